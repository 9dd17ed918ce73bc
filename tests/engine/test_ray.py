"""Experts on the nodes of a real Ray cluster on this machine: equal bits, nodes that are killed or freeze or join."""

import os
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import reshard
from hub_server import Hub
from machines import a_machine, keep

from numoe.engine import InputError, Model, load
from numoe.engine.experts import cluster as cluster_module
from numoe.engine.experts.cluster import connect
from numoe.engine.measure.calls import measure_calls
from numoe.engine.measure.machine import known
from numoe.engine.pull import pull

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'numoe[ray]'")
CASE = "v4_a"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", made.url)
        yield made


@pytest.fixture(scope="module")
def cluster(numoe_home: Path, hub: Hub) -> Iterator[Any]:
    """One for all tests of this file, for it takes seconds to start: a head without cores, and two nodes."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    made.add_node(num_cpus=1, **memory)
    made.add_node(num_cpus=1, **memory)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def logits(model: Model) -> np.ndarray:
    session, golden = model.session(), tiny.load_golden(CASE)
    return np.concatenate([session.feed(golden.ids), *(session.feed([token]) for token in golden.greedy)])


def actors(model: Model) -> list[Any]:
    assert model.shared is not None
    return [node for _, node in model.shared._there()]


def test_nodes_that_die_freeze_and_join(
    cluster: Any, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster_module, "SILENT", 1.0)
    path, told = checkpoint(CASE), list[str]()
    alone = logits(load(path))
    made: list[Any] = []
    monkeypatch.setattr(cluster_module.Cluster, "watch", lambda cluster, bank: made.append(cluster))
    model = load(path, ram="1GB", threads=1, ray=cluster.address, tell=told.append)
    first, second = actors(model)
    assert model.shared is not None
    assert np.array_equal(logits(model), alone) and not told
    # One is killed.
    os.kill(first.pid(), signal.SIGKILL)
    assert np.array_equal(logits(model), alone)
    assert len(told) == 1 and first.name in told[0] and "1 other" in told[0]
    # The other one freezes: nobody is left, and this process goes on.
    frozen = second.pid()
    os.kill(frozen, signal.SIGSTOP)
    assert np.array_equal(logits(model), alone)
    assert len(told) == 2 and "no sign of life for 2 s" in told[1] and "this machine" in told[1]
    os.kill(frozen, signal.SIGKILL)
    # A new one joins when it is looked for.
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    for node in made[0].joined():
        model.shared.join(node)
    (third,) = actors(model)
    assert np.array_equal(logits(model), alone)
    assert third.peak_bytes() < 1.1e9 and "joined" in told[2]
    assert capfd.readouterr().out == ""  # which is the answer's


def test_another_model_is_found_before_the_first_token(
    cluster: Any, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numoe.engine.description.Description.identity", "another")
    with pytest.raises(InputError, match="has another model under this name; copy the same one"):
        load(checkpoint(CASE), ram="1GB", threads=1, ray=cluster.address)


def test_nodes_without_a_copy_pull_their_experts(
    cluster: Any, hub: Hub, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = reshard(checkpoint(CASE), tmp_path / "source", 3)
    (source / "tokenizer.json").write_text("{}")
    hub.add("owner/Model-1", source)
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))  # which the nodes do not have
    path, told = pull("owner/Model-1").path, list[str]()
    alone = logits(load(path))
    module, at = import_module("numoe.engine.load"), cluster_module.Settings
    monkeypatch.setattr(module, "Settings", lambda model, *others: at(f"{model}-that-is-not-here", *others))
    model = load(path, ram="1GB", threads=1, ray=cluster.address, tell=told.append)
    assert np.array_equal(logits(model), alone)
    assert len(told) == len(actors(model)) > 0
    assert all(line.endswith("has no copy of the model, and pulls its experts from owner/Model-1") for line in told)


def test_calls_are_measured_between_processes(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    connect(cluster.address)
    measured = measure_calls()
    assert sorted(measured.seconds) == list(measured.seconds) and measured.seconds[0] > 0
    keep(a_machine(calls=measured))
    assert known() == a_machine(calls=measured)

"""Experts on several nodes, without Ray: placement, equal bits, takeover, joining, who is asked for what."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from near_nodes import Near, load_near

from numoe.engine import InputError, Model, describe, load
from numoe.engine.experts import heat
from numoe.engine.experts.cluster import connect
from numoe.engine.experts.place import place, uses
from numoe.engine.experts.share import Settings, Share
from numoe.engine.experts.unit import Key
from numoe.quant.compute import threads
from numoe.quant.compute.kernels import block_elements

LAYERS, EXPERTS = 2, 8
KEYS = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
ROOMS = st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any)
SIZES = st.fixed_dictionaries({key: st.integers(1, 9) for key in KEYS})
HOTTEST = st.lists(st.sampled_from(KEYS), unique=True)


# ------------------------------------------------------------------------------------------------------------ placement


@given(SIZES, ROOMS, HOTTEST)
def test_nodes_get_bytes_in_proportion_to_their_rooms(
    sizes: dict[Key, int], rooms: list[int], hottest: list[Key]
) -> None:
    placed = place(sizes, rooms, uses(KEYS, hottest))
    assert placed.keys() == sizes.keys()
    for node, room in enumerate(rooms):
        filled = sum(sizes[key] for key, at in placed.items() if at == node)
        assert abs(filled - sum(sizes.values()) * room / sum(rooms)) <= max(sizes.values()) * len(rooms)
        assert room or not filled


@given(st.integers(1, 5), HOTTEST)
def test_equal_nodes_have_equal_parts_of_what_is_used_in_each_layer(nodes: int, hottest: list[Key]) -> None:
    used = uses(KEYS, hottest)
    placed = place(dict.fromkeys(KEYS, 1), [1000] * nodes, used)
    for layer in range(LAYERS):
        busy = [0.0] * nodes
        for key, node in placed.items():
            busy[node] += used[key] * (key[0] == layer)
        # One expert apart, and where the last ones of a node are those that are left, another.
        assert max(busy) - min(busy) <= 2 * max(used.values())


@given(SIZES, ROOMS, HOTTEST, st.data())
def test_of_a_lost_node_only_its_own_experts_move(
    sizes: dict[Key, int], rooms: list[int], hottest: list[Key], data: st.DataObject
) -> None:
    used = uses(KEYS, hottest)
    before = place(sizes, rooms, used)
    lost = data.draw(st.integers(0, len(rooms) - 1))
    after = place(sizes, [0 if node == lost else room for node, room in enumerate(rooms)], used, before)
    assert len(rooms) == 1 or sum(rooms) == rooms[lost] or lost not in after.values()
    if any(room for node, room in enumerate(rooms) if node != lost):
        assert all(after[key] == node for key, node in before.items() if node != lost)


@given(SIZES, st.lists(st.integers(100, 1000), min_size=1, max_size=5), st.integers(100, 1000), HOTTEST)
def test_to_a_node_that_joins_experts_move_and_to_no_other(
    sizes: dict[Key, int], rooms: list[int], room: int, hottest: list[Key]
) -> None:
    used = uses(KEYS, hottest)
    before = place(sizes, rooms, used)
    after = place(sizes, [*rooms, room], used, before)
    moved = {key: node for key, node in after.items() if before[key] != node}
    # A node that is above its part by less than one expert gives one, and takes as much as it is below then.
    among = sum(sizes[key] for key, node in moved.items() if node != len(rooms))
    assert among <= 2 * max(sizes.values()) * len(rooms)
    filled = sum(sizes[key] for key, node in after.items() if node == len(rooms))
    assert abs(filled - sum(sizes.values()) * room / (sum(rooms) + room)) <= max(sizes.values()) * (len(rooms) + 1)


# ---------------------------------------------------------------------------------------------- the bank, and models


Loads = Callable[..., tuple[Model, list[Near], list[str]]]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loads]:
    """A model whose experts nodes have, which go off after so many calls; the nodes; and what is told."""
    before = threads.in_use()
    yield lambda path, offs=(inf, inf): load_near(path, monkeypatch, offs)
    threads.use(before)


def logits(model: Model, case: str) -> np.ndarray:
    session = model.session()
    golden = tiny.load_golden(case)
    read = session.feed(golden.ids)
    return np.concatenate([read, *(session.feed([token]) for token in golden.greedy)])


CASES = ["mixtral_a", "v4_a", "v4_released", "llama4_a", "gpt_oss_a", "gemma4_a", "nemotron_h_b", "qwen2_moe_a"]


@pytest.mark.parametrize("case", CASES)
def test_experts_on_nodes_change_no_bit(case: str, checkpoint: Callable[[str], Path], shared: Loads) -> None:
    path = checkpoint(case)
    if not describe(path).spec.routed:
        pytest.fail(f"{case} has no experts")
    alone = logits(load(path), case)
    model, nodes, told = shared(path)
    assert np.array_equal(logits(model, case), alone)
    assert all(node.asked for node in nodes) and not told
    held = [node.held for node in nodes]
    assert not held[0] & held[1]


@given(offs=st.lists(st.integers(0, 40).map(lambda calls: calls / 2), min_size=1, max_size=3))
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nodes_that_go_off_lose_and_change_nothing(
    offs: list[float], checkpoint: Callable[[str], Path], shared: Loads
) -> None:
    path = checkpoint("v4_a")
    model, nodes, told = shared(path, offs)
    assert np.array_equal(logits(model, "v4_a"), _alone(path))
    lost = {node.name for node in nodes if node.left <= 0}
    assert model.shared is not None
    assert len(told) <= len(lost) and len(told) == len(nodes) - len(model.shared.stats()["nodes"])
    for line in told:
        assert re.fullmatch(
            r"node node\d is lost \(it (is|went) off\); its experts are taken over by "
            r"(\d others?|this machine, from its disk), and the answer goes on",
            line,
        )


@cache
def _alone(path: Path) -> np.ndarray:
    return logits(load(path), "v4_a")


def test_a_node_that_joins_takes_its_share(checkpoint: Callable[[str], Path], shared: Loads) -> None:
    path = checkpoint("v4_a")
    model, nodes, told = shared(path)
    before = [set(node.held) for node in nodes]
    settings = Settings(str(path), describe(path).identity, None, None, 1, block_elements())
    late = Near(2, settings, 1 << 40)
    assert model.shared is not None
    model.shared.join(late)
    assert np.array_equal(logits(model, "v4_a"), _alone(path))
    assert late.asked and late.held
    assert all(node.held <= held for node, held in zip(nodes, before, strict=True))
    assert told == ["node node2 has joined and takes its share of the experts"]


def test_a_layer_is_one_call_a_node_and_row(checkpoint: Callable[[str], Path], shared: Loads) -> None:
    model, nodes, _ = shared(checkpoint("v4_a"))
    session = model.session()
    session.feed([1, 2, 3])
    routed = len(model.spec.routed)
    for node in nodes:
        assert len(node.asked) <= routed and max(rows for _, rows in node.asked) <= 3


def test_what_is_used_is_noted_of_all_nodes(checkpoint: Callable[[str], Path], shared: Loads) -> None:
    path = checkpoint("v4_a")
    model, nodes, _ = shared(path)
    logits(model, "v4_a")
    heat.keep(model)
    noted = heat.kept(model.identity)
    assert noted and all(any(key in node.held for key in noted) for node in nodes)


def test_ray_without_experts_or_without_ray_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no routed experts, which are what `ray` shares out"):
        load(checkpoint("llama_a"), ray="local")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=re.escape("`ray` needs Ray: pip install 'numoe[ray]'")):
        load(checkpoint("mixtral_a"), ray="local")


def test_a_node_without_the_model_is_told_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither .*absent nor .*models.absent; copy"):
        Share().open(Settings(str(tmp_path / "absent"), "", None, None, 1, block_elements()), 1)


def test_a_node_with_another_model_or_numoe_is_refused(checkpoint: Callable[[str], Path]) -> None:
    other = Settings(str(checkpoint("mixtral_a")), "another", None, None, 1, block_elements())
    with pytest.raises(InputError, match="has another model under this name; copy the same one to all nodes"):
        Share().open(other, 1)
    with pytest.raises(InputError, match=r"it has numoe \S+, and the one that asks 0.0.1; install the same one"):
        Share().open(replace(other, version="0.0.1"), 1)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_where_nobody_listens_is_refused_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'numoe[ray]'")
    with pytest.raises(InputError, match=f"`ray` {address}: no cluster of Ray answers there"):
        connect(address)

"""Nodes without a copy of the model: they pull the experts that they have from the hub, and nothing else."""

import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import reshard
from hub_server import Hub
from near_nodes import Near, load_near

from numoe.engine import InputError, Model, describe, load
from numoe.engine.description import Description
from numoe.engine.experts.pulled import Origin, origin
from numoe.engine.experts.share import Settings
from numoe.engine.experts.unit import Key
from numoe.engine.hub.repository import repository
from numoe.engine.pull import pull
from numoe.quant.compute import threads
from numoe.quant.compute.kernels import block_elements
from numoe.quant.stored.manifest import read_manifest

ID = "owner/Model-1"


@dataclass
class Nodes:
    """A hub with a model, the one that was pulled here, and nodes that have no copy and homes of their own."""

    hub: Hub
    path: Path
    case: str
    root: Path
    patch: pytest.MonkeyPatch

    def load(self, nodes: int = 2) -> tuple[Model, list[Near], list[str]]:
        return load_near(self.path, self.patch, [float("inf")] * nodes, self.node)

    def node(self, number: int, settings: Settings, off: float) -> Near:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NUMOE_HOME", str(self.root / f"node{number}"))
            return Near(number, replace(settings, model=str(self.root / "absent")), 1 << 40, off)

    def logits(self, model: Model) -> np.ndarray:
        session, golden = model.session(), tiny.load_golden(self.case)
        return np.concatenate([session.feed(golden.ids), *(session.feed([token]) for token in golden.greedy)])

    def files(self, number: int) -> dict[Key, Path]:
        """Those of experts that a node has, and that were compared."""
        files = (self.root / f"node{number}" / "experts").glob("*/*.safetensors")
        return {(int(layer), int(expert)): path for path in files for layer, _, expert in [path.stem.partition("-")]}

    def settings(self, of: Origin | None = None) -> Settings:
        described = describe(self.path)
        return Settings("", described.identity, of or origin(described), None, 1, block_elements())

    def source(self) -> Description:
        return describe(self.root / "source")

    def experts_bytes(self) -> int:
        source = self.source()
        return sum(
            source.places[name].stored.nbytes for _, name, one in source.spec.listing() if one.expert is not None
        )

    def asked(self) -> int:
        """Bytes of weights that the hub has sent."""
        starts = {
            name: 8 + int.from_bytes(content.head[:8], "little")
            for name, content in self.hub.contents(ID).items()
            if name.endswith(".safetensors")
        }
        return sum(r.sent for r in self.hub.log if r.path in starts and r.start >= starts[r.path])


@pytest.fixture
def nodes(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], Nodes]]:
    """Of a case and a recipe, or "cached": the model is in the Hugging Face cache."""
    before = threads.in_use()
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("numoe.engine.hub.network._RETRY_WAITS", (0, 60))

        def made(case: str, quant: str = "native") -> Nodes:
            folder = reshard(checkpoint(case), tmp_path / "source", 3)
            (folder / "tokenizer.json").write_text("{}")
            commit = hub.add(ID, folder)
            if quant == "cached":
                for name in hub.contents(ID):
                    repository(ID).fetch_to_cache(name)
                path = tmp_path / "cache" / f"models--{ID.replace('/', '--')}" / "snapshots" / commit
            else:
                path = pull(ID, quant).path
            hub.log.clear()
            return Nodes(hub, path, case, tmp_path, monkeypatch)

        yield made
    threads.use(before)


FORMS = [
    ("v4_released", "native"),
    ("v4_released", "cached"),
    ("v4_released", "int4"),
    ("v3_fp8", "native"),
    ("gpt_oss_a", "native"),  # of here on some are stacked, which nodes take apart
    ("llama4_a", "int8"),
    ("qwen3_5_moe_a", "cached"),
]


@pytest.mark.parametrize(("case", "quant"), FORMS)
def test_nodes_pull_what_they_have_once_and_change_no_bit(case: str, quant: str, nodes: Any) -> None:
    made = nodes(case, quant)
    alone = made.logits(load(made.path))
    model, two, told = made.load()
    assert np.array_equal(made.logits(model), alone) and not told
    assert 0 < made.asked() < made.experts_bytes()
    before = {}
    for number, node in enumerate(two):
        before |= {path: path.stat().st_ino for path in made.files(number).values()}
        assert node.pulls == ID and made.files(number).keys() <= node.held
    assert before
    # The next process pulls none of them again.
    del model, two, node
    model, _, told = made.load()
    assert np.array_equal(made.logits(model), alone) and not told
    assert all(path.stat().st_ino == inode for path, inode in before.items())


def test_an_expert_that_arrives_with_another_byte_is_never_used(nodes: Any) -> None:
    made = nodes("v4_released")
    alone = made.logits(load(made.path))
    made.logits(made.load()[0])
    layer, expert = min(made.files(0))  # which is taken
    for number in (0, 1):
        shutil.rmtree(made.root / f"node{number}")
    part = made.source().places[f"layers.{layer}.ffn.experts.{expert}.up"].stored.extents()[0]
    made.hub.corrupt(part.path.name, part.offset + part.nbytes // 2, times=1000)
    model, _, told = made.load()
    assert np.array_equal(made.logits(model), alone)
    said = f"expert {expert} of layer {layer}, as the hub gave it, is another one than here"
    assert len(told) == 2 and all(said in sentence for sentence in told)
    assert not any((layer, expert) in made.files(number) for number in (0, 1))


def test_without_the_hub_the_answer_goes_on(nodes: Any) -> None:
    made = nodes("v4_released")
    alone = made.logits(load(made.path))
    model, _, told = made.load()
    for name in made.hub.contents(ID):
        made.hub.fail(name, 503, times=1000)
    assert np.array_equal(made.logits(model), alone)
    assert told and all(f"answers {ID} with status 503)" in sentence for sentence in told)


def test_a_disk_that_is_full_is_said(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = nodes("v4_released")
    alone = made.logits(load(made.path))
    model, _, told = made.load()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numoe.engine.experts.pulled.write_whole", full)
    assert np.array_equal(made.logits(model), alone)
    assert told and all("cannot be written (No space left on device); put that right" in t for t in told)


def test_what_is_given_to_others_is_removed(nodes: Any) -> None:
    made = nodes("v4_released")
    model, two, _ = made.load()
    made.logits(model)
    late = made.node(2, made.settings(), float("inf"))
    same = made.node(1, made.settings(), float("inf"))  # in the same folder as another
    assert model.shared is not None
    model.shared.join(late)
    made.logits(model)
    for number, node in enumerate((*two, late)):
        assert made.files(number) and (number == 1 or made.files(number).keys() <= node.held)
    same.hold([])
    assert made.files(1)


def test_what_cannot_be_pulled_again_has_to_be_copied(
    checkpoint: Callable[[str], Path], nodes: Any, tmp_path: Path
) -> None:
    assert origin(describe(checkpoint("mixtral_a"))) is None  # nobody pulled it
    made = nodes("v4_released")
    manifest = read_manifest(made.path)
    assert manifest and origin(describe(made.path)) == Origin(ID, manifest.revision or "", "native")
    replace(manifest, calibration="0" * 16).write(made.path)
    assert origin(describe(made.path)) is None
    made.hub.forget(ID, manifest.revision)
    with pytest.raises(InputError, match="no such revision"):
        made.node(0, made.settings(Origin(ID, manifest.revision or "", "native")), 1)

"""What is planned is what is there: bytes on disk and in memory, before anything is read or converted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import tiny
from cases import LAYOUTS
from helpers import write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.engine import Model, describe, load
from numoe.engine.plan import Verdict, kv_bytes
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.errors import DoesNotFit
from numoe.quant.stored.checkpoint import open_checkpoint

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]

PLAN = import_module("numoe.engine.plan")
DESCRIBED = cache(describe)


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("quant", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_recipe_is_planned_as_it_is_written(case: str, quant: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = describe(checkpoint(case))
    convert(source.checkpoint, source.weights(), tmp_path / "made", quant, Folder(source.path, case))
    assert source.plan(64, quant) == describe(tmp_path / "made").plan(64)
    with open_checkpoint(tmp_path / "made") as made:
        assert source.plan(64, quant).disk_bytes == sum(info.nbytes for info in made.tensors.values())


@pytest.mark.parametrize("case", tiny.cases())
def test_planned_memory_is_the_memory_taken(case: str, model: Models) -> None:
    loaded = model(case)
    stats = loaded.stats()
    stats["weight_bytes"] -= loaded.wide_bytes
    if stats["experts"]:
        stats["experts"]["resident_bytes"] -= loaded.wide_bytes  # only experts are large enough here
    for context in (1, 100, 600):
        planned = loaded.plan(context)
        assert planned.resident_bytes == stats["weight_bytes"] - stats["experts"].get("resident_bytes", 0)
        assert planned.kv_bytes == kv_bytes(loaded.spec, context) == loaded.decoder.cache(context).nbytes
    assert planned.expert_bytes == stats["experts"].get("resident_bytes", 0)
    assert sum(planned.sizes.values()) == planned.parameters > planned.active_parameters * 0.99


@pytest.mark.parametrize(
    "case",
    [
        "qwen3_b",
        "v4_released",
        "gpt_oss_a",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("qwen3_moe_a", "v4_a", "qwen3_5_moe_a", "mixtral_a")),
    ],
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_verdict_is_that_of_loading(
    data: st.DataObject, case: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is stored by rows or in codes too, which takes more memory while it is read."""
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 1000)
    context = data.draw(st.sampled_from([1, 64, 600]))
    described = DESCRIBED(checkpoint(case))
    planned = described.plan(context)
    full = planned.total_bytes + planned.wide_bytes
    edges = [edge + more for edge in (planned.least_bytes, planned.total_bytes, full) for more in (-1, 0, 1)]
    room = data.draw(st.integers(1, 2 * full) | st.sampled_from(edges))
    verdict = planned.verdict(room)
    try:
        model = load(described, ram=room, ctx=context, threads=1)
        session = model.session(context)
    except DoesNotFit:
        assert verdict is Verdict.TOO_LARGE
        return
    store = model.experts
    assert verdict is (Verdict.FROM_DISK if store and not store.complete else Verdict.IN_MEMORY)
    assert model.wide_bytes == (planned.wide_bytes if planned.widens(room) else 0)
    if store and verdict is Verdict.FROM_DISK:
        assert store.budget == max(planned.held_experts(room), *store.largest.values())
    session.feed([1])
    assert planned.kv_bytes <= model.memory.sessions.budget.reserved <= room


BYTES = st.integers(0, 10**10)
TINY = describe("tiny").plan(64)


@given(plan=st.tuples(BYTES, BYTES, BYTES, BYTES, BYTES, BYTES), routed=st.booleans(), sessions=BYTES, more=BYTES)
def test_enough_for_sessions_is_enough(plan: tuple[int, ...], routed: bool, sessions: int, more: int) -> None:
    """Where more memory makes `load` take more, none of that is named."""
    weights, experts, active, kv, scratch, wide = plan
    listed = {("attention", "f32"): weights, ("experts", "f32"): experts} if routed else {("attention", "f32"): weights}
    planned = replace(
        TINY, weights=listed, active_experts={0: min(active, experts)} if routed else {},
        kv_bytes=kv, scratch_bytes=scratch, float32_bytes=0, wide_bytes=wide,
    )  # fmt: skip
    above = planned.least_bytes + more
    room = planned.enough(kv + sessions, above)
    assert room > above and planned.for_sessions(room) >= kv + sessions
    assert planned.for_sessions(above) >= kv  # for which it was loaded


def test_a_model_without_experts_fits_or_does_not(checkpoint: Checkpoints) -> None:
    planned = describe(checkpoint("llama_a")).plan(64)
    assert planned.verdict(planned.total_bytes) is Verdict.IN_MEMORY
    assert planned.verdict(planned.total_bytes - 1) is Verdict.TOO_LARGE
    load(checkpoint("llama_a"), ram=planned.least_bytes, ctx=64)


def test_the_wide_form_is_taken_where_there_is_room(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Then weights take as much more as was planned, and give the same logits."""
    source = describe(checkpoint("qwen3_moe_a"))
    convert(source.checkpoint, source.weights(), tmp_path / "int4", "int4", Folder(source.path, "source"))
    ids = tiny.load_golden("qwen3_moe_a").ids[:12]
    planned = describe(tmp_path / "int4").plan(64)
    full = planned.total_bytes + planned.wide_bytes
    assert planned.wide_bytes > 0
    logits = []
    for ram, wide in ((planned.total_bytes, 0), (full - 1, 0), (full, planned.wide_bytes)):
        assert planned.widens(ram) == bool(wide)
        model = load(tmp_path / "int4", ram=ram, ctx=64)
        assert model.wide_bytes == wide
        assert model.stats()["weight_bytes"] == planned.weight_bytes + wide
        session = model.session(64)
        logits.append(np.concatenate([session.feed(ids[:4]), session.feed(ids[4:])]))
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_show_tells_where_the_bits_went(command: Callable[..., tuple[int, str, str]]) -> None:
    document = json.loads(command("show", "tiny", "--json")[1])
    assert sum(row["parameters"] for row in document["weights"]) == document["parameters"]
    [experts] = [row for row in document["weights"] if row["role"] == "experts"]
    assert 8 * experts["bytes"] == 9 * experts["parameters"]
    rows = [line.split() for line in command("show", "tiny")[1].splitlines()]
    assert [row[-1] for row in rows if row and row[0] in ("experts", "norms")][1:] == ["9", "32"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mtp.0.norm.weight", "drafting"),
        ("model.layers.3.mlp.gate_proj.weight", "drafting"),
        ("model.visual.blocks.0.norm1.weight", "vision"),
        ("model.audio_tower.conv1.weight", "audio"),
        ("model.rotary_emb.inv_freq", "other"),
    ],
)
def test_show_tells_what_is_left_aside(
    checkpoint: Checkpoints, command: Callable[..., tuple[int, str, str]], tmp_path: Path, name: str, part: str
) -> None:
    case = "gemma4_a" if part == "audio" else "glm4_moe_a" if ".layers." in name else "qwen3_5_a"
    folder = Path(shutil.copytree(checkpoint(case), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    name = name.replace(".3.", f".{config['num_hidden_layers']}.")
    if ".layers." in name:
        config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "more.safetensors", {name: ("F16", (50,), bytes(100))})
    weights = dict.fromkeys(open_checkpoint(folder / "model.safetensors").tensors, "model.safetensors")
    index = {"weight_map": weights | {name: "more.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert json.loads(command("show", str(folder), "--json")[1])["aside"] == {part: 100}
    assert f"left aside   {part} 100 B" in command("show", str(folder))[1]

"""What is planned is what is there: bytes on disk and in memory, before anything is read or converted."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.engine import InputError, Model, describe, load
from numoe.engine.families import family
from numoe.engine.measure.machine import calibrate
from numoe.engine.plan import Verdict, kv_bytes
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.stored.checkpoint import open_checkpoint

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]

PLAN = import_module("numoe.engine.plan")
SLACK = 4096  # bytes that buffers of experts are aligned with


@pytest.mark.parametrize(
    ("case", "quant"), [*((case, "int4") for case in tiny.cases()), ("v3_b", "int8"), ("v4_a", "int8")]
)
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
        assert planned.kv_bytes == kv_bytes(loaded.spec, context) == loaded.session(context)._cache.nbytes
    assert planned.expert_bytes == stats["experts"].get("resident_bytes", 0)
    assert sum(planned.sizes.values()) == planned.parameters > planned.active_parameters * 0.99


@pytest.mark.parametrize("case", ["qwen3_moe_a", "v4_a"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_verdict_is_that_of_loading(
    data: st.DataObject, case: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 1000)
    path = checkpoint(case)
    planned = describe(path).plan(64)
    assert planned.least_bytes + SLACK < planned.total_bytes
    edges = [planned.least_bytes - SLACK, planned.least_bytes + SLACK, planned.total_bytes, planned.total_bytes - 1]
    room = data.draw(st.integers(1, 2 * planned.total_bytes) | st.sampled_from(edges))
    verdict = planned.verdict(room)
    try:
        model = load(path, ram=room, ctx=64)
    except InputError:
        assert verdict is Verdict.TOO_LARGE or abs(room - planned.least_bytes) < SLACK
        return
    assert model.experts is not None
    assert verdict is (Verdict.IN_MEMORY if model.experts.complete else Verdict.FROM_DISK)
    if verdict is Verdict.FROM_DISK:
        assert model.experts.budget == pytest.approx(planned.held_experts(room), abs=SLACK)


def test_a_model_without_experts_fits_or_does_not(checkpoint: Checkpoints) -> None:
    planned = describe(checkpoint("llama_a")).plan(64)
    assert planned.verdict(planned.total_bytes) is Verdict.IN_MEMORY
    assert planned.verdict(planned.total_bytes - 1) is Verdict.TOO_LARGE
    load(checkpoint("llama_a"), ram=planned.least_bytes, ctx=64)


# ------------------------------------------------------------------------------------------------------- peak memory

SHAPE = {"vocab_size": 2000, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 512}
SHAPE |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}
SHAPE |= {"hidden_act": "silu", "num_hidden_layers": 6}
MIXTURE = SHAPE | {"model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True}
MIXTURE |= {"moe_intermediate_size": 384, "intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": []}
DENSE = SHAPE | {"model_type": "llama", "intermediate_size": 4096}


def write_large(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    """A model of some 200 MB whose weights repeat."""
    kind = family(config["model_type"])
    normal = np.random.default_rng(0).standard_normal(1 << 22, np.float32) / 32
    tensors = {}
    for layer, name, tensor in kind.spec(config).listing():
        source = next(s for s in kind.sources(name, layer, tensor.expert) if not s.stacked and not s.fused)
        values = normal[: math.prod(tensor.shape)]
        raw = (values.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else values
        tensors[source.name] = dtype, tensor.shape, raw.tobytes()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize(
    ("config", "dtype", "rams"), [(MIXTURE, "BF16", ("1GB", "150MB")), (DENSE, "F32", ("1GB",))], ids=["moe", "dense"]
)
def test_peak_memory_is_predicted(config: dict[str, Any], dtype: str, rams: tuple[str, ...], tmp_path: Path) -> None:
    planned = describe(write_large(tmp_path / "model", config, dtype)).plan(600)
    assert planned.weight_bytes > 150e6
    machine = calibrate().with_reading(planned.largest_expert, 1e9)
    for ram in rams:
        predicted = machine.forecast(planned, PLAN.parse_bytes(ram)).peak_bytes
        command = [sys.executable, "-m", "numoe.cli", "bench", str(tmp_path / "model"), "--ram", ram, "--json"]
        command += ["--prompt-tokens", "550", "-n", "8", "--repetitions", "1"]
        measured = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["peak_rss_bytes"]
        print(f"{ram}: predicted {predicted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
        assert measured == pytest.approx(predicted, rel=0.1)


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


# ------------------------------------------------------------------------------------------------------- free memory

V2, V1 = "0::/a/b\n", "12:cpu,cpuacct:/x\n4:memory:/docker/1f\n0::/\n"
STAT = "anon 7\ninactive_file 250\ntotal_inactive_file 100\nactive_file 3\n"
OLD = "memory/docker/1f/memory"


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        (None, {}, 10_000),
        (V2, {}, 10_000),
        (V2, {"a/b/memory.max": "max\n", "a/b/memory.current": "9999999\n"}, 10_000),
        (V2, {"a/b/memory.max": "2000\n"}, 2000),
        (V2, {"a/b/memory.max": "2000\n", "a/b/memory.current": "500\n"}, 1500),
        (V2, {"a/b/memory.max": "2000\n", "a/b/memory.current": "500\n", "a/b/memory.stat": STAT}, 1750),
        (V2, {"a/b/memory.max": "2000\n", "a/b/memory.current": "100\n", "a/b/memory.stat": STAT}, 2000),
        (V2, {"a/b/memory.max": "3000\n", "a/memory.high": "2500", "memory.max": "2800"}, 2500),
        (V2, {"a/b/memory.max": "100", "a/b/memory.current": "900"}, 0),
        (V2, {"a/b/memory.max": "0"}, 0),
        (V2, {"a/b/memory.max": ""}, 10_000),
        (V2, {"a/b/memory.max": "9" * 5000, "a/memory.max": "-5", "memory.max": "x"}, 10_000),
        ("0::/\n", {"memory.max": "2000"}, 2000),
        ("0::/../../b\n", {"memory.max": "2000", "b/memory.max": "5"}, 2000),
        ("0::/with space:and colon\n", {"with space:and colon/memory.max": "2000"}, 2000),
        (V1, {}, 10_000),
        (V1, {f"{OLD}.limit_in_bytes": "9223372036854771712"}, 10_000),
        (V1, {f"{OLD}.limit_in_bytes": "2000", f"{OLD}.usage_in_bytes": "50"}, 1950),
        (V1, {"memory/memory.limit_in_bytes": "2000", "memory/memory.usage_in_bytes": "900"}, 1100),
        (V1, {f"{OLD}.limit_in_bytes": "999", f"{OLD}.usage_in_bytes": "900", f"{OLD}.stat": STAT}, 199),
        ("4:cpu,memory,pids:/a\n", {"memory/a/memory.limit_in_bytes": "2000"}, 2000),
        ("\n0\n::\nmemory\n\0", {"memory/memory.limit_in_bytes": "1"}, 10_000),
    ],
)
def test_memory_is_that_of_the_least_group(
    group: str | None, files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    there = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (there if group is None else there | {"proc/self/cgroup": group}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert PLAN.available_memory(tmp_path) == free * 9 // 10


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_is_that_of_the_processs_limits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 50))
    limits = resource.getrlimit(getattr(resource, kind))
    for limit in (1 << 40, 1 << 39):
        resource.setrlimit(getattr(resource, kind), (limit, limits[1]))
        try:
            assert 0 < limit - PLAN.available_memory(tmp_path) * 10 // 9 < 1 << 38
        finally:
            resource.setrlimit(getattr(resource, kind), limits)

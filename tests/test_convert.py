"""Converted folders: the same model in fewer bytes, each expert in one piece, and never half a model."""

import errno
import hashlib
import json
import os
import shutil
import tracemalloc
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import write_safetensors
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from numoe.cli.main import main
from numoe.engine import Model, describe, load
from numoe.quant import convert as converter
from numoe.quant import pack, threads
from numoe.quant.checkpoint import Checkpoint, open_checkpoint
from numoe.quant.convert import Conversion, Matrix, convert
from numoe.quant.errors import InputError
from numoe.quant.manifest import read_manifest

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]

DENSE = [case for case in tiny.cases() if case.startswith(("llama", "qwen3_a", "qwen3_b"))]
MIXTURES = sorted(set(tiny.cases()) - set(DENSE))


def quantize(source: Path, destination: Path, quant: str, **options: Any) -> Conversion:
    description = describe(source)
    with description.checkpoint as checkpoint:
        return convert(checkpoint, description.matrices(), destination, quant, source.name, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def raw(dtype: str, values: NDArray) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, values.shape, values.tobytes()


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Mean KL(reference | logits) a position, in nats."""

    def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.fixture
def source(checkpoint: Checkpoints) -> Path:
    return checkpoint("mixtral_a")


# The model stays the same


@pytest.mark.parametrize("case", tiny.cases())
def test_native_keeps_every_byte_and_every_logit(
    case: str, checkpoint: Checkpoints, model: Models, tmp_path: Path
) -> None:
    made = quantize(checkpoint(case), tmp_path / "native", "native")
    assert made.source_bytes == made.result_bytes
    with open_checkpoint(checkpoint(case)) as before, open_checkpoint(tmp_path / "native") as after:
        assert before.tensors.keys() == after.tensors.keys()
        for name, info in before.tensors.items():
            copy = after.tensors[name]
            assert (info.dtype, info.shape) == (copy.dtype, copy.shape)
            old, new = (c.files.read_range(i.path, i.offset, i.nbytes) for c, i in ((before, info), (after, copy)))
            np.testing.assert_array_equal(old, new)
    ids = tiny.load_golden(case).ids[:40]
    np.testing.assert_array_equal(load(tmp_path / "native").session(256).feed(ids), model(case).session(256).feed(ids))


@pytest.mark.parametrize("case", tiny.cases())
def test_rounded_models_stay_close(case: str, checkpoint: Checkpoints, model: Models, tmp_path: Path) -> None:
    """Random mixtures are hard to round: where two experts score alike, the least change picks the other one."""
    ids = tiny.load_golden(case).ids[:40]
    reference = model(case).session(256).feed(ids)
    compact = case in ("v3_fp8", "v4_released")  # FP8 and FP4 of its own, which no recipe makes larger
    bounds = {"int8": 2e-3, "int4": 0.2} if case in DENSE else {"int8": 0.2, "int4": 1.0}
    sizes = {}
    for quant, bound in bounds.items():
        sizes[quant] = quantize(checkpoint(case), tmp_path / quant, quant).result_bytes
        loaded = load(tmp_path / quant)
        found = divergence(reference, loaded.session(256).feed(ids))
        print(f"{case} {quant}: KL {found:.2e}")
        assert found < bound
        assert loaded.plan().weight_bytes == loaded.stats()["weight_bytes"]
        formats = {role: {kind for r, kind in loaded.plan().weights if r == role} for role, _ in loaded.plan().weights}
        bulk = formats.get("experts", formats.get("dense ffn", set()))
        assert compact or any(kind.startswith(quant) for kind in bulk)
        assert formats["router"] <= {"f32", "bf16", "i64"} if "router" in formats else case in DENSE
        assert formats["norms"] == {"f32"}
    assert sizes["int4"] < sizes["int8"] or case == "v4_released"


def test_every_weight_is_what_the_quantizer_makes_of_it(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantize(checkpoint("qwen3_moe_a"), tmp_path / "int4", "int4")
    with open_checkpoint(checkpoint("qwen3_moe_a")) as before, open_checkpoint(tmp_path / "int4") as after:
        assert set(before.names()) == set(after.names())
        for name in [n for n in before.names() if n.endswith(("experts.3.up_proj.weight", "q_proj.weight"))]:
            weights = before.matrix(name).dequantize()
            routed = ".experts." in name
            expected = pack.pack_int4(weights, symmetric=True, search=True) if routed else pack.pack_int8(weights)
            assert after.format(name) == expected.format
            np.testing.assert_array_equal(after.matrix(name).dequantize(), expected.dequantize())


def test_converting_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "once", "int4")
    quantize(tmp_path / "once", tmp_path / "twice", "int4")
    weights = "model.safetensors"
    assert (tmp_path / "once" / weights).read_bytes() == (tmp_path / "twice" / weights).read_bytes()


def test_bytes_do_not_depend_on_threads_or_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(source, tmp_path / "a", "int4")
    monkeypatch.setattr(converter, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(converter, "_COPY_BYTES", 999)
    before = threads.in_use()
    for count in (1, 3):
        threads.use(count)
        quantize(source, tmp_path / f"{count}", "int4")
        assert tree(tmp_path / f"{count}") == tree(tmp_path / "a")
    threads.use(before)


# The layout


def experts_ranges(folder: Path) -> Iterator[list[tuple[Path, int, int]]]:
    """For each routed expert, the (file, start, stop) of all its tensors."""
    description = describe(folder)
    units: dict[str, list[str]] = {}
    for matrix in description.matrices():
        if matrix.unit:
            units.setdefault(matrix.unit, []).append(matrix.source)
    assert units
    for names in units.values():
        assert len(set(names)) == 3
        stored = [description.checkpoint.tensors[s] for name in names for s in description.checkpoint.companions(name)]
        yield sorted((info.path, info.offset, info.offset + info.nbytes) for info in stored)


@pytest.mark.parametrize("quant", ["native", "int8", "int4"])
@pytest.mark.parametrize("shard", [None, 100_000])
@pytest.mark.parametrize("case", ["mixtral_a", "v3_fp8", "v4_released"])
def test_an_expert_is_one_byte_range(
    case: str, shard: int | None, quant: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shard:
        monkeypatch.setattr(converter, "SHARD_BYTES", shard)
    quantize(checkpoint(case), tmp_path / "out", quant)
    for ranges in experts_ranges(tmp_path / "out"):
        assert len({path for path, _, _ in ranges}) == 1
        assert all(before[2] == after[1] for before, after in pairwise(ranges))
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if shard is None:
        assert shards == ["model.safetensors"]
    else:
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert len(shards) == len(
            set(json.loads((tmp_path / "out" / converter.INDEX_NAME).read_text())["weight_map"].values())
        )
        assert load(tmp_path / "out").plan() == describe(tmp_path / "out").plan()


@pytest.mark.parametrize("quant", ["native", "int4"])
def test_stacked_experts_become_the_files_of_single_ones(source: Path, quant: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "stacked"))
    tensors = load_file(folder / "model.safetensors")
    experts = json.loads((folder / "config.json").read_text())["num_local_experts"]
    for name in [n for n in tensors if n.endswith("experts.0.w1.weight")]:
        layer = name.removesuffix(".block_sparse_moe.experts.0.w1.weight")
        w1, w2, w3 = (
            [tensors.pop(f"{layer}.block_sparse_moe.experts.{e}.{w}.weight") for e in range(experts)]
            for w in ("w1", "w2", "w3")
        )
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate(p) for p in zip(w1, w3, strict=True)])
        tensors[f"{layer}.mlp.experts.down_proj"] = np.stack(w2)
    save_file(tensors, folder / "model.safetensors")
    quantize(folder, tmp_path / "from stacked", quant)
    quantize(source, tmp_path / "from single", quant)
    ids = tiny.load_golden("mixtral_a").ids[:40]
    logits = [load(tmp_path / made).session(128).feed(ids) for made in ("from stacked", "from single")]
    np.testing.assert_array_equal(*logits)
    for ranges in experts_ranges(tmp_path / "from stacked"):
        assert all(before[2] == after[1] for before, after in pairwise(ranges))
    assert "model.layers.0.mlp.experts.1.gate_proj.weight" in open_checkpoint(tmp_path / "from stacked")


def folder_of(folder: Path, **tensors: tuple[str, tuple[int, ...], bytes]) -> Checkpoint:
    folder.mkdir()
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    write_safetensors(folder / "model.safetensors", named)
    return open_checkpoint(folder)


def test_stacked_codes_are_cut_with_their_scales(tmp_path: Path) -> None:
    fp4 = [pack.pack_mxfp4(normal(12, 64, seed=expert)) for expert in range(3)]
    fp8 = [pack.pack_fp8(normal(256, 130, seed=expert), float_scales=True) for expert in range(3)]
    source = folder_of(
        tmp_path / "source",
        up_blocks=raw("U8", np.stack([each.codes.reshape(12, 2, 16) for each in fp4])),
        up_scales=raw("U8", np.stack([each.scales for each in fp4])),
        fused=raw("F8_E4M3", np.stack([each.codes for each in fp8])),
        fused_scale_inv=raw("F32", np.stack([each.scales for each in fp8])),
    )
    cuts = [Matrix(f"e{e}.up.weight", "experts", "up", e, unit=f"{e}") for e in range(3)]
    cuts += [Matrix(f"e{e}.half.weight", "experts", "fused", e, (128, 256), unit=f"{e} half") for e in range(3)]
    convert(source, cuts, tmp_path / "out", "native", "source")
    with open_checkpoint(tmp_path / "out") as made:
        assert set(made.names()) == {cut.name for cut in cuts}
        for e in range(3):
            assert made.format(f"e{e}.up.weight") == "mxfp4"
            np.testing.assert_array_equal(made.matrix(f"e{e}.up.weight").dequantize(), fp4[e].dequantize())
            np.testing.assert_array_equal(made.matrix(f"e{e}.half.weight").dequantize(), fp8[e].dequantize()[128:])
    inside = [Matrix("half.weight", "experts", "fused", 0, (100, 200))]
    with pytest.raises(InputError, match=r"'fused' cannot be cut at row 100.*quantize it to int4"):
        convert(source, inside, tmp_path / "other", "native", "source")
    convert(source, inside, tmp_path / "other", "int4", "source")


def test_manifest_and_small_files(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "model.py", "pytorch_model.bin", ".hidden.json"):
        (folder / name).write_text(name)
    quantize(folder, tmp_path / "out", "int8")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.source, manifest.recipe) == ("source", "int8")
    files = tree(tmp_path / "out")
    assert files.pop("numoe.json")
    assert set(files) == {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()} == {
        name: (record.size, record.sha256) for name, record in manifest.files.items()
    }
    assert files["config.json"] == (folder / "config.json").read_bytes()
    assert read_manifest(folder) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2}', "has format 2, and this numoe reads format 1; update numoe"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1, "source": "x", "recipe": "int4", "files": {"a": 3}}', "is damaged"),
    ],
)
def test_folders_of_another_format_are_refused(source: Path, text: str, message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "numoe.json").write_text(text)
    with pytest.raises(InputError, match=f"numoe.json {message}"):
        open_checkpoint(folder)


# The stored formats


@pytest.mark.parametrize("name", ["a.weight", "stack"])
def test_grouped_weights_are_read_in_every_way(name: str, tmp_path: Path) -> None:
    made: list[Any] = [
        [pack.pack_int8(normal(9, 96, seed=e)) for e in range(2)],
        [pack.pack_int4(normal(9, 96, seed=e), 16, symmetric=True) for e in range(2)],
        [pack.pack_int4(normal(9, 96, seed=e), 48) for e in range(2)],
    ]
    scale, minimum = ("a.scale", "a.minimum") if name == "a.weight" else ("stack_scale", "stack_minimum")
    for number, stack in enumerate(made):
        parts = {name: "codes", scale: "scales"} | ({minimum: "bias"} if stack[0].bias is not None else {})
        whole = {stored: np.stack([getattr(one, field) for one in stack]) for stored, field in parts.items()}
        if name == "a.weight":
            whole = {stored: values[1] for stored, values in whole.items()}
        dtypes = {"int8": "I8", "uint8": "U8", "float16": "F16"}
        tensors = {stored: raw(dtypes[str(values.dtype)], values) for stored, values in whole.items()}
        path = write_safetensors(tmp_path / f"{number}.safetensors", tensors)
        index = None if name == "a.weight" else 1
        with open_checkpoint(path) as opened:
            assert list(opened.names()) == [name]
            assert opened.companions(name) == tuple(parts)
            assert opened.format(name) == stack[1].format
            assert opened.shape(name) == ((9, 96) if index is None else (2, 9, 96))
            assert opened.stored_nbytes(name) == opened.loaded_nbytes(name) == sum(len(t[2]) for t in tensors.values())
            np.testing.assert_array_equal(opened.matrix(name, index).dequantize(), stack[1].dequantize())
            part = opened.matrix(name, index, rows=(2, 7))
            np.testing.assert_array_equal(part.dequantize(), stack[1].dequantize()[2:7])
            np.testing.assert_array_equal(opened.array(name)[..., -1, :], whole_values(stack, index)[..., -1, :])


def whole_values(stack: list[Any], index: int | None) -> NDArray[np.float32]:
    return stack[1].dequantize() if index is None else np.stack([one.dequantize() for one in stack])


@pytest.mark.parametrize(
    ("codes", "scales"), [((4, 32), (3, 1)), ((4, 32), (4, 3)), ((4, 32), (4, 0)), ((4, 32), ()), ((32,), (1,))]
)
@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_scales_that_do_not_fit_are_refused(dtype: str, codes: Any, scales: Any, tmp_path: Path) -> None:
    tensors = {"a.weight": raw(dtype, np.zeros(codes, np.uint8)), "a.scale": raw("F16", np.zeros(scales, np.float16))}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with open_checkpoint(path) as opened, pytest.raises(InputError, match=r"a\.(weight|scale)"):
        opened.matrix("a.weight")


@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_infinite_scales_are_refused(dtype: str, tmp_path: Path) -> None:
    codes, scales = np.zeros((4, 32), np.uint8), np.full((4, 2), np.inf, np.float16)
    tensors = {"a.weight": raw(dtype, codes), "a.scale": raw("F16", scales)}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with open_checkpoint(path) as opened, pytest.raises(InputError, match=r"'a\.weight' contains NaN or infinity"):
        opened.matrix("a.weight")


# Never half a model


def refused(source: Path, destination: Path, *mentions: str, quant: str = "int4", **options: Any) -> None:
    before = sorted(destination.parent.rglob("*")) if destination.parent.exists() else None
    with pytest.raises(InputError) as caught:
        quantize(source, destination, quant, **options)
    assert "\n" not in str(caught.value)
    for mention in mentions:
        assert mention in str(caught.value)
    assert before == (sorted(destination.parent.rglob("*")) if destination.parent.exists() else None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("at", [1, 20, -1])
def test_an_interrupted_conversion_leaves_nothing(
    source: Path, error: type[BaseException], at: int, tmp_path: Path
) -> None:
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        assert not (tmp_path / "out").exists()
        if calls == at or (at == -1 and done == total):
            raise error

    with pytest.raises(error):
        quantize(source, tmp_path / "out", "int4", progress=interrupt)
    assert not list(tmp_path.iterdir())
    quantize(source, tmp_path / "out", "int4")


def test_progress_ends_at_the_size_of_the_result(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = quantize(source, tmp_path / "out", "int8", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (made.result_bytes, made.result_bytes)
    assert all(before[0] < after[0] for before, after in pairwise(seen))
    with open_checkpoint(tmp_path / "out") as opened:
        assert made.result_bytes == sum(info.nbytes for info in opened.tensors.values())


def test_an_existing_destination_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(source, tmp_path / "empty", "is there already")
    refused(source, source, "is there already")
    (tmp_path / "out.part").mkdir()
    refused(source, tmp_path / "out", "out.part", "remove it and try again")
    refused(source, tmp_path / "nowhere" / "out", "there is no folder")


def test_a_disk_that_is_too_small_is_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(data) for name, data in tree(source).items())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(source, tmp_path / "out", "needs 0.00 GB", "make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, size))
    quantize(source, tmp_path / "out", "native")


def test_a_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(source, tmp_path / "out", "cannot be written (No space left on device); nothing was kept")


def test_damaged_weights_are_refused(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    tensors[name] = tensors[name] * np.float32(np.nan)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, tmp_path / "out", name, "NaN")


def test_single_files_are_refused(source: Path, tmp_path: Path) -> None:
    with open_checkpoint(source / "model.safetensors") as opened, pytest.raises(InputError, match="takes a folder of"):
        convert(opened, [], tmp_path / "out", "int4", "x")


def test_memory_is_bounded_by_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "in_use", lambda: 2)
    monkeypatch.setattr(converter, "_BLOCK_ELEMENTS", 1 << 15)
    monkeypatch.setattr(converter, "_COPY_BYTES", 1 << 17)
    weights = normal(4096, 512)
    source = folder_of(tmp_path / "source", a__weight=raw("F32", weights), b__weight=raw("F32", weights))
    tracemalloc.start()
    try:
        convert(source, [Matrix("a.weight", "experts", "a.weight")], tmp_path / "out", "int4", "source")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < weights.nbytes / 4


# The command


def test_the_command_says_what_it_saved(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def numoe(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["quantize", str(source), str(tmp_path / "out"), *arguments])
        return (left.value.code or 0, *capsys.readouterr())

    code, out, err = numoe("--quant", "int4")
    assert (code, out) == (0, "")
    assert err == f"628 kB of weights became 115 kB in {tmp_path / 'out'}\n"
    code, out, err = numoe("--quant", "int4")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "is there already" in err
    assert numoe("--quant", "int5")[0] == 2

"""Converted folders: the same model in fewer bytes, each expert in one piece, and never half a model."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cases import LAYOUTS, recurrent, spec
from helpers import reshard, stack_experts, write_safetensors
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from numoe.cli.main import main
from numoe.engine import Model, describe, load
from numoe.engine.families import family
from numoe.quant.compute import threads
from numoe.quant.convert import jobs
from numoe.quant.convert.convert import Conversion, Folder, convert
from numoe.quant.convert.folder import Part
from numoe.quant.convert.jobs import Matrix
from numoe.quant.errors import InputError
from numoe.quant.formats import pack
from numoe.quant.stored.checkpoint import Checkpoint, open_checkpoint
from numoe.quant.stored.conventions.native import LAYOUT, companion
from numoe.quant.stored.handle import Stored
from numoe.quant.stored.manifest import read_manifest
from numoe.quant.stored.shards import INDEX_NAME

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]


def quantize(source: Path, destination: Path, quant: str, **options: Any) -> Conversion:
    description = describe(source)
    with description.checkpoint as checkpoint:
        return convert(checkpoint, description.weights(), destination, quant, Folder(source, source.name), **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The tensors of a model, whatever their order."""
    with open_checkpoint(folder) as opened:
        read = opened.files.read_range
        return {
            name: (info.dtype, info.shape, read(info.path, info.offset, info.nbytes).tobytes())
            for name, info in opened.tensors.items()
        }


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


# The model stays the same: one of each storage layout, and all golden cases with `-m slow`.


@pytest.mark.parametrize("case", LAYOUTS)
def test_native_keeps_every_weight_and_every_logit(
    case: str, checkpoint: Checkpoints, model: Models, tmp_path: Path
) -> None:
    """Under the names that the model's own specification has for them."""
    made = quantize(checkpoint(case), tmp_path / "native", "native")
    assert made.source_bytes == made.result_bytes
    before, after = describe(checkpoint(case)), describe(tmp_path / "native")
    assert before.spec == after.spec
    left = set(before.checkpoint.names()) - {place.stored.name for place in before.places.values()}
    assert set(after.checkpoint.names()) == {*before.places, *left}
    for name, tensor in before.spec.tensors().items():
        old, new = before.places[name], after.places[name]
        assert (new.stored.name, new.columns, new.made) == (name, None, None)
        if tensor.held == "array":
            np.testing.assert_array_equal(new.array(tensor.shape), old.array(tensor.shape))
        else:
            assert (new.stored.format, new.stored.nbytes) == (old.stored.format, old.stored.nbytes)
            np.testing.assert_array_equal(new.stored.matrix().dequantize(), old.stored.matrix().dequantize())
    ids = tiny.load_golden(case).ids[:40]
    copied, original = load(tmp_path / "native"), load(checkpoint(case))
    np.testing.assert_array_equal(copied.session(256).feed(ids), original.session(256).feed(ids))


@pytest.mark.parametrize("case", LAYOUTS)
def test_rounded_models_stay_close(case: str, checkpoint: Checkpoints, model: Models, tmp_path: Path) -> None:
    """Random mixtures are hard to round: where two experts score alike, the least change picks the other one."""
    ids = tiny.load_golden(case).ids[:40]
    reference = model(case).session(256).feed(ids)
    # FP8 and FP4 of its own, which no recipe makes larger.
    compact = "quantization_config" in tiny.load_golden(case).config
    dense = not spec(case).routed
    steady = dense and not recurrent(case)  # nothing chooses, and no state carries errors on
    bounds = {"int8": 2e-3, "int4": 0.2} if steady else {"int8": 0.2, "int4": 1.0}
    sizes = {}
    for quant, bound in bounds.items():
        sizes[quant] = quantize(checkpoint(case), tmp_path / quant, quant).result_bytes
        loaded = load(tmp_path / quant)
        found = divergence(reference, loaded.session(256).feed(ids))
        print(f"{case} {quant}: KL {found:.2e}")
        assert found < bound
        assert loaded.plan().weight_bytes + loaded.wide_bytes == loaded.stats()["weight_bytes"]
        held = loaded.plan().weights
        kinds = {role: {stored.kind for r, stored in held if r == role} for role, _ in held}
        assert compact or quant in kinds.get("experts", kinds.get("dense ffn", set()))
        assert kinds["router"] <= {"f32", "bf16", "i64"} if "router" in kinds else dense
        assert kinds["norms"] == {"f32"}
    assert sizes["int4"] < sizes["int8"] or case == "v4_released"


def test_every_weight_is_what_the_quantizer_makes_of_it(checkpoint: Checkpoints, tmp_path: Path) -> None:
    quantize(checkpoint("qwen3_moe_a"), tmp_path / "int4", "int4")
    before, after = describe(checkpoint("qwen3_moe_a")), describe(tmp_path / "int4")
    for name in [n for n in before.places if n.endswith(("experts.3.up", "attention.q"))]:
        weights = before.places[name].stored.matrix().dequantize()
        routed = ".experts." in name
        expected = pack.pack_int4(weights, 64) if routed else pack.pack_int8(weights, 64)
        made = after.places[name].stored
        assert made.format == expected.format
        np.testing.assert_array_equal(made.matrix().dequantize(), expected.dequantize())


def test_converting_again_changes_nothing(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "once", "int4")
    quantize(tmp_path / "once", tmp_path / "twice", "int4")
    weights = "model.safetensors"
    assert (tmp_path / "once" / weights).read_bytes() == (tmp_path / "twice" / weights).read_bytes()


def test_bytes_do_not_depend_on_threads_or_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(source, tmp_path / "a", "int4")
    monkeypatch.setattr(jobs, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(jobs, "_COPY_BYTES", 999)
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
    units: dict[str, list[Stored]] = {}
    for matrix in description.weights():
        if matrix.unit:
            units.setdefault(matrix.unit, []).append(matrix.stored)
    assert units
    for unit in units.values():
        assert len({stored.name for stored in unit}) == 3
        parts = [info for stored in unit for info in stored.parts]
        yield sorted((info.path, info.offset, info.offset + info.nbytes) for info in parts)


@pytest.mark.parametrize("quant", ["native", "int8", "int4"])
@pytest.mark.parametrize("shards", [1, 7])
@pytest.mark.parametrize("case", ["mixtral_a", "v3_fp8", "v4_released"])
def test_an_expert_is_one_byte_range(
    case: str, shards: int, quant: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = reshard(checkpoint(case), tmp_path / "source", shards)
    quantize(folder, tmp_path / "out", quant)
    for ranges in experts_ranges(tmp_path / "out"):
        assert len({path for path, _, _ in ranges}) == 1
        assert all(before[2] == after[1] for before, after in pairwise(ranges))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"]
    else:
        assert files == [f"model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]
        index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(
            info.nbytes for info in describe(tmp_path / "out").checkpoint.tensors.values()
        )


@pytest.mark.parametrize("quant", ["native", "int4"])
def test_scales_may_be_far_from_their_codes(quant: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """And a unit that is spread over many shards is not kept together."""
    apart = reshard(checkpoint("v3_fp8"), tmp_path / "apart", 6, key=lambda name: ("scale" in name, name[::-1]))
    quantize(apart, tmp_path / "from apart", quant)
    quantize(checkpoint("v3_fp8"), tmp_path / "from one", quant)
    assert contents(tmp_path / "from apart") == contents(tmp_path / "from one")
    with open_checkpoint(apart) as before:
        homes = [{info.path for info in before[name].parts} for name in before.names()]
    assert any(len(home) > 1 for home in homes)


@pytest.mark.parametrize("quant", ["native", "int4"])
def test_stacked_experts_become_the_files_of_single_ones(source: Path, quant: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "stacked"))
    tensors = load_file(folder / "model.safetensors")
    experts = json.loads((folder / "config.json").read_text())["num_local_experts"]
    stack_experts(tensors, experts)
    save_file(tensors, folder / "model.safetensors")
    quantize(folder, tmp_path / "from stacked", quant)
    quantize(source, tmp_path / "from single", quant)
    ids = tiny.load_golden("mixtral_a").ids[:40]
    logits = [load(tmp_path / made).session(128).feed(ids) for made in ("from stacked", "from single")]
    np.testing.assert_array_equal(*logits)
    for ranges in experts_ranges(tmp_path / "from stacked"):
        assert all(before[2] == after[1] for before, after in pairwise(ranges))
    assert contents(tmp_path / "from stacked") == contents(tmp_path / "from single")


def test_a_family_may_store_its_experts_stacked_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    golden = checkpoint("gpt_oss_a")
    known = family("gpt_oss").names
    alone = {ours for ours, sources in known.items() if "experts.{expert}" in ours and all(s.stacked for s in sources)}
    assert {name.rpartition(".")[2] for name in alone} == {"gate", "up", "down"}
    quantize(golden, tmp_path / "out", "int4")
    routed = [w for w in describe(tmp_path / "out").weights() if w.unit]
    assert routed and all(w.stored.shape == w.stored.whole for w in routed)


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
    cuts = [Matrix(f"e{e}.up.weight", "experts", source["up"].expert(e), unit=f"{e}") for e in range(3)]
    halves = [source["fused"].expert(e).rows(128, 256) for e in range(3)]
    cuts += [Matrix(f"e{e}.half.weight", "experts", half, unit=f"{e} half") for e, half in enumerate(halves)]
    convert(source, cuts, tmp_path / "out", "native", Folder(source.path, "source"))
    with open_checkpoint(tmp_path / "out") as made:
        assert set(made.names()) == {cut.name for cut in cuts}
        for e in range(3):
            assert made[f"e{e}.up.weight"].format == fp4[e].format
            np.testing.assert_array_equal(made[f"e{e}.up.weight"].matrix().dequantize(), fp4[e].dequantize())
            np.testing.assert_array_equal(made[f"e{e}.half.weight"].matrix().dequantize(), fp8[e].dequantize()[128:])
    inside = [Matrix("half.weight", "experts", source["fused"].expert(0).rows(100, 200))]
    with pytest.raises(InputError, match=r"'fused' cannot be cut at row 100.*quantize it to int4"):
        convert(source, inside, tmp_path / "other", "native", Folder(source.path, "source"))
    convert(source, inside, tmp_path / "other", "int4", Folder(source.path, "source"))


def test_every_other_row_of_a_stack_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces are in which it is copied."""
    monkeypatch.setattr(jobs, "_COPY_BYTES", 100)
    stack = normal(3, 10, 8)
    source = folder_of(tmp_path / "source", fused=raw("F32", stack))
    every = {f"e{e}.{odd}.weight": (e, odd) for e in range(3) for odd in range(2)}
    cuts = [Matrix(name, "experts", source["fused"].expert(e).rows(odd, 10, 2)) for name, (e, odd) in every.items()]
    convert(source, cuts, tmp_path / "out", "native", Folder(source.path, "source"))
    with open_checkpoint(tmp_path / "out") as made:
        for name, (e, odd) in every.items():
            np.testing.assert_array_equal(made[name].array(), stack[e, odd::2])


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
        ('{"format": 7}', "has format 7, and this numoe reads formats 4 to 6; update numoe"),
        ('{"format": 3}', "has format 3, and this numoe reads formats 4 to 6; convert or download the model again"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 4, "source": "x", "recipe": "int4", "files": {"a": 3}}', "is damaged"),
    ],
)
def test_folders_of_another_format_are_refused(source: Path, text: str, message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    (folder / "numoe.json").write_text(text)
    with pytest.raises(InputError, match=f"numoe.json {message}"):
        open_checkpoint(folder)


def made_by_format_4(source: Path, folder: Path, quant: str) -> None:
    """A conversion as it was: matrices named as in the source, parts of stacked ones with .weight, arrays untouched."""
    quantize(source, folder, quant)
    described, made, before = describe(source), contents(folder), contents(source)
    for name, place in described.places.items():
        if described.spec.tensors()[name].held == "array":
            made |= {info.name: before[info.name] for info in place.stored.parts}
            made.pop(name)
            continue
        old = place.stored.name if place.stored.shape == place.stored.whole else f"{name}.weight"
        for new, former in ((name, old), *((companion(name, p), companion(old, p)) for p in ("scale", "minimum"))):
            if new in made:
                made[former] = made.pop(new)
    write_safetensors(folder / "model.safetensors", made, LAYOUT)
    as_format_4(folder / "numoe.json")


def as_format_4(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["sum"]
    path.write_text(json.dumps(manifest | {"format": 4}))


@pytest.mark.parametrize("case", ["mixtral_a", "v3_fp8", "gpt_oss_a"])
def test_conversions_of_before_still_load_and_are_renewed(case: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    made_by_format_4(checkpoint(case), tmp_path / "old", "int4")
    quantize(checkpoint(case), tmp_path / "new", "int4")
    ids = tiny.load_golden(case).ids[:40]
    logits = [load(tmp_path / made).session(128).feed(ids) for made in ("old", "new")]
    np.testing.assert_array_equal(*logits)
    quantize(tmp_path / "old", tmp_path / "renewed", "int4")
    assert contents(tmp_path / "renewed") == contents(tmp_path / "new")


def test_what_an_earlier_version_began_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(reshard(source, tmp_path / "source", 3), tmp_path / "out", "int4", progress=interruption(0.6))
    as_format_4(tmp_path / "out.part" / "numoe.json")
    refused(tmp_path / "source", tmp_path / "out", "an earlier numoe began", "remove the folder and repeat the command")


RECORD = {"size": 1, "sha256": "0" * 64}
NAMES = [
    "../x",
    "/x",
    "a/b",
    "C:x",
    "a\\b",
    "a\0",
    "a\n",
    "",
    ".",
    "..",
    "CON",
    "nul.json",
    "lpt1.a.b",
    "a.",
    "a ",
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_plain_files_only(name: str, source: Path, tmp_path: Path, command: Any) -> None:
    """What else it says is never joined to a folder: not to verify, and not to go on with a conversion."""
    (tmp_path / "x").write_text("mine")
    part = tmp_path / "a" / "out.part"
    part.mkdir(parents=True)
    document = {"format": 5, "source": source.name, "recipe": "int4", "revision": Folder(source, "").revision}
    (part / "numoe.json").write_text(json.dumps(document | {"files": {name: RECORD}}))
    with pytest.raises(InputError, match=r"numoe\.json names the file .*: do not use it"):
        read_manifest(part)
    refused(source, tmp_path / "a" / "out", "numoe.json names the file")
    assert (code := command("verify", str(part)))[0] == 1 and "names the file" in code[2]
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("files", files)
            for files in ([], {"a": {}}, {"A.txt": RECORD, "a.TXT": RECORD}, {"a": RECORD | {"size": -1}})
        ),
        ("files", {"a": RECORD | {"size": True}}),
        ("files", {"a": RECORD | {"sha256": "0"}}),
        ("source", 1),
        ("recipe", None),
        ("revision", []),
        ("calibration", 7),
        ("format", True),
        ("format", "4"),
    ],
)
def test_manifests_of_other_types_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    document = {"format": 4, "source": "x", "recipe": "int4", "files": {"a": RECORD}}
    (tmp_path / "numoe.json").write_text(json.dumps(document), encoding="utf-16")
    assert read_manifest(tmp_path) is not None
    (tmp_path / "numoe.json").write_text(json.dumps(document | {key: value}))
    with pytest.raises(InputError, match=r"numoe\.json (is damaged|names both)"):
        read_manifest(tmp_path)


# The stored formats


@pytest.mark.parametrize("name", ["a.weight", "stack"])
def test_grouped_weights_are_read_in_every_way(name: str, tmp_path: Path) -> None:
    made: list[Any] = [
        [pack.pack_int8(normal(9, 96, seed=e)) for e in range(2)],
        [pack.pack_int8(normal(9, 96, seed=e), symmetric=True) for e in range(2)],
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
            assert [info.name for info in opened[name].parts] == list(parts)
            assert opened[name].format == stack[1].format
            assert opened[name].shape == ((9, 96) if index is None else (2, 9, 96))
            assert opened[name].nbytes == opened[name].read_nbytes == sum(len(t[2]) for t in tensors.values())
            one = opened[name] if index is None else opened[name].expert(index)
            np.testing.assert_array_equal(one.matrix().dequantize(), stack[1].dequantize())
            np.testing.assert_array_equal(one.rows(2, 7).matrix().dequantize(), stack[1].dequantize()[2:7])
            np.testing.assert_array_equal(opened[name].array()[..., -1, :], whole_values(stack, index)[..., -1, :])


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
        opened["a.weight"].matrix()


@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_infinite_scales_are_refused(dtype: str, tmp_path: Path) -> None:
    codes, scales = np.zeros((4, 32), np.uint8), np.full((4, 2), np.inf, np.float16)
    tensors = {"a.weight": raw(dtype, codes), "a.scale": raw("F16", scales)}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    with open_checkpoint(path) as opened, pytest.raises(InputError, match=r"'a\.weight' contains NaN or infinity"):
        opened["a.weight"].matrix()


# Never half a model


def test_what_others_left_by_the_name_of_the_part_stays(source: Path, tmp_path: Path) -> None:
    """Only what a conversion has made is ever removed."""
    for number, (file, also) in enumerate(
        [("diary.txt", ""), ("work/diary.txt", ""), ("work/lock", ""), ("diary.txt", "work"), ("numoe.json", "")]
    ):
        part = tmp_path / f"{number}.part"
        (part / file).parent.mkdir(parents=True)
        (part / file).write_text("mine")
        (part / also).mkdir(exist_ok=True)
        refused(source, tmp_path / str(number), f"{number}.part")
        assert (part / file).read_text() == "mine"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "diary.txt").write_text("mine")
    (tmp_path / "linked.part").mkdir()
    (tmp_path / "linked.part" / "work").symlink_to(tmp_path / "elsewhere")
    refused(source, tmp_path / "linked", "linked.part")

    def interrupt(*_: Any) -> None:
        (tmp_path / "out.part" / "diary.txt").write_text("mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", "int4", progress=interrupt)
    assert [path.name for path in (tmp_path / "out.part").iterdir()] == ["diary.txt"]


def test_names_that_not_every_disk_has(source: Path, tmp_path: Path) -> None:
    """A folder's name that is not UTF-8 is no obstacle, and small files that are nobody's are left behind."""
    folder = Path(shutil.copytree(source, tmp_path / "caf\udce9"))
    for name in (
        "read\udce9.md",
        "notes: more.md",
        "con.json",
        "CONFIG.json",
        "README.md",
        "LICENSE.exe",
        "LICENSE-2.0",
    ):
        (folder / name).write_text("{}")
    quantize(folder, tmp_path / "out\udce9", "int8")
    assert tree(tmp_path / "out\udce9").keys() == {
        *("config.json", "README.md", "LICENSE-2.0", "model.safetensors", "numoe.json")
    }
    manifest = read_manifest(tmp_path / "out\udce9")
    assert manifest is not None and manifest.source == "caf?"
    load(tmp_path / "out\udce9")


def test_files_that_are_not_the_models_change_nothing(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = reshard(checkpoint("mixtral_a"), tmp_path / "source", 5)
    others = (".DS_Store", "Thumbs.db", "log.txt", "._config.json", "notes.md", "desktop.ini", "model.bin")
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", "int4", progress=interruption(0.5))
    for name in others:
        (folder / name).write_text("")
    quantize(folder, tmp_path / "out", "int4")
    assert {"log.txt", "Thumbs.db"}.isdisjoint(tree(tmp_path / "out"))
    before = Folder(folder, "").revision
    for name in ("config.json", "tokenizer.json", "merges.txt", "model-00001-of-00005.safetensors"):
        (folder / name).touch()
        before, old = Folder(folder, "").revision, before
        assert before != old


def test_the_second_of_two_finds_the_first_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step of the end somebody else tries the same, who is refused and does no harm."""

    def meanwhile(step: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*arguments: Any, **options: Any) -> Any:
            with pytest.raises(InputError, match=r"is being written by another process|is there already"):
                quantize(source, tmp_path / "out", "int4")
            return step(*arguments, **options)

        return tried

    monkeypatch.setattr(shutil, "rmtree", meanwhile(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", meanwhile(Path.rename))
    monkeypatch.setattr(Part, "give_up", meanwhile(Part.give_up))
    quantize(source, tmp_path / "out", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "work" not in [path.name for path in (tmp_path / "out").iterdir()]


def refused(source: Path, destination: Path, *mentions: str, quant: str = "int4", **options: Any) -> None:
    before = sorted(destination.parent.rglob("*")) if destination.parent.exists() else None
    with pytest.raises(InputError) as caught:
        quantize(source, destination, quant, **options)
    assert "\n" not in str(caught.value)
    for mention in mentions:
        assert mention in str(caught.value)
    assert before == (sorted(destination.parent.rglob("*")) if destination.parent.exists() else None)


def interruption(share: float, error: type[BaseException] = KeyboardInterrupt) -> Callable[[int, int], None]:
    """A progress that raises when this share of the bytes is written."""

    def progress(done: int, total: int) -> None:
        if done >= share * total:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_an_interruption_within_the_first_file_leaves_nothing(
    source: Path, error: type[BaseException], share: float, tmp_path: Path
) -> None:
    with pytest.raises(error):
        quantize(source, tmp_path / "out", "int4", progress=interruption(share, error))
    assert not list(tmp_path.iterdir())
    quantize(source, tmp_path / "out", "int4")


@pytest.mark.parametrize("case", ["mixtral_a", "v4_released"])
def test_an_interrupted_conversion_goes_on(
    case: str, checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reshard(checkpoint(case), tmp_path / "source", 5)
    quantize(folder, tmp_path / "whole", "int4")
    made: list[str] = []
    write = Part.write
    monkeypatch.setattr(Part, "write", lambda part, name, data: (write(part, name, data), made.append(name)))
    part = tmp_path / "out.part"
    for share in (0.3, 0.5, 0.5, 0.9, 1):
        with pytest.raises(KeyboardInterrupt):
            quantize(folder, tmp_path / "out", "int4", progress=interruption(share))
        assert not (tmp_path / "out").exists()
        manifest = read_manifest(part)
        assert manifest is not None
        assert manifest.files.keys() == set(made)
        assert tree(part).keys() == {*made, "numoe.json"}
        with pytest.raises(InputError):
            load(part)
    seen: list[int] = []
    quantize(folder, tmp_path / "out", "int4", progress=lambda done, total: seen.append(done))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert len(made) == len(set(made)) == len(tree(tmp_path / "out")) - 1
    assert seen[0] > seen[-1] / 2  # what was there already counts
    assert not part.exists()


def test_an_interruption_between_two_steps_is_gone_on_from(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reshard(checkpoint("mixtral_a"), tmp_path / "source", 3)
    (tmp_path / "out.part").mkdir()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", interrupt)
        quantize(folder, tmp_path / "out", "int8")
    assert not (tmp_path / "out.part" / "work").exists()
    quantize(folder, tmp_path / "out", "int8")
    quantize(folder, tmp_path / "whole", "int8")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_one_lost_file_is_made_anew(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """What `numoe verify` leaves to repair: the folder's name and the record taken back."""
    folder = reshard(checkpoint("mixtral_a"), tmp_path / "source", 5)
    quantize(folder, tmp_path / "out", "native")
    whole = tree(tmp_path / "out")
    for name in ("model-00003-of-00005.safetensors", "config.json", INDEX_NAME):
        (tmp_path / "out").rename(tmp_path / "out.part")
        (tmp_path / "out.part" / name).write_bytes(b"damaged")
        quantize(folder, tmp_path / "out", "native")
        assert tree(tmp_path / "out") == whole


def test_conversions_are_not_mixed(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = reshard(checkpoint("mixtral_a"), tmp_path / "source", 5)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", "int4", progress=interruption(0.5))
    refused(folder, tmp_path / "out", "out.part", "conversion to int4 of source", "repeat the command", quant="int8")
    other = reshard(checkpoint("mixtral_a"), tmp_path / "other", 5)
    refused(other, tmp_path / "out", "of source at revision", "of other", "or remove the folder to begin anew")
    (folder / "model-00005-of-00005.safetensors").touch()
    refused(folder, tmp_path / "out", "of source at revision")
    (tmp_path / "notes.part").mkdir()
    (tmp_path / "notes.part" / "diary.txt").write_text("mine")
    refused(folder, tmp_path / "notes", "notes.part is there and holds no unfinished conversion")


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(InputError, match=r"out\.part is being written by another process"):
            quantize(source, tmp_path / "out", "int4")

    quantize(source, tmp_path / "out", "int4", progress=again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_disk_without_locks_is_written_all_the_same(
    code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    quantize(source, tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(source, tmp_path / "link", "is there already")
    refused(source, tmp_path / "nowhere" / "out", "there is no folder")


def test_a_destination_in_the_folder_of_no_user(source: Path, command: Callable[..., Any]) -> None:
    code, _, err = command("quantize", str(source), "~nosuchuser/out", "--quant", "int4")
    assert (code, "begins with the name of no user" in err) == (2, True)


def test_a_disk_that_is_too_small_is_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(data) for name, data in tree(source).items())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(source, tmp_path / "out", "needs 0.02 GB more", "make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**9 + size // 2))
    refused(source, tmp_path / "out", "needs 1.00 GB more and its disk has 1.00 GB free", quant="native")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9 // 50 + size))
    quantize(source, tmp_path / "out", "native")


def test_a_disk_that_fills_up_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(source, tmp_path / "out", "cannot be written (No space left on device)", "repeat the command")


def test_damaged_weights_are_refused(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    tensors[name] = tensors[name] * np.float32(np.nan)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, tmp_path / "out", name, "NaN")


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize(
    ("factor", "kept"),
    [(1e-30, True), (1e-8, True), (1e-7, True), (1e-4, False), (1e3, False), (1e8, True), (0, False)],
)
def test_what_float16_scales_cannot_hold_stays_as_it_is(quant: str, factor: float, kept: bool, tmp_path: Path) -> None:
    """Also where it is one expert of many, and only half of a fused weight."""
    weights = normal(64, 128) * np.float32(factor)
    fused = np.concatenate([normal(32, 128), weights[:32]])
    source = folder_of(tmp_path / "source", a__weight=raw("F32", weights), fused=raw("F32", np.stack([fused, fused])))
    matrices = [Matrix("a.weight", "experts", source["a.weight"], unit="a")]
    first, second = (source["fused"].expert(i) for i in range(2))
    parts = {"e0": first.rows(0, 32), "e00": first.rows(32, 64), "e11": second}
    matrices += [Matrix(f"{name}.weight", "experts", part, unit="e") for name, part in parts.items()]
    made = convert(source, matrices, tmp_path / "out", quant, Folder(source.path, "source"))
    wanted = {"a.weight": weights, "e0.weight": fused[:32], "e00.weight": fused[32:], "e11.weight": fused}
    assert set(made.kept) >= {"a.weight", "e00.weight"} if kept else made.kept == ()
    assert "e0.weight" not in made.kept
    assert ("a.weight" in made.remark) == kept
    with open_checkpoint(tmp_path / "out") as opened:
        assert made.result_bytes == sum(info.nbytes for info in opened.tensors.values())
        for name, values in wanted.items():
            stored = opened[name].matrix()
            assert stored.format.kind == ("f32" if name in made.kept else quant)
            error = (stored.dequantize() - values).astype(np.float64)
            assert np.linalg.norm(error) <= {"int8": 0.01, "int4": 0.12}[quant] * np.linalg.norm(values.astype(float))


def test_few_small_weights_among_others_do_not_keep_a_matrix(tmp_path: Path) -> None:
    """Their groups are off by half of float16's least step at most, which is nothing beside the others."""
    weights = normal(64, 128)
    weights[3] *= np.float32(1e-9)
    weights[5, 32:64] *= np.float32(1e-7)
    source = folder_of(tmp_path / "source", a__weight=raw("F32", weights))
    matrices = [Matrix("a.weight", "experts", source["a.weight"])]
    assert convert(source, matrices, tmp_path / "out", "int8", Folder(source.path, "source")).kept == ()
    with open_checkpoint(tmp_path / "out") as opened:
        error = np.abs(opened["a.weight"].matrix().dequantize() - weights)
    assert max(error[3].max(), error[5, 32:64].max()) <= 2**-24


def test_a_matrix_that_stays_is_told_of(source: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """In every shard, after an interruption too; and the model runs as before."""
    single = Path(shutil.copytree(source, tmp_path / "single"))
    tensors = load_file(single / "model.safetensors")
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in (0, 3)]
    tensors |= {name: tensors[name] * np.float32(1e-8) for name in names}
    save_file(tensors, single / "model.safetensors")
    folder = reshard(single, tmp_path / "source", 5)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", "int4", progress=interruption(0.9))
    seen: list[tuple[int, int]] = []
    made = quantize(folder, tmp_path / "out", "int4", progress=lambda *counts: seen.append(counts))
    assert sorted(made.kept) == ["layers.1.ffn.experts.0.down", "layers.1.ffn.experts.3.down"]
    assert seen[-1] == (made.result_bytes, made.result_bytes)
    assert all(done <= total for done, total in seen)
    code, _, err = command("quantize", str(folder), str(tmp_path / "whole"), "--quant", "int4")
    assert code == 0
    names = ", ".join(sorted(made.kept))
    assert f"2 too small or too large for the recipe's scales stay as they were stored: {names}" in err
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "whole").keys()
    for ranges in experts_ranges(tmp_path / "out"):
        assert all(before[2] == after[1] for before, after in pairwise(ranges))
    ids = tiny.load_golden("mixtral_a").ids[:40]
    assert divergence(load(folder).session(64).feed(ids), load(tmp_path / "out").session(64).feed(ids)) < 1


def test_memory_is_bounded_by_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "in_use", lambda: 2)
    monkeypatch.setattr(jobs, "_BLOCK_ELEMENTS", 1 << 15)
    monkeypatch.setattr(jobs, "_COPY_BYTES", 1 << 17)
    weights = normal(16384, 512)
    source = folder_of(tmp_path / "source", a__weight=raw("F32", weights), b__weight=raw("F32", weights))
    tracemalloc.start()
    try:
        convert(
            source,
            [Matrix("a.weight", "experts", source["a.weight"])],
            tmp_path / "out",
            "int4",
            Folder(source.path, "source"),
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < weights.nbytes / 8  # of 16 slabs one at a time, with what laying it out takes


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["native", "int4"])
def test_memory_of_a_real_process_is_bounded(quant: str, tmp_path: Path) -> None:
    """Half a minute: `pytest -m slow tests/quant/test_convert.py -k real_process`. Of a shard of 200 MB about 40 MB."""
    rows = np.random.default_rng(0).integers(0x3C00, 0x3E00, (25_000, 4096), np.uint16)
    source = folder_of(tmp_path / "source", a__weight=raw("BF16", rows)).path
    code = """
import sys
from pathlib import Path
from numoe.engine.budget import peak_rss
from numoe.quant.compute import threads
from numoe.quant.stored.checkpoint import open_checkpoint
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.convert.jobs import Matrix
source, destination, quant = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
threads.use(2)
before = peak_rss()
opened = open_checkpoint(source)
convert(opened, [Matrix("a.weight", "experts", opened["a.weight"])], destination, quant, Folder(source, "source"))
print(peak_rss() - before)
"""
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out"), quant]
    took = int(subprocess.run(command, check=True, capture_output=True).stdout)
    print(f"{quant}: {took / 1e6:.0f} MB beside the imports")
    assert took < 100e6


# The command


def test_the_command_says_what_it_saved(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def numoe(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["quantize", str(source), str(tmp_path / "out"), *arguments])
        return (left.value.code or 0, *capsys.readouterr())

    code, out, err = numoe("--quant", "int4")
    assert (code, out) == (0, "")
    assert err == f"628 kB of weights became 120 kB in {tmp_path / 'out'}\n"
    code, out, err = numoe("--quant", "int4")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "is there already" in err
    assert numoe("--quant", "int5")[0] == 2


def test_ctrl_c_says_how_to_go_on(
    checkpoint: Checkpoints,
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = reshard(checkpoint("mixtral_a"), tmp_path / "source", 3)
    write = Part.write

    def interrupt(part: Any, name: str, pieces: Any) -> None:
        write(part, name, pieces)
        if name.startswith("model-00002"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Part, "write", interrupt)
        code, _, err = command("quantize", str(folder), str(tmp_path / "out"), "--quant", "int8")
    assert (code, err) == (130, "stopped; the same command goes on from here\n")
    assert command("quantize", str(folder), str(tmp_path / "out"), "--quant", "int8")[0] == 0
    load(tmp_path / "out")

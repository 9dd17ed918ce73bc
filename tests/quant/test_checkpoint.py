"""safetensors files and folders: what is read, what is folded together, and what is refused with which sentence."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import write_safetensors, write_sharded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.quant import files
from numoe.quant.compute import memory
from numoe.quant.dtypes import decode_bf16, decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.formats import pack
from numoe.quant.formats.fp8 import FP8
from numoe.quant.formats.mxfp4 import MXFP4
from numoe.quant.stored.checkpoint import Checkpoint, open_checkpoint
from numoe.quant.stored.quantization import read_quantization
from numoe.quant.stored.shards import model_shards


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def raw(dtype: str, values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return dtype, values.shape, values.tobytes()


W = normal(300, 160)
FP8_E8M0, FP8_F32 = pack.pack_fp8(W), pack.pack_fp8(W, float_scales=True)
FP8_BF16 = FP8(FP8_F32.codes, decode_bf16(pack.pack_bf16(FP8_F32.scales).codes))
FP4 = pack.pack_mxfp4(W)
BF = pack.pack_bf16(W)
EXPERTS = [pack.pack_mxfp4(normal(12, 64, seed=expert)) for expert in range(3)]
STACK = normal(3, 10, 64)


def blocks(tensors: list[MXFP4]) -> tuple[np.ndarray, np.ndarray]:
    """gpt-oss's two arrays: blocks (E, out, in/32, 16) and scales (E, out, in/32)."""
    codes = np.stack([made.codes for made in tensors])
    return codes.reshape(*codes.shape[:2], -1, 16), np.stack([made.scales for made in tensors])


TENSORS = {
    "norm.weight": raw("BF16", BF.codes[0]),
    "embed.weight": raw("BF16", BF.codes),
    "f32.weight": raw("F32", W),
    "f16.weight": raw("F16", W.astype(np.float16)),
    "f64.weight": raw("F64", W.astype(np.float64)),
    "v4.weight": raw("F8_E4M3", FP8_E8M0.codes),
    "v4.scale": raw("F8_E8M0", FP8_E8M0.scales),
    "v3.weight": raw("F8_E4M3", FP8_F32.codes),
    "v3.weight_scale_inv": raw("F32", FP8_F32.scales),
    "bf.weight": raw("F8_E4M3", FP8_BF16.codes),
    "bf.weight_scale_inv": raw("BF16", pack.pack_bf16(FP8_BF16.scales).codes),
    "expert.weight": raw("I8", FP4.codes.view(np.int8)),
    "expert.scale": raw("F8_E8M0", FP4.scales),
    "gate_up_proj_blocks": raw("U8", blocks(EXPERTS)[0]),
    "gate_up_proj_scales": raw("U8", blocks(EXPERTS)[1]),
    "stack": raw("F32", STACK),
    "tid2eid": raw("I64", np.arange(12).reshape(4, 3)),
    "mask": raw("BOOL", np.array([True, False])),
    "scalar": raw("F32", np.array(2.5, np.float32)),
    "empty": raw("F32", np.zeros((0, 4), np.float32)),
}
EXPECTED = {
    "embed.weight": ("bf16", BF.dequantize()),
    "f32.weight": ("f32", W),
    "f16.weight": ("f16", W.astype(np.float16).astype(np.float32)),
    "f64.weight": ("f32", W),
    "v4.weight": ("fp8 128x128", FP8_E8M0.dequantize()),
    "v3.weight": ("fp8 128x128", FP8_F32.dequantize()),
    "bf.weight": ("fp8 128x128", FP8_BF16.dequantize()),
    "expert.weight": ("mxfp4", FP4.dequantize()),
}


@pytest.fixture(params=["file", "index", "no index"], scope="module")
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param == "file":
        path = write_safetensors(folder / "model.safetensors", TENSORS, {"made": "here"})
    elif request.param == "index":
        path = write_sharded(folder, TENSORS, 3)
    else:
        path = folder
        names = list(TENSORS)
        write_safetensors(folder / "a-00001-of-00002.safetensors", {name: TENSORS[name] for name in names[:7]})
        write_safetensors(folder / "a-00002-of-00002.safetensors", {name: TENSORS[name] for name in names[7:]})
        (folder / "._a-00001-of-00002.safetensors").write_bytes(b"macOS leaves such files")
    with open_checkpoint(path) as opened:
        yield opened


def test_matrices_keep_their_format(checkpoint):
    for name, (kind, values) in EXPECTED.items():
        tensor = checkpoint[name].matrix()
        assert tensor.format == checkpoint[name].format
        assert str(tensor.format) == kind
        assert tensor.nbytes == checkpoint[name].read_nbytes
        assert tensor.shape == checkpoint[name].shape == values.shape
        np.testing.assert_array_equal(tensor.dequantize(), values)
        np.testing.assert_array_equal(checkpoint[name].array(), values)
        if name not in ("f64.weight", "bf.weight"):  # which become float32
            assert tensor.nbytes == checkpoint[name].nbytes


def test_row_ranges(checkpoint):
    for name, (_, values) in EXPECTED.items():
        for start, stop in ((0, 5), (128, 300), (100, 130), (255, 257), (299, 300)):
            tensor = checkpoint[name].rows(start, stop).matrix()
            np.testing.assert_array_equal(tensor.dequantize(), values[start:stop])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(EXPECTED)), turned=st.booleans(), data=st.data())
def test_rows_of_rows_take_what_they_say(checkpoint, name, turned, data):
    """Also of what is stored (in, out)."""
    part, values = checkpoint[name], EXPECTED[name][1]
    if turned and len(part.parts) == 1:
        part, values = part.turned(), values.T
        np.testing.assert_array_equal(part.array(), values)
    for _ in range(2):
        start = data.draw(st.integers(0, len(values) - 1))
        stop, step = data.draw(st.integers(start + 1, len(values))), data.draw(st.sampled_from([1, 1, 2, 3]))
        part, values = part.rows(start, stop, step), values[start:stop:step]
        matrix = part.matrix()
        np.testing.assert_array_equal(matrix.dequantize(), values)
        assert part.shape == matrix.shape == values.shape
        assert (part.format, part.read_nbytes) == (matrix.format, matrix.nbytes)


def test_stacked_experts(checkpoint):
    assert checkpoint["gate_up_proj"].shape == (3, 12, 64)
    for expert, made in enumerate(EXPERTS):
        tensor = checkpoint["gate_up_proj"].expert(expert).matrix()
        np.testing.assert_array_equal(tensor.codes, made.codes)
        np.testing.assert_array_equal(tensor.scales, made.scales)
        np.testing.assert_array_equal(checkpoint["stack"].expert(expert).matrix().dequantize(), STACK[expert])
        part = checkpoint["gate_up_proj"].expert(expert).rows(3, 9).matrix()
        np.testing.assert_array_equal(part.dequantize(), made.dequantize()[3:9])
    np.testing.assert_array_equal(checkpoint["gate_up_proj"].array()[2], EXPERTS[2].dequantize())


def test_arrays(checkpoint):
    np.testing.assert_array_equal(checkpoint["tid2eid"].array(), np.arange(12).reshape(4, 3))
    assert checkpoint["tid2eid"].array().dtype == checkpoint["mask"].array().dtype == np.int64
    assert checkpoint["mask"].array().tolist() == [1, 0]
    np.testing.assert_array_equal(checkpoint["norm.weight"].array(), decode_bf16(BF.codes[0]))
    assert checkpoint["scalar"].array().shape == () and checkpoint["scalar"].array() == 2.5
    assert checkpoint["empty"].array().shape == (0, 4)
    np.testing.assert_array_equal(checkpoint["v4.scale"].array(), decode_e8m0(FP8_E8M0.scales))
    for name in TENSORS:
        assert checkpoint[name].array().dtype in (np.float32, np.int64) or name == "v4.scale"


def test_names_fold_scales_into_their_weight(checkpoint):
    scales = {"v4.scale", "v3.weight_scale_inv", "bf.weight_scale_inv", "expert.scale"}
    scales |= {"gate_up_proj_scales", "gate_up_proj_blocks"}
    assert set(checkpoint.names()) == set(TENSORS) - scales | {"gate_up_proj"}
    parts = {name: [info.name for info in checkpoint[name].parts] for name in checkpoint.names()}
    assert parts["v4.weight"] == ["v4.weight", "v4.scale"]
    assert parts["gate_up_proj"] == ["gate_up_proj_blocks", "gate_up_proj_scales"]
    assert parts["norm.weight"] == ["norm.weight"]
    assert "gate_up_proj" in checkpoint and "v4.weight" in checkpoint and "v5.weight" not in checkpoint
    nbytes = sum(checkpoint[name].nbytes for name in checkpoint.names())
    assert nbytes == sum(len(data) for *_, data in TENSORS.values())


def test_metadata(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", {"stack": TENSORS["stack"]}, {"format": "pt"})
    with open_checkpoint(str(path)) as opened:
        assert opened.metadata == {"format": "pt"}


def test_fp8_blocks_of_another_size(tmp_path):
    made = pack.pack_fp8(W, (64, 32))
    tensors = {"a.weight": raw("F8_E4M3", made.codes), "a.scale": raw("F8_E8M0", made.scales)}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    convention = read_quantization({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}})
    with open_checkpoint(path, convention) as opened:
        tensor = opened["a.weight"].rows(70, 200).matrix()
        np.testing.assert_array_equal(tensor.dequantize(), made.dequantize()[70:200])
    with open_checkpoint(path) as opened, pytest.raises(InputError, match=r"a\.scale.*\[3, 2\].*check the quant"):
        opened["a.weight"].matrix()


def test_stacked_fp8_with_scales(tmp_path):
    made = [pack.pack_fp8(normal(130, 140, seed=expert), float_scales=True) for expert in range(2)]
    tensors = {
        "gate_up_proj": raw("F8_E4M3", np.stack([each.codes for each in made])),
        "gate_up_proj_scale_inv": raw("F32", np.stack([each.scales for each in made])),
    }
    with open_checkpoint(write_safetensors(tmp_path / "a.safetensors", tensors)) as opened:
        tensor = opened["gate_up_proj"].expert(1).matrix()
        assert isinstance(tensor, FP8)
        np.testing.assert_array_equal(tensor.dequantize(), made[1].dequantize())


def test_planning_needs_no_file(checkpoint):
    listing = Checkpoint(Path("nowhere"), dict(checkpoint.tensors), {})
    assert list(listing.names()) == list(checkpoint.names())
    assert all(listing[name].nbytes == checkpoint[name].nbytes for name in listing.names())


def test_concurrent_reads(checkpoint):
    with ThreadPoolExecutor(4) as pool:
        for name, got in pool.map(lambda name: (name, checkpoint[name].matrix()), list(EXPECTED) * 5):
            np.testing.assert_array_equal(got.dequantize(), EXPECTED[name][1])


def test_closing_and_reading_again(checkpoint):
    checkpoint.close()
    assert checkpoint["scalar"].array() == 2.5


def test_read_range_without_preadv_and_with_short_reads(tmp_path, monkeypatch):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(256)))
    monkeypatch.setattr(files, "_LARGEST_READ", 7)
    for positioned in (True, False):
        if not positioned:
            monkeypatch.delattr(files.os, "preadv", raising=False)
        opened = files.Files()
        out = np.zeros(200, np.uint8)
        got = opened.read_range(path, 10, 100, out)
        assert np.shares_memory(got, out) and got.tolist() == list(range(10, 110)) and not out[100:].any()
        assert opened.read_range(path, 256, 0).size == 0
        with pytest.raises(InputError, match="ends at byte 256"):
            opened.read_range(path, 250, 7)
        opened.close()


@pytest.mark.filterwarnings("error")  # of a file that is left open
@pytest.mark.parametrize("way", ["past the cache", "no such reads", "larger sectors", "ends in between"])
@pytest.mark.parametrize("offset, nbytes", [(0, 1), (0, 8192), (5000, 9000), (4096, 4096), (8191, 2), (12288, 7712)])
def test_read_once(tmp_path, monkeypatch, way, offset, nbytes):
    path = tmp_path / "bytes"
    content = np.random.default_rng(0).integers(0, 256, 20000, np.uint8)
    path.write_bytes(content.tobytes())
    if way == "no such reads":
        monkeypatch.delattr(files.os, "O_DIRECT", raising=False)
    elif way != "past the cache":
        preadv, refused = os.preadv, []

        def refuse(file, buffers, at):
            if at % files.PAGE == 0 and len(buffers[0]) % files.PAGE == 0 and len(refused) < 1:
                refused.append(at)
                if way == "larger sectors":
                    raise OSError(errno.EINVAL, "no")
                return preadv(file, [buffers[0][:3]], at)
            return preadv(file, buffers, at)

        monkeypatch.setattr(files.os, "preadv", refuse)
    lead = offset % files.PAGE
    pages = memory.unshared(-(-(lead + nbytes) // files.PAGE) * files.PAGE)
    opened = files.Files()
    opened.read_once(path, offset, nbytes, pages)
    np.testing.assert_array_equal(pages[lead : lead + nbytes], content[offset : offset + nbytes])
    with pytest.raises(InputError, match="ends at byte 20000"):
        opened.read_once(path, 16384, 4096, pages[: files.PAGE])
    opened.close()


# Refusals


def refuses(path: Path, *mentions: str) -> None:
    """Opening fails with one sentence that mentions these."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    for mention in (*mentions, path.name):
        assert mention in str(caught.value)


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_HEADERS = {
    "not JSON": (b"{nonsense", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "deeply nested": (b'{"a":' + b"[" * 100_000, b""),
    "a list": ([1], b""),
    "duplicate": (b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, "a": {}}', bytes(8)),
    "metadata not a table": ({"__metadata__": [], "a": entry()}, bytes(8)),
    "metadata not of strings": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "entry not a table": ({"a": 7}, b""),
    "unknown dtype": ({"a": entry("F12")}, bytes(8)),
    "dtype not a string": ({"a": entry(["F32"])}, bytes(8)),
    "negative size": ({"a": entry(shape=(-1, -2))}, bytes(8)),
    "size not an int": ({"a": entry(shape=(2.0,))}, bytes(8)),
    "size true": ({"a": entry(shape=(True, 2))}, bytes(8)),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, bytes(8)),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "shape against size": ({"a": entry(shape=(3,))}, bytes(8)),
    "beyond the end": ({"a": entry(offsets=(8, 16))}, bytes(8)),
    "truncated data": ({"a": entry()}, bytes(7)),
    "trailing data": ({"a": entry()}, bytes(9)),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "huge shape": ({"a": entry(shape=[1 << 62] * 40)}, bytes(8)),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_damaged_headers_are_refused(case, tmp_path):
    header, data = BAD_HEADERS[case]
    refuses(write_header(tmp_path / "bad.safetensors", header, data), "damaged header", "download it again")


def test_headers_that_take_seconds_are_refused_unread(tmp_path):
    refuses(
        write_header(tmp_path / "a.safetensors", b'"data_offsets"' * 250_001), "250001 tensors, and no file has more"
    )


@pytest.mark.parametrize("length", [1000, 100_000_001, (1 << 64) - 1])
def test_lying_header_lengths_are_refused(length, tmp_path):
    refuses(write_header(tmp_path / "bad.safetensors", {}, length=length), "header", str(length))


def test_files_too_short_for_a_header_are_refused(tmp_path):
    for content in (b"", b"1234567"):
        path = tmp_path / "short.safetensors"
        path.write_bytes(content)
        refuses(path, "not a whole safetensors file")


def test_paths_that_are_no_checkpoint_are_refused(tmp_path):
    refuses(tmp_path / "missing", "not a folder")
    refuses(tmp_path / "missing.safetensors", "cannot be read")
    refuses(tmp_path, "holds no .safetensors files")
    (tmp_path / "model.gguf").touch()
    refuses(tmp_path, "GGUF files", "model.gguf")


def test_pickles_are_refused(tmp_path):
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"\x80\x04.")
    refuses(pickle, "pickle", "safetensors")
    refuses(tmp_path, "pickled weights", "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize(
    ("names", "shards"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["adapter_model.safetensors", "model.safetensors", "model-00001-of-00002.safetensors"], ["model.safetensors"]),
        (["._model.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["original/consolidated.safetensors", "weights.safetensors", "config.json"], ["weights.safetensors"]),
        (["m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors"],
         ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]),
        (["config.json"], []),
    ],
)  # fmt: skip
def test_the_files_that_hold_the_model_are_found_without_an_index(names, shards):
    assert model_shards(names, "folder") == shards


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["m-00001-of-00003.safetensors", "m-00002-of-00003.safetensors"],
        ["m-00001-of-00002.safetensors", "n-00002-of-00002.safetensors"],
        ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "consolidated.safetensors"],
    ],
)
def test_several_files_that_nothing_puts_in_order_are_refused(names, tmp_path):
    for name in names:
        write_safetensors(tmp_path / name, {name: TENSORS["scalar"]})
    refuses(tmp_path, f"{len(names)} .safetensors files", "no model.safetensors.index.json")


def test_a_file_beside_the_model_is_not_read(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": TENSORS["f32.weight"]})
    (tmp_path / "consolidated.safetensors").write_bytes(b"another model, half downloaded")
    assert list(open_checkpoint(tmp_path).names()) == ["w"]


def test_what_git_leaves_in_place_of_a_shard_is_named(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    refuses(tmp_path, "Git LFS pointer", "git lfs pull")
    refuses(pointer, "Git LFS pointer")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_place_of_a_shard_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refuses(tmp_path, "not an ordinary file", "model.safetensors")


def test_an_index_may_begin_with_a_byte_order_mark(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(b"\xef\xbb\xbf" + index.read_bytes())
    assert "stack" in open_checkpoint(sharded)


@pytest.fixture
def sharded(tmp_path):
    names = ["embed.weight", "v4.weight", "v4.scale", "stack", "scalar", "tid2eid"]
    return write_sharded(tmp_path, {name: TENSORS[name] for name in names}, 3)


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuses(sharded, "model-00002-of-00003.safetensors is missing")


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    edit_index(sharded, lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors"))
    refuses(sharded, "'ghost'", "model-00001-of-00003.safetensors")


def test_a_tensor_in_two_shards_is_named(sharded):
    first = {name: TENSORS[name] for name in ("embed.weight", "v4.weight", "scalar")}
    write_safetensors(sharded / "model-00001-of-00003.safetensors", first)
    refuses(sharded, "'scalar'", "two shards")
    (sharded / "model.safetensors.index.json").unlink()
    refuses(sharded, "'scalar'", "two shards")


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/a.safetensors", "x\\a.safetensors", "C:a.safetensors", "a.bin"]
)
def test_shards_outside_the_folder_are_refused(sharded, shard):
    edit_index(sharded, lambda index: index["weight_map"].update(scalar=shard))
    with pytest.raises(InputError, match=r"index\.json names"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_damaged_indexes_are_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refuses(sharded)


def one(tmp_path: Path, **tensors) -> Checkpoint:
    named = {name.replace("__", "."): value for name, value in tensors.items()}
    return open_checkpoint(write_safetensors(tmp_path / "a.safetensors", named))


def test_matrix_refusals_name_the_tensor(checkpoint):
    cases = [
        (lambda: checkpoint["nothing"], "'nothing'"),
        (lambda: checkpoint["norm.weight"].matrix(), r"'norm.weight'.*\(160,\)"),
        (lambda: checkpoint["stack"].matrix(), r"'stack'.*\(3, 10, 64\)"),
        (lambda: checkpoint["stack"].rows(0, 1), r"'stack'.*\(3, 10, 64\)"),
        (lambda: checkpoint["embed.weight"].expert(0), "'embed.weight'.*E, out, in"),
        (lambda: checkpoint["stack"].expert(0).expert(0), "'stack'.*E, out, in"),
        (lambda: checkpoint["stack"].expert(3), "no matrix 3"),
        (lambda: checkpoint["stack"].expert(-1), "no matrix -1"),
        (lambda: checkpoint["f32.weight"].rows(0, 301), "no rows 0 to 301"),
        (lambda: checkpoint["f32.weight"].rows(5, 5), "no rows 5 to 5"),
        (lambda: checkpoint["f32.weight"].rows(5, 9).rows(0, 5), "no rows 0 to 5: it has 4"),
        (lambda: checkpoint["tid2eid"].matrix(), "'tid2eid'.*I64"),
        (lambda: checkpoint["empty"].matrix(), "'empty'"),
    ]
    for ask, message in cases:
        with pytest.raises(InputError, match=message):
            ask()


def test_unsupported_dtypes_are_refused_by_name(tmp_path):
    codes = np.zeros((2, 32), np.uint8)
    with one(
        tmp_path, a__weight=raw("F8_E5M2", codes), b__weight=raw("F8_E4M3", codes), c=raw("U64", codes.view("u8"))
    ) as opened:
        for name, dtype in (("a.weight", "F8_E5M2"), ("b.weight", "F8_E4M3"), ("c", "U64")):
            with pytest.raises(InputError, match=dtype):
                opened[name].matrix()
            with pytest.raises(InputError, match=dtype):
                opened[name].array()


def test_scales_that_do_not_fit_are_refused(tmp_path):
    codes, scales = np.zeros((4, 32), np.uint8), np.zeros((4, 2), np.uint8)
    bad = [
        {"a__weight": raw("I8", codes), "a__scale": raw("F8_E8M0", scales[:, :1])},
        {"a__weight": raw("I8", codes), "a__scale": raw("F32", scales.astype(np.float32))},
        {"a__weight": raw("I8", codes[:, :20]), "a__scale": raw("F8_E8M0", scales)},
        {"a__weight": raw("F8_E4M3", codes), "a__scale": raw("F8_E8M0", scales)},
        {"a__weight": raw("F8_E4M3", codes), "a__scale": raw("I64", np.zeros((1, 1), np.int64))},
    ]
    for tensors in bad:
        with one(tmp_path, **tensors) as opened, pytest.raises(InputError, match=r"a\.(weight|scale)"):
            opened["a.weight"].matrix()
    odd = np.zeros((2, 4, 2, 15), np.uint8)
    opened = one(tmp_path, x_blocks=raw("U8", odd), x_scales=raw("U8", odd[..., 0]))
    with pytest.raises(InputError, match="x_blocks"):
        opened["x"].matrix()


def test_weights_that_are_nan_are_refused_by_name(tmp_path):
    codes = FP8_E8M0.codes.copy()
    codes[17, 3] = 0xFF
    values = W.copy()
    values[4, 4] = np.inf
    tensors = {
        "a__weight": raw("F8_E4M3", codes), "a__scale": TENSORS["v4.scale"],
        "b": raw("F32", values), "c": raw("BF16", np.full((2, 2), 0x7FC0, np.uint16)), "d": raw("F32", values[4]),
    }  # fmt: skip
    with one(tmp_path, **tensors) as opened:
        for name in ("a.weight", "b", "c"):
            with pytest.raises(InputError, match=f"a.safetensors.*'{name}' contains NaN or infinity"):
                opened[name].matrix()
        for name in ("a.weight", "b", "c", "d"):
            with pytest.raises(InputError, match=f"'{name}' contains NaN or infinity"):
                opened[name].array()
        opened["b"].rows(5, 20).matrix()


def test_a_file_truncated_while_open_is_refused(tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", {"w": TENSORS["f32.weight"]})
    with open_checkpoint(path) as opened:
        with path.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(InputError, match="ends at byte 5000"):
            opened["w"].matrix()


def test_importing_does_not_import_gguf():
    code = "import sys, numoe.quant.stored.checkpoint; sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as opened:
        return {name: opened[name].array() for name in opened.names()}


SMALL = {
    "a.weight": raw("F8_E4M3", FP8_E8M0.codes[:4, :8]),
    "a.scale": raw("F8_E8M0", FP8_E8M0.scales[:1, :1]),
    "b_blocks": raw("U8", blocks(EXPERTS)[0][:1, :2, :1]),
    "b_scales": raw("U8", blocks(EXPERTS)[1][:1, :2, :1]),
    "norm": raw("BF16", BF.codes[0, :4]),
    "ids": raw("I64", np.arange(3)),
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(data, tmp_path):
    path = write_safetensors(tmp_path / "a.safetensors", SMALL, {"format": "pt"})
    whole, original = path.read_bytes(), read_all(path)
    damaged = bytearray(whole)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.sampled_from(b'\0 019[]{},:"FIU8_a\xff'))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    try:
        got = read_all(path)
    except InputError:
        return
    if path.read_bytes() == whole:
        assert got.keys() == original.keys()
        for name, values in original.items():
            np.testing.assert_array_equal(got[name], values)

"""GGUF files written by the gguf package, read by ours, and compared with the package's own dequantizers."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_blocks import HALVES, add_blocks, random_blocks, reference
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.quant.errors import InputError
from numoe.quant.stored.checkpoint import open_checkpoint

AS_INT = {"Q4_0": "int4 g32", "Q4_1": "int4 g32", "Q8_0": "int8 g32"}


def write(path: Path, blocks: dict[str, tuple[str, np.ndarray]], metadata=lambda writer: None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    metadata(writer)
    for name, (dtype, data) in blocks.items():
        add_blocks(writer, name, dtype, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", HALVES)
def test_block_types_equal_the_reference_dequantizer(dtype, tmp_path):
    raw = random_blocks(dtype, 300, 512)  # 300 rows: more than one block of rows
    values = reference(raw, dtype)
    with open_checkpoint(write(tmp_path / "a.gguf", {"w": (dtype, raw)})) as opened:
        tensor = opened["w"].matrix()
        assert tensor.shape == opened["w"].shape == (300, 512)
        assert tensor.format == opened["w"].format
        assert str(tensor.format) == AS_INT.get(dtype, dtype.lower())
        assert opened.tensors["w"].dtype == dtype and opened["w"].nbytes == raw.nbytes
        np.testing.assert_array_equal(tensor.dequantize(), values)
        np.testing.assert_array_equal(opened["w"].array(), values)
        np.testing.assert_array_equal(opened["w"].rows(7, 9).matrix().dequantize(), values[7:9])
        np.testing.assert_array_equal(opened["w"].rows(7, 90, 4).matrix().dequantize(), values[7:90:4])
        assert tensor.nbytes == opened["w"].read_nbytes == raw.nbytes + (4 * 300 if dtype == "NVFP4" else 0)


@pytest.mark.parametrize("dtype", HALVES)
def test_stacked_experts_read_one_slice(dtype, tmp_path):
    raw = random_blocks(dtype, 3, 6, 256)
    with open_checkpoint(write(tmp_path / "a.gguf", {"experts": (dtype, raw)})) as opened:
        assert opened["experts"].shape == (3, 6, 256)
        for expert in range(3):
            values = reference(raw[expert], dtype)
            np.testing.assert_array_equal(opened["experts"].expert(expert).matrix().dequantize(), values)
        assert opened["experts"].array().shape == (3, 6, 256)


@pytest.mark.parametrize("count", [1, 3])
def test_nvfp4_has_a_scale_beside_it(count, tmp_path):
    raw = random_blocks("NVFP4", 3, 6, 128)
    scales = np.arange(2, 2 + count, dtype=np.float32) / 8
    tensors = {"a.weight": ("NVFP4", raw), "a.scale": ("F32", scales), "a.input_scale": ("F32", scales),
               "b.weight": ("NVFP4", raw[0]), "b.scale": ("F32", scales[-1:])}  # fmt: skip
    values = reference(raw, "NVFP4")
    with open_checkpoint(write(tmp_path / "a.gguf", tensors)) as opened:
        assert list(opened.names()) == ["a.weight", "b.weight"]
        np.testing.assert_array_equal(opened["b.weight"].matrix().dequantize(), values[0] * scales[-1])
        np.testing.assert_array_equal(
            opened["b.weight"].rows(1, 5, 2).matrix().dequantize(), values[0, 1:5:2] * scales[-1]
        )
        for expert, scale in enumerate(np.broadcast_to(scales, 3)):
            one = opened["a.weight"].expert(expert)
            np.testing.assert_array_equal(one.matrix().dequantize(), values[expert] * scale)
            np.testing.assert_array_equal(one.rows(2, 6).matrix().dequantize(), values[expert, 2:6] * scale)
        assert opened["a.weight"].array().shape == (3, 6, 128)


def test_a_scale_beside_nvfp4_of_another_shape_is_refused(tmp_path):
    tensors = {"a.weight": ("NVFP4", random_blocks("NVFP4", 3, 6, 128)), "a.scale": ("F32", np.ones(2, np.float32))}
    with open_checkpoint(write(tmp_path / "a.gguf", tensors)) as opened, pytest.raises(InputError, match=r"a\.scale"):
        opened["a.weight"]


def test_plain_floats_and_integers(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    bf16 = gguf.quants.quantize(values, GGMLQuantizationType.BF16)
    tensors = {
        "f32": ("F32", values), "f16": ("F16", values.astype(np.float16)), "bf16": ("BF16", bf16),
        "norm": ("F32", values[0]), "ids": ("I32", np.arange(7, dtype=np.int32)),
    }  # fmt: skip
    with open_checkpoint(write(tmp_path / "a.gguf", tensors)) as opened:
        assert list(opened.names()) == list(tensors)
        np.testing.assert_array_equal(opened["f32"].matrix().dequantize(), values)
        np.testing.assert_array_equal(opened["f16"].matrix().dequantize(), values.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(
            opened["bf16"].matrix().dequantize(), gguf.quants.dequantize(bf16, GGMLQuantizationType.BF16)
        )
        assert [str(opened[name].format) for name in ("f32", "f16", "bf16")] == ["f32", "f16", "bf16"]
        np.testing.assert_array_equal(opened["norm"].array(), values[0])
        assert opened["ids"].array().tolist() == list(range(7))


def add_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("yes", True)
    writer.add_int64("negative", -(1 << 40))
    writer.add_string("text", "Ġé")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "▁b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.5])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])


def test_metadata_are_python_values(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": ("F32", np.zeros((2, 2), np.float32))}, add_metadata)
    with open_checkpoint(path) as opened:
        metadata = dict(opened.metadata)
    assert metadata == {
        "general.architecture": "llama", "llama.block_count": 3, "llama.rope.freq_base": 1e5, "yes": True,
        "negative": -(1 << 40), "text": "Ġé", "tokenizer.ggml.tokens": ["a", "", "▁b"],
        "tokenizer.ggml.scores": [0.5, -1.5], "tokenizer.ggml.token_type": [1, 2, 3],
    }  # fmt: skip
    assert type(metadata["yes"]) is bool and type(metadata["llama.block_count"]) is int


def shards(folder: Path) -> list[Path]:
    paths = []
    for number in range(2):
        tensors = {f"w{number}": ("Q8_0", random_blocks("Q8_0", 4, 64))}
        path = folder / f"model-{number + 1:05d}-of-00002.gguf"
        paths.append(write(path, tensors, lambda writer: writer.add_uint16("split.count", 2)))
    return paths


def test_shards_are_opened_together(tmp_path):
    first, second = shards(tmp_path)
    reference = gguf.quants.dequantize(random_blocks("Q8_0", 4, 64), GGMLQuantizationType.Q8_0)
    with open_checkpoint(first) as opened:
        assert list(opened.names()) == ["w0", "w1"]
        np.testing.assert_array_equal(opened["w1"].matrix().dequantize(), reference)
    with pytest.raises(InputError, match="00001-of-"):
        open_checkpoint(second)
    second.unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.gguf cannot be read"):
        open_checkpoint(first)


def test_parts_are_found_whatever_their_capitals(tmp_path):
    for path in shards(tmp_path):
        path.rename(path.with_suffix(".GGUF"))
    with open_checkpoint(tmp_path / "model-00001-of-00002.GGUF") as opened:
        assert list(opened.names()) == ["w0", "w1"]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 4, 8, 64, 4096])
def test_files_of_version_2_and_of_any_alignment(version, alignment, tmp_path):
    values = np.arange(6, dtype="<f4")
    rest = text(b"general.alignment") + struct.pack("<II", 4, alignment)
    rest += tensor(b"v", [2], 0, 0) + tensor(b"w", [6], 0, -(-8 // alignment) * alignment)
    start = header(version, tensors=2, pairs=1, rest=rest)
    data = start + bytes(-len(start) % alignment) + values[:2].tobytes().ljust(-(-8 // alignment) * alignment, b"\0")
    (tmp_path / "a.gguf").write_bytes(data + values.tobytes())
    with open_checkpoint(tmp_path / "a.gguf") as opened:
        np.testing.assert_array_equal(opened["v"].array(), values[:2])
        np.testing.assert_array_equal(opened["w"].array(), values)


# Refusals


def header(version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


BAD_FILES = {
    "empty": b"",
    "other magic": b"GGML" + bytes(40),
    "magic only": b"GGUF",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 1": header(1),
    "endless pairs": header(pairs=1 << 63),
    "endless tensors": header(tensors=1 << 63),
    "endless array": header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 60)),
    "endless strings": header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(4000)),
    "long string": header(pairs=1, rest=text(b"k") + struct.pack("<IQ", 8, (1 << 64) - 1)),
    "nested array": header(pairs=1, rest=text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(40)),
    "unknown value type": header(pairs=1, rest=text(b"k") + struct.pack("<IQ", 99, 1)),
    "key not UTF-8": header(pairs=1, rest=text(b"\xff") + struct.pack("<II", 4, 1)),
    "key twice": header(pairs=2, rest=(text(b"k") + struct.pack("<II", 4, 1)) * 2),
    "alignment 3": header(pairs=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 3)),
    "alignment text": header(pairs=1, rest=text(b"general.alignment") + struct.pack("<I", 8) + text(b"32")),
    "five dimensions": header(tensors=1, rest=tensor(b"w", [1] * 5, 0, 0) + bytes(99)),
    "unknown tensor type": header(tensors=1, rest=tensor(b"w", [32], 4000, 0) + bytes(99)),
    "broken row": header(tensors=1, rest=tensor(b"w", [33], 2, 0) + bytes(99)),
    "tensor twice": header(tensors=2, rest=tensor(b"w", [1], 0, 0) * 2 + bytes(99)),
    "tensor outside": header(tensors=1, rest=tensor(b"w", [1 << 40, 1 << 40], 0, 0) + bytes(99)),
    "offset outside": header(tensors=1, rest=tensor(b"w", [1], 0, 1 << 63) + bytes(99)),
    "offset odd": header(tensors=1, rest=tensor(b"w", [1], 0, 1) + bytes(99)),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_refused(case, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(InputError, match=r"bad\.gguf") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.gguf.part1of3", "a.gguf-split-a", "a.GGUF.split00"])
def test_a_part_of_a_file_that_was_cut_is_called_one(name, tmp_path):
    (tmp_path / name).write_bytes(BAD_FILES["offset outside"])
    with pytest.raises(InputError, match=r"(?i)is a part of a file that was cut: join all parts, in order, to a\.gguf"):
        open_checkpoint(tmp_path / name)


def test_a_big_endian_file_is_called_one(tmp_path):
    (tmp_path / "a.gguf").write_bytes(BAD_FILES["big-endian"])
    with pytest.raises(InputError, match="is big-endian GGUF; convert it to a little-endian file"):
        open_checkpoint(tmp_path / "a.gguf")


@pytest.mark.parametrize("claim", [{"tensors": 250_001}, {"pairs": 1 << 63}])
def test_headers_that_take_seconds_are_refused_unread(claim, tmp_path):
    (tmp_path / "a.gguf").write_bytes(header(**claim))
    with pytest.raises(InputError, match="tensors or keys, and no file has more than 250000"):
        open_checkpoint(tmp_path / "a.gguf")


def test_weights_that_are_nan_are_refused_by_name(tmp_path):
    for dtype in ("Q4_0", "Q6_K", "IQ4_NL"):
        raw = random_blocks(dtype, 2, 256)
        raw[1, HALVES[dtype][0] : HALVES[dtype][0] + 2] = 0xFF
        path = write(tmp_path / "a.gguf", {"w": (dtype, raw)})
        with open_checkpoint(path) as opened, pytest.raises(InputError, match=r"a\.gguf.*'w'.*NaN or infinity"):
            opened["w"].matrix()


def test_a_type_that_cannot_be_dequantized_is_refused_by_name(tmp_path):
    size = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_K][1]
    path = write(tmp_path / "a.gguf", {"w": ("Q8_K", np.zeros((2, size), np.uint8))})
    with open_checkpoint(path) as opened, pytest.raises(InputError, match=r"'w'.*Q8_K"):
        opened["w"].matrix()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    tensors = {"w": ("Q4_0", random_blocks("Q4_0", 2, 32)), "norm": ("F32", np.ones(3, np.float32))}
    return write(tmp_path_factory.mktemp("whole") / "a.gguf", tensors, add_metadata).read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_refused_or_harmless(data, tmp_path, whole):
    path = tmp_path / "a.gguf"
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    try:
        with open_checkpoint(path) as opened:
            dict(opened.metadata)
            for name in opened.names():
                opened[name].array()
    except InputError:
        pass

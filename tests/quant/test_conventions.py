"""Weights as other libraries pack them are what those libraries say, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from helpers import RawTensor, write_safetensors
from numpy.typing import NDArray
from packers import CASES, ROWS, WIDTH, Case, rng

from numoe.quant.errors import InputError
from numoe.quant.stored.checkpoint import open_checkpoint
from numoe.quant.stored.conventions.spelling import fields
from numoe.quant.stored.quantization import read_quantization


def opened(folder: Path, case: Case, tensors: dict[str, RawTensor]) -> Any:
    return open_checkpoint(write_safetensors(folder / "a.safetensors", tensors), read_quantization(case.table))


def close(case: Case, found: NDArray[Any], wanted: NDArray[Any]) -> None:
    if case.exact:
        np.testing.assert_array_equal(found, wanted.astype(np.float32))
    else:  # two roundings at most of the largest of what is added up
        np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=3e-7 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", CASES)
def test_packed_weights_have_the_values_that_their_library_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tensors, wanted = case.make()
    with opened(tmp_path, case, tensors) as checkpoint:
        assert list(checkpoint.names()) == ["a.weight"] and "a.weight" in checkpoint
        stored = checkpoint["a.weight"].fitted((ROWS, WIDTH))
        assert stored.shape == (ROWS, WIDTH) and stored.format.kind == case.kind
        matrix = stored.matrix()
        assert matrix.nbytes == stored.read_nbytes and matrix.format == stored.format
        close(case, matrix.dequantize(), wanted)
        close(case, stored.rows(5, 37).matrix().dequantize(), wanted[5:37])
        close(case, stored.rows(2, 40, 2).matrix().dequantize(), wanted[2:40:2])
        x = rng(9).standard_normal((3, WIDTH), np.float32)
        np.testing.assert_allclose(matrix.matmul(x), x @ wanted.T.astype(np.float32), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 5, 7, 8, 10, 31, 32, 33, 96])
def test_fields_of_any_length(bits: int, count: int) -> None:
    codes = rng(bits).integers(0, 1 << bits, (3, count))
    np.testing.assert_array_equal(fields(packers.bits_of(codes, bits), bits, count), codes)


@pytest.mark.parametrize(("rows", "width"), [(50, 96), (7, 30), (64, 256)])
def test_blocks_that_reach_over_rows_of_bitsandbytes(
    rows: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packers, "ROWS", rows)
    monkeypatch.setattr(packers, "WIDTH", width)
    tensors, wanted = packers.bnb4("fp4")
    with opened(tmp_path, Case(packers.BNB | {"bnb_4bit_quant_type": "fp4"}, packers.bnb4, "f32"), tensors) as made:
        stored = made["a.weight"].fitted((rows, width))
        for start, stop, step in ((0, rows, 1), (3, 6, 1), (1, rows, 3), (rows - 1, rows, 1)):
            found = stored.rows(start, stop, step).matrix().dequantize()
            np.testing.assert_allclose(found, wanted[start:stop:step], rtol=3e-7, atol=1e-6)


SERVES_ACTIVATIONS = ("a.input_scale", "a.input_global_scale", "a.weight_shape", "a.weight_format")


def parts(name: str) -> list[str]:
    case = CASES[name]
    return [part for part in case.make()[0] if part not in (*SERVES_ACTIVATIONS, *case.optional)]


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in CASES for part in parts(name)])
@pytest.mark.parametrize("how", ["missing", "shape", "dtype"])
def test_no_part_is_taken_for_something_else(name: str, part: str, how: str, tmp_path: Path) -> None:
    case = CASES[name]
    tensors, _ = case.make()
    dtype, shape, data = tensors.pop(part)
    if how == "shape":
        size = int(np.prod(shape)) + 1  # of a vector: one value more
        tensors[part] = (dtype, (size,), data + bytes(len(data) // (size - 1)))
    elif how == "dtype":
        tensors[part] = ("F64", shape, bytes(8 * int(np.prod(shape))))
    with opened(tmp_path, case, tensors) as checkpoint:
        try:
            checkpoint["a.weight"].fitted((ROWS, WIDTH)).matrix()
        except InputError as error:
            assert "\n" not in str(error) and "a." in str(error)
        else:  # plain numbers; what is beside them has no place in any family, for which the model is refused
            assert set(checkpoint.names()) > {"a.weight"}


LIKE = {
    "F8_E4M3": "I8",
    "I8": "U8",
    "U8": "F8_E4M3",
    "I32": "F32",
    "U32": "I32",
    "F32": "I32",
    "BF16": "I16",
    "F16": "I16",
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in CASES for part in parts(name)])
@pytest.mark.parametrize("how", ["scalar", "row", "like"])
def test_a_part_of_another_kind_is_refused_or_means_the_same(name: str, part: str, how: str, tmp_path: Path) -> None:
    case = CASES[name]
    tensors, wanted = case.make()
    dtype, shape, data = tensors[part]
    size = int(np.prod(shape))
    if how == "like":
        tensors[part] = (LIKE.get(dtype, "I16"), shape, data)
    else:
        tensors[part] = (dtype, (), data[: len(data) // size]) if how == "scalar" else (dtype, (1, size), data)
    with opened(tmp_path, case, tensors) as checkpoint:
        try:
            matrix = checkpoint["a.weight"].fitted((ROWS, WIDTH)).matrix()
        except InputError as error:
            assert "\n" not in str(error) and "a." in str(error)
        else:
            if set(checkpoint.names()) == {"a.weight"} and matrix.shape == (ROWS, WIDTH):
                close(case, matrix.dequantize(), wanted)


def test_packings_that_shapes_do_not_tell_apart_are_refused(tmp_path: Path) -> None:
    groups = {
        str(n): {"weights": packers.PACKED | {"num_bits": 4, "group_size": 32, "symmetric": bool(n)}} for n in (0, 1)
    }
    case = Case(packers.ct("pack-quantized") | {"config_groups": groups}, lambda: packers.ct_packed(4, 32), "int4")
    dynamic = {"dynamic": {".*mlp.*": {"sym": False}}}
    other = Case(packers.GPTQ | {"bits": 4} | dynamic, lambda: packers.gptq(4, sym=True, less=1), "int4")
    for one in (case, other):
        with opened(tmp_path, one, one.make()[0]) as checkpoint, pytest.raises(InputError, match="2 of the packings"):
            checkpoint["a.weight"].fitted((ROWS, WIDTH))
        with opened(tmp_path, one, one.make()[0]) as checkpoint, pytest.raises(InputError, match="2 of the packings"):
            checkpoint["a.weight"].matrix()

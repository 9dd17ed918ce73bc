"""Weights as other libraries pack them are what those libraries say, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import RawTensor, write_safetensors
from numpy.typing import NDArray
from packers import CASES, ROWS, WIDTH, Case, rng

from numoe.quant.errors import InputError
from numoe.quant.stored.checkpoint import open_checkpoint
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

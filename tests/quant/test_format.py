"""Formats as values: their names, what they take, and that matrices have the bytes that their format says."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.quant.formats.format import FLOAT32, INT64, Format
from numoe.quant.formats.fp8 import FP8, fp8_format
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.mxfp4 import MXFP4
from numoe.quant.formats.plain import BF16, F16, F32
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import fastest, held_nbytes, hold
from numoe.quant.formats.samples import PACKS, samples

# Each with its name, bits a weight, and the bytes of a matrix (256, 384) and of a stack of three (200, 320).
FORMATS = [
    (F32.format, "f32", 32, 256 * 384 * 4, 3 * 200 * 320 * 4),
    (F16.format, "f16", 16, 256 * 384 * 2, 3 * 200 * 320 * 2),
    (BF16.format, "bf16", 16, 256 * 384 * 2, 3 * 200 * 320 * 2),
    (fp8_format((128, 128), 8), "fp8 128x128", 8 + 8 / 16384, 256 * 384 + 2 * 3, 3 * (200 * 320 + 2 * 3)),
    (fp8_format((1, 128), 32), "fp8 1x128", 8.25, 256 * (384 + 3 * 4), 3 * 200 * (320 + 3 * 4)),
    (MXFP4.format, "mxfp4", 4.25, 256 * (384 // 2 + 384 // 32), 3 * 200 * (320 // 2 + 320 // 32)),
    (integer_format(8, 32, 16, False), "int8 g32", 8.5, 256 * (384 + 12 * 2), 3 * 200 * (320 + 10 * 2)),
    (integer_format(8, 32, 16, True), "int8 g32", 9, 256 * (384 + 12 * 4), 3 * 200 * (320 + 10 * 4)),
    (integer_format(4, 64, 16, True), "int4 g64", 4.5, 256 * (192 + 6 * 4), 3 * 200 * (160 + 5 * 4)),
    (integer_format(4, 32, 32, True), "int4 g32", 6, 256 * (192 + 12 * 8), 3 * 200 * (160 + 10 * 8)),
]


@pytest.mark.parametrize(("stored", "name", "bits", "nbytes", "stacked"), FORMATS)
def test_what_a_format_takes(stored: Format, name: str, bits: float, nbytes: int, stacked: int) -> None:
    assert str(stored) == name
    assert stored.bits_each == bits
    assert stored.nbytes(256, 384) == nbytes
    assert stored.nbytes(3, 200, 320) == stacked


def test_arrays_of_any_rank_have_bytes() -> None:
    assert FLOAT32.nbytes() == 4
    assert FLOAT32.nbytes(7) == 28
    assert FLOAT32.nbytes(0, 5) == 0
    assert INT64.nbytes(2, 3, 4, 5) == 960


def zeros(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


def integers(kind: type[INT8] | type[INT4], scale: type, bias: bool) -> Callable[[int, int, int], QTensor]:
    def make(rows: int, groups: int, size: int) -> QTensor:
        width = groups * size * kind.bits // 8
        factors = [zeros(rows, groups, dtype=scale)] * (1 + bias)
        return kind(zeros(rows, width, dtype=np.int8 if kind is INT8 else np.uint8), *factors)

    return make


# Of (rows, groups, an even size): a matrix of each kind.
KINDS: list[Callable[[int, int, int], QTensor]] = [
    lambda rows, groups, size: F32(zeros(rows, groups * size, dtype=np.float32)),
    lambda rows, groups, size: F16(zeros(rows, groups * size, dtype=np.float16)),
    lambda rows, groups, size: BF16(zeros(rows, groups * size, dtype=np.uint16)),
    lambda rows, groups, size: FP8(zeros(rows, groups * size - 1), zeros(-(-rows // 3), groups), (3, size)),
    lambda rows, groups, size: FP8(
        zeros(rows, groups * size), zeros(-(-rows // size), groups, dtype=np.float32), (size, size)
    ),
    lambda rows, groups, size: MXFP4(zeros(rows, 16 * groups), zeros(rows, groups)),
    *(integers(kind, scale, bias) for kind in (INT8, INT4) for scale in (np.float16, np.float32) for bias in (0, 1)),
]


@given(
    make=st.sampled_from(KINDS),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    half=st.integers(1, 40),
    data=st.data(),
)
def test_matrices_take_the_bytes_of_their_format(
    make: Callable[[int, int, int], QTensor], rows: int, groups: int, half: int, data: st.DataObject
) -> None:
    """Also rows of them, and the forms in which they are multiplied faster."""
    matrix = make(rows, groups, 2 * half)
    start = data.draw(st.integers(0, rows - 1))
    stop, step = data.draw(st.integers(start + 1, rows)), data.draw(st.integers(1, 3))
    for one in (matrix, matrix.slice_rows(start, stop, step), fastest(matrix), fastest(matrix, wide=True)):
        assert one.nbytes == sum(values.nbytes for values in one.arrays().values()) == one.format.nbytes(*one.shape)
    held = [hold(matrix, multiplied=True, wide=wide).nbytes for wide in (False, True)]
    assert held == list(held_nbytes(matrix.format, matrix.shape))
    routed = [fastest(matrix, wide=wide).nbytes for wide in (False, True)]
    assert routed == list(held_nbytes(matrix.format, matrix.shape, routed=True))


def test_only_what_has_a_form_by_columns_has_a_wide_one() -> None:
    for stored, *_ in FORMATS:
        assert (stored.wide != stored) == stored.by_columns(4)
        assert stored.wide.wide == stored.wide
    assert MXFP4.format.wide.bits_each == 8.25
    assert integer_format(4, 64, 16, True).wide.bits_each == integer_format(8, 64, 16, True).wide.bits_each == 9
    assert [rows for rows in (1, 4, 6, 8) if MXFP4.format.by_columns(rows)] == [4, 8]
    assert integer_format(8, 32, 16, False).by_columns(7)


def test_formats_that_hold_the_same_are_one_key() -> None:
    assert {integer_format(4, 32, 16, True): 1}[integer_format(4, 32, 16, True)] == 1
    assert integer_format(4, 32, 16, True) != integer_format(4, 32, 32, True)
    assert F32.format == FLOAT32 == Format("f32", 32)


def test_samples_are_of_every_kind() -> None:
    made = samples((256, 512), 1 << 22)
    assert all(one.format.kind == kind and one.shape == (256, 512) for kind, all_ in made.items() for one in all_)
    assert all(one.finite() for one in made["int8"])
    assert {pack(np.ones((4, 128), np.float32)).format.kind for pack in PACKS} <= made.keys()

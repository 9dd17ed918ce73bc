"""ggml's block types: the values of the gguf package, in the file's bytes, however they are laid out and cut."""

from collections.abc import Iterator

import numpy as np
import pytest
from ggml_blocks import random_blocks, reference, size
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.quant.formats import columns
from numoe.quant.formats.columns import Columns, laid_out, widened
from numoe.quant.formats.ggml import GGML
from numoe.quant.formats.ggml_types import TYPES
from numoe.quant.formats.qtensor import matmul_all
from numoe.quant.formats.resident import fastest, held_nbytes, hold
from numoe.quant.formats.samples import blocks


@pytest.fixture(autouse=True, scope="module")
def none_is_small() -> Iterator[None]:
    """Small matrices are multiplied as float32 ones, see `test_columns`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "WHOLE", 0)
        yield


def made(kind: str, rows: int, width: int, seed: int = 0) -> tuple[GGML, np.ndarray]:
    """A matrix and its values."""
    raw = random_blocks(kind.upper(), rows, width, seed=seed)
    return GGML(raw, TYPES[kind]), reference(raw, kind.upper())


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_the_references_in_the_bytes_of_the_file(kind: str) -> None:
    matrix, values = made(kind, 67, 1024)
    weights, nbytes = size(kind.upper())
    assert (matrix.shape, str(matrix.format)) == ((67, 1024), kind)
    for one in (matrix, laid_out(matrix), widened(laid_out(matrix))):
        np.testing.assert_array_equal(one.dequantize(), values)
        assert one.nbytes == one.format.nbytes(*one.shape)
        assert one.finite()
    assert laid_out(matrix).nbytes == matrix.nbytes == 67 * 1024 // weights * nbytes
    assert held_nbytes(matrix.format, matrix.shape, routed=True) == (
        matrix.nbytes, fastest(matrix, wide=True).nbytes
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from([*TYPES]),
    rows=st.integers(1, 90),
    supers=st.integers(1, 3),
    slab=st.sampled_from([16, 2048]),
    step=st.integers(1, 3),
    data=st.data(),
)
def test_any_rows_are_those_of_the_whole(
    kind: str, rows: int, supers: int, slab: int, step: int, data: st.DataObject
) -> None:
    matrix, values = made(kind, rows, 256 * supers, seed=rows)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    picked = data.draw(st.lists(st.integers(0, rows - 1), max_size=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SLAB_ROWS", slab)
        dense = laid_out(matrix)
        for one in (matrix, dense, widened(dense)):
            np.testing.assert_array_equal(one.rows(picked), values[picked])
            np.testing.assert_array_equal(one.slice_rows(start, stop, step).dequantize(), values[start:stop:step])
            out = np.empty((stop - start, values.shape[1]), np.float32)
            one.dequantize_rows(start, stop, out)
            np.testing.assert_array_equal(out, values[start:stop])
        assert isinstance(dense, Columns)
        again = dense.plain()
        assert isinstance(again, GGML)
        np.testing.assert_array_equal(again.blocks, matrix.blocks)
        wide = widened(dense)
        assert isinstance(wide, Columns)
        np.testing.assert_array_equal(wide.plain().dequantize(), values)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from([*TYPES]),
    rows=st.integers(1, 150),
    supers=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 3, 4, 16, 17, 32, 33]),
    slab=st.sampled_from([32, 2048]),
)
def test_products_are_those_of_float32_and_of_the_wide_form(
    kind: str, rows: int, supers: int, tokens: int, slab: int
) -> None:
    matrix, values = made(kind, rows, 256 * supers, seed=rows)
    x = np.random.default_rng(1).standard_normal((tokens, values.shape[1]), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SLAB_ROWS", slab)
        dense = laid_out(matrix)
        wide = widened(dense)
        assert wide.format == dense.format.wide == wide.format.wide
        got, again = (product.copy() for product in matmul_all([(dense, x, None), (wide, x, None)]))
    np.testing.assert_array_equal(got, again)
    exact = x.astype(np.float64) @ values.astype(np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(values).astype(np.float64).T
    assert (np.abs(got - exact) <= 1e-6 * scale + 1e-30).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bits", [0x7C, 0xFC, 0x7E])
def test_infinity_and_nan_are_found(kind: str, bits: int) -> None:
    for place in TYPES[kind].places:
        matrix, _ = made(kind, 5, 512)
        last = matrix.blocks.reshape(5, -1, TYPES[kind].nbytes)[3, -1]
        last[place + 1] = bits
        if kind == "iq1_m":
            last[place - 1] |= 0xC0
        assert not matrix.finite()
        assert not laid_out(matrix).finite()


@pytest.mark.parametrize("kind", TYPES)
def test_slices_of_whole_slabs_share_their_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SLAB_ROWS", 64)
    matrix, values = made(kind, 256, 256)
    for one in (laid_out(matrix), widened(laid_out(matrix))):
        assert isinstance(one, Columns)
        for number, part in enumerate(one.split(2)):
            assert isinstance(part, Columns)
            assert np.shares_memory(part.codes, one.codes)
            np.testing.assert_array_equal(part.dequantize(), values[128 * number : 128 * number + 128])


@pytest.mark.parametrize("kind", TYPES)
def test_held_in_memory_it_is_the_same(kind: str) -> None:
    matrix = blocks(kind, (512, 1024))
    x = np.random.default_rng(0).standard_normal((2, 1024), np.float32)
    tight, wide = (hold(matrix, multiplied=True, wide=one) for one in (False, True))
    assert [tight.nbytes, wide.nbytes] == list(held_nbytes(matrix.format, matrix.shape))
    assert tight.nbytes == matrix.nbytes
    np.testing.assert_array_equal(tight.matmul(x), wide.matmul(x))
    assert matrix.finite() and 0.1 < np.abs(matrix.dequantize()).max() < 1e5

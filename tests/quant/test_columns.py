"""Weights by columns: the same values, their products, and bits that depend on the weights alone."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tiny
from helpers import rounds_alike
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine import load
from numoe.quant.compute import threads
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import multiply_columns
from numoe.quant.dtypes import E2M1
from numoe.quant.formats import columns
from numoe.quant.formats.columns import FEW, Columns, laid_out, widened
from numoe.quant.formats.ggml import GGML
from numoe.quant.formats.ggml_types import TYPES
from numoe.quant.formats.integer import INT4
from numoe.quant.formats.mxfp4 import MXFP4
from numoe.quant.formats.nvfp4 import NVFP4
from numoe.quant.formats.pack import pack_bf16, pack_int4, pack_int8, pack_mxfp4
from numoe.quant.formats.plain import BF16, F16, F32
from numoe.quant.formats.qtensor import QTensor, matmul_all
from numoe.quant.formats.samples import BLOCK_KINDS, blocks

Pack = Callable[..., QTensor]


def symmetric(weights: np.ndarray, group: int = 32) -> INT4:
    return pack_int4(weights, group, symmetric=True)


PACKS = {"int8": pack_int8, "int4": symmetric, "int4 with bias": pack_int4}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = threads.in_use()
    yield
    threads.use(before)


@pytest.fixture(autouse=True, scope="module")
def none_is_small() -> Iterator[None]:
    """Small ones are multiplied as float32, see `test_small_matrices_are_multiplied_as_float32`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "WHOLE", 0)
        yield


def weights_of(rows: int, size: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((rows, size), np.float32)
    weights *= np.exp(random.standard_normal((rows, 1), np.float32))
    return weights


def laid(matrix: QTensor) -> Columns:
    result = laid_out(matrix)
    assert isinstance(result, Columns)
    return result


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*PACKS, "mxfp4"]),
    rows=st.integers(1, 700).map(lambda n: 4 * n),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 64, 128]),
    slab=st.sampled_from([64, 2048]),
    data=st.data(),
)
def test_it_is_the_same_matrix(kind: str, rows: int, groups: int, group: int, slab: int, data: st.DataObject) -> None:
    if kind == "mxfp4":
        matrix: QTensor = pack_mxfp4(weights_of(rows, 32 * groups))
    else:
        matrix = PACKS[kind](weights_of(rows, group * groups), group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SLAB_ROWS", slab)
        moved = laid(matrix)
        assert (moved.shape, moved.nbytes, moved.format) == (matrix.shape, matrix.nbytes, matrix.format)
        values = matrix.dequantize()
        np.testing.assert_array_equal(moved.dequantize(), values)
        np.testing.assert_array_equal(moved.plain().dequantize(), values)
        picked = data.draw(st.lists(st.integers(0, rows - 1), max_size=5))
        np.testing.assert_array_equal(moved.rows(picked), values[picked])
        start = 4 * data.draw(st.integers(0, rows // 4 - 1))
        np.testing.assert_array_equal(moved.slice_rows(start, rows).dequantize(), values[start:])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*PACKS, "mxfp4"]),
    rows=st.integers(1, 320),
    size=st.sampled_from([128, 384]),
    group=st.sampled_from([16, 32, 64, 128]),
    tokens=st.sampled_from([1, 2, FEW, FEW + 1, 2 * FEW, 2 * FEW + 1]),
    outliers=st.sampled_from([1, 100]),
)
def test_products_are_those_of_float32(kind: str, rows: int, size: int, group: int, tokens: int, outliers: int) -> None:
    if kind == "mxfp4":
        matrix = laid(pack_mxfp4(weights_of(4 * rows, size)))
    else:
        matrix = laid(PACKS[kind](weights_of(rows, size), group))
    x = np.random.default_rng(1).standard_normal((tokens, size), np.float32)
    x[:, ::37] *= outliers
    values = matrix.dequantize().astype(np.float64)
    off = np.abs(matrix.matmul(x) - x @ values.T)
    # Of the product without cancellation, which what codes are shifted by takes part in.
    assert (off <= 3e-6 * (np.abs(x) @ np.abs(values.T) + np.abs(x).sum(1)[:, None] * np.abs(values).max(1))).all()
    if kind == "int8" or tokens > 2 * FEW:
        np.testing.assert_allclose(matrix.matmul(x), x @ values.T, rtol=1e-4, atol=1e-5 * np.abs(x @ values.T).max())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 130),
    size=st.sampled_from([1, 96, 512, 520, 1100]),
    rows=st.sampled_from([1, 36, 64, 100, 192]),
    small=st.booleans(),
    add=st.booleans(),
)
def test_blocks_are_multiplied_in_tiles_of_any_shape(tokens: int, size: int, rows: int, small: bool, add: bool) -> None:
    random = np.random.default_rng(tokens)
    x, block = random.standard_normal((tokens, size + 5), np.float32)[:, 5:], weights_of(size, rows)
    out = random.standard_normal((tokens, rows + 3), np.float32)
    before = out.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_small_products", small)
        multiply_columns(x, block, out[:, 3:], add=add)
    expected = x.astype(np.float64) @ block + (before[:, 3:] if add else 0)
    np.testing.assert_allclose(out[:, 3:], expected, rtol=0, atol=1e-6 * (np.abs(x) @ np.abs(block) + 1).max())
    np.testing.assert_array_equal(out[:, :3], before[:, :3])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", [*PACKS, "mxfp4", "nvfp4", *BLOCK_KINDS])
def test_one_token_is_multiplied_alike_with_one_slab_and_with_several(kind: str, count: int) -> None:
    """Rows have scales of their own, and the last slab is shorter."""
    random = np.random.default_rng(0)
    rows, size = 4 * 97, 512
    if kind == "nvfp4":
        codes, scales = (
            random.integers(0, 256, (rows, size // 2), np.uint8),
            random.integers(0, 0x70, (rows, size // 16)),
        )
        matrix: QTensor = NVFP4(codes, scales.astype(np.uint8), np.exp(random.standard_normal((rows, 1), np.float32)))
    elif kind in BLOCK_KINDS:
        matrix = blocks(kind, (rows, size))
    else:
        weights = weights_of(rows, size)
        matrix = pack_mxfp4(weights) if kind == "mxfp4" else PACKS[kind](weights, 32)
    x = random.standard_normal((1, size), np.float32)
    threads.use(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SLAB_ROWS", 64)
        dense = laid(matrix)
        for form in (dense, widened(dense)):
            assert isinstance(form, Columns)
            joined = form.matmul(x)
            values = form.dequantize().astype(np.float64)
            assert (
                np.abs(joined - x @ values.T)
                <= 3e-6 * (np.abs(x) @ np.abs(values.T) + np.abs(x).sum() * np.abs(values).max(1))
            ).all()
            patch.setattr(Columns, "_runs", lambda self: [])
            np.testing.assert_allclose(joined, form.matmul(x), rtol=1e-5, atol=1e-5 * np.abs(joined).max())
            patch.undo()
            patch.setattr(columns, "SLAB_ROWS", 64)


@pytest.mark.parametrize("code", [-8, 7])
def test_the_largest_codes_keep_their_sign(code: int) -> None:
    rows, size = 64, 64
    nibbles = np.full((rows, size // 2), (code + 8) * 17, np.uint8)
    scales = np.ones((rows, size // 32), np.float16)
    for matrix in (
        INT4(nibbles, scales),
        MXFP4(np.full((rows, size // 2), (7 if code > 0 else 15) * 17, np.uint8), np.full(scales.shape, 127, np.uint8)),
    ):
        for sign in (1, -1):
            x = np.full((1, size), sign, np.float32)
            np.testing.assert_array_equal(laid(matrix).matmul(x), x @ matrix.dequantize().T)
            np.testing.assert_array_equal(widened(laid(matrix)).matmul(x), x @ matrix.dequantize().T)


def test_every_word_of_four_values_is_in_the_table() -> None:
    words = np.arange(65536, dtype=np.uint16)
    found = columns._values_of_words().view(np.int8).reshape(-1, 4)
    for place in range(4):
        np.testing.assert_array_equal(found[:, place], 2 * E2M1[(words >> np.uint16(4 * place)) & np.uint16(15)])


@pytest.mark.parametrize("kind", [*PACKS, "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_no_bit_depends_on_threads_or_company(kind: str, tokens: int) -> None:
    """Nor, for few tokens, on which others are multiplied at the same time, where BLAS itself rounds them alike."""
    weights = weights_of(2100, 256)
    matrix = laid(pack_mxfp4(weights) if kind == "mxfp4" else PACKS[kind](weights))
    x = np.random.default_rng(1).standard_normal((tokens, 256), np.float32)
    threads.use(1)
    alone = matrix.matmul(x)
    for count in (2, 4):
        threads.use(count)
        np.testing.assert_array_equal(matrix.matmul(x), alone)
        whole = Activations(x)
        several = matmul_all([(matrix, whole, None), (matrix, whole.take(np.arange(tokens)[::-1]), None)])
        np.testing.assert_array_equal(several[0], alone)
        np.testing.assert_allclose(several[1], alone[::-1], rtol=1e-5, atol=1e-3)
        if tokens <= FEW and rounds_alike():
            np.testing.assert_array_equal(several[1], alone[::-1])


@pytest.mark.parametrize("kind", [*PACKS, "mxfp4"])
@pytest.mark.parametrize(("rows", "size"), [(64, 128), (4, 4096), (256, 64)])
def test_small_matrices_are_multiplied_as_float32(kind: str, rows: int, size: int) -> None:
    """Their values are float32 ones where there is room, to the same digits."""
    weights = weights_of(rows, size)
    dense = laid(pack_mxfp4(weights) if kind == "mxfp4" else PACKS[kind](weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "WHOLE", rows * size)
        wide = widened(dense)
        assert isinstance(wide, F32)
        np.testing.assert_array_equal(wide.values, dense.dequantize())
        for tokens in (1, 3, 70):
            x = np.random.default_rng(tokens).standard_normal((tokens, size), np.float32)
            wanted = wide.matmul(x)
            np.testing.assert_array_equal(dense.matmul(x), wanted)
            np.testing.assert_allclose(wanted, x @ dense.dequantize().T, rtol=1e-4, atol=1e-4)
        patch.setattr(columns, "WHOLE", rows * size - 1)
        assert isinstance(widened(dense), Columns)


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_small_matrices_of_plain_numbers_are_float32_too(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "WHOLE", 64 * 96)
    weights, x = weights_of(64, 96), weights_of(tokens, 96, 1)
    for matrix in (pack_bf16(weights), F16(weights.astype(np.float16))):
        wide = widened(matrix)
        assert isinstance(wide, F32) and widened(wide) is wide
        np.testing.assert_array_equal(wide.matmul(x), matrix.matmul(x))
    assert widened(pack_bf16(weights_of(65, 96))).format == BF16.format


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from([*PACKS, "mxfp4"]),
    rows=st.integers(1, 300).map(lambda n: 4 * n),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 64, 128]),
    tokens=st.sampled_from([1, 2, FEW, FEW + 1]),
    slab=st.sampled_from([64, 2048]),
)
def test_the_wide_form_gives_the_same_digits(
    kind: str, rows: int, groups: int, group: int, tokens: int, slab: int
) -> None:
    group = 32 if kind == "mxfp4" else group
    weights = weights_of(rows, group * groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "SLAB_ROWS", slab)
        dense = laid(pack_mxfp4(weights) if kind == "mxfp4" else PACKS[kind](weights, group))
        wide = widened(dense)
        assert wide.nbytes == dense.format.wide.nbytes(*dense.shape) > dense.nbytes
        assert wide.format == dense.format.wide == wide.format.wide
        assert str(wide.format) == str(dense.format)
        x = np.random.default_rng(1).standard_normal((tokens, group * groups), np.float32)
        np.testing.assert_array_equal(wide.matmul(x), dense.matmul(x))
        np.testing.assert_array_equal(wide.dequantize(), dense.dequantize())
        assert isinstance(wide, Columns)
        np.testing.assert_array_equal(wide.plain().dequantize(), dense.dequantize())
        picked = [0, rows - 1, rows // 2]
        np.testing.assert_array_equal(wide.rows(picked), dense.rows(picked))
        part = wide.slice_rows(rows // 4 * 2, rows)
        np.testing.assert_array_equal(part.dequantize(), dense.dequantize()[rows // 4 * 2 :])
        assert widened(wide).nbytes == wide.nbytes


@pytest.mark.parametrize("kind", [*PACKS, "mxfp4"])
def test_slices_of_whole_slabs_share_their_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the groups of V4's output projection are: copies would take memory that no plan counts."""
    monkeypatch.setattr(columns, "SLAB_ROWS", 64)
    weights = weights_of(256, 64)
    dense = laid(pack_mxfp4(weights) if kind == "mxfp4" else PACKS[kind](weights, 32))
    x = np.random.default_rng(1).standard_normal((1, 64), np.float32)
    for matrix in (dense, widened(dense)):
        assert isinstance(matrix, Columns)
        for number, part in enumerate(matrix.split(2)):
            assert isinstance(part, Columns)
            assert all(np.shares_memory(a, b) for a, b in ((part.codes, matrix.codes), (part.scales, matrix.scales)))
            rows = slice(128 * number, 128 * number + 128)
            np.testing.assert_array_equal(part.dequantize(), matrix.dequantize()[rows])
            np.testing.assert_array_equal(part.matmul(x), matrix.matmul(x)[:, rows])
            np.testing.assert_array_equal(widened(part).dequantize(), part.dequantize())
            np.testing.assert_array_equal(part.slice_rows(4, 40).dequantize(), part.dequantize()[4:40])
        assert not np.shares_memory(matrix.slice_rows(4, 68).codes, matrix.codes)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [*PACKS, "mxfp4", "nvfp4", *BLOCK_KINDS])
def test_nothing_is_kept_of_values_beside_the_arrays(kind: str) -> None:
    """Experts are read one after the other into those of one matrix."""

    def made(seed: int) -> Columns:
        weights = weights_of(64, 256, seed)
        if kind == "nvfp4":
            random = np.random.default_rng(seed)
            codes, scales = random.integers(0, 256, (64, 128), np.uint8), random.integers(0, 0x70, (64, 16), np.uint8)
            return laid(NVFP4(codes, scales, random.random((64, 1), np.float32)))
        if kind in BLOCK_KINDS:
            return laid(GGML(blocks(kind, (64, 256)).blocks[np.random.default_rng(seed).permutation(64)], TYPES[kind]))
        return laid((PACKS | {"mxfp4": pack_mxfp4})[kind](weights))

    x = weights_of(2, 256, 3)
    matrix, other = made(0), made(1)
    before = matrix.matmul(x), matrix.dequantize()
    for name, values in matrix.arrays().items():
        np.copyto(values, other.arrays()[name])
    assert (matrix.matmul(x) != before[0]).any()
    np.testing.assert_array_equal(matrix.matmul(x), other.matmul(x))
    np.testing.assert_array_equal(matrix.dequantize(), other.dequantize())


def test_what_has_no_such_form_stays_as_it_is() -> None:
    for matrix in (pack_bf16(weights_of(8, 32)), pack_mxfp4(weights_of(6, 32))):
        assert laid_out(matrix) is widened(matrix) is matrix
        assert not matrix.format.by_columns(matrix.shape[0])
    assert isinstance(laid_out(pack_int8(weights_of(7, 32))), Columns)
    assert isinstance(laid_out(symmetric(weights_of(7, 32))), Columns)


@pytest.mark.parametrize("step", [1, 7, 400])
def test_few_tokens_at_once_stay_near_the_reference(checkpoint: Callable[[str], object], step: int) -> None:
    """The released form, with MXFP4 experts: within 2e-4 of logits whose standard deviation is 2."""
    golden = tiny.load_golden("v4_released")
    session = load(checkpoint("v4_released")).session(1024)  # type: ignore[arg-type]
    ids = golden.ids.tolist()[: 100 * step]
    logits = np.concatenate([session.feed(ids[at : at + step]) for at in range(0, len(ids), step)])
    assert np.abs(logits - golden.logits[: len(ids)]).max() < 2e-4


@pytest.mark.parametrize(("rows", "width"), [(4, 16), (1028, 48), (2052, 512)])
def test_nvfp4_has_the_same_values_by_columns(rows: int, width: int) -> None:
    random = np.random.default_rng(rows)
    codes = random.integers(0, 256, (rows, width // 2), np.uint8)
    scales = random.integers(0, 127, (rows, width // 16), np.uint8)
    matrix = NVFP4(codes, scales, random.random((rows, 1), np.float32))
    wanted = matrix.dequantize()
    x = random.standard_normal((3, width), np.float32)
    made = laid_out(matrix)
    wide = widened(made)
    assert made.nbytes == matrix.nbytes and wide.nbytes == matrix.format.wide.nbytes(rows, width)
    np.testing.assert_array_equal(made.matmul(x), wide.matmul(x))
    for one in (made, wide):
        np.testing.assert_allclose(one.dequantize(), wanted, rtol=1e-6)
        np.testing.assert_allclose(one.matmul(x), x @ wanted.T, rtol=1e-4, atol=1e-3 * float(np.abs(wanted).max()))
        np.testing.assert_allclose(one.slice_rows(1, rows - 1, 2).dequantize(), wanted[1 : rows - 1 : 2], rtol=1e-6)
        assert one.finite()
    assert laid_out(matrix.slice_rows(0, rows - 1)).format == matrix.format  # by rows, as 4 does not divide them
    scales[-1, -1] = 0x7F
    assert not laid_out(NVFP4(codes, scales, matrix.factors)).finite()

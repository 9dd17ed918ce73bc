"""Every format through the one interface, against plain float32 arithmetic on its definition."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.quant.compute import threads
from numoe.quant.compute.kernels import FEW
from numoe.quant.dtypes import E2M1, decode_bf16, decode_e4m3, decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.formats import pack
from numoe.quant.formats.fp8 import FP8
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.formats.mxfp4 import MXFP4
from numoe.quant.formats.plain import BF16, F16, F32, F32Tiles

OUT, IN = 300, 608  # 3 blocks of 128 rows and 5 of 128 columns, the last of each partial; several scratch blocks


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def weights(out: int = OUT, columns: int = IN) -> np.ndarray:
    return rng().standard_normal((out, columns), dtype=np.float32)


FORMATS = {
    "f32": F32,
    "f16": lambda w: F16(w.astype(np.float16)),
    "bf16": pack.pack_bf16,
    "fp8 128x128": pack.pack_fp8,
    "fp8 64x32": lambda w: pack.pack_fp8(w, (64, 32), float_scales=True),
    "mxfp4": pack.pack_mxfp4,
    "int8 g32": pack.pack_int8,
    "int4 g32": pack.pack_int4,
    "int4 g16": lambda w: pack.pack_int4(w, 16, symmetric=True),
}


@pytest.fixture(params=FORMATS, scope="module")
def tensor(request):
    made = FORMATS[request.param](weights())
    assert str(made.format) == request.param
    return made


def test_matmul_is_x_times_the_transposed_weights(tensor):
    whole = tensor.dequantize()
    assert tensor.shape == whole.shape == (OUT, IN)
    for tokens in (1, 5, FEW + 1, 70):
        x = rng(tokens).standard_normal((tokens, IN), dtype=np.float32)
        expected = x.astype(np.float64) @ whole.T.astype(np.float64)
        out = np.full((tokens, OUT), np.nan, np.float32)
        assert tensor.matmul(x, out=out) is out
        np.testing.assert_allclose(out, expected, atol=2e-4)
        np.testing.assert_array_equal(tensor.matmul(x), out)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["f32", "f16", "bf16", "fp8 128x128", "fp8 64x32"]),
    rows=st.integers(1, 700),
    columns=st.sampled_from([32, 128, 608, 1024]),
    tokens=st.sampled_from([1, 2, 3, FEW, FEW + 1, 2 * FEW, 2 * FEW + 1]),
    small=st.booleans(),
)
def test_products_with_any_number_of_tokens(kind, rows, columns, tokens, small):
    """Made of many small products or not."""
    matrix = FORMATS[kind](weights(rows, columns))
    x = rng(1).standard_normal((tokens, columns), dtype=np.float32)
    expected = x.astype(np.float64) @ matrix.dequantize().T.astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "blas_has_small_products", lambda: small)
        np.testing.assert_allclose(matrix.matmul(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@settings(max_examples=60, deadline=None)
@given(
    tiles=st.integers(1, 20),
    columns=st.sampled_from([1, 32, 608, 2100]),
    tokens=st.integers(1, 130),
    small=st.booleans(),
)
def test_float32_in_tiles(tiles, columns, tokens, small):
    """Held so, a matrix is multiplied as by its rows, and takes as many bytes."""
    values = weights(tiles * 32, columns)
    matrix = F32(values).tiled()
    assert isinstance(matrix, F32Tiles) and matrix.nbytes == values.nbytes and matrix.format == F32.format
    x = rng(1).standard_normal((tokens, columns + 3), dtype=np.float32)[:, 3:]
    expected = x.astype(np.float64) @ values.T.astype(np.float64)
    out = np.full((tokens, tiles * 32 + 2), np.nan, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "blas_has_small_products", lambda: small)
        matrix.matmul(x, out=out[:, 1:-1])
    np.testing.assert_allclose(out[:, 1:-1], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.isnan(out[:, [0, -1]]).all()


def test_ranges_of_rows_in_tiles():
    """Of whole tiles the bytes are shared."""
    values = weights(160, 40)
    matrix = F32(values).tiled()
    np.testing.assert_array_equal(matrix.dequantize(), values)
    for start, stop, step in ((0, 160, 1), (32, 96, 1), (5, 7, 1), (31, 33, 1), (64, 70, 1), (70, 128, 1), (3, 150, 7)):
        part = matrix.slice_rows(start, stop, step)
        np.testing.assert_array_equal(part.dequantize(), values[start:stop:step])
        whole = step == 1 and start % 32 == stop % 32 == 0
        assert isinstance(part, F32Tiles) == np.shares_memory(part.values, matrix.values) == whole
    assert matrix.finite()
    values[159, 39] = np.inf
    assert not F32(values).tiled().finite()
    odd = F32(values[:150])
    assert odd.tiled() is odd


@pytest.mark.parametrize("factor", [2.0**-110, 2.0**-20, 1.0, 2.0**18, 2.0**70, 2.0**110])
@pytest.mark.parametrize("tokens", [1, 5])
def test_fp8_takes_any_scale(factor, tokens):
    stored = pack.pack_fp8(weights(200, 256), (64, 32), float_scales=True)
    matrix = FP8(stored.codes, stored.scales * np.float32(factor), stored.block)
    x = rng(1).standard_normal((tokens, 256), dtype=np.float32)
    expected = stored.matmul(x)
    np.testing.assert_allclose(matrix.matmul(x) / np.float32(factor), expected, rtol=1e-5, atol=1e-4)
    small = np.float32(2.0**-30)
    np.testing.assert_allclose(stored.matmul(x * small) / small, expected, rtol=1e-5, atol=1e-4)


def test_rows_look_up(tensor):
    picked = [OUT - 1, 0, 7, 7]
    np.testing.assert_array_equal(tensor.rows(np.array(picked)), tensor.dequantize()[picked])
    assert tensor.rows([]).shape == (0, IN)
    for outside in (OUT, -OUT - 1):
        with pytest.raises(IndexError):
            tensor.rows([outside])


def test_split_shares_the_bytes(tensor):
    whole = tensor.dequantize()
    for parts in (1, 2, 3):  # 150 and 100 rows: neither a multiple of the 128-row block
        pieces = tensor.split(parts)
        np.testing.assert_array_equal(np.concatenate([piece.dequantize() for piece in pieces]), whole)
        assert all(piece.shape == (OUT // parts, IN) for piece in pieces)
        stored = "values" if hasattr(tensor, "values") else "codes"
        assert all(np.shares_memory(getattr(piece, stored), getattr(tensor, stored)) for piece in pieces)
    inner = pieces[1].slice_rows(10, 60)
    np.testing.assert_array_equal(inner.dequantize(), whole[110:160])
    with pytest.raises(ValueError, match="7 equal parts"):
        tensor.split(7)


def test_dequantize_rows_of_any_range(tensor):
    whole = tensor.dequantize()
    for start, stop in ((0, 1), (100, 260), (127, 129), (299, 300)):
        out = np.empty((stop - start, IN), np.float32)
        tensor.dequantize_rows(start, stop, out)
        np.testing.assert_array_equal(out, whole[start:stop])


def test_threads_do_not_disturb_each_other():
    tensors = [make(weights()) for make in FORMATS.values()]
    x = rng(3).standard_normal((2, IN), dtype=np.float32)
    expected = [made.matmul(x) for made in tensors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(lambda made: made.matmul(x), tensors), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_matmul_refuses_other_shapes_and_dtypes(tensor):
    for x in (np.zeros((1, IN + 1), np.float32), np.zeros((1, IN)), np.zeros(IN, np.float32)):
        with pytest.raises(ValueError, match="matmul takes float32"):
            tensor.matmul(x)


def test_rows_longer_than_the_scratch():
    wide = weights(3, 1 << 17 | 32)
    x = rng(5).standard_normal((1, wide.shape[1]), dtype=np.float32)
    made = pack.pack_int8(wide)
    expected = x.astype(np.float64) @ made.dequantize().T
    np.testing.assert_allclose(made.matmul(x), expected, atol=5e-3)


def test_fp8_is_code_times_block_scale():
    codes = rng().integers(0, 127, (OUT, IN), dtype=np.uint8)
    scales = rng().integers(120, 134, (3, 5), dtype=np.uint8)
    rows, columns = np.arange(OUT) // 128, np.arange(IN) // 128
    expected = decode_e4m3(codes) * decode_e8m0(scales)[rows][:, columns]
    np.testing.assert_array_equal(FP8(codes, scales).dequantize(), expected)


def test_mxfp4_is_two_values_a_byte_low_nibble_first():
    codes = rng().integers(0, 256, (4, 32), dtype=np.uint8)
    scales = rng().integers(120, 134, (4, 2), dtype=np.uint8)
    values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1).reshape(4, 64)
    np.testing.assert_array_equal(
        MXFP4(codes, scales).dequantize(), values * np.repeat(decode_e8m0(scales), 32, axis=1)
    )


def test_int8_and_int4_are_affine_in_their_codes():
    scales = rng().random((4, 2), dtype=np.float32).astype(np.float16)
    bias = rng(1).standard_normal((4, 2), dtype=np.float32)
    spread = np.repeat(scales.astype(np.float32), 32, axis=1)
    codes = rng().integers(-128, 128, (4, 64), dtype=np.int8)
    np.testing.assert_array_equal(INT8(codes, scales).dequantize(), codes * spread)
    np.testing.assert_array_equal(INT8(codes, scales, bias).dequantize(), codes * spread + np.repeat(bias, 32, axis=1))
    packed = rng().integers(0, 256, (4, 32), dtype=np.uint8)
    halves = packed.reshape(4, 2, 16)
    values = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(4, 64).astype(np.float32)
    np.testing.assert_array_equal(INT4(packed, scales).dequantize(), (values - 8) * spread)
    np.testing.assert_array_equal(
        INT4(packed, scales, bias).dequantize(), values * spread + np.repeat(bias, 32, axis=1)
    )


def test_nbytes_counts_codes_scales_and_bias():
    w = weights(256, 512)
    assert pack.pack_fp8(w).nbytes == 256 * 512 + 2 * 4
    assert pack.pack_mxfp4(w).nbytes == 256 * 512 * 17 // 32
    assert pack.pack_int4(w).nbytes == 256 * 512 * 20 // 32  # as GGUF's Q4_1
    assert pack.pack_int4(w, symmetric=True).nbytes == 256 * 512 * 18 // 32  # Q4_0
    assert pack.pack_int8(w).nbytes == 256 * 512 * 36 // 32
    assert pack.pack_int8(w, symmetric=True).nbytes == 256 * 512 * 34 // 32  # Q8_0


def test_finite_sees_every_kind_of_nan_and_infinity():
    w = weights(64, 64)
    f16, bf16 = w.astype(np.float16), pack.pack_bf16(w).codes
    assert F32(w).finite() and F16(f16).finite() and BF16(bf16).finite()
    for value in (np.nan, np.inf, -np.inf):
        for values in (w.copy(), f16.copy()):
            values[-1, -1] = value
            assert not (F32 if values.dtype == np.float32 else F16)(values).finite()
        codes = bf16.copy()
        codes[0, 0] = np.float32(value).view(np.uint32) >> 16
        assert not BF16(codes).finite()
        assert not np.isfinite(decode_bf16(codes)).all()
    for make in (pack.pack_fp8, pack.pack_mxfp4, pack.pack_int8, pack.pack_int4):
        made = make(w)
        assert made.finite()
        scales = made.scales.copy()
        scales[0, 0] = 255 if scales.dtype == np.uint8 else np.nan
        assert not type(made)(made.codes, scales).finite()
    fp8 = pack.pack_fp8(w)
    for code in (0x7F, 0xFF):
        codes = fp8.codes.copy()
        codes[5, 5] = code
        assert not FP8(codes, fp8.scales).finite()
    int4 = pack.pack_int4(w)
    bias = int4.bias.copy()
    bias[0, 0] = np.inf
    assert not INT4(int4.codes, int4.scales, bias).finite()


def test_scales_of_the_wrong_shape_are_refused():
    codes = np.zeros((4, 48), np.uint8)
    with pytest.raises(InputError, match="fp8"):
        FP8(codes, np.zeros((2, 1), np.uint8))
    with pytest.raises(InputError, match="mxfp4"):
        MXFP4(np.zeros((4, 24), np.uint8), np.zeros((4, 1), np.uint8))
    with pytest.raises(InputError, match="int8"):
        INT8(codes.view(np.int8), np.zeros((4, 5), np.float16))
    with pytest.raises(InputError, match="int4"):
        INT4(codes, np.zeros((4, 3), np.float16), np.zeros((4, 2), np.float16))

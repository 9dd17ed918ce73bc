"""Quantizers: how far a weight may move, and that what is on the grid already does not move at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.quant import pack
from numoe.quant.dtypes import decode_e8m0
from numoe.quant.errors import InputError

PACKERS = {
    "bf16": pack.pack_bf16,
    "int8 g32": pack.pack_int8,
    "int8 g64": lambda weights: pack.pack_int8(weights, 64, np.float32),
    "int4 g32": pack.pack_int4,
    "int4 g16": lambda weights: pack.pack_int4(weights, 16, symmetric=True),
    "fp8 128x128": pack.pack_fp8,
    "fp8 32x48": lambda weights: pack.pack_fp8(weights, (32, 48), float_scales=True),
    "mxfp4": pack.pack_mxfp4,
}


def draw(seed: int, scale: float = 0.05, rows: int = 37, columns: int = 192) -> np.ndarray:
    weights = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)
    weights[3] = 0
    weights[5, :64] = 0.25 * np.float32(scale)
    return weights


def steps(tensor, weights: np.ndarray) -> np.ndarray:
    """The distance between neighbouring grid points around each weight, (out, in)."""
    name = type(tensor).__name__
    magnitude = np.abs(weights)
    if name == "BF16":
        return np.maximum(2.0 ** (np.floor(np.log2(np.maximum(magnitude, 1e-30))) - 7), 1e-30)
    if name in ("INT8", "INT4"):
        scales = np.repeat(tensor.scales.astype(np.float32), tensor.group, axis=1)
        # Scale and bias were rounded to float16 themselves, by at most 2^-11 of their size.
        slack = 0 if tensor.bias is None else np.repeat(np.abs(tensor.bias.astype(np.float32)), tensor.group, axis=1)
        return scales * (1 + 15 * 2**-10) + slack * 2**-10
    if name == "FP8":
        height, width = tensor.block
        factors = tensor.scales if tensor.scales.dtype == np.float32 else decode_e8m0(tensor.scales)
        scales = np.repeat(np.repeat(factors, height, axis=0), width, axis=1)[: len(weights), : weights.shape[1]]
        mantissa_bits, smallest = 3, 2.0**-6
    else:
        scales = np.repeat(decode_e8m0(tensor.scales), 32, axis=1)
        mantissa_bits, smallest = 1, 1.0
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    return scales * 2.0 ** (np.floor(np.log2(np.maximum(magnitude / scales, smallest))) - mantissa_bits)


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-2, 0.05, 3.0]))
def test_error_is_at_most_half_a_step(name, seed, scale):
    weights = draw(seed, scale)
    tensor = PACKERS[name](weights)
    assert tensor.format == name
    error = np.abs(tensor.dequantize() - weights)
    assert (error <= steps(tensor, weights) / 2 * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-2, 0.05, 3.0]))
def test_packing_dequantized_weights_gives_the_same_codes(name, seed, scale):
    once = PACKERS[name](draw(seed, scale))
    again = PACKERS[name](once.dequantize())
    np.testing.assert_array_equal(again.codes, once.codes)
    np.testing.assert_allclose(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PACKERS)
def test_extreme_magnitudes_stay_finite(name):
    for scale in (1e-38, 1e-7, 1e6, 1e37):
        weights = draw(1, scale)
        tensor = PACKERS[name](weights)
        assert tensor.finite()
        assert np.isfinite(tensor.dequantize()).all()


def test_small_float16_scales_do_not_clip():
    weights = draw(2, 1e-5)  # scales far below float16's normal range
    tensor = pack.pack_int8(weights)
    error = np.abs(tensor.dequantize() - weights)
    assert (error <= np.repeat(tensor.scales.astype(np.float32), 32, axis=1) * 0.501).all()


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(name, value):
    weights = draw(0)
    weights[-1, -1] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        PACKERS[name](weights)


def test_rows_that_do_not_divide_into_groups_are_refused():
    weights = np.zeros((4, 40), np.float32)
    for packer in (pack.pack_int8, pack.pack_int4, pack.pack_mxfp4):
        with pytest.raises(InputError, match="groups of 32"):
            packer(weights)

"""Quantizers: how far a weight may move, that what is on the grid already does not move at all, and what is spared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.quant.dtypes import decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.formats import pack

PACKERS = {
    "bf16": pack.pack_bf16,
    "int8 g32": pack.pack_int8,
    "int8 g64": lambda weights: pack.pack_int8(weights, 64, scale_dtype=np.float32),
    "int8 g16": lambda weights: pack.pack_int8(weights, 16, symmetric=True),
    "int4 g16": lambda weights: pack.pack_int4(weights, 16, symmetric=True),
    "fp8 128x128": pack.pack_fp8,
    "fp8 32x48": lambda weights: pack.pack_fp8(weights, (32, 48), float_scales=True),
    "mxfp4": pack.pack_mxfp4,
}
EVERY = PACKERS | {"int4 g32": pack.pack_int4}  # whose search may cut off extremes


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
        return scales * (1 + 128 * 2**-10) + slack * 2**-10
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
    assert str(tensor.format) == name
    error = np.abs(tensor.dequantize() - weights)
    assert (error <= steps(tensor, weights) / 2 * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-2, 0.05, 3.0]))
def test_packing_dequantized_weights_gives_the_same_codes(name, seed, scale):
    once = PACKERS[name](draw(seed, scale))
    again = PACKERS[name](once.dequantize())
    np.testing.assert_array_equal(again.codes, once.codes)
    np.testing.assert_allclose(again.dequantize(), once.dequantize(), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("name", EVERY)
def test_extreme_magnitudes_stay_finite(name):
    for scale in (1e-38, 1e-7, 1e6, 1e37):
        weights = draw(1, scale)
        tensor = EVERY[name](weights)
        assert tensor.finite()
        assert np.isfinite(tensor.dequantize()).all()


def test_small_float16_scales_do_not_clip():
    weights = draw(2, 1e-5)  # scales far below float16's normal range
    tensor = pack.pack_int8(weights)
    error = np.abs(tensor.dequantize() - weights)
    # 2^-25: the bias is a multiple of 2^-24.
    assert (error <= np.repeat(tensor.scales.astype(np.float32), 32, axis=1) * 0.501 + 2**-25).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_refused(name, value):
    weights = draw(0)
    weights[-1, -1] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        EVERY[name](weights)


@pytest.mark.parametrize("moment", ["mean", "square"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_numbers_are_refused(moment, value):
    moments = {"mean": np.ones(192, np.float32), "square": np.ones(192, np.float32)}
    moments[moment][7] = value
    with pytest.raises(InputError, match="multiplied with contains NaN or infinity"):
        pack.pack_int4(draw(0), inputs=pack.Moments(**moments))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-10, 1e-7, 1e-6, 1e-3, 1.0, 1e4, 1e8, 1e37])
@pytest.mark.parametrize(("group", "levels", "packer"), [(32, 255, pack.pack_int8), (64, 15, pack.pack_int4)])
def test_what_float16_takes_is_known_beforehand(group, levels, packer, scale):
    """What is said to be little is little: such a matrix is off by little more than one of a common magnitude."""
    weights = np.random.default_rng(0).uniform(-1, 1, (16, 256)).astype(np.float32)

    def error(values):
        exact = values.astype(np.float64)
        return np.linalg.norm(packer(values, group).dequantize() - exact) / max(np.linalg.norm(exact), 1e-300)

    scaled = weights * np.float32(scale)
    lost, whole = pack.float16_loss(scaled, group, levels)
    assert np.isfinite([lost, whole]).all()
    fits = lost <= whole / (2 * levels) ** 2
    assert fits <= (error(scaled) <= 1.5 * error(weights))
    if scale != 1e-6:
        assert fits == (scale in (0.0, 1e-3, 1.0, 1e4))


def test_rows_that_do_not_divide_into_groups_are_refused():
    weights = np.zeros((4, 40), np.float32)
    for packer in (pack.pack_int8, pack.pack_int4, pack.pack_mxfp4):
        with pytest.raises(InputError, match="groups of 32"):
            packer(weights)


# Searched scales


def four_bits(rng: np.random.Generator, offset: float, shape: tuple[int, ...] = (64, 3, 32)) -> np.ndarray:
    """Weights on 16 levels of float16 scale and minimum a group, as GGUF's Q4_1 has them."""
    codes = rng.integers(0, 16, shape)
    codes[..., 0], codes[..., 1] = 0, 15
    scales, minimums = (rng.uniform(a, a + 1, (*shape[:-1], 1)).astype(np.float16) for a in (1, offset))
    values = codes.astype(np.float32) * scales.astype(np.float32) + minimums.astype(np.float32)
    return values.reshape(len(codes), -1)


@pytest.mark.parametrize("offset", [-8.0, 0.0, 40.0])
def test_sixteen_levels_are_found_again(offset):
    weights = four_bits(np.random.default_rng(0), offset)
    np.testing.assert_array_equal(pack.pack_int4(weights).dequantize(), weights)
    rounding = np.abs(pack.pack_int8(weights).dequantize() - weights)
    assert rounding.max() < 0.01 + 2**-11 * np.abs(weights).max()  # of scale and bias, not of codes: steps are 0.06


@pytest.mark.parametrize("group", [16, 32, 60, 64, 128])
def test_searched_levels_beat_those_from_least_to_greatest(group):
    rng = np.random.default_rng(group)
    shape = 256, 4 * group
    for draw in (rng.standard_normal(shape), rng.standard_t(5, shape), rng.uniform(-1, 1, shape) ** 3):
        weights = draw.astype(np.float32)
        grouped = weights.reshape(256, 4, group)
        low, high = grouped.min(axis=-1, keepdims=True), grouped.max(axis=-1, keepdims=True)
        plain = low + np.rint((grouped - low) / (high - low) * 15) * (high - low) / 15
        searched = pack.pack_int4(weights, group).dequantize()
        assert ((searched - weights) ** 2).sum() < 0.96 * ((plain - grouped) ** 2).sum()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-38, 1e-7, 1e-3, 1.0, 1e6, 1e37]))
def test_searched_levels_are_sane_at_every_magnitude(seed, scale):
    weights = np.random.default_rng(seed).standard_normal((5, 64), dtype=np.float32) * np.float32(scale)
    weights[1] = 0
    weights[2, :32] = scale
    tensor = pack.pack_int4(weights)
    assert tensor.finite()
    values = tensor.dequantize()
    assert not values[1].any()
    if 1e-3 <= scale <= 1:
        assert np.abs(values - weights).max() <= np.ptp(weights) / 6
        np.testing.assert_allclose(values[2, :32], scale, rtol=1e-3)


def test_what_matters_is_spared():
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((128, 256), dtype=np.float32)
    strengths = np.exp(rng.standard_normal(256))
    strengths[64:128] = 0  # a group that no input reaches
    inputs = ((rng.standard_normal((1000, 256)) + 0.5 * rng.standard_normal(256)) * strengths).astype(np.float32)
    moments = pack.Moments(inputs.mean(axis=0), (inputs**2).mean(axis=0))

    def errors(given):
        """Of the products: mean square, and mean square of the mean over all tokens."""
        change = inputs @ (pack.pack_int4(weights, 64, inputs=given).dequantize() - weights).T
        return float((change**2).mean()), float((change.mean(axis=0) ** 2).mean())

    without = errors(None)
    spared = errors(pack.Moments(np.zeros_like(moments.mean), moments.square))
    centred = errors(moments)
    assert spared[0] < 0.8 * without[0]
    assert centred[0] < spared[0]
    assert centred[1] < 0.5 * spared[1]
    tiny = pack.Moments(moments.mean * np.float32(1e-9), moments.square * np.float32(1e-18))
    assert errors(tiny) == pytest.approx(centred, rel=1e-2)
    alike = pack.Moments(np.zeros(256, np.float32), np.full(256, 7, np.float32))
    assert errors(alike) == errors(None)

"""Quantizers: a float32 matrix (out, in) to a QTensor, each weight to the nearest value its group's scale allows.

Every function works in blocks of rows, so that beyond its input and output it needs little memory, and raises
InputError for weights that are NaN or infinite or rows that do not divide into groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import all_finite, block_rows, pack_nibbles
from numoe.quant.dtypes import (
    E2M1_MAX,
    E4M3_MAX,
    Float32,
    decode_e8m0,
    encode_bf16,
    encode_e2m1,
    encode_e4m3,
    encode_e8m0,
)
from numoe.quant.errors import InputError
from numoe.quant.formats.fp8 import FP8
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.formats.plain import BF16

# The largest magnitudes that still round to the largest code when the next binade is not there.
_E4M3_REACH = np.float32(E4M3_MAX + 16)
_E2M1_REACH = np.float32(E2M1_MAX + 1)
# Ranges to try for sixteen levels, as shares of the whole: cutting off the extremes makes the steps between smaller.
_REACHES = (0.7, 0.8, 0.9, 1.0)
_ROUNDS = 5


@dataclass(frozen=True)
class Moments:
    """What a matrix is multiplied with, of many tokens: mean and mean square of each channel, (in,) float32."""

    mean: Float32
    square: Float32


def pack_bf16(weights: Float32) -> BF16:
    """weights (out, in) -> bf16."""
    _check(weights, 1)
    codes = np.empty(weights.shape, np.uint16)
    for rows in _row_blocks(weights):
        codes[rows] = encode_bf16(weights[rows])
    return BF16(codes)


def pack_int8(
    weights: Float32, group: int = 32, symmetric: bool = False, scale_dtype: type[np.floating] = np.float16
) -> INT8:
    """weights (out, in) -> int8: scale = range of the group / 255, and a bias; symmetric: scale = absmax / 127."""
    _check(weights, group)
    scales = np.empty((len(weights), weights.shape[1] // group), scale_dtype)
    bias = None if symmetric else np.empty_like(scales)
    codes = np.empty(weights.shape, np.int8)
    for rows in _row_blocks(weights):
        grouped = _grouped(weights[rows], group)
        if bias is None:
            scales[rows] = _store_scales(np.abs(grouped).max(axis=-1) / np.float32(127), scale_dtype)
        else:
            middle, width = _extent(grouped)
            scales[rows] = _store_scales(width / np.float32(255), scale_dtype)
            bias[rows] = _fit(middle + np.float32(0.5) * scales[rows].astype(np.float32), scale_dtype)  # code 0
        steps = _steps(grouped, scales[rows], None if bias is None else bias[rows])
        codes[rows] = np.clip(steps, -127 if symmetric else -128, 127).reshape(-1, weights.shape[1])
    return INT8(codes, scales, bias)


def pack_int4(
    weights: Float32,
    group: int = 32,
    symmetric: bool = False,
    scale_dtype: type[np.floating] = np.float16,
    inputs: Moments | None = None,
) -> INT4:
    """weights (out, in) -> int4: of some scales and biases those with the least error; symmetric: scale = absmax / 7.

    The error is that of the weights, or with `inputs` that of their products. Symmetric scales leave them aside.
    """
    _check(weights, group)
    if inputs is not None and not (np.isfinite(inputs.mean).all() and np.isfinite(inputs.square).all()):
        raise InputError("what the weights are multiplied with contains NaN or infinity; check the model's files")
    scales = np.empty((len(weights), weights.shape[1] // group), scale_dtype)
    bias = None if symmetric else np.empty_like(scales)
    codes = np.empty((len(weights), weights.shape[1] // 2), np.uint8)
    shares = _shares(np.ones(weights.shape[1], np.float32) if inputs is None else inputs.square, group)
    for rows in _row_blocks(weights):
        grouped = _grouped(weights[rows], group)
        if bias is None:
            scales[rows] = _store_scales(np.abs(grouped).max(axis=-1) / np.float32(7), scale_dtype)
            steps = _steps(grouped, scales[rows], None) + np.float32(8)
        else:
            scale, low = _searched(grouped, shares)
            scales[rows] = _store_scales(scale, scale_dtype)
            # Rounding the scale has moved the levels: the bias makes up for it.
            rest = _rest(grouped, _steps(grouped, scales[rows], low), scales[rows])
            low = np.einsum("ngk,gk->ng", rest, shares)
            steps = _steps(grouped, scales[rows], low)
            if inputs is not None:
                low += _centring(_rest(grouped, steps, scales[rows]) - low[..., None], inputs)
            bias[rows] = _fit(low, scale_dtype)
        nibbles = np.clip(steps, 1 if symmetric else 0, 15).astype(np.uint8)
        codes[rows] = pack_nibbles(nibbles).reshape(-1, weights.shape[1] // 2)
    return INT4(codes, scales, bias)


def pack_fp8(weights: Float32, block: tuple[int, int] = (128, 128), float_scales: bool = False) -> FP8:
    """weights (out, in) -> fp8 e4m3 in blocks of (height, width).

    Scales are e8m0, the least power of two under which nothing saturates, or absmax / 448 when `float_scales`.
    """
    _check(weights, 1)
    height, width = block
    starts = np.arange(0, weights.shape[1], width)
    scales = np.empty((-(-len(weights) // height), len(starts)), np.float32 if float_scales else np.uint8)
    codes = np.empty(weights.shape, np.uint8)
    for index in range(len(scales)):
        rows = slice(index * height, (index + 1) * height)
        largest: Float32 = np.maximum.reduceat(np.abs(weights[rows]).max(axis=0), starts)
        scales[index] = largest / np.float32(E4M3_MAX) if float_scales else _power_of_two(largest / _E4M3_REACH)
        factors = scales[index] if float_scales else decode_e8m0(scales[index])
        codes[rows] = encode_e4m3(weights[rows] * np.repeat(_inverse(factors), width)[: weights.shape[1]])
    return FP8(codes, scales, block)


def pack_mxfp4(weights: Float32) -> MXFP4:
    """weights (out, in) -> mxfp4: e2m1 codes, and a group of 32 the least power of two under which none saturates."""
    _check(weights, MX_GROUP)
    scales = np.empty((len(weights), weights.shape[1] // MX_GROUP), np.uint8)
    codes = np.empty((len(weights), weights.shape[1] // 2), np.uint8)
    for rows in _row_blocks(weights):
        grouped = _grouped(weights[rows], MX_GROUP)
        scales[rows] = _power_of_two(np.abs(grouped).max(axis=-1) / _E2M1_REACH)
        nibbles = encode_e2m1(grouped * _inverse(decode_e8m0(scales[rows]))[..., None])
        pairs = nibbles.reshape(len(nibbles), -1, 2)
        codes[rows] = pairs[..., 0] | pairs[..., 1] << 4
    return MXFP4(codes, scales)


def float16_loss(weights: Float32, group: int, levels: int) -> tuple[float, float]:
    """What float16 adds to the error of a matrix on `levels` + 1 even levels a group, and what is in it.

    Two sums over the groups: of the mean square by which steps are coarser than they could be and minimums are off,
    and of the square of the largest weight. Both float64, in which no float32 overflows.
    """
    grouped = _grouped(weights, group)
    low, high = grouped.min(axis=-1).astype(np.float64), grouped.max(axis=-1).astype(np.float64)
    step = (high - low) / levels
    minimum = low if levels < 128 else low + 128 * step  # the weight of code 0
    limit = np.finfo(np.float32).max
    stored = _store_scales(np.minimum(step, limit).astype(np.float32), np.float16).astype(np.float64)
    cut = levels * np.maximum(step * (1 - 2**-10) - stored, 0)
    offset = _fit(np.clip(minimum, -limit, limit).astype(np.float32), np.float16) - minimum
    lost = np.maximum(stored**2 - step**2, 0) / 12 + cut**2 + offset**2
    return float(lost.sum()), float((np.maximum(-low, high) ** 2).sum())


def _check(weights: Float32, group: int) -> None:
    if weights.ndim != 2 or weights.dtype != np.float32:
        raise InputError(f"weights must be a float32 matrix, not {weights.dtype} of shape {weights.shape}")
    if group > 1 and (weights.shape[1] % group or group % 2):
        raise InputError(
            f"rows of {weights.shape[1]} weights do not divide into groups of {group}; choose an even divisor"
        )
    if not all_finite(weights):
        raise InputError("the weights contain NaN or infinity and cannot be quantized; check their file")


def _row_blocks(weights: Float32) -> Iterator[slice]:
    step = block_rows(weights.shape[1])
    return (slice(start, start + step) for start in range(0, len(weights), step))


def _grouped(rows: Float32, group: int) -> Float32:
    return rows.reshape(len(rows), -1, group)  # (n, groups, g)


def _fit(values: Float32, dtype: type[np.floating]) -> NDArray:
    # Saturates where float16 would overflow to infinity.
    limit = np.finfo(dtype).max
    return np.clip(values, -limit, limit).astype(dtype)


def _store_scales(scales: Float32, dtype: type[np.floating]) -> NDArray:
    stored = _fit(scales, dtype)
    # A scale below float16's normal range may lose most of its digits: rounded up it never makes a code saturate.
    short = np.abs(stored.astype(np.float32)) < np.abs(scales) * np.float32(1 - 2**-10)
    away = np.copysign(np.finfo(dtype).max, scales).astype(dtype)
    return np.where(short, np.nextafter(stored, away), stored)


def _extent(grouped: Float32) -> tuple[Float32, Float32]:
    """The middle and the width of each group's range, (n, groups) both."""
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    return low / 2 + high / 2, high - low


def _steps(grouped: Float32, scales: NDArray, bias: NDArray | None) -> Float32:
    """Codes before clipping: (w - bias) / scale to the nearest integer."""
    steps = grouped if bias is None else grouped - bias.astype(np.float32)[..., None]
    steps = steps * _inverse(scales)[..., None]
    return np.rint(steps, out=steps)


def _rest(grouped: Float32, steps: Float32, scales: NDArray) -> Float32:
    """What the codes 0..15 leave of the weights: w - scale * code."""
    return grouped - np.clip(steps, 0, 15) * scales.astype(np.float32)[..., None]


def _centring(error: Float32, inputs: Moments) -> Float32:
    """What to add to biases (n, groups), so that errors (n, groups, g) change a row's product less on the average.

    The mean input makes r = sum_i error_i mean_i of them. Adding c_g to the bias of group g takes c_g M_g away from r,
    with M_g = sum mean_i, and costs c_g^2 V_g, with V_g = sum square_i. sum_g c_g^2 V_g + (r - sum_g c_g M_g)^2 is
    least at c_g = r (M_g / V_g) / (1 + sum_h M_h^2 / V_h).
    """
    groups, size = error.shape[1:]
    shift = error.reshape(len(error), -1) @ inputs.mean
    means, squares = (moment.reshape(groups, size).sum(axis=1) for moment in (inputs.mean, inputs.square))
    pull = means * _inverse(squares)
    return shift[:, None] * (pull / (1 + means @ pull))


def _shares(importance: Float32, group: int) -> Float32:
    """importance (in,) -> (groups, g), which sum to 1 in each group."""
    grouped = importance.astype(np.float32).reshape(-1, group)
    total = grouped.sum(axis=1, keepdims=True)
    return np.where(total > 0, grouped * _inverse(total), np.float32(1 / group))


def _searched(grouped: Float32, shares: Float32) -> tuple[Float32, Float32]:
    """Scales and lowest levels (n, groups) near the least of sum_i a_i (w_i - s q_i - b)^2 for q_i in 0..15.

    Given the codes, this is a weighted regression: s = cov(w, q) / var(q), b = mean(w) - s mean(q), and the error is
    var(w) - cov(w, q)^2 / var(q). Each reach gives codes and so such a pair; the best one gives codes anew.
    """
    middle, width = _extent(grouped)
    grouped = (grouped - middle[..., None]) * _inverse(width)[..., None]  # in -1/2..1/2
    mean = np.einsum("ngk,gk->ng", grouped, shares)
    best = np.full_like(middle, -1)
    scales, low = np.zeros_like(middle), np.zeros_like(middle)
    for reach in _REACHES:
        scale = np.full_like(width, reach / 15)
        bias = np.full_like(width, -reach / 2)
        for _ in range(_ROUNDS):
            codes = _steps(grouped, scale, bias)
            np.clip(codes, 0, 15, out=codes)
            weighted = codes * shares
            center = weighted.sum(axis=-1)
            variance = np.einsum("ngk,ngk->ng", weighted, codes) - center * center
            covariance = np.einsum("ngk,ngk->ng", weighted, grouped) - center * mean
            scale = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > np.float32(1e-6))
            bias = mean - scale * center
            gain = scale * covariance
            better = gain > best
            best[better] = gain[better]
            scales[better] = scale[better]
            low[better] = bias[better]
    return scales * width, low * width + middle


def _power_of_two(ratio: Float32) -> NDArray[np.uint8]:
    # The least power of two that is not below `ratio`; frexp gives m * 2^e with m in [.5, 1).
    mantissa, exponent = np.frexp(ratio)
    return encode_e8m0(np.ldexp(np.float32(1), exponent - (mantissa <= 0.5)))


def _inverse(scales: NDArray) -> Float32:
    # Zero for a scale of zero, and for one so small that its inverse overflows: such a group is all zeros.
    factors = scales.astype(np.float32)
    usable = np.abs(factors) >= np.finfo(np.float32).tiny
    return np.divide(np.float32(1), factors, out=np.zeros_like(factors), where=usable)

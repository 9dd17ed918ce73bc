"""Quantizers: a float32 matrix (out, in) to a QTensor, each weight to the nearest value its group's scale allows.

Every function works in blocks of rows, so that beyond its input and output it needs little memory, and raises
InputError for weights that are NaN or infinite or rows that do not divide into groups.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

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
from numoe.quant.kernels import all_finite, block_rows, pack_nibbles
from numoe.quant.qtensor import BF16, FP8, INT4, INT8, MX_GROUP, MXFP4

# The largest magnitudes that still round to the largest code when the next binade is not there.
_E4M3_REACH = np.float32(E4M3_MAX + 16)
_E2M1_REACH = np.float32(E2M1_MAX + 1)
# On normally distributed weights these few bring three quarters of what 46 bring over 1.0 alone.
_REACHES = (0.87, 0.93, 1.0, 1.06)


def pack_bf16(weights: Float32) -> BF16:
    """weights (out, in) -> bf16."""
    _check(weights, 1)
    codes = np.empty(weights.shape, np.uint16)
    for rows in _row_blocks(weights):
        codes[rows] = encode_bf16(weights[rows])
    return BF16(codes)


def pack_int8(weights: Float32, group: int = 32, scale_dtype: type[np.floating] = np.float16) -> INT8:
    """weights (out, in) -> symmetric int8: scale = absmax of the group / 127."""
    _check(weights, group)
    scales = np.empty((len(weights), weights.shape[1] // group), scale_dtype)
    codes = np.empty(weights.shape, np.int8)
    for rows in _row_blocks(weights):
        grouped = _grouped(weights[rows], group)
        scales[rows] = _store_scales(np.abs(grouped).max(axis=-1) / np.float32(127), scale_dtype)
        steps = grouped * _inverse(scales[rows])[..., None]
        codes[rows] = np.clip(np.rint(steps), -127, 127).reshape(-1, weights.shape[1])
    return INT8(codes, scales)


def pack_int4(
    weights: Float32,
    group: int = 32,
    symmetric: bool = False,
    scale_dtype: type[np.floating] = np.float16,
    search: bool = False,
) -> INT4:
    """weights (out, in) -> int4: bias = minimum of the group and scale = range / 15; symmetric: scale = absmax / 7.

    `search`, for symmetric ones: of some scales, which may be negative, the one with the least squared error.
    """
    _check(weights, group)
    if search and not symmetric:
        raise ValueError("only symmetric scales are searched")
    scales = np.empty((len(weights), weights.shape[1] // group), scale_dtype)
    bias = None if symmetric else np.empty_like(scales)
    codes = np.empty((len(weights), weights.shape[1] // 2), np.uint8)
    for rows in _row_blocks(weights):
        grouped = _grouped(weights[rows], group)
        if bias is None:
            exact = _searched_scales(grouped) if search else np.abs(grouped).max(axis=-1) / np.float32(7)
            scales[rows] = _store_scales(exact, scale_dtype)
            steps = grouped * _inverse(scales[rows])[..., None] + np.float32(8)
        else:
            low = grouped.min(axis=-1)
            bias[rows] = _fit(low, scale_dtype)
            scales[rows] = _store_scales((grouped.max(axis=-1) - low) / np.float32(15), scale_dtype)
            offset = bias[rows].astype(np.float32)
            steps = (grouped - offset[..., None]) * _inverse(scales[rows])[..., None]
        nibbles = np.clip(np.rint(steps), 1 if symmetric and not search else 0, 15).astype(np.uint8)
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


def _searched_scales(grouped: Float32) -> Float32:
    """Scales s (n, groups) near the least of sum_i (w_i - s q_i)^2, with q_i = w_i / s rounded into -8..7.

    Each reach r sends the weight of the largest magnitude to -8 / r. Given the codes q, the error is least, namely
    sum w^2 - (sum w q)^2 / sum q^2, at s = sum w q / sum q^2.
    """
    peak = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=-1)[..., None], axis=-1)
    scaled = grouped * _inverse(peak)
    scaled *= np.float32(-8)  # the peak is at -8
    best = np.zeros(grouped.shape[:2], np.float32)
    scales = np.zeros_like(best)
    codes = np.empty_like(scaled)
    for reach in _REACHES:
        np.rint(np.multiply(scaled, np.float32(1 / reach), out=codes), out=codes)
        np.clip(codes, -8, 7, out=codes)
        products = np.einsum("...i,...i", scaled, codes)
        squares = np.maximum(np.einsum("...i,...i", codes, codes), np.float32(1))
        gain = products * products / squares
        better = gain > best
        best[better] = gain[better]
        scales[better] = (products / squares)[better]
    return scales * (peak[..., 0] / np.float32(-8))


def _power_of_two(ratio: Float32) -> NDArray[np.uint8]:
    # The least power of two that is not below `ratio`; frexp gives m * 2^e with m in [.5, 1).
    mantissa, exponent = np.frexp(ratio)
    return encode_e8m0(np.ldexp(np.float32(1), exponent - (mantissa <= 0.5)))


def _inverse(scales: NDArray) -> Float32:
    # Zero for a scale of zero, and for one so small that its inverse overflows: such a group is all zeros.
    factors = scales.astype(np.float32)
    usable = np.abs(factors) >= np.finfo(np.float32).tiny
    return np.divide(np.float32(1), factors, out=np.zeros_like(factors), where=usable)

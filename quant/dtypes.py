"""Float formats that NumPy does not have: bf16, fp8 e4m3, e8m0 scales and fp4 e2m1, to and from float32.

Decoding is exact. Encoding rounds to the nearest representable value, ties to the even code, and saturates
at the largest finite one. Formulas: OCP 8-bit Floating Point Specification (e4m3, "fn": no infinities) and
OCP Microscaling Formats Specification 1.0 (e8m0, e2m1).
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
UInt16 = NDArray[np.uint16]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E8M0_NAN = 255


def _e4m3_table() -> Float32:
    # code = sign(1) exponent(4, bias 7) mantissa(3); exponent 0: mantissa * 2^-9; S.1111.111 is NaN.
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    significand = np.where(exponent == 0, mantissa, mantissa + 8).astype(np.float32)
    table = np.ldexp(significand, np.maximum(exponent, 1) - 10)
    table[codes & 127 == 127] = np.nan
    return np.where(codes >= 128, -table, table)


E4M3 = _e4m3_table()  # (256,) float32: the value of each code
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)  # (16,)
# (256, 2) float32, seen as 256 eight-byte items: one look-up decodes a byte of two codes, low nibble first.
_E2M1_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=1).view(np.uint64)[:, 0]


def _take(table: NDArray, codes: NDArray, out: NDArray | None) -> NDArray:
    # mode="clip" writes straight into `out`; the default mode goes through a copy of it.
    return np.take(table, codes, out=out, mode="clip")


def decode_bf16(codes: UInt16, out: Float32 | None = None) -> Float32:
    """The values of bf16 bit patterns: uint16 of any shape -> float32 of the same shape."""
    if out is None:
        out = np.empty(codes.shape, np.float32)
    bits = out.view(np.uint32)
    np.copyto(bits, codes)
    np.left_shift(bits, 16, out=bits)
    return out


def decode_f16(codes: NDArray[np.float16], out: Float32) -> Float32:
    """The values of finite float16 numbers, as float32 in `out`: what a cast gives, several times faster.

    The cast goes number by number. Here sign, exponent and mantissa move to their places in float32, whose exponent
    counts from 112 lower down.
    """
    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, -0x70000001, out=bits)  # the sign's copies between sign and exponent
    return np.multiply(out, np.float32(2.0**112), out=out)


def encode_bf16(values: Float32) -> UInt16:
    """bf16 bit patterns of float32 values: same shape, uint16. Infinity and NaN keep their kind."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> np.uint32(16)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    sign = (bits >> 16) & np.uint32(0x8000)
    rounded = np.where((magnitude < 0x7F800000) & (magnitude > 0x7F7F0000), sign | np.uint32(0x7F7F), rounded)
    return np.where(magnitude > 0x7F800000, sign | np.uint32(0x7FC0), rounded).astype(np.uint16)


def decode_e4m3(codes: UInt8, out: Float32 | None = None) -> Float32:
    """The values of fp8 e4m3fn codes: uint8 of any shape -> float32 of that shape; 0x7f and 0xff are NaN."""
    return _take(E4M3, codes, out)


def encode_e4m3(values: Float32) -> UInt8:
    """fp8 e4m3fn codes of float32 values: same shape, uint8. Infinity saturates to 448, NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Normal range: drop 20 mantissa bits, then move the exponent bias from 127 to 7.
    rounded = (magnitude + np.uint32(0x7FFFF) + ((magnitude >> 20) & np.uint32(1))) >> np.uint32(20)
    normal = np.minimum(np.maximum(rounded, 120 << 3) - np.uint32(120 << 3), np.uint32(0x7E))
    # Below 2^-6 the codes count multiples of 2^-9; the product with 2^9 is exact.
    small = np.fmin(magnitude.view(np.float32), np.float32(2**-6)) * np.float32(2**9)
    codes = np.where(magnitude < 121 << 23, np.rint(small).astype(np.uint32), normal)
    codes = np.where(magnitude > 0x7F800000, np.uint32(0x7F), codes)
    return (codes | (bits >> 24) & np.uint32(0x80)).astype(np.uint8)


def decode_e8m0(codes: UInt8, out: Float32 | None = None) -> Float32:
    """The values 2^(code - 127) of e8m0 codes: uint8 of any shape -> float32 of that shape; 255 is NaN."""
    if out is None:
        out = np.empty(codes.shape, np.float32)
    # The code is float32's exponent, but for 2^-127, which is subnormal, and NaN.
    bits = out.view(np.uint32)
    np.copyto(bits, codes)
    np.left_shift(bits, 23, out=bits)
    if codes.size and codes.min() == 0:
        bits[codes == 0] = 1 << 22
    if codes.size and codes.max() == E8M0_NAN:
        out[codes == E8M0_NAN] = np.nan
    return out


def encode_e8m0(values: Float32) -> UInt8:
    """e8m0 codes of float32 values: same shape, uint8. Zero becomes 2^-127, a negative value NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x3FFFFF) + ((bits >> 23) & np.uint32(1))) >> np.uint32(23)
    # Below 2^-126 float32 is subnormal and its exponent no longer tells 2^-127 from 2^-126.
    rounded = np.where(bits < 0x800000, (bits > 0x600000).astype(np.uint32), np.minimum(rounded, 254))
    return np.where(values >= 0, rounded, E8M0_NAN).astype(np.uint8)


def decode_e2m1(codes: UInt8, out: Float32 | None = None) -> Float32:
    """The values of e2m1 codes 0..15: uint8 of any shape -> float32 of the same shape."""
    return _take(E2M1, codes, out)


def decode_e2m1_pairs(packed: UInt8, out: Float32 | None = None) -> Float32:
    """The values of packed e2m1 codes, two a byte, low nibble first: uint8 (..., n) -> float32 (..., 2n).

    `out` must be C-contiguous.
    """
    if out is None:
        out = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.float32)
    _take(_E2M1_PAIRS, packed, out.view(np.uint64))
    return out


def encode_e2m1(values: Float32) -> UInt8:
    """e2m1 codes 0..15 of float32 values: same shape, uint8. Infinity saturates to 6; NaN has no code."""
    magnitude = np.abs(values)
    codes = np.zeros(magnitude.shape, np.uint8)
    # The midpoint between codes c and c+1 goes to the even one: up exactly when c is odd.
    for code, (low, high) in enumerate(pairwise(E2M1[:8])):
        midpoint = (low + high) / 2
        codes += (magnitude >= midpoint) if code % 2 else (magnitude > midpoint)
    return codes | np.signbit(values).astype(np.uint8) << np.uint8(3)

"""How the codes of ggml's block types lie in planes (blocks, bytes, rows): as fields of bits, see `ggml_types`.

A function of planes writes the codes to `out` (blocks, weights, rows), int8 seen as uint8; one of planes and of a
block's numbers, (blocks, 1, rows) float32 each, gives scales and perhaps a bias, (blocks, groups, rows).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.memory import scratch
from numoe.quant.dtypes import Float32, UInt8

Factors = tuple[Float32, Float32 | None]


def alone(planes: NDArray, d: Float32) -> Factors:
    return d, None


def of_all(groups: int, planes: NDArray, d: Float32) -> Factors:
    """A scale for that many groups: one for all would do, but products of several tokens want shorter ones."""
    return d.repeat(groups, axis=1), None


def with_minimum(planes: NDArray, d: Float32, m: Float32) -> Factors:
    return d, m


def _fields(packed: UInt8, bits: int, out: UInt8) -> None:
    """Fields of `bits` bits, low first: packed (.., L, rows) -> out (.., 8 / bits, L, rows)."""
    mask = np.uint8((1 << bits) - 1)
    for field in range(8 // bits):
        to = out[..., field, :, :]
        if field == 0:
            np.bitwise_and(packed, mask, out=to)
        else:
            np.right_shift(packed, np.uint8(bits * field), out=to)
            if bits * (field + 1) < 8:
                np.bitwise_and(to, mask, out=to)


def _add_high(packed: UInt8, at: int, bits: int, place: int, out: UInt8) -> None:
    """out |= the field of `bits` bits from bit `at` on, as bits `place` and up."""
    high = scratch("high", packed.shape, np.uint8)
    np.bitwise_and(packed, np.uint8(((1 << bits) - 1) << at), out=high)
    if at > place:
        np.right_shift(high, np.uint8(at - place), out=high)
    elif at < place:
        np.multiply(high, np.uint8(1 << (place - at)), out=high)  # many times as fast as a shift to the left
    np.bitwise_or(out, high, out=out)


def _lower(out: UInt8, zero: int) -> None:
    """Codes less `zero`, as int8."""
    np.subtract(out, np.uint8(zero), out=out)


# ------------------------------------------------------------------------------------------------ fields in planes


def q5(start: int, zero: int, planes: UInt8, out: UInt8) -> None:
    count, _, rows = planes.shape
    _fields(planes[:, None, start + 4 : start + 20], 4, out.reshape(count, 1, 2, 16, rows))
    eights = out.reshape(count, 4, 8, rows)
    for bit in range(8):
        _add_high(planes[:, start : start + 4], bit, 1, 4, eights[:, :, bit])
    if zero:
        _lower(out, zero)


def two_bits(start: int, zero: int, planes: UInt8, out: UInt8) -> None:
    count, _, rows = planes.shape
    _fields(planes[:, start : start + 64].reshape(count, 2, 32, rows), 2, out.reshape(count, 2, 4, 32, rows))
    if zero:
        _lower(out, zero)


def q3_k(planes: UInt8, out: UInt8) -> None:
    two_bits(32, 0, planes, out)
    thirtytwos = out.reshape(len(planes), 8, 32, -1)
    for bit in range(8):
        _add_high(planes[:, :32], bit, 1, 2, thirtytwos[:, bit])
    _lower(out, 4)


def q4_k(start: int, planes: UInt8, out: UInt8) -> None:
    count, _, rows = planes.shape
    _fields(planes[:, start : start + 128].reshape(count, 4, 32, rows), 4, out.reshape(count, 4, 2, 32, rows))


def q5_k(planes: UInt8, out: UInt8) -> None:
    q4_k(48, planes, out)
    thirtytwos = out.reshape(len(planes), 8, 32, -1)
    for bit in range(8):
        _add_high(planes[:, 16:48], bit, 1, 4, thirtytwos[:, bit])


def q6_k(planes: UInt8, out: UInt8) -> None:
    count, _, rows = planes.shape
    _fields(planes[:, :128].reshape(count, 2, 64, rows), 4, out.reshape(count, 2, 2, 64, rows))
    high, quarters = planes[:, 128:192].reshape(count, 2, 32, rows), out.reshape(count, 2, 4, 32, rows)
    for field in range(4):
        _add_high(high, 2 * field, 2, 4, quarters[:, :, field])
    _lower(out, 32)


def scaled(d: Float32, *parts: NDArray[Any]) -> Float32:
    """d times small integers, which come in parts (n, groups, rows) one after another."""
    out = np.concatenate(parts, axis=1, dtype=np.float32)
    out *= d
    return out


def k_factors(planes: UInt8, d: Float32, dmin: Float32) -> Factors:
    """Q4_K's and Q5_K's 8 scales and 8 minimums, of 6 bits each."""
    first, second, rest = planes[:, 4:8], planes[:, 8:12], planes[:, 12:16]
    scales = scaled(d, first & 63, rest & 15 | first >> 2 & 48)
    return scales, scaled(-dmin, second & 63, rest >> 4 | second >> 2 & 48)


def q2_k_factors(planes: UInt8, d: Float32, dmin: Float32) -> Factors:
    return scaled(d, planes[:, :16] & 15), scaled(-dmin, planes[:, :16] >> 4)


def q3_k_factors(planes: UInt8, d: Float32) -> Factors:
    """16 scales of 6 bits: four bits of each in 8 bytes, and the other two in 4."""
    low, high = planes[:, 96:104], planes[:, 104:108]
    lows = low[:, :4] & 15, low[:, 4:] & 15, low[:, :4] >> 4, low[:, 4:] >> 4
    highs = (high & 3) * np.uint8(16), (high & 12) * np.uint8(4), high & 48, high >> 2 & 48
    signed = [(a | b).view(np.int8) - np.int8(32) for a, b in zip(lows, highs, strict=True)]
    return scaled(d, *signed), None


def q6_k_factors(planes: UInt8, d: Float32) -> Factors:
    return scaled(d, planes[:, 192:208].view(np.int8)), None


def tq1_0(planes: UInt8, out: UInt8) -> None:
    """Five trits a byte, as its digits to base 3 behind the point; the last four bytes have four."""
    count, _, rows = planes.shape
    at = 0
    for first, last, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        size = last - first
        to = out[:, at : at + digits * size].reshape(count, digits, size, rows)
        above = scratch("high", (count, size, rows), np.uint8)
        for digit in range(digits):
            np.multiply(planes[:, first:last], np.uint8(3**digit), out=to[:, digit])
            np.greater_equal(to[:, digit], np.uint8(171), out=above.view(np.bool_))
            np.greater_equal(to[:, digit], np.uint8(86), out=to[:, digit].view(np.bool_))
            np.add(to[:, digit], above, out=to[:, digit])
        at += digits * size
    _lower(out, 1)


def q1_0(planes: UInt8, out: UInt8) -> None:
    bits = out.reshape(len(planes), 16, 8, -1)
    for bit in range(8):
        np.right_shift(planes[:, 2:18], np.uint8(bit), out=bits[:, :, bit])
    np.bitwise_and(out, np.uint8(1), out=out)
    np.multiply(out, np.uint8(2), out=out)
    _lower(out, 1)


def q2_0(planes: UInt8, out: UInt8) -> None:
    count, _, rows = planes.shape
    _fields(planes[:, 2:18].reshape(count, 16, 1, rows), 2, out.reshape(count, 16, 4, 1, rows))
    _lower(out, 1)

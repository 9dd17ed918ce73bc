"""What the codes of ggml's IQ types stand for: indices of tables, whose entries are the codes of several weights.

As `ggml_planes`, but for words of 16 bits, and `out` has eight weights of a row together: (blocks, weights / 8, rows,
8). The tables are in `ggml_grids`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.memory import scratch
from numoe.quant.dtypes import Float32, UInt8, UInt16
from numoe.quant.formats import ggml_grids
from numoe.quant.formats.ggml_planes import Factors, scaled


def _look_up(table: NDArray[Any], index: NDArray[Any], out: NDArray[Any]) -> None:
    places = scratch("places", index.shape, np.intp)
    np.copyto(places, index)
    np.take(table, places, out=out, mode="wrap")  # which goes through no copy of `out`


def _bytes_of(words: UInt16) -> UInt16:
    """(n, m, rows) -> (n, 2 m, rows), the low one first."""
    out = np.empty((len(words), 2 * words.shape[1], words.shape[2]), np.uint16)
    np.bitwise_and(words, np.uint16(255), out=out[:, 0::2])
    np.right_shift(words, np.uint16(8), out=out[:, 1::2])
    return out


def _seven_bits(words: UInt16) -> UInt16:
    """Four fields of seven bits in each two words: (n, m, 2, rows) -> (n, m, 4, rows)."""
    low, high = words[:, :, 0], words[:, :, 1]
    fields = [low, low >> 7, low >> 14 | high * np.uint16(4), high >> 5]
    return np.stack(fields, axis=2) & np.uint16(127)


def _fields(words: UInt16, step: int, mask: int) -> UInt16:
    """Four fields of each word, `step` bits apart: (n, m, rows) -> (n, 4 m, rows)."""
    shifts = np.arange(0, 4 * step, step, dtype=np.uint16)[:, None]
    fields = words[:, :, None] >> shifts  # (n, m, 4, rows)
    fields &= np.uint16(mask)
    return fields.reshape(len(words), -1, words.shape[2])


def _signed(out: UInt8, signs: UInt16) -> None:
    """Give codes (n, m, rows, 8) the signs that (n, m, rows) tell in bits; a set bit is a minus."""
    factors = scratch("signs", signs.shape, np.uint64)
    _look_up(ggml_grids.signs(), signs, factors)
    _times(out, factors)


def _times(out: UInt8, factors: NDArray[np.uint64]) -> None:
    """Codes times what eight bytes of an integer are each."""
    values = out.view(np.int8)
    np.multiply(values, factors.view(np.int8).reshape(out.shape), out=values)


def _eights(out: UInt8) -> NDArray[np.uint64]:
    return out.view(np.uint64)[..., 0]


def iq2_xxs(words: UInt16, out: UInt8) -> None:
    count, _, rows = words.shape
    groups = words[:, 1:].reshape(count, 8, 4, rows)
    index = _seven_bits(groups[:, :, 2:]) * np.uint16(256)
    index |= _bytes_of(groups[:, :, :2].reshape(count, 16, rows)).reshape(index.shape)
    _look_up(ggml_grids.iq2_xxs(), index.reshape(count, 32, rows), _eights(out))


def iq2_xs(words: UInt16, out: UInt8) -> None:
    _look_up(ggml_grids.iq2_xs(), words[:, 1:33], _eights(out))


def iq2_s(words: UInt16, out: UInt8) -> None:
    index = _fields(_bytes_of(words[:, 33:37]), 2, 3)
    index *= np.uint16(256)
    index |= _bytes_of(words[:, 1:17])
    _look_up(ggml_grids.iq2_s(), index, _eights(out))
    _signed(out, _bytes_of(words[:, 17:33]))


def iq3_xxs(words: UInt16, out: UInt8) -> None:
    count, _, rows = words.shape
    _look_up(ggml_grids.iq3_xxs(), words[:, 1:33], _eights(out))
    signs = _seven_bits(words[:, 33:49].reshape(count, 8, 2, rows))
    factors = scratch("signs", (count, 32, rows), np.uint64)
    _look_up(ggml_grids.seven_signs(), signs.reshape(factors.shape), factors)
    _times(out, factors)


def iq3_s(words: UInt16, out: UInt8) -> None:
    """Twice four codes, each of a table that leaves the place of the others 0."""
    signs = _bytes_of(words[:, 37:53])
    ninth = _fields(_bytes_of(words[:, 33:37]), 2, 3)
    eights, others = _eights(out), scratch("signs", signs.shape, np.uint64)
    for low, bit, four, table, to in (
        (words[:, 1:33] & np.uint16(255), 1, 15, 0, eights),
        (words[:, 1:33] >> np.uint16(8), 2, 240, 1, others),
    ):
        low |= (ninth & np.uint16(bit)) * np.uint16(256 // bit)
        low |= (signs & np.uint16(four)) * np.uint16(512 * 15 // four)
        _look_up(ggml_grids.iq3_s()[table], low, to)
    np.bitwise_or(eights, others, out=eights)


def iq1_s(words: UInt16, out: UInt8) -> None:
    count, _, rows = words.shape
    shift = words[:, 17:25] >> 12 & 8
    index = _fields(words[:, 17:25], 3, 7).reshape(count, 8, 4, rows)
    index |= shift[:, :, None]
    index *= np.uint16(256)
    index |= _bytes_of(words[:, 1:17]).reshape(index.shape)
    _look_up(ggml_grids.iq1(), index.reshape(count, 32, rows), _eights(out))


def iq1_m(words: UInt16, out: UInt8) -> None:
    index = _fields(words[:, 16:24], 4, 15)
    index *= np.uint16(256)
    index |= _bytes_of(words[:, :16])
    _look_up(ggml_grids.iq1(), index, _eights(out))


def iq1_m_half(words: UInt16) -> NDArray[np.float16]:
    """Its four parts are the highest bits of the words that hold scales."""
    parts = words[:, 24:28] >> 12
    return (parts[:, 0] | parts[:, 1] << 4 | parts[:, 2] << 8 | parts[:, 3] << 12).view(np.float16)


def iq1_m_factors(words: UInt16, d: Float32) -> Factors:
    return _odd(d, 0.125, _fields(words[:, 24:28], 3, 7))


def _odd(d: Float32, unit: float, scales: NDArray[Any]) -> Factors:
    """d (2 s + 1) unit."""
    out = scales.astype(np.float32)
    out *= 2
    out += 1
    out *= np.float32(unit) * d
    return out, None


def half_steps(first: int, unit: float, words: UInt16, d: Float32) -> Factors:
    """Scales of four bits in the words from `first` on."""
    return _odd(d, unit, _fields(words[:, first:], 4, 15))


def highest(first: int, step: int, unit: float, words: UInt16, d: Float32) -> Factors:
    """Scales in the highest four bits of every `step`th word from `first` on."""
    return _odd(d, unit, words[:, first::step] >> 12)


def iq1_s_factors(words: UInt16, d: Float32) -> Factors:
    return _odd(d, 0.125, words[:, 17:25] >> 12 & 7)


def iq4(start: int, planes: UInt8, out: UInt8) -> None:
    """Nibbles that index `ggml_grids.IQ4`: a look-up gives those of two rows, in two places each."""
    count, _, rows = planes.shape
    groups = out.shape[1] // 32
    even = rows + rows % 2
    packed = scratch("pairs of rows", (count, groups * 16, even), np.uint8)
    np.copyto(packed[..., :rows], planes[:, start : start + groups * 16])
    packed[..., rows:] = 0
    four = scratch("four", (count, groups, 16, even // 2), np.uint32)
    _look_up(ggml_grids.iq4(), packed.view(np.uint16).reshape(four.shape), four)
    to = out if even == rows else scratch("even rows", (count, groups * 32, even), np.uint8)
    places = to.view(np.uint16).reshape(count, groups, 2, 16, even // 2)
    np.copyto(places[:, :, 0], four, casting="unsafe")
    np.right_shift(four, np.uint32(16), out=four)
    np.copyto(places[:, :, 1], four, casting="unsafe")
    if to is not out:
        np.copyto(out, to[..., :rows])


def iq4_xs_factors(planes: UInt8, d: Float32) -> Factors:
    """8 scales of 6 bits: four bits of each in 4 bytes, and the other two in 2."""
    low, high = planes[:, 4:8], planes[:, 2:4]
    scales = np.empty((len(planes), 8, planes.shape[2]), np.uint8)
    scales[:, 0::2], scales[:, 1::2] = low & 15, low >> 4
    tops = (high & 3) * np.uint8(16), (high & 12) * np.uint8(4), high & 48, high >> 2 & 48
    for field, top in enumerate(tops):
        scales[:, field::4] |= top
    return scaled(d, scales.view(np.int8) - np.int8(32)), None

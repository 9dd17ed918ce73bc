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
from numoe.quant.formats.ggml_planes import Factors


def _look_up(table: NDArray[Any], index: NDArray[Any], out: NDArray[Any]) -> None:
    places = scratch("places", index.shape, np.intp)
    np.copyto(places, index)
    np.take(table, places, out=out, mode="wrap")  # the other modes go through a copy, or compare more


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


def _nibbles(words: UInt16) -> UInt16:
    """(n, m, rows) -> (n, 4 m, rows)."""
    return np.stack([words >> 4 * place & 15 for place in range(4)], axis=2).reshape(len(words), -1, words.shape[2])


def _signed(out: UInt8, signs: UInt16) -> None:
    """Give codes (n, m, rows, 8) the signs that bytes (n, m, rows) tell; a set bit is a minus."""
    factors = scratch("signs", signs.shape, np.uint64)
    _look_up(ggml_grids.signs(), signs, factors)
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
    count, _, rows = words.shape
    index = _bytes_of(words[:, 1:17]).reshape(count, 8, 4, rows)
    high = _bytes_of(words[:, 33:37])
    for field in range(4):
        index[:, :, field] |= (high >> 2 * field & 3) * np.uint16(256)
    _look_up(ggml_grids.iq2_s(), index.reshape(count, 32, rows), _eights(out))
    _signed(out, _bytes_of(words[:, 17:33]))


def iq3_xxs(words: UInt16, out: UInt8) -> None:
    count, _, rows = words.shape
    _look_up(ggml_grids.iq3_xxs(), words[:, 1:33], _eights(out))
    signs = _seven_bits(words[:, 33:49].reshape(count, 8, 2, rows))
    _signed(out, ggml_grids.with_parity(signs).reshape(count, 32, rows))


def iq3_s(words: UInt16, out: UInt8) -> None:
    count, _, rows = words.shape
    pairs = words[:, 1:33].reshape(count, 8, 4, rows)
    high = _bytes_of(words[:, 33:37])
    index = scratch("pairs", (count, 8, 4, rows, 2), np.intp)
    for field in range(4):
        low = pairs[:, :, field]
        np.add(low & np.uint16(255), (high >> 2 * field & 1) * np.uint16(256), out=index[:, :, field, :, 0])
        np.add(low >> np.uint16(8), (high >> 2 * field + 1 & 1) * np.uint16(256), out=index[:, :, field, :, 1])
    np.take(ggml_grids.iq3_s(), index.reshape(count, 32, rows, 2), out=out.view(np.uint32), mode="wrap")
    _signed(out, _bytes_of(words[:, 37:53]))


def iq1_s(words: UInt16, out: UInt8) -> None:
    count, _, rows = words.shape
    index = _bytes_of(words[:, 1:17]).reshape(count, 8, 4, rows)
    high = words[:, 17:25]
    for field in range(4):
        index[:, :, field] |= (high >> 3 * field & 7 | high >> 12 & 8) * np.uint16(256)
    _look_up(ggml_grids.iq1(), index.reshape(count, 32, rows), _eights(out))


def iq1_m(words: UInt16, out: UInt8) -> None:
    index = _bytes_of(words[:, :16])
    index |= _nibbles(words[:, 16:24]) * np.uint16(256)
    _look_up(ggml_grids.iq1(), index, _eights(out))


def iq1_m_half(words: UInt16) -> NDArray[np.float16]:
    """Its four parts are the highest bits of the words that hold scales."""
    parts = words[:, 24:28] >> 12
    return (parts[:, 0] | parts[:, 1] << 4 | parts[:, 2] << 8 | parts[:, 3] << 12).view(np.float16)


def iq1_m_factors(words: UInt16, d: Float32) -> Factors:
    scales = np.stack([words[:, 24:28] >> 3 * field & 7 for field in range(4)], axis=2)
    return 0.125 * d * _odd(scales.reshape(len(words), 16, -1)), None


def _odd(scales: NDArray[Any]) -> Float32:
    """2 s + 1."""
    return (2 * scales + 1).astype(np.float32)


def half_steps(first: int, unit: float, words: UInt16, d: Float32) -> Factors:
    """d (2 s + 1) unit, of scales of four bits in the words from `first` on."""
    return unit * d * _odd(_nibbles(words[:, first:])), None


def highest(first: int, step: int, unit: float, words: UInt16, d: Float32) -> Factors:
    """The same of scales in the highest four bits of every `step`th word from `first` on."""
    return unit * d * _odd(words[:, first::step] >> 12), None


def iq1_s_factors(words: UInt16, d: Float32) -> Factors:
    return 0.125 * d * _odd(words[:, 17:25] >> 12 & 7), None


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
    halves = four.view(np.uint16).reshape(*four.shape, 2)
    to = out if even == rows else scratch("even rows", (count, groups * 32, even), np.uint8)
    places = to.view(np.uint16).reshape(count, groups, 2, 16, even // 2)
    np.copyto(places[:, :, 0], halves[..., 0])
    np.copyto(places[:, :, 1], halves[..., 1])
    if to is not out:
        np.copyto(out, to[..., :rows])


def iq4_xs_factors(planes: UInt8, d: Float32) -> Factors:
    low, high = planes[:, 4:8], planes[:, 2:4]  # (n, 4, rows), (n, 2, rows)
    scales = np.empty((len(planes), 8, planes.shape[2]), np.uint8)
    scales[:, 0::2], scales[:, 1::2] = low & 15, low >> 4
    for field in range(4):
        scales[:, field::4] |= (high >> 2 * field & 3) << 4
    return d * (scales.view(np.int8) - np.int8(32)), None

"""ggml's block types: how the bytes of a block become small integers, and the scales that these are multiplied with.

A block holds some weights of a row with what scales them. What is computed on is blocks of many rows at once, with a
byte (or a word of two) of all rows side by side: planes (blocks, bytes, rows). Then every step is one NumPy call over
long contiguous rows, whatever place a field has in its byte.

    value = scale * code + bias          scale and bias float32, one a group of weights

scale * code has at most 24 significant bits, so it is exact, and the values are those of ggml and of the gguf package
to the last bit. Layouts: `ggml-common.h` of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.memory import scratch
from numoe.quant.dtypes import UInt8, decode_f16
from numoe.quant.formats import ggml_planes, ggml_words
from numoe.quant.formats.format import Format
from numoe.quant.formats.ggml_planes import Factors

Planes = NDArray[Any]
Half = NDArray[np.float16]


@dataclass(frozen=True)
class BlockType:
    """A block of `weights` weights in `nbytes` bytes, `group` of which share a scale and perhaps a bias."""

    name: str
    weights: int
    nbytes: int
    group: int
    places: tuple[int, ...]
    """Bytes from which on a block's float16 numbers lie; of IQ1_M's there are but the highest bits."""
    factors: Callable[..., Factors]
    """Planes, and `halves` as float32, (n, 1, rows) each -> scales and perhaps a bias, (n, groups, rows)."""
    codes: Callable[[Planes, UInt8], None]
    """Planes -> int8 codes, written to the uint8 array (n, weights, rows), or (n, weights / lanes, rows, lanes)."""
    bias: bool = False
    lanes: int = 1
    """Weights of a row whose codes one look-up gives, and which lie together therefore."""
    gathered: Callable[[Planes], Half] | None = None
    """Planes -> the one float16 number of each block, where its bits are not side by side, (n, rows)."""

    def halves(self, planes: Planes) -> list[Half]:
        """The float16 numbers of each block, (n, rows) each."""
        if self.gathered:
            return [self.gathered(planes)]
        if self.lanes > 1:
            return [planes[:, place // 2].view(np.float16) for place in self.places]
        return [(planes[:, at] | planes[:, at + 1].astype(np.uint16) * 256).view(np.float16) for at in self.places]

    @property
    def format(self) -> Format:
        return _format(self)

    @property
    def word(self) -> type[np.unsignedinteger]:
        """What a plane has of each row."""
        return np.uint16 if self.lanes > 1 else np.uint8

    def unpack(self, planes: Planes) -> NDArray[np.int8]:
        """The codes of planes, (n, weights, rows), or (n, weights / lanes, rows, lanes). Valid until the next call."""
        blocks, _, rows = planes.shape
        shape = (blocks, self.weights // self.lanes, rows)
        out = scratch("codes", shape if self.lanes == 1 else (*shape, self.lanes), np.uint8)
        self.codes(planes, out)
        return out.view(np.int8)

    def scale(self, planes: Planes) -> Factors:
        """Scales and perhaps a bias of planes, (n * groups, rows)."""
        rows = planes.shape[2]
        halves = (decode_f16(half, np.empty(half.shape, np.float32))[:, None] for half in self.halves(planes))
        scales, bias = self.factors(planes, *halves)
        return scales.reshape(-1, rows), None if bias is None else bias.reshape(-1, rows)

    def finite(self, planes: Planes) -> bool:
        """Whether no number of a block is NaN or infinite."""
        return all(bool(np.isfinite(half).all()) for half in self.halves(planes))


@cache
def _format(kind: BlockType) -> Format:
    name = kind.name.lower()
    wide = Format(name, 8, (1, kind.group), 32, kind.bias)
    return Format(name, 0, (1, kind.weights), 8 * kind.nbytes, slab_step=1, spread=wide)


_D = (0,)
_ALL = (
    BlockType("Q1_0", 128, 18, 64, _D, partial(ggml_planes.of_all, 2), ggml_planes.q1_0),
    BlockType("Q2_0", 64, 18, 64, _D, ggml_planes.alone, ggml_planes.q2_0),
    BlockType("Q5_0", 32, 22, 32, _D, ggml_planes.alone, partial(ggml_planes.q5, 2, 16)),
    BlockType("Q5_1", 32, 24, 32, (0, 2), ggml_planes.with_minimum, partial(ggml_planes.q5, 4, 0), bias=True),
    BlockType("Q2_K", 256, 84, 16, (80, 82), ggml_planes.q2_k_factors, partial(ggml_planes.two_bits, 16, 0), bias=True),
    BlockType("Q3_K", 256, 110, 16, (108,), ggml_planes.q3_k_factors, ggml_planes.q3_k),
    BlockType("Q4_K", 256, 144, 32, (0, 2), ggml_planes.k_factors, partial(ggml_planes.q4_k, 16), bias=True),
    BlockType("Q5_K", 256, 176, 32, (0, 2), ggml_planes.k_factors, ggml_planes.q5_k, bias=True),
    BlockType("Q6_K", 256, 210, 16, (208,), ggml_planes.q6_k_factors, ggml_planes.q6_k),
    BlockType("TQ1_0", 256, 54, 64, (52,), partial(ggml_planes.of_all, 4), ggml_planes.tq1_0),
    BlockType("TQ2_0", 256, 66, 64, (64,), partial(ggml_planes.of_all, 4), partial(ggml_planes.two_bits, 0, 1)),
    BlockType("IQ4_NL", 32, 18, 32, _D, ggml_planes.alone, partial(ggml_words.iq4, 2)),
    BlockType("IQ4_XS", 256, 136, 32, _D, ggml_words.iq4_xs_factors, partial(ggml_words.iq4, 8)),
    BlockType("IQ1_S", 256, 50, 32, _D, ggml_words.iq1_s_factors, ggml_words.iq1_s, lanes=8),
    BlockType(
        "IQ1_M", 256, 56, 16, (54,), ggml_words.iq1_m_factors, ggml_words.iq1_m, lanes=8, gathered=ggml_words.iq1_m_half
    ),
    BlockType("IQ2_XXS", 256, 66, 32, _D, partial(ggml_words.highest, 4, 4, 0.125), ggml_words.iq2_xxs, lanes=8),
    BlockType("IQ2_XS", 256, 74, 16, _D, partial(ggml_words.half_steps, 33, 0.125), ggml_words.iq2_xs, lanes=8),
    BlockType("IQ2_S", 256, 82, 16, _D, partial(ggml_words.half_steps, 37, 0.125), ggml_words.iq2_s, lanes=8),
    BlockType("IQ3_XXS", 256, 98, 32, _D, partial(ggml_words.highest, 34, 2, 0.25), ggml_words.iq3_xxs, lanes=8),
    BlockType("IQ3_S", 256, 110, 32, _D, partial(ggml_words.half_steps, 53, 1.0), ggml_words.iq3_s, lanes=8),
)
TYPES = {kind.name.lower(): kind for kind in _ALL}
"""By `Format.kind`."""

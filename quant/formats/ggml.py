"""Matrices in ggml's block types, whose bytes stay those of the file; what is in them, `ggml_types` tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import block_elements, equal_spans, transposed
from numoe.quant.compute.memory import scratch
from numoe.quant.compute.threads import run
from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.formats.columns import FORMS, Columns, Slab, by_rows
from numoe.quant.formats.format import Format
from numoe.quant.formats.ggml_types import TYPES, BlockType, Planes
from numoe.quant.formats.integer import INT8
from numoe.quant.formats.qtensor import QTensor, taken

_FEW_LANES = 3
"""Up to so many tokens, codes that lie together by row are multiplied as they are, one token after the other."""

_NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True, eq=False)
class GGML(QTensor):
    """blocks (out, bytes a row) uint8, as a GGUF file has them."""

    blocks: UInt8
    kind: BlockType

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.blocks), self.blocks.shape[1] // self.kind.nbytes * self.kind.weights

    @property
    def format(self) -> Format:
        return self.kind.format

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        _decode(self.kind, np.ascontiguousarray(self._planes(start, stop)), out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> GGML:
        return GGML(taken(self.blocks, start, stop, step), self.kind)

    def finite(self) -> bool:
        return self.kind.finite(self._planes(0, len(self.blocks)))

    def _planes(self, start: int, stop: int) -> Planes:
        """A view of rows start..stop, (blocks, words, rows)."""
        words = self.blocks[start:stop].view(self.kind.word)
        return words.reshape(stop - start, -1, self.kind.nbytes // words.itemsize).transpose(1, 2, 0)


@dataclass(frozen=True, eq=False)
class GGMLColumns(Columns):
    """The same bytes by columns: codes flat, slab after slab, (blocks, words, rows) each. No scales beside them."""

    kind: BlockType = field(kw_only=True)

    @classmethod
    def slab_arrays(cls, rows: QTensor) -> list[NDArray[Any]]:
        assert isinstance(rows, GGML)
        return [transposed(rows.blocks.view(rows.kind.word)).reshape(-1), _NOTHING]

    @classmethod
    def of(cls, format: Format, arrays: Sequence[NDArray[Any]], shape: tuple[int, int]) -> GGMLColumns:
        kind = TYPES[format.kind]
        return cls(arrays[0].view(kind.word), _NOTHING, None, shape, kind=kind)

    @property
    def format(self) -> Format:
        return self.kind.format

    @cached_property
    def group(self) -> int:
        return self.kind.group

    @property
    def quantum(self) -> int:
        return self.kind.weights // self.kind.group

    def _slab(self, first: int, rows: int, count: int = 1) -> Slab:
        each = self.codes.size // self.shape[0]
        words = self.kind.nbytes // self.codes.itemsize
        planes = self.codes[first * each : (first + count * rows) * each].reshape(-1, words, rows)
        return Slab(first, rows, planes, self.scales, None, count)

    def _joined(self, sharing: int, most: int) -> list[Slab]:
        return super()._joined(sharing, most) if self.kind.lanes == 1 else []

    def plain(self) -> QTensor:
        rows = [slab.codes.reshape(-1, slab.rows).T for slab in self.slabs]
        return GGML(np.ascontiguousarray(np.concatenate(rows)).view(np.uint8), self.kind)

    def finite(self) -> bool:
        return all(self.kind.finite(slab.codes) for slab in self.slabs)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        for slab, a, b in self._slabs_of(start, stop):
            planes = np.ascontiguousarray(slab.codes[..., a - slab.first : b - slab.first])
            _decode(self.kind, planes, out[a - start : b - start])

    def _scaling(self, slab: Slab) -> tuple[Float32, Float32 | None]:
        return self.kind.scale(slab.codes)

    def _codes(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        """Those of groups start..stop, as `BlockType.unpack` gives them."""
        return self.kind.unpack(slab.codes[start // self.quantum : stop // self.quantum])

    def _bytes(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        codes = self._codes(slab, start, stop)
        if self.kind.lanes == 1:
            return codes.reshape(-1)
        eights = codes.reshape(-1, slab.rows, self.kind.lanes)
        out = scratch("bytes", (len(eights), self.kind.lanes, slab.rows), np.uint8).view(np.int8)
        np.copyto(out, eights.transpose(0, 2, 1))
        return out.reshape(-1)

    def _rows(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        codes = self._bytes(slab, 0, self.shape[1] // self.group)
        return codes.reshape(self.shape[1], slab.rows)[:, start:stop].copy()  # of what the next call overwrites

    def _sums(self, slab: Slab, x: Activations, first: int, last: int) -> Float32:
        lanes, tokens = self.kind.lanes, len(x)
        if lanes == 1 or tokens > _FEW_LANES:
            return super()._sums(slab, x, first, last)
        eights = x.grouped(lanes)[..., None]  # (in / 8, T, 8, 1)
        share = self.group // lanes
        sums = scratch("sums", (last - first, tokens, slab.rows))
        for start, stop in self._spans(first, last, self.group * slab.rows, block_elements()):
            block = scratch("block", ((stop - start) * share, 1, slab.rows, lanes))
            np.copyto(block.reshape(-1), self._codes(slab, start, stop).reshape(-1))
            parts = scratch("part", (len(block), tokens, slab.rows, 1))
            np.matmul(block, eights[start * share : stop * share], out=parts)
            added = sums[start - first : stop - first]
            np.add.reduce(parts.reshape(-1, share, tokens, slab.rows), axis=1, out=added)
        return sums

    def wider(self) -> QTensor:
        rows, columns = self.shape
        groups = columns // self.group
        codes = np.empty(rows * columns, np.int8)
        scales = np.empty(rows * groups, np.float32)
        bias = np.empty_like(scales) if self.kind.bias else None

        def unpack(slab: Slab) -> None:
            to = codes[slab.first * columns :][: slab.rows * columns].reshape(groups, -1)
            for start, stop in self._spans(0, groups, self.group * slab.rows):
                np.copyto(to[start:stop].reshape(-1), self._codes(slab, start, stop).reshape(-1))
            own = slice(slab.first * groups, (slab.first + slab.rows) * groups)
            factors = self._scaling(slab)
            scales[own] = factors[0].reshape(-1)
            if bias is not None and factors[1] is not None:
                bias[own] = factors[1].reshape(-1)

        run([partial(unpack, slab) for slab in self.slabs])
        return GGMLWide(codes, scales, bias, self.shape, self.cut, kind=self.kind)


@dataclass(frozen=True, eq=False)
class GGMLWide(GGMLColumns):
    """The same with a byte a weight, as `BlockType.unpack` gives them, and float32 scales and bias."""

    @property
    def format(self) -> Format:
        return self.kind.format.wide

    def _slab(self, first: int, rows: int, count: int = 1) -> Slab:
        return Columns._slab(self, first, rows, count)

    def plain(self) -> INT8:
        """The same values; what they were coded as is gone."""
        bias = None if self.bias is None else by_rows(self, "bias")
        return INT8(self._codes_by_rows(), by_rows(self, "scales"), bias)

    def finite(self) -> bool:
        return Columns.finite(self)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        Columns.dequantize_rows(self, start, stop, out)

    def _scaling(self, slab: Slab) -> tuple[Float32, Float32 | None]:
        return Columns._scaling(self, slab)

    def _codes(self, slab: Slab, start: int, stop: int) -> NDArray[np.int8]:
        size = self.group * slab.rows
        return slab.codes[start * size : stop * size]

    def wider(self) -> QTensor:
        return self


FORMS.update(dict.fromkeys(TYPES, GGMLColumns))


def _decode(kind: BlockType, planes: Planes, out: Float32) -> None:
    """The weights of planes (blocks, words, rows), to `out` (rows, in)."""
    rows = planes.shape[2]
    for start, stop in equal_spans(len(planes), kind.weights * rows):
        part = planes[start:stop]
        codes = kind.unpack(part)
        values = scratch("values", (rows, (stop - start) * kind.weights))
        if kind.lanes == 1:
            np.copyto(values, codes.reshape(-1, rows).T)
        else:
            eights = codes.reshape(-1, rows, kind.lanes)
            np.copyto(values.reshape(rows, -1, kind.lanes), eights.transpose(1, 0, 2))
        scales, bias = kind.scale(part)
        grouped = values.reshape(rows, -1, kind.group)
        grouped *= scales.T[..., None]
        if bias is not None:
            grouped += bias.T[..., None]
        out[:, start * kind.weights : stop * kind.weights] = values

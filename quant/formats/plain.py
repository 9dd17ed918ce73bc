"""Matrices of plain numbers: float32, float16 and bf16."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import kernels
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import TILE_ROWS
from numoe.quant.compute.threads import Task
from numoe.quant.dtypes import Float32, UInt16, decode_bf16, decode_f16
from numoe.quant.formats.format import FLOAT32, Format
from numoe.quant.formats.qtensor import QTensor, pair, taken


@dataclass(frozen=True, eq=False)
class F32(QTensor):
    """values (out, in) float32."""

    values: Float32
    format = FLOAT32

    @cached_property
    def shape(self) -> tuple[int, int]:
        return pair(self.values)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        np.copyto(out, self.values[start:stop])

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "F32":
        return F32(taken(self.values, start, stop, step))

    def finite(self) -> bool:
        return kernels.all_finite(self.values)

    def products(self, x: Activations, out: Float32) -> list[Task]:
        return kernels.products_of_float32(x.x, self.values, out)

    def tiled(self) -> QTensor:
        """The form that is multiplied faster, in as many bytes; itself where its rows are not whole tiles."""
        rows, columns = self.shape
        if rows % TILE_ROWS:
            return self
        return F32Tiles(np.ascontiguousarray(self.values.reshape(-1, TILE_ROWS, columns).transpose(0, 2, 1)))


@dataclass(frozen=True, eq=False)
class F32Tiles(QTensor):
    """values (out/32, in, 32) float32: those of 32 rows after one another, by columns."""

    values: Float32
    format = FLOAT32

    @cached_property
    def shape(self) -> tuple[int, int]:
        tiles, columns, rows = self.values.shape
        return tiles * rows, columns

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        at = start
        while at < stop:
            tile, row = divmod(at, TILE_ROWS)
            end = min(stop, (tile + 1) * TILE_ROWS)
            np.copyto(out[at - start : end - start], self.values[tile, :, row : row + end - at].T)
            at = end

    def slice_rows(self, start: int, stop: int, step: int = 1) -> QTensor:
        """Shares these bytes where the range begins and ends with a tile; elsewhere it copies them."""
        if step == 1 and start % TILE_ROWS == stop % TILE_ROWS == 0:
            return F32Tiles(self.values[start // TILE_ROWS : stop // TILE_ROWS])
        rows = np.empty((stop - start, self.shape[1]), np.float32)
        self.dequantize_rows(start, stop, rows)
        return F32(rows).slice_rows(0, stop - start, step)

    def finite(self) -> bool:
        return kernels.all_finite(self.values)

    def products(self, x: Activations, out: Float32) -> list[Task]:
        return kernels.products_of_tiles(x.x, self.values, out)


@dataclass(frozen=True, eq=False)
class F16(QTensor):
    """values (out, in) float16, finite ones."""

    values: NDArray[np.float16]
    format = Format("f16", 16)

    @property
    def shape(self) -> tuple[int, int]:
        return pair(self.values)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        decode_f16(self.values[start:stop], out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "F16":
        return F16(taken(self.values, start, stop, step))

    def finite(self) -> bool:
        return not kernels.has_bits(self.values.view(np.uint16), 0x7C00)


@dataclass(frozen=True, eq=False)
class BF16(QTensor):
    """codes (out, in) uint16: the upper halves of float32 values."""

    codes: UInt16
    format = Format("bf16", 16)

    @property
    def shape(self) -> tuple[int, int]:
        return pair(self.codes)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        decode_bf16(self.codes[start:stop], out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "BF16":
        return BF16(taken(self.codes, start, stop, step))

    def finite(self) -> bool:
        return not kernels.has_bits(self.codes, 0x7F80)

"""Matrices in NVIDIA's nvfp4: fp4 e2m1, 16 of which share an e4m3 scale, and a float32 factor for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import kernels
from numoe.quant.compute.memory import scratch
from numoe.quant.dtypes import Float32, UInt8, decode_e4m3
from numoe.quant.formats.columns import FORMS, Columns, MXFP4Columns, MXFP4Wide, Slab, by_rows, e2m1_codes, e2m1_words
from numoe.quant.formats.format import Format
from numoe.quant.formats.qtensor import QTensor, check_groups, finite_scales, taken

NV_GROUP = 16
"""Weights that share one e4m3 scale."""


@dataclass(frozen=True, eq=False)
class NVFP4(QTensor):
    """value = e2m1(code) * e4m3(scale) * factor.

    codes (out, in/2) uint8, two a byte, low nibble first; scales (out, in/16) uint8; factors (out, 1) float32: one a
    row, so that rows of matrices with different ones make a matrix.
    """

    codes: UInt8
    scales: UInt8
    factors: Float32
    format = Format("nvfp4", 4, (1, NV_GROUP), 8, row_bits=32, slab_step=4)

    def __post_init__(self) -> None:
        check_groups(self.format.kind, self.shape, NV_GROUP, self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        scales = decode_e4m3(self.scales[start:stop])
        scales *= self.factors[start:stop]
        kernels.dequantize_mxfp4(self.codes[start:stop], scales, out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> NVFP4:
        return NVFP4(*(taken(values, start, stop, step) for values in (self.codes, self.scales, self.factors)))

    def finite(self) -> bool:
        return not kernels.has_bits(self.scales, 0x7F) and finite_scales(self.factors)


@dataclass(frozen=True, eq=False)
class NVFP4Columns(Columns):
    """The same by columns. codes uint16 as those of `MXFP4Columns`; scales uint8; factors (out,) float32."""

    factors: Float32 = field(default_factory=lambda: np.empty(0, np.float32))

    format = NVFP4.format
    unit = 0.5
    dtype = np.uint16

    _bytes = MXFP4Columns._bytes
    _rows = MXFP4Columns._rows

    @classmethod
    def slab_arrays(cls, rows: QTensor) -> list[NDArray[Any]]:
        assert isinstance(rows, NVFP4)
        return [e2m1_words(rows.codes), rows.scales.T.reshape(-1), rows.factors.reshape(-1)]

    @classmethod
    def of(cls, format: Format, arrays: Sequence[NDArray[Any]], shape: tuple[int, int]) -> NVFP4Columns:
        codes, scales, factors = arrays
        return cls(codes.view(cls.dtype), scales, None, shape, factors=factors)

    def plain(self) -> NVFP4:
        return NVFP4(e2m1_codes(self._codes_by_rows()), by_rows(self, "scales"), self.factors[:, None])

    def finite(self) -> bool:
        return not kernels.has_bits(self.scales, 0x7F) and finite_scales(self.factors)

    def wider(self) -> QTensor:
        return NVFP4Wide(self._unpacked(), self.scales, None, self.size, self.cut, self.factors)

    def _scaling(self, slab: Slab) -> tuple[Float32, Float32 | None]:
        scales = decode_e4m3(slab.scales, scratch("scales", slab.scales.shape))
        factors = self.factors[slab.first :][: slab.alike * slab.rows] * np.float32(self.unit)
        each = scales.reshape(slab.alike, -1, slab.rows)  # (slabs, G, rows)
        each *= factors.reshape(slab.alike, 1, slab.rows)
        return scales, None


@dataclass(frozen=True, eq=False)
class NVFP4Wide(NVFP4Columns):
    """The same with a byte a weight: codes int8, (in, rows) a slab, twice the values."""

    codes: NDArray[Any]
    format = NVFP4.format.wide

    _bytes = MXFP4Wide._bytes
    _rows = MXFP4Wide._rows

    def wider(self) -> QTensor:
        return self


FORMS["nvfp4"] = NVFP4Columns

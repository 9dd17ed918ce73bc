"""Matrices in NVIDIA's nvfp4: fp4 e2m1, 16 of which share an e4m3 scale, and a float32 factor for all of them."""

from dataclasses import dataclass

from numoe.quant.compute import kernels
from numoe.quant.dtypes import Float32, UInt8, decode_e4m3
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
    format = Format("nvfp4", 4, (1, NV_GROUP), 8, row_bits=32)

    def __post_init__(self) -> None:
        check_groups(self.format.kind, self.shape, NV_GROUP, self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        scales = decode_e4m3(self.scales[start:stop])
        scales *= self.factors[start:stop]
        kernels.dequantize_mxfp4(self.codes[start:stop], scales, out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "NVFP4":
        return NVFP4(*(taken(values, start, stop, step) for values in (self.codes, self.scales, self.factors)))

    def finite(self) -> bool:
        return not kernels.has_bits(self.scales, 0x7F) and finite_scales(self.factors)

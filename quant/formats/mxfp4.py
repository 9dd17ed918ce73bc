"""Matrices in mxfp4, as the OCP Microscaling Formats Specification 1.0 has it: fp4 e2m1, 32 of which share a scale."""

from dataclasses import dataclass

from numoe.quant.compute import kernels
from numoe.quant.dtypes import Float32, UInt8, decode_e8m0
from numoe.quant.formats.format import Format
from numoe.quant.formats.qtensor import QTensor, check_groups, finite_scales, taken

MX_GROUP = 32
"""Weights that share one e8m0 scale in the OCP microscaling formats."""


@dataclass(frozen=True, eq=False)
class MXFP4(QTensor):
    """e2m1 codes (out, in/2) uint8, two a byte, low nibble first, with e8m0 scales (out, in/32) uint8."""

    codes: UInt8
    scales: UInt8
    format = Format("mxfp4", 4, (1, MX_GROUP), 8, slab_step=4)

    def __post_init__(self) -> None:
        check_groups(self.format.kind, self.shape, MX_GROUP, self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        kernels.dequantize_mxfp4(self.codes[start:stop], decode_e8m0(self.scales[start:stop]), out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "MXFP4":
        return MXFP4(taken(self.codes, start, stop, step), taken(self.scales, start, stop, step))

    def finite(self) -> bool:
        return finite_scales(self.scales)

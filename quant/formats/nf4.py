"""Matrices in nf4, as QLoRA (arXiv:2305.14314, appendix E) has it: codes of 16 quantiles of a normal distribution."""

from dataclasses import dataclass

import numpy as np

from numoe.quant.compute import kernels
from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.formats.format import Format
from numoe.quant.formats.qtensor import QTensor, check_groups, finite_scales, taken

NF4_GROUP = 64
"""Weights that share one scale."""

NF4_VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32
)  # fmt: skip
"""(16,) float32: the value of each code."""

# (256, 2) float32, seen as 256 eight-byte items: one look-up decodes a byte of two codes, low nibble first.
_PAIRS = np.stack([np.tile(NF4_VALUES, 16), np.repeat(NF4_VALUES, 16)], axis=1).view(np.uint64)[:, 0]


@dataclass(frozen=True, eq=False)
class NF4(QTensor):
    """codes (out, in/2) uint8, two a byte, low nibble first, with scales (out, in/64) float32."""

    codes: UInt8
    scales: Float32
    format = Format("nf4", 4, (1, NF4_GROUP), 32)

    def __post_init__(self) -> None:
        check_groups(self.format.kind, self.shape, NF4_GROUP, self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        np.take(_PAIRS, self.codes[start:stop], out=out.view(np.uint64), mode="clip")
        kernels.dequantize_groups(out, self.scales[start:stop], None)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "NF4":
        return NF4(taken(self.codes, start, stop, step), taken(self.scales, start, stop, step))

    def finite(self) -> bool:
        return finite_scales(self.scales)

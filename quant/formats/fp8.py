"""Matrices in fp8 e4m3 with a scale a block of rows and columns."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import kernels
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import FEW
from numoe.quant.compute.threads import Task
from numoe.quant.dtypes import Float32, UInt8, decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.formats.format import Format
from numoe.quant.formats.qtensor import QTensor, finite_scales, pair, taken

_FOLDED_ROWS = 32  # of weights that share scales; with fewer, scaling x takes longer than scaling the weights


@cache
def fp8_format(block: tuple[int, int], scale_bits: int) -> Format:
    """That of `FP8` in blocks of (height, width): e8m0 scales have 8 bits, and float ones 32."""
    return Format("fp8", 8, block, scale_bits, note=f"{block[0]}x{block[1]}")


@dataclass(frozen=True, eq=False)
class FP8(QTensor):
    """e4m3 codes (out, in) uint8 with one scale a block of (height, width) weights.

    scales (ceil(out / height), ceil(in / width)): e8m0 codes when uint8, else float32. The blocks at the lower and
    right edge may be partial.
    """

    codes: UInt8
    scales: UInt8 | Float32
    block: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        expected = tuple(-(-size // step) for size, step in zip(self.codes.shape, self.block, strict=True))
        if self.scales.shape != expected:
            raise InputError(
                f"fp8 weights of shape {self.codes.shape} in blocks of {self.block} need scales of shape {expected}, "
                f"not {self.scales.shape}; check the checkpoint's block size"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return pair(self.codes)

    @property
    def format(self) -> Format:
        return fp8_format(self.block, 8 * self.scales.itemsize)

    @cached_property
    def _factors(self) -> Float32:
        return _decode_scales(self.scales)

    @cached_property
    def folds(self) -> bool:
        """Whether x can take the scales: blocks are whole in a row and high, and scales neither huge nor tiny."""
        height, width = self.block
        if self.codes.shape[1] % width or height < _FOLDED_ROWS:
            return False
        scales = np.abs(self._factors[self._factors != 0])
        return not scales.size or bool(scales.min() >= 2.0**-30 and scales.max() <= 2.0**20)

    def products(self, x: Activations, out: Float32) -> list[Task]:
        if len(out) > FEW or not self.folds:
            return super().products(x, out)
        return kernels.few_products_of_fp8(x.x, self.codes, self._factors, self.block, out)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        kernels.dequantize_fp8(self.codes[start:stop], self._factors, self.block, start, out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "FP8":
        height, width = self.block
        if start % height == 0 and step == 1:
            return FP8(self.codes[start:stop], self.scales[start // height : -(-stop // height)], self.block)
        # A range that starts inside a block keeps the codes shared and gets one row of scales a row of codes.
        scales = self.scales[np.arange(start, stop, step) // height]
        return FP8(taken(self.codes, start, stop, step), scales, (1, width))

    def finite(self) -> bool:
        return not kernels.has_bits(self.codes, 0x7F) and finite_scales(self.scales)


def _decode_scales(scales: NDArray) -> Float32:
    return decode_e8m0(scales) if scales.dtype == np.uint8 else scales

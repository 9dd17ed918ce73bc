"""Matrices in int8 and int4 with a scale, and perhaps a bias, a group of weights along a row."""

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import kernels
from numoe.quant.compute.memory import scratch
from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.errors import InputError
from numoe.quant.formats.format import Format
from numoe.quant.formats.qtensor import QTensor, check_groups, finite_scales, pair, taken


@cache
def integer_format(bits: int, group: int, scale_bits: int, bias: bool) -> Format:
    """That of `INT8` and `INT4`, whose `group` weights share a scale and perhaps a bias of so many bits."""
    return Format(f"int{bits}", bits, (1, group), scale_bits, bias, note=f"g{group}", slab_step=1)


@cache
def ordered_format(bits: int, group: int, scale_bits: int, bias: bool) -> Format:
    """That of the same with an `order` of its columns."""
    plain = integer_format(bits, group, scale_bits, bias)
    return replace(plain, note=f"g{group} in another order", column_bits=32, slab_step=0)


@dataclass(frozen=True, eq=False)
class _Grouped(QTensor):
    """Integer codes with a scale and perhaps a bias a group of weights along a row.

    scales and bias are (out, in / group), float16 or float32; the group size follows from their shape. Where groups
    are not of neighbours, order (in,) int32 tells which column each code of a row is of.
    """

    codes: NDArray
    scales: NDArray[np.float16] | Float32
    bias: NDArray[np.float16] | Float32 | None = None
    order: NDArray[np.int32] | None = None

    bits: ClassVar[int]
    """Of a code."""

    def __post_init__(self) -> None:
        check_groups(f"int{self.bits}", self.shape, self.group, self.scales)
        if self.bias is not None:
            check_groups(f"int{self.bits}", self.shape, self.group, self.bias)
        if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(self.shape[1])):
            raise InputError(f"the order of {self.shape[1]} columns does not name each once; download the model again")

    @property
    def group(self) -> int:
        """Weights that share one scale."""
        return self.shape[1] // max(1, self.scales.shape[1])

    @property
    def format(self) -> Format:
        kind = integer_format if self.order is None else ordered_format
        return kind(self.bits, self.group, 8 * self.scales.itemsize, self.bias is not None)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        bias = None if self.bias is None else self.bias[start:stop]
        decode = kernels.dequantize_int4 if self.bits == 4 else kernels.dequantize_int8
        if self.order is None:
            decode(self.codes[start:stop], self.scales[start:stop], bias, out)
        else:
            values = scratch("ordered", out.shape)
            decode(self.codes[start:stop], self.scales[start:stop], bias, values)
            out[:, self.order] = values

    def slice_rows(self, start: int, stop: int, step: int = 1) -> QTensor:
        bias = None if self.bias is None else taken(self.bias, start, stop, step)
        codes, scales = (taken(values, start, stop, step) for values in (self.codes, self.scales))
        return type(self)(codes, scales, bias, self.order)

    def finite(self) -> bool:
        return finite_scales(self.scales) and (self.bias is None or finite_scales(self.bias))


@dataclass(frozen=True, eq=False)
class INT8(_Grouped):
    """value = scale * code + bias (0 without one); codes (out, in) int8."""

    codes: NDArray[np.int8]
    bits = 8

    @property
    def shape(self) -> tuple[int, int]:
        return pair(self.codes)


@dataclass(frozen=True, eq=False)
class INT4(_Grouped):
    """value = scale * q + bias, or scale * (q - 8) without a bias; q is 0..15.

    codes (out, in/2) uint8: in each group's group/2 bytes, the low nibbles are its first half and the high nibbles
    its second.
    """

    codes: UInt8
    bits = 4

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

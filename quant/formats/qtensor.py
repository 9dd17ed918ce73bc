"""One interface over weight matrices however they are stored: float32, float16, bf16, fp8, mxfp4, int8, int4.

A QTensor is a matrix W of shape (out, in). Users multiply with it and never ask for its format. Each format adds
only how a range of its rows becomes float32 and how a range of its rows is cut out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute import kernels, threads, workers
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.kernels import FEW
from numoe.quant.compute.threads import Task
from numoe.quant.dtypes import E8M0_NAN, Float32, UInt8, UInt16, decode_bf16, decode_e8m0, decode_f16
from numoe.quant.errors import InputError

_FLOAT32 = np.dtype(np.float32)

# Multiplications; for fewer, having others help takes longer than it gains.
_WORTH_WORKERS = 1 << 19
_WORTH_THREADS = 1 << 21

_FOLDED_ROWS = 32  # of weights that share scales; with fewer, scaling x takes longer than scaling the weights

MX_GROUP = 32
"""Weights that share one e8m0 scale in the OCP microscaling formats."""


class QTensor(ABC):
    """A weight matrix of shape (out, in), stored in some format, that computes in float32."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""

    @property
    @abstractmethod
    def format(self) -> str:
        """The format for people to read, such as "int4 g32"."""

    @abstractmethod
    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        """Writes rows start..stop to `out`, (stop - start, in) float32, C-contiguous."""

    @abstractmethod
    def slice_rows(self, start: int, stop: int, step: int = 1) -> "QTensor":
        """Rows start, start + step, ... before stop as a QTensor that shares these bytes, or has its own where they do
        not follow each other."""

    @abstractmethod
    def finite(self) -> bool:
        """Whether no code, scale or bias is NaN or infinite."""

    def matmul(self, x: Float32 | Activations, out: Float32 | None = None) -> Float32:
        """x @ W.T: x (T, in) float32, C-contiguous -> (T, out) float32, written to `out` if given.

        Raises ValueError for another shape or dtype.
        """
        return matmul_all([(self, x, out)])[0]

    def rows(self, indices: NDArray[np.integer] | Sequence[int]) -> Float32:
        """The rows of these indices, (n, in) float32: an embedding look-up. Raises IndexError outside 0..out-1."""
        picked = np.asarray(indices, np.int64)
        if picked.size and not 0 <= int(picked.min()) <= int(picked.max()) < self.shape[0]:
            raise IndexError(f"row indices must lie in 0..{self.shape[0] - 1}")
        out = np.empty((picked.size, self.shape[1]), np.float32)
        for position, row in enumerate(picked.tolist()):
            self.dequantize_rows(row, row + 1, out[position : position + 1])
        return out

    def dequantize(self) -> Float32:
        """The whole matrix, (out, in) float32."""
        out = np.empty(self.shape, np.float32)
        step = kernels.block_rows(self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            self.dequantize_rows(start, stop, out[start:stop])
        return out

    def products(self, x: Activations, out: Float32) -> list[Task]:
        """The tasks that together write x @ W.T to `out`, in any order and on any thread."""
        return kernels.products_by_rows(x.x, self.shape, self.dequantize_rows, out)

    def split(self, parts: int) -> "list[QTensor]":
        """`parts` equal ranges of rows that share these bytes. Raises ValueError when they would not be equal."""
        step, rest = divmod(self.shape[0], parts)
        if rest:
            raise ValueError(f"{self.shape[0]} rows do not split into {parts} equal parts")
        return [self.slice_rows(part * step, (part + 1) * step) for part in range(parts)]


def matmul_all(products: Sequence[tuple[QTensor, Float32 | Activations, Float32 | None]]) -> list[Float32]:
    """`QTensor.matmul` of several matrices at once, each (W, x, out or None): workers or threads share all of it.

    Give the same `Activations` to all matrices that are multiplied with the same x. Raises what `matmul` raises.
    """
    given: list[workers.Product] = []
    work = 0
    few = True
    for matrix, x, out in products:
        activations = x if isinstance(x, Activations) else Activations(x)
        values = activations.x
        rows, columns = matrix.shape
        if values.dtype != _FLOAT32 or values.ndim != 2 or values.shape[1] != columns:
            raise ValueError(f"matmul takes float32 (T, {columns}), not {values.dtype} {values.shape}")
        given.append((matrix, activations, np.empty((len(values), rows), np.float32) if out is None else out))
        work += len(values) * rows * columns
        few = few and len(values) <= FEW
    if not (few and work >= _WORTH_WORKERS and workers.multiply(given)):
        tasks = [task for matrix, x, out in given for task in matrix.products(x, out)]
        if work < _WORTH_THREADS:
            for task in tasks:
                task()
        else:
            threads.run(tasks)
    return [out for _, _, out in given]


@dataclass(frozen=True, eq=False)
class F32(QTensor):
    """values (out, in) float32."""

    values: Float32
    format = "f32"

    @cached_property
    def shape(self) -> tuple[int, int]:
        return _pair(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        np.copyto(out, self.values[start:stop])

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "F32":
        return F32(_rows(self.values, start, stop, step))

    def finite(self) -> bool:
        return kernels.all_finite(self.values)

    def products(self, x: Activations, out: Float32) -> list[Task]:
        return kernels.products_of_float32(x.x, self.values, out)


@dataclass(frozen=True, eq=False)
class F16(QTensor):
    """values (out, in) float16, finite ones."""

    values: NDArray[np.float16]
    format = "f16"

    @property
    def shape(self) -> tuple[int, int]:
        return _pair(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        decode_f16(self.values[start:stop], out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "F16":
        return F16(_rows(self.values, start, stop, step))

    def finite(self) -> bool:
        return not kernels.has_bits(self.values.view(np.uint16), 0x7C00)


@dataclass(frozen=True, eq=False)
class BF16(QTensor):
    """codes (out, in) uint16: the upper halves of float32 values."""

    codes: UInt16
    format = "bf16"

    @property
    def shape(self) -> tuple[int, int]:
        return _pair(self.codes)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        decode_bf16(self.codes[start:stop], out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "BF16":
        return BF16(_rows(self.codes, start, stop, step))

    def finite(self) -> bool:
        return not kernels.has_bits(self.codes, 0x7F80)


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
        return _pair(self.codes)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def format(self) -> str:
        return f"fp8 {self.block[0]}x{self.block[1]}"

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
        return FP8(_rows(self.codes, start, stop, step), scales, (1, width))

    def finite(self) -> bool:
        return not kernels.has_bits(self.codes, 0x7F) and finite_scales(self.scales)


@dataclass(frozen=True, eq=False)
class MXFP4(QTensor):
    """e2m1 codes (out, in/2) uint8, two a byte, low nibble first, with e8m0 scales (out, in/32) uint8."""

    codes: UInt8
    scales: UInt8
    format = "mxfp4"

    def __post_init__(self) -> None:
        _check_groups(self.format, self.shape, MX_GROUP, self.scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        kernels.dequantize_mxfp4(self.codes[start:stop], decode_e8m0(self.scales[start:stop]), out)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> "MXFP4":
        return MXFP4(_rows(self.codes, start, stop, step), _rows(self.scales, start, stop, step))

    def finite(self) -> bool:
        return finite_scales(self.scales)


@dataclass(frozen=True, eq=False)
class _Grouped(QTensor):
    """Integer codes with a scale and perhaps a bias a group of weights along a row.

    scales and bias are (out, in / group), float16 or float32; the group size follows from their shape.
    """

    codes: NDArray
    scales: NDArray[np.float16] | Float32
    bias: NDArray[np.float16] | Float32 | None = None

    def __post_init__(self) -> None:
        _check_groups(type(self).__name__.lower(), self.shape, self.group, self.scales)
        if self.bias is not None:
            _check_groups(type(self).__name__.lower(), self.shape, self.group, self.bias)

    @property
    def group(self) -> int:
        """Weights that share one scale."""
        return self.shape[1] // max(1, self.scales.shape[1])

    @property
    def format(self) -> str:
        return f"{type(self).__name__.lower()} g{self.group}"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def slice_rows(self, start: int, stop: int, step: int = 1) -> QTensor:
        bias = None if self.bias is None else _rows(self.bias, start, stop, step)
        return type(self)(_rows(self.codes, start, stop, step), _rows(self.scales, start, stop, step), bias)

    def finite(self) -> bool:
        return finite_scales(self.scales) and (self.bias is None or finite_scales(self.bias))


@dataclass(frozen=True, eq=False)
class INT8(_Grouped):
    """value = scale * code + bias (0 without one); codes (out, in) int8."""

    codes: NDArray[np.int8]

    @property
    def shape(self) -> tuple[int, int]:
        return _pair(self.codes)

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        bias = None if self.bias is None else self.bias[start:stop]
        kernels.dequantize_int8(self.codes[start:stop], self.scales[start:stop], bias, out)


@dataclass(frozen=True, eq=False)
class INT4(_Grouped):
    """value = scale * q + bias, or scale * (q - 8) without a bias; q is 0..15.

    codes (out, in/2) uint8: in each group's group/2 bytes, the low nibbles are its first half and the high nibbles
    its second.
    """

    codes: UInt8

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def dequantize_rows(self, start: int, stop: int, out: Float32) -> None:
        bias = None if self.bias is None else self.bias[start:stop]
        kernels.dequantize_int4(self.codes[start:stop], self.scales[start:stop], bias, out)


def _rows(values: NDArray, start: int, stop: int, step: int) -> NDArray:
    """Rows one after another, as kernels take them: without a copy where they are so already."""
    return values[start:stop] if step == 1 else np.ascontiguousarray(values[start:stop:step])


def _pair(values: NDArray) -> tuple[int, int]:
    rows, columns = values.shape
    return rows, columns


def _check_groups(kind: str, shape: tuple[int, int], group: int, scales: NDArray) -> None:
    if group < 2 or group % 2 or scales.shape != (shape[0], shape[1] // group) or shape[1] % group:
        raise InputError(
            f"{kind} weights of shape {shape} do not fit scales of shape {scales.shape} in groups of {group}; "
            "the row length must be a multiple of an even group size"
        )


def _decode_scales(scales: NDArray) -> Float32:
    return decode_e8m0(scales) if scales.dtype == np.uint8 else scales


def finite_scales(scales: NDArray) -> bool:
    """Whether no scale, float or e8m0 code, is NaN or infinite."""
    if scales.dtype == np.uint8:
        return not kernels.has_bits(scales, E8M0_NAN)
    return kernels.all_finite(scales)

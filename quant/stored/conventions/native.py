"""The handles on weights whose tensors need no unpacking, numoe's own among them.

Where safetensors' `__metadata__` says so (`LAYOUT`), matrices in mxfp4, int8 and int4 are stored by columns: dtypes and
shapes are those of `registry`, and the bytes are in the order of `columns.slab_arrays`, slab after slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import all_finite
from numoe.quant.dtypes import Float32, UInt8, decode_bf16, decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, TensorInfo
from numoe.quant.formats import columns
from numoe.quant.formats.format import FLOAT32, INT64, Format
from numoe.quant.formats.fp8 import FP8, fp8_format
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.formats.mxfp4 import MXFP4
from numoe.quant.formats.plain import BF16, F16, F32
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.handle import Cut, Stored
from numoe.quant.stored.safetensors import DTYPE_BITS

LAYOUT = {"numoe": "columns"}
"""The entry of the metadata of a folder whose matrices are by columns."""
WRITTEN = {"format": "pt", **LAYOUT}
"""All the metadata of what numoe writes; other readers of safetensors ask for a format."""

_INTEGERS = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "I64": "<i8",
}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
FORMATS = {"F32": F32.format, "F64": F32.format, "F16": F16.format, "BF16": BF16.format}
_E8M0 = ("F8_E8M0", "U8")
_SCALES = (*_E8M0, "F32", "BF16")
_SUPPORTED = "use a checkpoint in F32, F16, BF16, FP8 with block scales, MXFP4, or a GGUF file"


def companion(name: str, part: str) -> str:
    """The name under which the "scale" or "minimum" of the weight `name` is stored beside it."""
    if name.endswith(".weight"):
        return f"{name.removesuffix('weight')}{part}"
    return f"{name}_{part}"


def block_name(name: str, kind: str) -> str:
    """The name under which a weight in one of GGUF's block types is stored: what its bytes are, only that tells."""
    return f"{name}.{kind.lower()}"


def own_layout(name: str, format: Format, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The tensors, (name, dtype, shape), in which numoe stores a matrix (out, in) of a format, in their order."""
    rows, width = shape
    height, breadth = format.block
    factors = -(-rows // height), -(-width // breadth)
    codes = (rows, width * format.bits // 8)
    scales = {8: "F8_E8M0", 16: "F16", 32: "F32"}.get(format.scale_bits, "")
    parts: list[tuple[str, str, tuple[int, ...]]]
    if not format.bits:
        parts = [(block_name(name, format.kind), "U8", (rows, format.nbytes(1, width)))]
    elif format.kind == "nvfp4":
        parts = [(name, "U8", codes), ("scale", "F8_E4M3", factors)]
        parts.append(("factors" if format.by_columns(rows) else "factor", "F32", (rows, 1)))
    elif format.kind == "nf4":
        parts = [(name, "U8", codes), ("nf4", "F32", factors)]
    elif format.scale_bits:
        dtype = {"fp8": "F8_E4M3", "mxfp4": "I8", "int8": "I8", "int4": "U8"}[format.kind]
        parts = [(name, dtype, codes), ("scale", scales, factors)]
        if format.bias:
            parts.append(("minimum", scales, factors))
        if format.column_bits:
            parts.append(("order", "I32", (width,)))
    else:
        parts = [(name, format.kind.upper(), (rows, width))]
    return [parts[0], *((companion(name, part), dtype, size) for part, dtype, size in parts[1:])]


class Numbers(Stored):
    """Plain floats, which become a matrix or an array, or integers, which become an array."""

    @property
    def _dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def array_format(self) -> Format:
        return INT64 if self._dtype in _INTEGERS else FLOAT32

    def turned(self) -> Stored:
        if len(self.whole) < 2:
            return self
        *stacked, rows, columns = self.whole
        return Turned(self.files, self.name, self.parts, (*stacked, columns, rows), self.format)

    @property
    def _is_view(self) -> bool:
        return self._dtype != "F64"

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        if self._dtype not in (*_FLOATS, "BF16"):
            raise self._refusal(f"it is {self._dtype} without scales; {_SUPPORTED}")
        return super()._extents(start, stop)

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        values = raw[0].reshape(stop - start, -1)
        if self._dtype == "BF16":
            return BF16(values.view("<u2"))
        if self._dtype == "F16":
            return F16(values.view("<f2"))
        return F32(_float_values(values, self.parts[0]))

    def array(self) -> NDArray:
        if self.index is not None or self.picked is not None:
            return super().array()
        (info,) = self.parts
        raw = self.files.read_range(info.path, info.offset, info.nbytes)
        if info.dtype in _INTEGERS:
            return raw.view(_INTEGERS[info.dtype]).astype(np.int64).reshape(self.whole)
        values = _float_values(raw, info).reshape(self.whole)
        if not all_finite(values):
            raise self._not_finite()
        return values


class Turned(Numbers):
    """Floats that are stored (in, out). A matrix is read as a whole, and held in as many bytes."""

    @property
    def _is_view(self) -> bool:
        return False

    def cuts(self) -> tuple[Cut, ...]:
        return ()

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        return super()._extents(0, self.whole[-2])

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        values = raw[0].view(f"V{DTYPE_BITS[self._dtype] // 8}").reshape(self.whole[-1], self.whole[-2])
        return super()._made([np.ascontiguousarray(values[:, start:stop].T).view(np.uint8)], start, stop)

    def array(self) -> NDArray:
        return Stored.array(self)


@dataclass(frozen=True, eq=False)
class BlockScaled(Stored):
    """fp8 codes with a scale a block of rows and columns."""

    block: tuple[int, int] = (128, 128)

    def rows(self, start: int, stop: int, step: int = 1) -> Self:
        picked = super().rows(start, stop, step)
        first, _, every = picked._range
        height, width = self.block
        # What starts inside a block, or leaves rows out, gets one row of scales a row of codes.
        block = (height, width) if first % height == 0 and every == 1 else (1, width)
        return replace(picked, format=fp8_format(block, self.format.scale_bits))

    def flat(self) -> Self:
        if len(self.whole) > 2 and self.whole[-2] % self.block[0]:
            raise self._refusal(f"its blocks of {self.block[0]} rows reach over the matrices of a stack")
        return super().flat()

    def _scale_rows(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.block[0], -(-stop // self.block[0])

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        codes, scales = self.parts
        rows = self._scale_rows(start, stop)
        return self._extent(codes, self.whole, start, stop), self._extent(scales, scales.shape, *rows)

    def cuts(self) -> tuple[Cut, ...]:
        start, stop, step = self._range
        height, width = self.block
        if (start % height or step > 1) and width >= self.whole[-1]:
            return ()
        if start % height or step > 1:
            raise InputError(
                f"{self.parts[0].path}: {self.name!r} cannot be cut at row {start} without new scales, as its blocks "
                f"have {height} rows; quantize it to int4"
            )
        (_, scales), (_, extent) = self.parts, self.extents()
        first, last = self._scale_rows(start, stop)
        row = extent.nbytes // (last - first)
        cut = Cut(scales.name, scales.dtype, extent.offset - scales.offset, row, last - first, 1)
        return super().cuts()[0], cut

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> FP8:
        height, width = self.block
        first, last = self._scale_rows(start, stop)
        codes, factors = raw[0].reshape(stop - start, -1), raw[1].reshape(last - first, -1)
        scales = self.parts[1]
        values = factors if scales.dtype in _E8M0 else _float_values(factors, scales)
        if start % height == 0:
            return FP8(codes, values, (height, width))
        return FP8(codes, values[np.arange(start, stop) // height - first], (1, width))


class Microscaled(Stored):
    """mxfp4."""

    _dtypes = "I8", "F8_E8M0"

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> MXFP4:
        codes, scales = (part.reshape(stop - start, -1) for part in raw)
        return MXFP4(codes, scales)


class Grouped(Stored):
    """int8 or int4 with a float scale, and perhaps a minimum, a group."""

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> INT8 | INT4:
        codes, *factors = (part.reshape(stop - start, -1) for part in raw)
        scales, *minimum = (part.view(_FLOATS[info.dtype]) for part, info in zip(factors, self.parts[1:], strict=True))
        bias = minimum[0] if minimum else None
        return INT4(codes, scales, bias) if self.format.bits == 4 else INT8(codes.view(np.int8), scales, bias)


class Slabs(Stored):
    """What is laid out by columns, and read as a whole."""

    laid_out = True

    def cuts(self) -> tuple[Cut, ...]:
        if self.picked is not None:
            raise self._refusal("it is laid out by columns, and no rows can be taken out; convert the original")
        return super().cuts()

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        return tuple(Extent(info.path, info.offset, info.nbytes) for info in self.parts)

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        codes, *factors = raw
        arrays = [
            codes,
            *(part.view(_FLOATS.get(info.dtype, "u1")) for part, info in zip(factors, self.parts[1:], strict=True)),
        ]
        rows, width = self.whole
        matrix = columns.from_arrays(self.format, arrays, (rows, width))
        return matrix if stop - start == rows else matrix.slice_rows(start, stop)


def _float_values(raw: UInt8, info: TensorInfo) -> Float32:
    """The values along the last axis of raw bytes, float32. Raises InputError unless the dtype is a float."""
    if info.dtype == "BF16":
        return decode_bf16(raw.view("<u2"))
    if info.dtype == "F8_E8M0":
        return decode_e8m0(raw)
    if info.dtype not in _FLOATS:
        raise InputError(f"{info.path}: the tensor {info.name!r} is {info.dtype} without scales; {_SUPPORTED}")
    return raw.view(_FLOATS[info.dtype]).astype(np.float32, copy=False)

"""How safetensors files store weights, whose codes and scales are tensors of their own. The conventions understood are

    X.weight (F8_E4M3) + X.scale or X.weight_scale_inv       blocks of 128x128; e8m0 or float scales
    X.weight (I8)      + X.scale (F8_E8M0)                   mxfp4: two e2m1 values a byte, groups of 32
    X_blocks (U8)      + X_scales                            mxfp4 as gpt-oss stores it; its name here is X
    X.weight (I8)      + X.scale (F16) [+ X.minimum (F16)]   numoe's int8: (out, in), scales (out, in / group)
    X.weight (U8)      + X.scale (F16) [+ X.minimum (F16)]   numoe's int4: (out, in / 2) in the order of `INT4`

All but the third say Y_scale and Y_minimum beside a Y that does not end in .weight.

Where safetensors' `__metadata__` says so (`LAYOUT`), matrices in mxfp4, int8 and int4 are stored by columns: dtypes and
shapes are those above, and the bytes are in the order of `columns.slab_arrays`, slab after slab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import all_finite
from numoe.quant.dtypes import Float32, UInt8, decode_bf16, decode_e8m0
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo
from numoe.quant.formats import columns
from numoe.quant.formats.format import FLOAT32, INT64, Format
from numoe.quant.formats.fp8 import FP8, fp8_format
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.formats.plain import BF16, F16, F32
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.handle import Cut, Stored
from numoe.quant.stored.safetensors import DTYPE_BITS

LAYOUT = {"numoe": "columns"}
"""The entry of the metadata of a folder whose matrices are by columns."""

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
_FORMATS = {"F32": F32.format, "F64": F32.format, "F16": F16.format, "BF16": BF16.format}
_E8M0 = ("F8_E8M0", "U8")
_SCALES = (*_E8M0, "F32", "BF16")
_SUPPORTED = "use a checkpoint in F32, F16, BF16, FP8 with block scales, MXFP4, or a GGUF file"


def companion(name: str, part: str) -> str:
    """The name under which the "scale" or "minimum" of the weight `name` is stored beside it."""
    if name.endswith(".weight"):
        return f"{name.removesuffix('weight')}{part}"
    return f"{name}_{part}"


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
        height, _ = self.block
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
    """int8 or int4 with a float16 scale, and perhaps a minimum, a group."""

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> INT8 | INT4:
        codes, *factors = (part.reshape(stop - start, -1) for part in raw)
        scales, *minimum = (part.view("<f2") for part in factors)
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
        arrays = [codes, *(part.view("<f2") if self.format.scale_bits == 16 else part for part in factors)]
        rows, width = self.whole
        matrix = columns.from_arrays(self.format, arrays, (rows, width))
        return matrix if stop - start == rows else matrix.slice_rows(start, stop)


@dataclass(frozen=True)
class Conventions:
    """The weights among tensors, and which kind of `Stored` each is.

    `fp8_block` is the (height, width) of the blocks that share an FP8 scale; `by_columns` tells of `LAYOUT`.
    """

    tensors: Mapping[str, TensorInfo]
    files: Files
    fp8_block: tuple[int, int]
    by_columns: bool

    def names(self) -> Iterator[str]:
        """Those of the weights, in stored order; scales belong to their weight and are not listed."""
        for name in self.tensors:
            if name not in self._folded:
                yield self._folded_into.get(name, name)

    def find(self, name: str) -> Stored | None:
        """The weight by a name. Raises InputError where its codes and scales do not fit each other."""
        info = self.tensors.get(name)
        if info is not None:
            scales = self._scales_of(info)
            if scales is None:
                return self._unscaled(info)
            if info.dtype == "F8_E4M3":
                return self._fp8(info, scales)
            if scales.dtype == "F16":
                return self._grouped(info, scales)
            return self._mxfp4(name, info, scales, (*info.shape[:-1], 2 * info.shape[-1] if info.shape else 0))
        blocks, scales = self.tensors.get(f"{name}_blocks"), self.tensors.get(f"{name}_scales")
        if blocks is None or scales is None:
            return None
        if blocks.shape[-1:] != (MX_GROUP // 2,) or len(blocks.shape) < 3:
            raise InputError(f"{blocks.path}: {blocks.name!r} has the shape {blocks.shape}, not (.., out, in/32, 16)")
        return self._mxfp4(name, blocks, scales, (*blocks.shape[:-2], MX_GROUP * blocks.shape[-2]))

    @cached_property
    def _folded_into(self) -> dict[str, str]:
        # gpt-oss: the codes X_blocks and the weight X that they are.
        codes = {name: name.removesuffix("_blocks") for name in self.tensors if name.endswith("_blocks")}
        return {name: weight for name, weight in codes.items() if f"{weight}_scales" in self.tensors}

    @cached_property
    def _folded(self) -> frozenset[str]:
        folded = {f"{weight}_scales" for weight in self._folded_into.values()}
        for info in self.tensors.values():
            scales = self._scales_of(info)
            if scales is not None:
                folded.add(scales.name)
                if (minimum := self._minimum_of(info, scales)) is not None:
                    folded.add(minimum.name)
        return frozenset(folded)

    def _scales_of(self, info: TensorInfo) -> TensorInfo | None:
        if info.dtype not in ("F8_E4M3", "I8", "U8"):
            return None
        candidates = (f"{info.name}_scale_inv", companion(info.name, "scale"))
        found = next((self.tensors[name] for name in candidates if name in self.tensors), None)
        # A U8 tensor is int4 codes only beside numoe's own scales.
        return None if found is not None and info.dtype == "U8" and found.dtype != "F16" else found

    def _minimum_of(self, info: TensorInfo, scales: TensorInfo) -> TensorInfo | None:
        return self.tensors.get(companion(info.name, "minimum")) if scales.dtype == "F16" else None

    def _unscaled(self, info: TensorInfo) -> Stored:
        # GGUF's plain types have the names of safetensors' dtypes; all others of GGUF pack weights in blocks.
        if info.dtype not in DTYPE_BITS:
            from numoe.quant.stored.gguf_blocks import Blocks  # imports gguf, which others need not wait for

            return Blocks.of(self.files, info)
        format = _FORMATS.get(info.dtype) or Format(info.dtype.lower(), DTYPE_BITS[info.dtype])
        return Numbers(self.files, info.name, (info,), info.shape, format)

    def _fp8(self, info: TensorInfo, scales: TensorInfo) -> Stored:
        blocks = tuple(-(-size // step) for size, step in zip(info.shape[-2:], self.fp8_block, strict=False))
        self._check_scales(info, scales, (*info.shape[:-2], *blocks), _SCALES)
        format = fp8_format(self.fp8_block, 8 if scales.dtype in _E8M0 else 32)
        return BlockScaled(self.files, info.name, (info, scales), info.shape, format, block=self.fp8_block)

    def _mxfp4(self, name: str, info: TensorInfo, scales: TensorInfo, shape: tuple[int, ...]) -> Stored:
        if shape[-1] % MX_GROUP:
            raise InputError(f"{info.path}: the rows of {info.name!r} hold {shape[-1]} values, not a multiple of 32")
        self._check_scales(info, scales, (*shape[:-1], shape[-1] // MX_GROUP), _E8M0)
        kind = self._kind(Microscaled, shape, MXFP4.format)
        return kind(self.files, name, (info, scales), shape, MXFP4.format)

    def _grouped(self, info: TensorInfo, scales: TensorInfo) -> Stored:
        bits = 4 if info.dtype == "U8" else 8
        width = info.shape[-1] * 8 // bits if len(info.shape) > 1 else 0
        groups = scales.shape[-1] if scales.shape else 0
        if groups < 1 or width % (2 * groups):
            raise InputError(
                f"{info.path}: {info.name!r} of shape {info.shape} does not divide into even groups by the scales "
                f"{scales.name!r} of shape {scales.shape}; convert or download the model again"
            )
        minimum = self._minimum_of(info, scales)
        factors = (scales,) if minimum is None else (scales, minimum)
        for stored in factors:
            self._check_scales(info, stored, (*info.shape[:-1], groups), ("F16",))
        shape = (*info.shape[:-1], width)
        format = integer_format(bits, width // groups, 16, minimum is not None)
        return self._kind(Grouped, shape, format)(self.files, info.name, (info, *factors), shape, format)

    def _kind(self, by_rows: type[Stored], shape: tuple[int, ...], format: Format) -> type[Stored]:
        return Slabs if self.by_columns and len(shape) == 2 and format.by_columns(shape[0]) else by_rows

    def _check_scales(
        self, info: TensorInfo, scales: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]
    ) -> None:
        if scales.shape != shape or scales.dtype not in dtypes:
            raise InputError(
                f"{scales.path}: {scales.name!r} is {scales.dtype} {scales.shape} where {info.name!r} "
                f"{info.shape} needs {' or '.join(dtypes)} {shape}; check the block size in the config"
            )


def _float_values(raw: UInt8, info: TensorInfo) -> Float32:
    """The values along the last axis of raw bytes, float32. Raises InputError unless the dtype is a float."""
    if info.dtype == "BF16":
        return decode_bf16(raw.view("<u2"))
    if info.dtype == "F8_E8M0":
        return decode_e8m0(raw)
    if info.dtype not in _FLOATS:
        raise InputError(f"{info.path}: the tensor {info.name!r} is {info.dtype} without scales; {_SUPPORTED}")
    return raw.view(_FLOATS[info.dtype]).astype(np.float32, copy=False)

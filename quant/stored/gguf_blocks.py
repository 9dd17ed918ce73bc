"""GGUF's block types, each of whose blocks holds the codes and scales of some weights of a row.

Q4_0, Q4_1, Q8_0, MXFP4 and NVFP4 keep their codes and scales, which are those of INT4, INT8, MXFP4 and NVFP4; all
others are `GGML`, and stay the bytes that they are. No value changes. Layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import block_rows
from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.errors import InputError
from numoe.quant.files import Extent, Files, TensorInfo
from numoe.quant.formats.format import Format
from numoe.quant.formats.ggml import GGML
from numoe.quant.formats.ggml_types import TYPES
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.formats.nvfp4 import NV_GROUP, NVFP4
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.handle import Cut, Stored


class Blocks(Stored):
    """A weight in one of the block types."""

    @classmethod
    def of(cls, files: Files, info: TensorInfo, scale: TensorInfo | None = None) -> Blocks:
        """The weight that a tensor is; an NVFP4 one may have a scale beside it, for all of it or for each matrix.

        Raises InputError for another such scale.
        """
        format = block_format(info.dtype) or Format(info.dtype.lower(), 8)
        if scale is None or info.dtype != "NVFP4":
            return cls(files, info.name, (info,), info.shape, format)
        if scale.dtype != "F32" or scale.shape not in ((), (1,), info.shape[:-2]):
            raise InputError(
                f"{scale.path}: {scale.name!r} is {scale.dtype} {scale.shape}, no scale of {info.name!r} "
                f"{info.shape}; download the file again"
            )
        return cls(files, info.name, (info, scale), info.shape, format)

    def flat(self) -> Self:
        if len(self.whole) > 2 and any(scale.nbytes > 4 for scale in self.parts[1:]):
            raise self._refusal("its matrices have a scale each, and a stack of them makes no one matrix")
        return super().flat()

    def cuts(self) -> tuple[Cut, ...]:
        return ()

    @property
    def _is_view(self) -> bool:
        return self.parts[0].dtype.lower() in TYPES

    def _extents(self, start: int, stop: int) -> tuple[Extent, ...]:
        blocks, *scales = self.parts
        places = [Extent(one.path, one.offset + (self.index or 0) * (one.nbytes > 4) * 4, 4) for one in scales]
        return (self._extent(blocks, self.whole, start, stop), *places)

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        dtype = self.parts[0].dtype
        blocks = raw[0].reshape(stop - start, -1)
        if kind := TYPES.get(dtype.lower()):
            return GGML(blocks, kind)
        if dtype not in _MADE:
            raise InputError(f"weights of the GGUF type {dtype} cannot be read; use a file of another type")
        _, nbytes, parts, matrix = _MADE[dtype]
        step = block_rows(self.whole[-1])
        arrays: list[NDArray] = []
        for first in range(0, len(blocks), step):
            rows = blocks[first : first + step]
            made = [part.reshape(len(rows), -1) for part in parts(rows.reshape(-1, nbytes))]
            arrays = arrays or [np.empty((len(blocks), part.shape[1]), part.dtype) for part in made]
            for whole, part in zip(arrays, made, strict=True):
                whole[first : first + step] = part
        return matrix(*arrays, *(scale.view(np.float32) for scale in raw[1:]))


class _Made(NamedTuple):
    """A type whose blocks become another format's codes and scales."""

    format: Format
    nbytes: int
    """Of a block."""
    parts: Callable[[UInt8], tuple[NDArray, ...]]
    """Blocks (n, nbytes) -> what the matrix is made of, (n, ..) each."""
    matrix: Callable[..., QTensor]


def _halves(blocks: UInt8, start: int) -> NDArray[np.float16]:
    return blocks[:, start : start + 2].view(np.float16)  # (n, 1)


def _neighbours(packed: UInt8) -> UInt8:
    """Two codes a byte, (n, b): those of a run's halves in low and high nibbles -> neighbours, the low one first."""
    fields = np.concatenate([packed & 15, packed >> 4], axis=1)
    return fields[:, 0::2] | fields[:, 1::2] << 4


def _mxfp4(blocks: UInt8) -> tuple[NDArray, ...]:
    return _neighbours(blocks[:, 1:]), blocks[:, :1]


def _nvfp4(blocks: UInt8) -> tuple[NDArray, ...]:
    """Four runs of 16 weights; scales have no sign, and the code that is NaN elsewhere is 0."""
    scales = np.where(blocks[:, :4] == 127, np.uint8(0), blocks[:, :4] & np.uint8(127))
    return _neighbours(blocks[:, 4:].reshape(-1, 8)).reshape(len(blocks), -1), scales


def _nvfp4_matrix(codes: UInt8, scales: UInt8, factor: float | Float32 = 1.0) -> NVFP4:
    return NVFP4(codes, scales, np.full((len(codes), 1), factor, np.float32))


_MADE = {
    "Q4_0": _Made(integer_format(4, 32, 16, False), 18, lambda b: (b[:, 2:], _halves(b, 0)), INT4),
    "Q4_1": _Made(integer_format(4, 32, 16, True), 20, lambda b: (b[:, 4:], _halves(b, 0), _halves(b, 2)), INT4),
    "Q8_0": _Made(integer_format(8, 32, 16, False), 34, lambda b: (b[:, 2:].view(np.int8), _halves(b, 0)), INT8),
    "MXFP4": _Made(MXFP4.format, 1 + MX_GROUP // 2, _mxfp4, MXFP4),
    "NVFP4": _Made(NVFP4.format, 4 + 2 * NV_GROUP, _nvfp4, _nvfp4_matrix),
}


def block_format(dtype: str) -> Format | None:
    """That in which weights of a block type are read; None for what is none that is."""
    kind, made = TYPES.get(dtype.lower()), _MADE.get(dtype)
    return kind.format if kind else made.format if made else None

"""nvfp4 in the spellings of compressed-tensors, ModelOpt and MLX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.files import Files
from numoe.quant.formats.nvfp4 import NV_GROUP, NVFP4
from numoe.quant.stored.conventions.spelling import Packed, Parts, Spelling, check, misfit
from numoe.quant.stored.handle import Stored


def nvfp4(
    codes: str,
    dtype: str,
    scales: str,
    factor: str | None = None,
    *,
    divides: bool = False,
    scale_dtype: str = "F8_E4M3",
) -> Spelling:
    """Codes of a dtype by a name, low nibble first, with e4m3 scales and perhaps a factor for all, or a divisor."""
    per_item = {"U8": 2, "U32": 8}[dtype]

    def unpack(arrays: Sequence[NDArray[Any]]) -> NVFP4:
        packed, stored, *one = arrays
        bytes_: UInt8 = np.ascontiguousarray(packed).view(np.uint8).reshape(len(packed), -1)
        value = one[0].reshape(-1)[:1].astype(np.float32) if one else np.ones(1, np.float32)
        if divides:
            with np.errstate(divide="ignore"):
                value = np.float32(1) / value
        factors: Float32 = np.full((len(packed), 1), value[0], np.float32)
        return NVFP4(bytes_, stored, factors)

    def stored(files: Files, weight: str, parts: Parts) -> Stored:
        info = parts[codes]
        if len(info.shape) < 2:
            raise misfit(info, "it is no matrix")
        *stack, rows, items = info.shape
        width = items * per_item
        if width % NV_GROUP:
            raise misfit(info, f"rows of {width} do not divide into groups of {NV_GROUP}")
        found = [info, check(parts, scales, info, (scale_dtype,), [(*stack, rows, width // NV_GROUP)])]
        if factor is not None:
            shapes = [(*stack, *ones) for ones in ((), (1,), (1, 1))]
            found.append(check(parts, factor, info, ("F32",), shapes))
        by_rows = (True, True, False)[: len(found)]
        shape = (*stack, rows, width)
        return Packed(files, weight, tuple(found), shape, NVFP4.format, unpack=unpack, by_rows=by_rows)

    return Spelling(codes, (dtype,), (scales,) if factor is None else (scales, factor), stored)

"""mxfp4 with codes and scales in a tensor each, in the spellings of compressed-tensors, Quark and MLX."""

from __future__ import annotations

from numoe.quant.files import Files
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.stored.conventions.native import Microscaled
from numoe.quant.stored.conventions.spelling import Parts, Spelling, check, misfit
from numoe.quant.stored.handle import Stored


def mxfp4(codes: str, dtype: str, scales: str) -> Spelling:
    """Codes of a dtype by a name, low nibble first, with e8m0 scales."""
    per_item = {"U8": 2, "U32": 8}[dtype]

    def stored(files: Files, weight: str, parts: Parts) -> Stored:
        info = parts[codes]
        if len(info.shape) < 2 or info.shape[-1] * per_item % MX_GROUP:
            raise misfit(info, f"its rows do not divide into groups of {MX_GROUP}")
        shape = (*info.shape[:-1], info.shape[-1] * per_item)
        factors = check(parts, scales, info, ("U8", "F8_E8M0"), [(*shape[:-1], shape[-1] // MX_GROUP)])
        return Microscaled(files, weight, (info, factors), shape, MXFP4.format)

    return Spelling(codes, (dtype,), (scales,), stored)

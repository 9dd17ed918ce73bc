"""What only numoe writes, when it keeps what others stored: integers in another order of columns, nvfp4 and nf4.

Y (I8 | U8) + Y_scale [+ Y_minimum] + Y_order (I32)
Y (U8)      + Y_scale (F8_E4M3) + Y_factors (F32), one a row; Y_factor where they are by rows
Y (U8)      + Y_nf4 (F32), the scales
Y.q4_k (U8)                                                 GGUF's blocks, (out, bytes of a row) or a stack of such
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from numoe.quant.files import Files
from numoe.quant.formats.integer import INT4, INT8, ordered_format
from numoe.quant.formats.nf4 import NF4, NF4_GROUP
from numoe.quant.formats.nvfp4 import NV_GROUP, NVFP4
from numoe.quant.stored.conventions.native import Slabs, block_name
from numoe.quant.stored.conventions.spelling import Packed, Parts, Spelling, check, misfit
from numoe.quant.stored.gguf_blocks import Blocks, block_format
from numoe.quant.stored.handle import Stored
from numoe.quant.stored.safetensors import DTYPE_BITS

_CODES, _SCALE, _MINIMUM, _ORDER = "{weight}", "{beside}scale", "{beside}minimum", "{beside}order"
_FACTOR, _FACTORS, _NF4 = "{beside}factor", "{beside}factors", "{beside}nf4"


def _shape(parts: Parts, per_byte: int) -> tuple[int, int]:
    codes = parts[_CODES]
    if len(codes.shape) != 2:
        raise misfit(codes, "it is no matrix")
    return codes.shape[0], codes.shape[1] * per_byte


def _ordered(files: Files, weight: str, parts: Parts) -> Stored:
    codes = parts[_CODES]
    bits = 4 if codes.dtype == "U8" else 8
    rows, width = _shape(parts, 8 // bits)
    scales = parts[_SCALE]
    groups = scales.shape[-1] if scales.shape else 0
    if groups < 1 or width % (2 * groups):
        raise misfit(codes, f"it does not divide into even groups by the scales {scales.name!r} of {scales.shape}")
    found = [codes, check(parts, _SCALE, codes, ("F16", "F32"), [(rows, groups)])]
    if _MINIMUM in parts:
        found.append(check(parts, _MINIMUM, codes, (scales.dtype,), [(rows, groups)]))
    found.append(check(parts, _ORDER, codes, ("I32",), [(width,)]))
    kind = INT4 if bits == 4 else INT8

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT4 | INT8:
        values, factors, *bias, order = arrays
        return kind(values, factors, bias[0] if bias else None, order)

    format = ordered_format(bits, width // groups, DTYPE_BITS[scales.dtype], _MINIMUM in parts)
    by_rows = (*(True for _ in found[1:]), False)
    return Packed(files, weight, tuple(found), (rows, width), format, unpack=unpack, by_rows=by_rows)


def _nvfp4(files: Files, weight: str, parts: Parts) -> Stored:
    rows, width = _shape(parts, 2)
    codes = parts[_CODES]
    scales = check(parts, _SCALE, codes, ("F8_E4M3",), [(rows, width // NV_GROUP)])
    factor = check(parts, _FACTOR, codes, ("F32",), [(rows, 1)])
    shape, by_rows = (rows, width), (True, True, True)
    found = codes, scales, factor
    return Packed(files, weight, found, shape, NVFP4.format, unpack=lambda a: NVFP4(*a), by_rows=by_rows)


def _nvfp4_slabs(files: Files, weight: str, parts: Parts) -> Stored:
    rows, width = _shape(parts, 2)
    codes = parts[_CODES]
    scales = check(parts, _SCALE, codes, ("F8_E4M3",), [(rows, width // NV_GROUP)])
    factors = check(parts, _FACTORS, codes, ("F32",), [(rows, 1)])
    if not NVFP4.format.by_columns(rows):
        raise misfit(codes, f"{rows} rows are not by columns")
    return Slabs(files, weight, (codes, scales, factors), (rows, width), NVFP4.format)


def _nf4(files: Files, weight: str, parts: Parts) -> Stored:
    rows, width = _shape(parts, 2)
    codes = parts[_CODES]
    scales = check(parts, _NF4, codes, ("F32",), [(rows, width // NF4_GROUP)])
    shape, by_rows = (rows, width), (True, True)
    return Packed(files, weight, (codes, scales), shape, NF4.format, unpack=lambda a: NF4(*a), by_rows=by_rows)


def _blocks(kind: str, files: Files, weight: str, parts: Parts) -> Stored:
    codes, scale = parts[block_name("{weight}", kind)], parts.get(_SCALE)
    format = block_format(kind)
    if format is None or len(codes.shape) < 2:
        raise misfit(codes, f"it holds no matrix in {kind}")
    *stack, rows, nbytes = codes.shape
    width = int(8 * nbytes / format.bits_each)
    if not width or format.nbytes(1, width) - format.row_bits // 8 != nbytes:
        raise misfit(codes, f"{nbytes} bytes are no row of whole blocks of {kind}")
    if not format.bits and not stack and format.by_columns(rows):
        return Slabs(files, weight, (codes,), (rows, width), format)
    return replace(Blocks.of(files, replace(codes, dtype=kind, shape=(*stack, rows, width)), scale), name=weight)


def blocks(names: Iterable[str]) -> tuple[Spelling, ...]:
    """Of GGUF's block types, as far as some of these stored names say that they are of one."""
    endings = {name.rpartition(".")[2] for name in names}
    kinds = sorted(ending.upper() for ending in endings if ending.islower() and block_format(ending.upper()))
    return tuple(
        Spelling(block_name("{weight}", kind), ("U8",), (), partial(_blocks, kind), (_SCALE,) * (kind == "NVFP4"))
        for kind in kinds
    )


OWN = (
    Spelling(_CODES, ("I8", "U8"), (_SCALE, _ORDER), _ordered, (_MINIMUM,)),
    Spelling(_CODES, ("U8",), (_SCALE, _FACTORS), _nvfp4_slabs),
    Spelling(_CODES, ("U8",), (_SCALE, _FACTOR), _nvfp4),
    Spelling(_CODES, ("U8",), (_NF4,), _nf4),
)
"""Of folders whose matrices are by columns."""

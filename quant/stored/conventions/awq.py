"""AWQ, as AutoAWQ's "gemm" and "gemv" versions write it.

    gemm    X.qweight (I32: in, out / 8) + X.scales (groups, out)    + X.qzeros (I32: groups, out / 8)
    gemv    X.qweight (I32: out, in / 8) + X.scales (out, 8 columns) + X.qzeros (I32: out, columns)

The fields of a word, least significant first, are those of its eight inputs (gemv), or of the outputs 0, 2, 4, 6, 1, 3,
5 and 7 of its eight (gemm). gemv fills rows of scales and zero points up. Where a config has no zero points
("zero_point": false, as GPTQModel writes by itself) they are stored all the same, the middle.
Source: AutoAWQ 0.2.9, `packing_utils` and `gemv`; GPTQModel 7.7.0, `awq_processor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import transposed
from numoe.quant.dtypes import UInt8
from numoe.quant.errors import word
from numoe.quant.files import Files
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.integers import check_group, integers, integers_format
from numoe.quant.stored.conventions.spelling import FLOATS, Convention, Packed, Parts, Spelling, check, fields, misfit
from numoe.quant.stored.handle import Stored

_CODES, _SCALES, _ZEROS = "{module}.qweight", "{module}.scales", "{module}.qzeros"
_BITS = 4


def read_awq(config: Announced) -> Convention:
    """What such a config says. Raises InputError for what is not computed."""
    config.only(
        "quant_method", "bits", "w_bit", "group_size", "q_group_size", "version", "zero_point",
        "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
        "method", "format", "checkpoint_format", "pack_dtype", "meta", "lm_head", "sym", "pack_method",
    )  # fmt: skip
    version = (config.get("version", str) or config.get("format", str, "gemm")).lower()
    config.size("bits" if "bits" in config.values else "w_bit", (_BITS,), _BITS)
    if version not in ("gemm", "gemv"):
        raise config.unsupported(f"AWQ {version}")
    if (order := config.get("pack_method", str, "reorder")) != "reorder":  # Quark's word for the order below
        raise config.unsupported(f"AWQ with pack_method {word(order)}")
    key = "group_size" if "group_size" in config.values else "q_group_size"
    group = None if config.get(key, int, -1) == -1 else config.size(key)
    return Convention("AWQ", (awq(group) if version == "gemm" else gemv(group),))


def gemv(group: int | None) -> Spelling:
    """The same codes by rows."""
    return Spelling(_CODES, ("I32",), (_SCALES, _ZEROS), partial(_stored_by_rows, group))


def _stored_by_rows(group: int | None, files: Files, weight: str, parts: Parts) -> Stored:
    codes = parts[_CODES]
    if len(codes.shape) != 2:
        raise misfit(codes, "it is no matrix")
    rows, width = codes.shape[0], 8 * codes.shape[1]
    groups = check_group(codes, width, group or width)
    words = _FILLED.get(width // groups, 1)  # of zero points, to a multiple of which rows are filled up
    words *= -(-groups // (8 * words))
    scales = check(parts, _SCALES, codes, FLOATS, [(rows, 8 * words)])
    zeros = check(parts, _ZEROS, codes, ("I32",), [(rows, words)])

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT4 | INT8:
        packed, factors, middle = arrays
        factors = np.ascontiguousarray(factors[:, :groups])
        return integers(fields(packed, _BITS, width), _BITS, factors, fields(middle, _BITS, groups))

    format = integers_format(_BITS, width // groups, scales.dtype, True)
    shape, by_rows, found = (rows, width), (True, True, True), (codes, scales, zeros)
    return Packed(files, weight, found, shape, format, unpack=unpack, by_rows=by_rows)


_FILLED = {32: 4, 64: 2}


def awq(group: int | None) -> Spelling:
    """Codes in groups of so many; None: one of a row."""
    return Spelling(_CODES, ("I32",), (_SCALES, _ZEROS), partial(_stored, group))


def _stored(group: int | None, files: Files, weight: str, parts: Parts) -> Stored:
    codes = parts[_CODES]
    if len(codes.shape) != 2:
        raise misfit(codes, "it is no matrix")
    width, words = codes.shape
    rows = 8 * words
    groups = check_group(codes, width, group or width)
    scales = check(parts, _SCALES, codes, FLOATS, [(groups, rows)])
    zeros = check(parts, _ZEROS, codes, ("I32",), [(groups, words)])

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT4 | INT8:
        packed, factors, middle = arrays
        return integers(_unpacked(packed), _BITS, np.ascontiguousarray(factors.T), _unpacked(middle))

    format = integers_format(_BITS, width // groups, scales.dtype, True)
    shape, by_rows, found = (rows, width), (False, False, False), (codes, scales, zeros)
    return Packed(files, weight, found, shape, format, unpack=unpack, by_rows=by_rows, narrow=_narrow)


def _narrow(arrays: Sequence[NDArray[Any]], start: int, stop: int) -> tuple[Sequence[NDArray[Any]], int]:
    packed, scales, zeros = arrays
    first, last = start // 8, -(-stop // 8)
    return (packed[:, first:last], scales[:, 8 * first : 8 * last], zeros[:, first:last]), 8 * first


def _unpacked(words: NDArray[Any]) -> UInt8:
    """(n, out / 8) -> (out, n)."""
    codes = fields(words, _BITS, 8 * words.shape[1])
    eights = codes.view("<u8")
    both = eights & np.uint64(0xFFFFFFFF), eights >> np.uint64(32)  # the outputs of even number, and those of odd
    for half in both:
        half |= half * np.uint64(1 << 16)
        half &= np.uint64(0x0000FFFF0000FFFF)
        half |= half * np.uint64(1 << 8)
        half &= np.uint64(0x00FF00FF00FF00FF)
    np.bitwise_or(both[0], both[1] * np.uint64(1 << 8), out=eights)
    return transposed(codes)

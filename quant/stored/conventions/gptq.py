"""GPTQ, as AutoGPTQ and GPTQModel write it.

    X.qweight (I32: in * bits / 32, out) + X.scales (groups, out) + X.qzeros (I32: groups, out * bits / 32) [+ X.g_idx]

Codes lie down a column as a stream of bits, least significant first, and zero points along a row. Files of the format
"gptq" store zero points less one, those of "gptq_v2" as they are; some say one and are the other, which symmetric ones
tell, as all of their zero points are the middle. With `desc_act` columns are in groups in any order: `g_idx`.
Source: GPTQModel's `qlinear` (7.7.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError
from numoe.quant.files import Files
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.integers import check_group, integers, integers_format
from numoe.quant.stored.conventions.spelling import (
    FLOATS,
    Convention,
    Packed,
    Parts,
    Spelling,
    check,
    decided,
    fields,
    misfit,
    named,
)
from numoe.quant.stored.handle import Stored

_CODES, _SCALES, _ZEROS, _GROUPS = "{module}.qweight", "{module}.scales", "{module}.qzeros", "{module}.g_idx"
_UNREAD = (
    "quant_method", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "meta",
    "model_name_or_path", "model_file_base_name", "lm_head", "pack_dtype", "quantizer", "version", "exllama_config",
    "use_exllama", "disable_exllama", "max_input_length", "cache_block_outputs", "modules_in_block_to_quantize",
    "tokenizer", "dataset", "batch_size", "block_name_to_quantize", "model_seqlen", "module_name_preceding_first_block",
    "pad_token_id", "use_cuda_fp16", "backend", "hyb_act", "act_group_aware", "modules_to_not_convert", "mse",
    "offload_to_disk*", "method",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """How codes, scales and zero points are packed."""

    bits: int
    group: int | None
    """None: a row."""
    symmetric: bool
    ordered: bool
    less: int
    """What is to be added to zero points."""

    def width(self, parts: Parts) -> int:
        """Of a row."""
        return parts[_CODES].shape[0] * 32 // self.bits

    def fits(self, parts: Parts) -> bool:
        """Whether codes, scales and zero points have the shapes of this one."""
        rows, width = parts[_CODES].shape[1], self.width(parts)
        groups = width // (self.group or width or 1)
        found = parts[_SCALES].shape, parts[_ZEROS].shape
        return found == ((groups, rows), (groups, -(-rows * self.bits // 32)))

    def stored(self, files: Files, weight: str, parts: Parts) -> Stored:
        codes = parts[_CODES]
        if self.ordered and _GROUPS not in parts:
            raise misfit(codes, f'{named(_GROUPS, weight)!r} is not there, which "desc_act" stands for')
        rows, width = codes.shape[1], self.width(parts)
        groups = check_group(codes, width, self.group or width)
        found = [
            codes,
            check(parts, _SCALES, codes, FLOATS, [(groups, rows)]),
            check(parts, _ZEROS, codes, ("I32",), [(groups, -(-rows * self.bits // 32))]),
        ]
        if _GROUPS in parts:
            found.append(check(parts, _GROUPS, codes, ("I32", "I64"), [(width,)]))

        def unpack(arrays: Sequence[NDArray[Any]]) -> INT4 | INT8:
            packed, scales, zeros, *index = arrays
            return self._matrix(
                fields(np.ascontiguousarray(packed.T), self.bits, width),
                np.ascontiguousarray(scales.T),
                fields(zeros, self.bits, packed.shape[1]).T,
                index[0] if index else None,
            )

        format = integers_format(self.bits, width // groups, found[1].dtype, not self.symmetric, self.ordered)
        by_rows = (False,) * len(found)
        made = tuple(found), (rows, width), format
        return Packed(files, weight, *made, unpack=unpack, by_rows=by_rows, narrow=self._narrow)

    def _narrow(self, arrays: Sequence[NDArray[Any]], start: int, stop: int) -> tuple[Sequence[NDArray[Any]], int]:
        packed, scales, zeros, *index = arrays
        first, last = start // 32, -(-stop // 32)  # rows whose zero points fill whole words
        rows = slice(32 * first, 32 * last)
        words = slice(self.bits * first, self.bits * last)
        return (packed[:, rows], scales[:, rows], zeros[:, words], *index), 32 * first

    def _matrix(
        self, codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], index: NDArray[Any] | None
    ) -> INT4 | INT8:
        """codes (out, in), scales and zeros (out, G), index (in,)."""
        columns = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
        if not self.ordered and index is not None and not np.array_equal(index, columns):
            raise InputError(
                'its g_idx is of the kind that "desc_act" stands for, and the config says that it is false'
            )
        half = 1 << (self.bits - 1)
        if self.symmetric:
            if not ((zeros == half - 1).all() or (zeros == half).all()):
                raise InputError('its zero points are not all the middle, and the config says "sym": true')
            middle = None
        else:
            middle = zeros + np.uint8(self.less) & np.uint8((1 << self.bits) - 1)
        return integers(codes, self.bits, scales, middle, index if self.ordered else None)


def read_gptq(config: Announced) -> Convention:
    """What such a config says. Raises InputError for what is not computed."""
    config.only(
        *_UNREAD, "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "is_marlin_format"
    )
    bits = config.size("bits", (2, 3, 4, 8))
    format = config.get("checkpoint_format", str) or config.get("format", str, "gptq")
    if config.values.get("is_marlin_format") or format not in ("gptq", "gptq_v2"):
        raise config.unsupported(f"GPTQ {format if format != 'gptq' else 'marlin'} {bits}-bit")
    if config.get("pack_dtype", str, "int32") != "int32":
        raise config.unsupported(f"GPTQ packed in {config.values['pack_dtype']}")
    less = 0 if format == "gptq_v2" else 1
    base = overridden(config, Packing(bits, None, True, False, less))
    own = [one for pattern, one in config.each("dynamic") if not pattern.startswith("-:")]  # those stay as they are
    for one in own:
        one.only("bits", "group_size", "sym", "desc_act", *_UNREAD)
    return Convention("GPTQ", (gptq([base, *(overridden(one, base) for one in own)]),))


def overridden(table: Announced, base: Packing) -> Packing:
    """A packing where a table of a config says something else."""
    group = base.group
    if table.values.get("group_size") is not None:
        group = None if table.get("group_size", int) == -1 else table.size("group_size")
    return Packing(
        table.size("bits", (2, 3, 4, 8), base.bits),
        group,
        table.get("sym", bool, base.symmetric),
        table.get("desc_act", bool, base.ordered),
        base.less,
    )


def gptq(packings: Sequence[Packing]) -> Spelling:
    """Codes in some of these, which their shapes tell."""
    packings = list(dict.fromkeys(packings))
    ordered = all(one.ordered for one in packings)

    def stored(files: Files, weight: str, parts: Parts) -> Stored:
        if len(parts[_CODES].shape) != 2:
            raise misfit(parts[_CODES], "it is no matrix")
        fitting = [one for one in packings if one.fits(parts)] or packings[:1]
        choices = [(one.width(parts), partial(one.stored, files, weight, parts)) for one in fitting]
        return decided(choices, files, weight, parts[_CODES])

    needs = (_SCALES, _ZEROS, *((_GROUPS,) if ordered else ()))
    return Spelling(_CODES, ("I32",), needs, stored, () if ordered else (_GROUPS,))

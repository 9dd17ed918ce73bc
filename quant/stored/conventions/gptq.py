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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError
from numoe.quant.files import Files
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.integers import check_group, integers, integers_format
from numoe.quant.stored.conventions.spelling import FLOATS, Convention, Packed, Parts, Spelling, check, fields, misfit
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
class _Packing:
    bits: int
    group: int | None
    """None: a row."""
    symmetric: bool
    ordered: bool
    less: int
    """What is to be added to zero points."""

    def stored(self, files: Files, weight: str, parts: Parts) -> Stored:
        codes = parts[_CODES]
        if len(codes.shape) != 2:
            raise misfit(codes, "it is no matrix")
        words, rows = codes.shape
        width = words * 32 // self.bits
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
    if any(not str(pattern).startswith("-:") for pattern in config.below("dynamic").values):
        raise config.unsupported('GPTQ with other bits for some layers ("dynamic")')
    if config.get("pack_dtype", str, "int32") != "int32":
        raise config.unsupported(f"GPTQ packed in {config.values['pack_dtype']}")
    group = None if config.get("group_size", int, -1) == -1 else config.size("group_size")
    ordered = config.get("desc_act", bool, False)
    symmetric = config.get("sym", bool, True)
    less = 0 if format == "gptq_v2" else 1
    return Convention("GPTQ", (gptq(bits, group, symmetric=symmetric, ordered=ordered, less=less),))


def gptq(bits: int, group: int | None, *, symmetric: bool, ordered: bool, less: int) -> Spelling:
    """Codes of so many bits; group: None for one of a row; less: what is to be added to zero points."""
    packing = _Packing(bits, group, symmetric, ordered, less)
    needs = (_SCALES, _ZEROS, *((_GROUPS,) if ordered else ()))
    return Spelling(_CODES, ("I32",), needs, packing.stored, () if ordered else (_GROUPS,))

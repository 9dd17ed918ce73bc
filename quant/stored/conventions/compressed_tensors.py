"""compressed-tensors, as vLLM's LLM Compressor writes it.

    float-quantized   X.weight (F8_E4M3) + X.weight_scale, of a tensor, a row or a block; mxfp8: e8m0, of 32 neighbours
    int-quantized     X.weight (I8) + X.weight_scale [+ X.weight_zero_point]
    pack-quantized    X.weight_packed (I32) + X.weight_scale [+ X.weight_zero_point] [+ X.weight_g_idx], X.weight_shape
    nvfp4, mxfp4      X.weight_packed (U8) + X.weight_scale [+ X.weight_global_scale, which divides]

Packed codes lie along a row as a stream of bits, least significant first, with 2^(bits-1) added; zero points lie so
along a column. Source: compressed-tensors' `compressors`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.files import Files
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.stored.conventions import fp8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.integers import check_group, integers, integers_format
from numoe.quant.stored.conventions.mxfp4 import mxfp4
from numoe.quant.stored.conventions.nvfp4 import nvfp4
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

_CODES, _PLAIN = "{weight}_packed", "{weight}"
_SCALE, _ZERO, _GROUPS = "{weight}_scale", "{weight}_zero_point", "{weight}_g_idx"
_FORMATS = (
    "float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
_DROPPED = (*fp8.DROPPED, ".input_global_scale", ".weight_shape", ".input_zero_point", ".output_zero_point")


def read_compressed_tensors(config: Announced) -> Convention:
    """What such a config says. Raises InputError for what is not computed."""
    config.only(
        "quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "version",
        "global_compression_ratio", "sparsity_config", "transform_config", "producer", "quant_algo", "run_compressed",
    )  # fmt: skip
    sparsity = config.below("sparsity_config").values.get("format", "dense")
    if sparsity != "dense":
        raise config.unsupported(f"compressed-tensors with {sparsity} sparsity")
    transforms = config.below("transform_config")
    if transforms.values.get("config_groups"):
        raise config.unsupported("compressed-tensors with transforms (rotated weights)")
    transforms.only()
    packings: list[_Packing] = []
    blocks: list[tuple[int, int]] = []
    forms: set[str] = set()
    scaled: set[str] = set()
    whole: list[bool] = []
    for _, group in config.each("config_groups"):
        group.only("targets", "weights", "input_activations", "output_activations", "format")
        format = group.get("format", str) or config.get("format", str) or "dense"
        if format not in _FORMATS:
            raise config.unsupported(f"compressed-tensors {format}")
        weights = group.below("weights")
        if not weights.values:
            continue
        _check_weights(weights)
        integer = weights.values.get("type", "int") == "int"
        strategy = _FORMS.get(weights.values.get("strategy") or "tensor", "")
        if integer and not format.startswith("pack"):
            whole.append(weights.get("symmetric", bool, True) or format in ("mixed-precision", "dense"))
            scaled.add(strategy)
        if integer and format in ("pack-quantized", "mixed-precision", "dense"):
            packings.append(_packing(weights))
        if not integer:
            forms.add(strategy)
        structure = weights.values.get("block_structure")
        if isinstance(structure, str):  # as old files have it: "128x128"
            structure = [int(part) if part.isdigit() else 0 for part in structure.split("x")]
        if structure is not None:
            if not (
                isinstance(structure, list) and len(structure) == 2 and all(type(n) is int and n > 0 for n in structure)
            ):
                raise weights.error(f'"block_structure" must be two positive integers, not {structure!r:.60}')
            blocks.append((structure[0], structure[1]))
        elif not integer and weights.values.get("strategy") == "group":
            blocks.append((1, weights.size("group_size")))
    spellings = [
        *(fp8.spellings(tuple(blocks) or ((128, 128),), _SCALE, forms) if forms else ()),
        *([int8_rows(all(whole), scaled)] if whole else []),
        nvfp4(_CODES, "U8", _SCALE, "{weight}_global_scale", divides=True),
        mxfp4(_CODES, "U8", _SCALE),
        *([_packed_spelling(list(dict.fromkeys(packings)))] if packings else []),
    ]
    return Convention("compressed-tensors", tuple(spellings), _DROPPED)


_FORMS = {"tensor": "tensor", "channel": "row", "block": "block", "group": "block"}
"""Strategy -> what has one scale of fp8, see `fp8.FORMS`."""


def _packing(weights: Announced) -> _Packing:
    return _Packing(
        weights.size("num_bits", range(2, 9), 8),
        weights.size("group_size") if weights.values.get("strategy") == "group" else None,
        weights.get("symmetric", bool, True),
        weights.values.get("actorder") in ("group", True),
    )


def _packed_spelling(packings: Sequence[_Packing]) -> Spelling:
    centred, unordered = any(one.symmetric for one in packings), any(not one.ordered for one in packings)
    needs = (_SCALE, *(() if centred else (_ZERO,)), *(() if unordered else (_GROUPS,)))
    may = (*((_ZERO,) if centred else ()), *((_GROUPS,) if unordered and len(packings) > 1 else ()))
    return Spelling(_CODES, ("I32",), needs, partial(_packed, packings), may)


def int8_rows(symmetric: bool = True, forms: Collection[str] = ("tensor", "row")) -> Spelling:
    """int8 with a scale a row or tensor, and a zero point where it is not symmetric."""
    return Spelling(_PLAIN, ("I8",), (_SCALE,) if symmetric else (_SCALE, _ZERO), partial(_bytes, forms))


def _check_weights(weights: Announced) -> None:
    weights.only(
        "num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "actorder", "dynamic",
        "scale_dtype", "zp_dtype", "observer", "observer_kwargs", "is_mx",
    )  # fmt: skip
    kind, strategy = weights.values.get("type", "int"), weights.values.get("strategy") or "tensor"
    if kind not in ("int", "float") or strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
        raise weights.unsupported(f"compressed-tensors {kind} by {strategy}")
    if kind == "float" and not weights.get("symmetric", bool, True):
        raise weights.unsupported("compressed-tensors float with zero points")
    if weights.values.get("dynamic") not in (None, False):
        raise weights.error('"dynamic" weights have no scales; use a checkpoint with stored ones')
    if weights.values.get("actorder") not in (None, False, True, "group", "weight", "static"):
        raise weights.error(f'"actorder" {weights.values["actorder"]!r:.60} is not known')


@dataclass(frozen=True)
class _Packing:
    """Of integers in words."""

    bits: int
    group: int | None
    """None: a row."""
    symmetric: bool
    ordered: bool

    def size(self, parts: Parts) -> tuple[int, int, int]:
        """How wide rows are, and how many groups of what size they have."""
        words, scales = parts[_CODES].shape[-1], parts[_SCALE].shape
        if self.group is None:
            width = words * 32 // self.bits
            return width, 1, width
        # Of a row that does not fill its words the scales alone tell where it ends.
        groups = scales[-1] if scales else 0
        return groups * self.group, groups, self.group

    def fits(self, parts: Parts) -> bool:
        """Whether codes and scales have the shapes of this one."""
        width, groups, _ = self.size(parts)
        words, scales = parts[_CODES].shape[-1], parts[_SCALE].shape
        return scales[-1:] == (groups,) and words == -(-width * self.bits // 32)


def _packed(packings: Sequence[_Packing], files: Files, weight: str, parts: Parts) -> Stored:
    if len(parts[_CODES].shape) < 2:
        raise misfit(parts[_CODES], "it is no matrix")
    fitting = [one for one in packings if one.fits(parts)] or packings[:1]
    choices = [(one.size(parts)[0], partial(_packed_as, one, files, weight, parts)) for one in fitting]
    return decided(choices, files, weight, parts[_CODES])


def _packed_as(packing: _Packing, files: Files, weight: str, parts: Parts) -> Stored:
    bits, symmetric, ordered = packing.bits, packing.symmetric, packing.ordered
    codes = parts[_CODES]
    *stack, rows, words = codes.shape
    for name, wanted, said in ((_ZERO, not symmetric, "symmetric"), (_GROUPS, ordered, "in their own order")):
        if wanted != (name in parts):
            there, no = ("is not there", "not ") if wanted else ("is there", "")
            raise misfit(codes, f"{named(name, weight)!r} {there}, and the config says that weights are {no}{said}")
    width, groups, group = packing.size(parts)
    if words != -(-width * bits // 32):
        raise misfit(codes, f"rows of {words} words do not hold {groups} groups of {group} codes of {bits} bits")
    check_group(codes, width, group)
    found = [codes, check(parts, _SCALE, codes, FLOATS, [(*stack, rows, groups)])]
    if not symmetric:
        loose = parts[_ZERO].dtype == "I8"  # as old versions store them, 2^(bits-1) not added
        shape = (*stack, rows if loose else -(-rows * bits // 32), groups)
        found.append(check(parts, _ZERO, codes, ("I8" if loose else "I32",), [shape]))
    if ordered:
        found.append(check(parts, _GROUPS, codes, ("I32",), [(*stack, width)]))

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT4 | INT8:
        packed, scales, *others = arrays
        zeros = None if symmetric else _zero_points(others[0], bits, len(packed))
        return integers(fields(packed, bits, width), bits, scales, zeros, others[-1] if ordered else None)

    by_rows = (symmetric, symmetric, *(False for _ in found[2:]))
    format = integers_format(bits, group, found[1].dtype, not symmetric, ordered)
    made = tuple(found), (*stack, rows, width), format
    return Packed(files, weight, *made, unpack=unpack, by_rows=by_rows, narrow=partial(_narrow, bits))


def _narrow(bits: int, arrays: Sequence[NDArray[Any]], start: int, stop: int) -> tuple[Sequence[NDArray[Any]], int]:
    packed, scales, zeros, *others = arrays
    first, last = start // 32, -(-stop // 32)  # rows whose zero points fill whole words
    rows = slice(32 * first, 32 * last)
    taken = zeros[rows] if zeros.dtype == np.int8 else zeros[bits * first : bits * last]
    return (packed[rows], scales[rows], taken, *others), 32 * first


def _zero_points(stored: NDArray[Any], bits: int, rows: int) -> NDArray[Any]:
    """Those of each row and group, 0..2^bits - 1."""
    if stored.dtype == np.int8:
        return stored.astype(np.int16) + np.int16(1 << (bits - 1))
    return fields(np.ascontiguousarray(stored.T), bits, rows).T


def _bytes(forms: Collection[str], files: Files, weight: str, parts: Parts) -> Stored:
    """int8 with a scale a row, or one for all."""
    codes = parts[_PLAIN]
    if len(codes.shape) < 2:
        raise misfit(codes, "it is no matrix")
    *stack, rows, width = codes.shape
    check_group(codes, width, width)
    lead = tuple(stack)
    each, one = ((*lead, rows, 1), (*lead, rows)), ((*lead, 1, 1), (*lead, 1), lead)
    shapes = [*(each if "row" in forms else ()), *(one if "tensor" in forms else ())]
    if not shapes:
        raise misfit(codes, "it is int8, and the config has a strategy for it that no such weights have")
    scale = check(parts, _SCALE, codes, FLOATS, shapes)
    found = [codes, scale]
    if _ZERO in parts:
        found.append(check(parts, _ZERO, codes, ("I8",), each if scale.shape in each else one))
    by_rows = (True, *(info.shape in each for info in found[1:]))

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT8:
        values, scales, *zeros = arrays
        scales = np.broadcast_to(scales.reshape(-1, 1), (len(values), 1))
        zero = np.broadcast_to(zeros[0].reshape(-1, 1), scales.shape).astype(np.int32) + 128 if zeros else None
        made = integers(values.view(np.uint8) ^ np.uint8(128), 8, np.ascontiguousarray(scales), zero)
        assert isinstance(made, INT8)
        return made

    format = integers_format(8, width, scale.dtype, _ZERO in parts)
    return Packed(files, weight, tuple(found), codes.shape, format, unpack=unpack, by_rows=by_rows)

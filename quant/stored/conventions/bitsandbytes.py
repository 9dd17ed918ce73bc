"""bitsandbytes: nf4 and fp4 in blocks of the flattened weight, and int8 with a scale a row.

    4 bits   X.weight (U8, high nibble first) + X.weight.absmax + X.weight.quant_map + X.weight.quant_state.*, with
             X.weight.nested_absmax and X.weight.nested_quant_map where absmax is quantized itself
    8 bits   X.weight (I8) + X.SCB: value = code * SCB / 127

The quant state is JSON. Source: bitsandbytes 0.50's `functional.QuantState`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import Float32, UInt8
from numoe.quant.errors import InputError, word
from numoe.quant.files import Files
from numoe.quant.formats.format import FLOAT32, Format
from numoe.quant.formats.integer import INT8
from numoe.quant.formats.nf4 import NF4, NF4_GROUP, NF4_VALUES
from numoe.quant.formats.plain import F32
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.integers import check_group, integers_format
from numoe.quant.stored.conventions.spelling import Convention, Packed, Parts, Spelling, check, misfit
from numoe.quant.stored.handle import Stored

_CODES, _MAXIMA, _MAP = "{weight}", "{weight}.absmax", "{weight}.quant_map"
_NESTED = "{weight}.nested_absmax", "{weight}.nested_quant_map"
_SCB = "{module}.SCB"


def read_bitsandbytes(config: Announced) -> Convention:
    """What such a config says. Raises InputError for what is not computed."""
    config.only("quant_method", "load_in_*", "_load_in_*", "bnb_4bit_*", "llm_int8_*")
    if config.get("load_in_4bit", bool, False):
        kind = config.get("bnb_4bit_quant_type", str, "fp4")
        if kind not in ("nf4", "fp4"):
            raise config.unsupported(f"bitsandbytes {kind}")
        if (storage := config.get("bnb_4bit_quant_storage", str, "uint8")) != "uint8":
            raise config.unsupported(f"bitsandbytes {kind} stored as {word(storage)}")
        needs = (_MAXIMA, _MAP, f"{{weight}}.quant_state.bitsandbytes__{kind}")
        nested = Spelling(_CODES, ("U8",), (*needs, *_NESTED), partial(_four_bits, kind))
        plain = Spelling(_CODES, ("U8",), needs, partial(_four_bits, kind))
        return Convention("bitsandbytes", (nested, plain))
    return Convention("bitsandbytes", (Spelling(_CODES, ("I8",), (_SCB,), _eight_bits),), dropped=(".weight_format",))


def _eight_bits(files: Files, weight: str, parts: Parts) -> Stored:
    codes = parts[_CODES]
    if len(codes.shape) != 2:
        raise misfit(codes, "it is no matrix")
    rows, width = codes.shape
    check_group(codes, width, width)
    maxima = check(parts, _SCB, codes, ("F32",), [(rows,)])

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT8:
        values, maxima = arrays
        scales: Float32 = np.divide(maxima, np.float32(127), dtype=np.float32)
        return INT8(values, scales[:, None])

    format = integers_format(8, width, "F32", False)
    return Packed(files, weight, (codes, maxima), codes.shape, format, unpack=unpack, by_rows=(True, True))


def _four_bits(kind: str, files: Files, weight: str, parts: Parts) -> Stored:
    codes, maxima = parts[_CODES], parts[_MAXIMA]
    if maxima.dtype == "U8" and any(name not in parts for name in _NESTED):
        missing = next(name for name in _NESTED if name not in parts).format(weight=weight)
        raise misfit(codes, f"{missing!r} is not there, which absmax in U8 takes; download the model again")
    check(parts, _MAXIMA, codes, ("U8",) if _NESTED[0] in parts else ("F32",), [(math.prod(maxima.shape),)])
    check(parts, _MAP, codes, ("F32",), [(16,)])
    check(parts, f"{{weight}}.quant_state.bitsandbytes__{kind}", codes, ("U8",), [])
    if _NESTED[0] in parts:
        check(parts, _NESTED[0], codes, ("F32",), [(math.prod(parts[_NESTED[0]].shape),)])
        check(parts, _NESTED[1], codes, ("F32",), [(256,)])
    count = 2 * math.prod(codes.shape)
    found = tuple(parts.values())
    return Flat(files, weight, found, (count,), FLOAT32, unpack=_unfitted, by_rows=(False,) * len(found), kind=kind)


def _unfitted(arrays: Sequence[NDArray[Any]]) -> QTensor:
    raise InputError("its shape is not known")


@dataclass(frozen=True, eq=False)
class Flat(Packed):
    """Blocks of a flattened matrix, whose shape the model tells."""

    kind: str = "nf4"

    def fitted(self, shape: Sequence[int]) -> Self:
        if len(shape) != 2 or math.prod(shape) != math.prod(self.whole):
            return self
        rows, width = shape
        return replace(self, whole=(rows, width), format=_format((rows, width), self.kind))

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> NF4 | F32:
        """nf4 where its blocks lie in rows, elsewhere the values."""
        packed, maxima, table, text, *nested = self._arrays(raw, start, stop)
        if len(self.whole) != 2:
            raise InputError("its shape is not known")
        rows, width = self.whole
        size = _block_size(_state(text), self.kind, (rows, width), maxima)
        first, last = start * width // size, -(-stop * width // size)  # blocks
        scales: Float32 = maxima[first:last]
        if nested:
            scales = _scales(_state(text), maxima, (first, last), nested[0], nested[1])
        codes: UInt8 = packed.reshape(-1)[first * size // 2 : last * size // 2]
        if self.format is NF4.format and size % NF4_GROUP == 0 and width % size == 0:
            if not np.allclose(table, NF4_VALUES, rtol=0, atol=1e-7):
                raise InputError("its quant_map is not that of nf4")
            swapped = (codes >> np.uint8(4) | codes << np.uint8(4)).reshape(stop - start, -1)
            return NF4(swapped, np.repeat(scales, size // NF4_GROUP).reshape(stop - start, -1))
        if self.format is NF4.format:
            raise InputError(f"its blocks of {size} reach over its rows of {width}")
        values = table[np.stack([codes >> np.uint8(4), codes & np.uint8(15)], axis=1).reshape(-1)]
        values *= np.repeat(scales, size)[: len(values)]
        return F32(values[start * width - first * size :][: (stop - start) * width].reshape(stop - start, width))


def _format(shape: tuple[int, int], kind: str) -> Format:
    return NF4.format if kind == "nf4" and shape[1] % NF4_GROUP == 0 else FLOAT32


def _block_size(state: Mapping[str, Any], kind: str, shape: tuple[int, int], maxima: NDArray[Any]) -> int:
    """Raises InputError where a state is not of this weight."""
    size, count = state.get("blocksize"), math.prod(shape)
    if state.get("quant_type") != kind or state.get("shape") != list(shape) or type(size) is not int or size < 2:
        raise InputError(f"its quant_state {state} is of another weight than {kind} of shape {list(shape)}")
    if size % 2 or maxima.size != -(-count // size):
        raise InputError(
            f"it has {maxima.size} scales where {count} weights in blocks of {size} need {-(-count // size)}"
        )
    return size


def _scales(
    state: Mapping[str, Any],
    maxima: UInt8,
    blocks: tuple[int, int],
    outer: Float32,
    table: Float32,
) -> Float32:
    """Those of some blocks, of codes that have scales themselves."""
    each, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(each) is not int or each < 1 or type(offset) is not float or outer.size != -(-maxima.size // each):
        raise InputError(f"its quant_state {state} does not fit its {outer.size} nested scales")
    scales: Float32 = table[maxima[slice(*blocks)]] * outer[np.arange(*blocks) // each] + np.float32(offset)
    return scales


def _state(text: NDArray[Any]) -> dict[str, Any]:
    try:
        state = json.loads(text.tobytes().decode("utf-8"))
    except ValueError as error:
        raise InputError(f"its quant_state is not JSON ({error})") from error
    if not isinstance(state, dict):
        raise InputError("its quant_state is not a JSON object")
    return state

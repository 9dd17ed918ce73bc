"""MLX, as mlx-lm writes it; bits, group and mode may be others for a layer.

    affine   X.weight (U32) + X.scales + X.biases: value = scale * code + bias; 2 to 8 bits
    mxfp4    X.weight (U32) + X.scales (U8: e8m0)
    nvfp4    X.weight (U32) + X.scales (U8: e4m3)
    mxfp8    X.weight (U32: e4m3) + X.scales (U8: e8m0)

Codes lie along a row as a stream of bits, least significant first. Source: mlx 0.32's `quantize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from numpy.typing import NDArray

from numoe.quant.files import Files
from numoe.quant.formats.fp8 import fp8_format
from numoe.quant.formats.integer import INT4, INT8
from numoe.quant.formats.mxfp4 import MX_GROUP
from numoe.quant.stored.conventions import fp8
from numoe.quant.stored.conventions.announced import Announced
from numoe.quant.stored.conventions.integers import affine, check_group, integers_format
from numoe.quant.stored.conventions.mxfp4 import mxfp4
from numoe.quant.stored.conventions.native import BlockScaled
from numoe.quant.stored.conventions.nvfp4 import nvfp4
from numoe.quant.stored.conventions.spelling import FLOATS, Convention, Packed, Parts, Spelling, check, fields, misfit
from numoe.quant.stored.handle import Stored

_CODES, _SCALES, _BIASES = "{weight}", "{module}.scales", "{module}.biases"
_MODES = "affine", "mxfp4", "nvfp4", "mxfp8"


def read_mlx(config: Announced) -> Convention:
    """What "quantization" says. Raises InputError for what is not computed."""
    _mode(config)
    for name, value in config.values.items():
        if isinstance(value, dict):
            _mode(config.below(name))
    config.only(*(name for name, value in config.values.items() if isinstance(value, dict | bool)), *_KNOWN)
    scaled = Spelling(_CODES, ("U32",), (_SCALES,), partial(_scaled, config))
    whole = Spelling(_CODES, ("U32",), (_SCALES, _BIASES), partial(_affine, config))
    return Convention("MLX", (whole, scaled, *fp8.spellings(((1, MX_GROUP),))))


_KNOWN = "group_size", "bits", "mode", "quant_method", "linear_class", "quantize_embeddings"


def _mode(config: Announced) -> str:
    mode = config.get("mode", str, "affine")
    if mode not in _MODES:
        raise config.unsupported(f"MLX {mode}")
    return str(mode)


def _of(config: Announced, weight: str) -> Announced:
    """What holds for a weight."""
    own = config.values.get(weight.removesuffix(".weight"))
    shared = {key: config.values.get(key) for key in ("group_size", "bits", "mode")}
    return Announced(f"{config.where}: {weight}", shared | own if isinstance(own, dict) else shared)


def _affine(config: Announced, files: Files, weight: str, parts: Parts) -> Stored:
    own, codes = _of(config, weight), parts[_CODES]
    if (mode := _mode(own)) != "affine":
        raise misfit(codes, f"{parts[_BIASES].name!r} is there, which the mode {mode} has not")
    bits, group = own.size("bits", (2, 3, 4, 5, 6, 8), 4), own.size("group_size", default=64)
    if len(codes.shape) < 2:
        raise misfit(codes, "it is no matrix")
    *stack, rows, words = codes.shape
    width = words * 32 // bits
    groups = check_group(codes, width, group)
    found = (codes, *(check(parts, one, codes, FLOATS, [(*stack, rows, groups)]) for one in (_SCALES, _BIASES)))

    def unpack(arrays: Sequence[NDArray[Any]]) -> INT4 | INT8:
        packed, scales, biases = arrays
        return affine(fields(packed, bits, width), bits, scales, biases)

    format = integers_format(bits, group, found[1].dtype, True)
    return Packed(files, weight, found, (*stack, rows, width), format, unpack=unpack, by_rows=(True, True, True))


def _scaled(config: Announced, files: Files, weight: str, parts: Parts) -> Stored:
    own, codes = _of(config, weight), parts[_CODES]
    mode = _mode(own)
    if mode == "mxfp4":
        return mxfp4(_CODES, "U32", _SCALES).stored(files, weight, parts)
    if mode == "nvfp4":
        return nvfp4(_CODES, "U32", _SCALES, scale_dtype="U8").stored(files, weight, parts)
    if mode == "mxfp8":
        shape = (*codes.shape[:-1], 4 * codes.shape[-1] if codes.shape else 0)
        if len(shape) < 2 or shape[-1] % MX_GROUP:
            raise misfit(codes, f"its rows do not divide into groups of {MX_GROUP}")
        scales = check(parts, _SCALES, codes, ("U8",), [(*shape[:-1], shape[-1] // MX_GROUP)])
        values = replace(codes, dtype="F8_E4M3", shape=shape)
        block = (1, MX_GROUP)
        return BlockScaled(files, weight, (values, scales), shape, fp8_format(block, 8), block=block)
    name = _BIASES.format(module=weight.removesuffix(".weight"))
    raise misfit(codes, f"{name!r} is not there, which the mode {mode} has beside it; download the model again")

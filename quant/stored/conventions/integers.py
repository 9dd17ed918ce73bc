"""What integer codes with scales and zero points become: INT4 and INT8, without any rounding of codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.kernels import pack_nibbles
from numoe.quant.dtypes import UInt8
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo
from numoe.quant.formats.format import Format
from numoe.quant.formats.integer import INT4, INT8, integer_format, ordered_format
from numoe.quant.stored.conventions.spelling import floats, misfit


def integers_format(bits: int, group: int, scales: str, bias: bool, ordered: bool = False) -> Format:
    """That of what `integers` and `affine` give; scales: their dtype in the file."""
    kind = ordered_format if ordered else integer_format
    return kind(4 if bits <= 4 else 8, group, 16 if scales == "F16" and not bias else 32, bias)


def integers(
    codes: UInt8, bits: int, scales: NDArray[Any], zeros: NDArray[Any] | None = None, groups: NDArray[Any] | None = None
) -> INT4 | INT8:
    """value = (code - zero) * scale; without zeros they are 2^(bits-1).

    Args:
        codes: (out, in) of 0..2^bits - 1.
        scales, zeros: (out, G).
        groups: the group of each column (in,), where it is not of neighbours.

    Raises:
        InputError: groups are not of one size.
    """
    half = 1 << (bits - 1)
    order = None
    if groups is not None:
        size = codes.shape[1] // scales.shape[1]
        order = np.argsort(groups, kind="stable").astype(np.int32)
        if not np.array_equal(groups[order], np.repeat(np.arange(scales.shape[1]), size)):
            raise InputError(f"its columns do not make {scales.shape[1]} groups of {size}; download the model again")
        codes = codes[:, order]
    bias = None
    if zeros is None:
        scales = scales if scales.dtype == np.float16 else floats(scales)
        codes = codes + np.uint8(8 - half) if bits < 4 else codes
    else:
        scales = floats(scales)
        bias = (np.float32(0 if bits <= 4 else half) - zeros.astype(np.float32)) * scales
    if bits <= 4:
        return INT4(_nibbles(codes, scales.shape[1]), scales, bias, order)
    return INT8((codes - np.uint8(half)).view(np.int8), scales, bias, order)


def affine(codes: UInt8, bits: int, scales: NDArray[Any], bias: NDArray[Any]) -> INT4 | INT8:
    """value = scale * code + bias; codes (out, in) of 0..2^bits - 1, scales and bias (out, G)."""
    scales, bias = floats(scales), floats(bias)
    if bits <= 4:
        return INT4(_nibbles(codes, scales.shape[1]), scales, bias)
    if bits == 8:
        codes, bias = codes - np.uint8(128), bias + np.float32(128) * scales
    return INT8(codes.view(np.int8), scales, bias)


def check_group(codes: TensorInfo, width: int, group: int) -> int:
    """How many groups rows of `width` have. Raises InputError unless they divide into groups of an even size."""
    if group < 2 or group % 2 or width % group:
        raise misfit(codes, f"rows of {width} do not divide into even groups of {group}")
    return width // group


def _nibbles(codes: UInt8, groups: int) -> UInt8:
    return pack_nibbles(codes.reshape(len(codes), groups, -1)).reshape(len(codes), -1)

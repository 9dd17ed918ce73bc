"""GGUF's block types, each of whose blocks holds the codes and scales of some weights of a row.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 keep their codes and scales; Q5 codes widen to a byte. The K-quants are affine
lattices too, d * sub_scale * q - dmin * sub_min, and become INT4 or INT8 with the products as float32 scale and bias:
no value changes. Every other type goes through gguf's own dequantizer and is packed to int8.
Layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from numoe.quant.compute.kernels import block_rows, pack_nibbles
from numoe.quant.dtypes import UInt8
from numoe.quant.errors import InputError
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.format import Format
from numoe.quant.formats.integer import INT4, INT8, integer_format
from numoe.quant.formats.mxfp4 import MX_GROUP, MXFP4
from numoe.quant.formats.pack import pack_int8
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.stored.handle import Stored


class Blocks(Stored):
    """A weight in one of the block types, which are made anew when they are read."""

    @classmethod
    def of(cls, files: Files, info: TensorInfo) -> Blocks:
        """The weight that a tensor is."""
        return cls(files, info.name, (info,), info.shape, _format(info.dtype))

    @property
    def _is_view(self) -> bool:
        return False

    def _made(self, raw: Sequence[UInt8], start: int, stop: int) -> QTensor:
        return _decoded(raw[0].reshape(stop - start, -1), self.parts[0].dtype, self.whole[-1])


def _format(dtype: str) -> Format:
    """That of what `_decoded` makes of a block type."""
    if dtype == "MXFP4":
        return MXFP4.format
    layout = _layout(dtype)
    return integer_format(layout.bits, layout.group, 8 * np.dtype(layout.scale_dtype).itemsize, layout.has_bias)


def _decoded(raw: UInt8, dtype: str, columns: int) -> QTensor:
    """The QTensor of a matrix stored in a block type: raw (out, bytes a row) uint8 -> (out, columns).

    Raises InputError for a type that gguf cannot dequantize.
    """
    if dtype == "MXFP4":
        return _mxfp4(raw, columns)
    layout = _layout(dtype)
    type_size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]][1]
    rows = len(raw)
    codes = np.empty((rows, columns * layout.bits // 8), np.uint8)
    scales = np.empty((rows, columns // layout.group), layout.scale_dtype)
    bias = np.empty_like(scales) if layout.has_bias else None
    step = block_rows(columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        parts = layout.unpack(raw[start:stop].reshape(-1, type_size))
        codes[start:stop] = parts[0].view(np.uint8).reshape(stop - start, -1)
        scales[start:stop] = parts[1].reshape(stop - start, -1)
        if bias is not None:
            bias[start:stop] = parts[2].reshape(stop - start, -1)
    return INT4(codes, scales, bias) if layout.bits == 4 else INT8(codes.view(np.int8), scales, bias)


# The block types. `unpack` takes blocks (n, bytes) and gives codes (n, groups, ...) as INT4 or INT8 stores them,
# scales (n, groups), and bias (n, groups) where there is one.

_Parts = tuple[NDArray, ...]


@dataclass(frozen=True)
class _Layout:
    bits: int
    group: int
    scale_dtype: type[np.floating]
    has_bias: bool
    unpack: Callable[[UInt8], _Parts]


def _layout(dtype: str) -> _Layout:
    return _LAYOUTS.get(dtype) or _Layout(8, 32, np.float16, False, lambda blocks: _repack(blocks, dtype))


def _repack(blocks: UInt8, dtype: str) -> _Parts:
    try:
        weights = dequantize(blocks, GGMLQuantizationType[dtype])
    except NotImplementedError as error:
        raise InputError(f"weights of the GGUF type {dtype} cannot be read; use a file of another type") from error
    packed = pack_int8(weights, symmetric=True)
    return packed.codes, packed.scales


def _halves(blocks: UInt8, start: int) -> NDArray[np.float16]:
    return blocks[:, start : start + 2].view(np.float16)  # (n, 1)


def _q4_0(blocks: UInt8) -> _Parts:
    return blocks[:, 2:], _halves(blocks, 0)


def _q4_1(blocks: UInt8) -> _Parts:
    return blocks[:, 4:], _halves(blocks, 0), _halves(blocks, 2)


def _five_bits(blocks: UInt8, start: int) -> UInt8:
    # Bit i of the 32-bit word is the fifth bit of weight i; then the nibbles as in Q4_0.
    fifth = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    packed = blocks[:, start + 4 :]
    return np.concatenate([packed & 15, packed >> 4], axis=1) | fifth << 4  # (n, 32)


def _q5_0(blocks: UInt8) -> _Parts:
    return _five_bits(blocks, 2).view(np.int8) - np.int8(16), _halves(blocks, 0)


def _q5_1(blocks: UInt8) -> _Parts:
    return _five_bits(blocks, 4), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: UInt8) -> _Parts:
    return blocks[:, 2:].view(np.int8), _halves(blocks, 0)


def _spread(packed: UInt8, bits: int, run: int) -> UInt8:
    """Fields of `bits` bits, low first: a run of `run` bytes gives 8/bits runs; (n, b) -> (n, b * 8 / bits)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def _six_bit_scales(packed: UInt8) -> tuple[UInt8, UInt8]:
    """The 8 scales and 8 minima of Q4_K and Q5_K: 6 bits each in 12 bytes; (n, 12) -> (n, 8), (n, 8)."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _products(blocks: UInt8, start: int, factors: NDArray) -> NDArray[np.float32]:
    return _halves(blocks, start).astype(np.float32) * factors.astype(np.float32)


def _q2_k(blocks: UInt8) -> _Parts:
    codes = _spread(blocks[:, 16:80], 2, 32).reshape(-1, 16, 16)
    return (
        pack_nibbles(codes),
        _products(blocks, 80, blocks[:, :16] & 15),
        -_products(blocks, 82, blocks[:, :16] >> 4),
    )


def _q3_k(blocks: UInt8) -> _Parts:
    # The mask bit set means q in 0..3, else q in -4..-1: with INT4's zero point of 8 that is low bits + 8 or + 4.
    high = _spread(blocks[:, :32], 1, 32)
    codes = _spread(blocks[:, 32:96], 2, 32) + np.uint8(4) + (high << 2)
    packed = blocks[:, 96:108]
    scales = _spread(packed[:, :8], 4, 8) | _spread(packed[:, 8:], 2, 4) << 4
    return pack_nibbles(codes.reshape(-1, 16, 16)), _products(blocks, 108, scales.view(np.int8) - np.int8(32))


def _q4_k(blocks: UInt8) -> _Parts:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes = _spread(blocks[:, 16:], 4, 32).reshape(-1, 8, 32)
    return pack_nibbles(codes), _products(blocks, 0, scales), -_products(blocks, 2, minima)


def _q5_k(blocks: UInt8) -> _Parts:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes = _spread(blocks[:, 48:], 4, 32) | _spread(blocks[:, 16:48], 1, 32) << 4
    return codes, _products(blocks, 0, scales), -_products(blocks, 2, minima)


def _q6_k(blocks: UInt8) -> _Parts:
    codes = _spread(blocks[:, :128], 4, 64) | _spread(blocks[:, 128:192], 2, 32) << 4
    return codes.view(np.int8) - np.int8(32), _products(blocks, 208, blocks[:, 192:208].view(np.int8))


_LAYOUTS = {
    "Q4_0": _Layout(4, 32, np.float16, False, _q4_0),
    "Q4_1": _Layout(4, 32, np.float16, True, _q4_1),
    "Q5_0": _Layout(8, 32, np.float16, False, _q5_0),
    "Q5_1": _Layout(8, 32, np.float16, True, _q5_1),
    "Q8_0": _Layout(8, 32, np.float16, False, _q8_0),
    "Q2_K": _Layout(4, 16, np.float32, True, _q2_k),
    "Q3_K": _Layout(4, 16, np.float32, False, _q3_k),
    "Q4_K": _Layout(4, 32, np.float32, True, _q4_k),
    "Q5_K": _Layout(8, 32, np.float32, True, _q5_k),
    "Q6_K": _Layout(8, 16, np.float32, False, _q6_k),
}


def _mxfp4(raw: UInt8, columns: int) -> MXFP4:
    # A block is its e8m0 scale and 16 bytes with the halves in low and high nibbles; MXFP4 wants neighbours in a byte.
    rows = len(raw)
    codes = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // MX_GROUP), np.uint8)
    step = block_rows(columns)
    for start in range(0, rows, step):
        blocks = raw[start : start + step].reshape(-1, 17)
        pairs = _spread(blocks[:, 1:], 4, 16).reshape(-1, 16, 2)
        codes[start : start + step] = (pairs[..., 0] | pairs[..., 1] << 4).reshape(-1, columns // 2)
        scales[start : start + step] = blocks[:, 0].reshape(-1, columns // MX_GROUP)
    return MXFP4(codes, scales)

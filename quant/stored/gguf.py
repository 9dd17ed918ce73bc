"""The GGUF format: a header of key-value pairs and tensor descriptions, then aligned tensor bytes; and its block types.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 keep their codes and scales; Q5 codes widen to a byte. The K-quants are affine
lattices too, d * sub_scale * q - dmin * sub_min, and become INT4 or INT8 with the products as float32 scale and bias:
no value changes. Every other type goes through gguf's own dequantizer and is packed to int8.
Layouts: ggml's `ggml-common.h`, the file format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The header is parsed here, not by gguf's GGUFReader, which spends seconds on a vocabulary and never returns from some
damaged files.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from numoe.quant.compute.kernels import block_rows, pack_nibbles
from numoe.quant.dtypes import UInt8
from numoe.quant.errors import InputError
from numoe.quant.files import Files, TensorInfo
from numoe.quant.formats.pack import pack_int8
from numoe.quant.formats.qtensor import INT4, INT8, MX_GROUP, MXFP4, QTensor

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# The value types of the key-value pairs, by number; 8 is a string and 9 an array.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs as Python values (numbers, strings, lists), each read and decoded when first asked for."""

    def __init__(self, path: Path, files: Files, places: dict[str, tuple[int, int, int]]) -> None:
        self._path = path
        self._files = files
        self._places = places  # key -> (value type, offset, nbytes)
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, offset, nbytes = self._places[key]
            raw = self._files.read_range(self._path, offset, nbytes).tobytes()
            try:
                self._values[key] = _decode(kind, raw)
            except UnicodeDecodeError as error:
                raise InputError(f"{self._path}: the value of {key!r} is not UTF-8; download it again") from error
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_gguf(path: Path, files: Files) -> tuple[dict[str, TensorInfo], Mapping[str, Any]]:
    """The tensors and metadata of a GGUF file, or of all its shards when it is the first of several.

    Raises InputError naming the file when it is damaged, a shard is missing, or it is not the first shard.
    """
    tensors, metadata = _read_header(path, files)
    shards = metadata.get("split.count", 1)
    if type(shards) is not int:
        raise _refusal(path, "split.count is no number")
    if shards <= 1:
        return tensors, metadata
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != shards:
        raise InputError(f"{path} is one of {shards} shards: give the one named ...-00001-of-....gguf")
    for number in range(2, int(name[3]) + 1):
        shard, _ = _read_header(path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf"), files)
        if repeated := tensors.keys() & shard.keys():
            raise InputError(f"{path}: the tensor {min(repeated)!r} is in two shards; download them again")
        tensors |= shard
    return tensors, metadata


def decoded_format(dtype: str) -> str:
    """The `QTensor.format` that `decode` makes of a block type."""
    if dtype == "MXFP4":
        return "mxfp4"
    layout = _layout(dtype)
    return f"int{layout.bits} g{layout.group}"


def decoded_nbytes(dtype: str, weights: int) -> int:
    """The `QTensor.nbytes` that `decode` makes of so many weights in a block type."""
    if dtype == "MXFP4":
        return weights // 2 + weights // MX_GROUP
    layout = _layout(dtype)
    factors = weights // layout.group * np.dtype(layout.scale_dtype).itemsize
    return weights * layout.bits // 8 + factors * (2 if layout.has_bias else 1)


def decode(raw: UInt8, dtype: str, columns: int) -> QTensor:
    """The QTensor of a matrix stored in a block type: raw (out, bytes a row) uint8 -> (out, columns).

    Raises InputError for a type that gguf cannot dequantize.
    """
    if dtype == "MXFP4":
        return _decode_mxfp4(raw, columns)
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


# Reading the header


def _read_header(path: Path, files: Files) -> tuple[dict[str, TensorInfo], GgufMetadata]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise _refusal(path, "it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(data, path, files)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there") from error
    except (struct.error, OverflowError, UnicodeDecodeError) as error:
        raise _refusal(path, "its header ends too soon or holds garbage") from error


def _parse(data: mmap.mmap, path: Path, files: Files) -> tuple[dict[str, TensorInfo], GgufMetadata]:
    (version,) = _U32.unpack_from(data, 4)
    if version not in (2, 3):
        raise InputError(f"{path} is GGUF version {version}; convert it to a little-endian file of version 2 or 3")
    tensor_count, pair_count = struct.unpack_from("<QQ", data, 8)
    position = 24
    places: dict[str, tuple[int, int, int]] = {}
    for _ in range(pair_count):
        key, position = _string(data, position)
        (kind,) = _U32.unpack_from(data, position)
        end = _skip(data, position + 4, kind, path)
        if key in places:
            raise _refusal(path, f"the key {key!r} appears twice")
        places[key] = (kind, position + 4, end - position - 4)
        position = end
    stored: list[tuple[str, str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, position = _string(data, position)
        (rank,) = _U32.unpack_from(data, position)
        if rank > 4:
            raise _refusal(path, f"{name!r} has {rank} dimensions")
        *dims, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, position + 4)
        position += 4 + 8 * rank + 12
        # GGUF lists the fastest dimension first.
        dtype, nbytes = _stored_size(name, kind, dims, path)
        stored.append((name, dtype, tuple(reversed(dims)), offset, nbytes))
    metadata = GgufMetadata(path, files, places)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _refusal(path, f"general.alignment is {alignment!r}")
    data_start = position + -position % alignment
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, offset, nbytes in stored:
        if name in tensors:
            raise _refusal(path, f"the tensor {name!r} appears twice")
        if offset % alignment or data_start + offset + nbytes > len(data):
            raise InputError(f"{path} is truncated or damaged: {name!r} lies outside it; download it again")
        tensors[name] = TensorInfo(name, dtype, shape, path, data_start + offset, nbytes)
    return tensors, metadata


def _string(data: mmap.mmap, position: int) -> tuple[str, int]:
    end = position + 8 + _U64.unpack_from(data, position)[0]
    if end > len(data):
        raise struct.error("string beyond the end")
    return data[position + 8 : end].decode("utf-8"), end


def _skip(data: mmap.mmap, position: int, kind: int, path: Path) -> int:
    """The position after a value of this type."""
    count = 1
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", data, position)
        position += 12
    if kind == _STRING:
        # A hostile count ends at the end of the data: every string takes 8 bytes or more.
        for _ in range(count):
            position += 8 + _U64.unpack_from(data, position)[0]
    elif kind in _SCALARS:
        position += count * np.dtype(_SCALARS[kind]).itemsize
    else:
        raise _refusal(path, f"a value has the type {kind}")
    if position > len(data):
        raise struct.error("value beyond the end")
    return position


def _decode(kind: int, raw: bytes) -> Any:
    if kind == _ARRAY:
        item_kind, count = struct.unpack_from("<IQ", raw)
        if item_kind != _STRING:
            return np.frombuffer(raw, _SCALARS[item_kind], count, offset=12).tolist()
        items, position = [], 12
        for _ in range(count):
            end = position + 8 + _U64.unpack_from(raw, position)[0]
            items.append(raw[position + 8 : end].decode("utf-8"))
            position = end
        return items
    return raw[8:].decode("utf-8") if kind == _STRING else np.frombuffer(raw, _SCALARS[kind]).item()


def _stored_size(name: str, kind: int, dims: list[int], path: Path) -> tuple[str, int]:
    try:
        dtype = GGMLQuantizationType(kind)
    except ValueError as error:
        raise InputError(f"{path}: {name!r} has the unknown GGUF type {kind}; update the gguf package") from error
    block, type_size = GGML_QUANT_SIZES[dtype]
    if (dims[0] if dims else 1) % block:
        raise _refusal(path, f"the rows of {name!r} are not whole blocks of {dtype.name}")
    return dtype.name, math.prod(dims) // block * type_size


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a sound GGUF file: {reason}; download it again")


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


def _decode_mxfp4(raw: UInt8, columns: int) -> MXFP4:
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

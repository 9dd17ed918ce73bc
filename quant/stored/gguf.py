"""The GGUF format: a header of key-value pairs and tensor descriptions, then aligned tensor bytes.

As https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has it; `gguf_blocks` reads the tensors.

The header is parsed here, not by gguf's GGUFReader, which spends seconds on a vocabulary and never returns from some
damaged files.
"""

import math
import mmap
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from numoe.quant.errors import InputError
from numoe.quant.files import MOST_TENSORS, Files, TensorInfo

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# Tensor types that the gguf package does not know in all versions, by number: name, weights and bytes of a block.
_NEW_TYPES = {40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18), 42: ("Q2_0", 64, 18)}
# The value types of the key-value pairs, by number; 8 is a string and 9 an array.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_FIRST_BYTES, _LARGEST_HEADER = 1 << 20, 1 << 28  # vocabularies take some 5 to 20 MB
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_CUT_NAME = re.compile(r"(.+\.gguf)[-._](?:part|split)[-._]?\w+", re.IGNORECASE)
"""Of what people cut into parts as bytes, which no program reads."""


Read = Callable[[int, int], bytes]
"""The bytes of a file from one position to another."""
Header = tuple[dict[str, TensorInfo], "GgufMetadata"]


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs as Python values (numbers, strings, lists), each read and decoded when first asked for."""

    def __init__(self, path: Path, read: Read, places: dict[str, tuple[int, int, int]]) -> None:
        self._path = path
        self._read = read
        self._places = places  # key -> (value type, offset, nbytes)
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, offset, nbytes = self._places[key]
            raw = self._read(offset, offset + nbytes)
            try:
                self._values[key] = _decode(kind, raw)
            except UnicodeDecodeError as error:
                raise InputError(f"{self._path}: the value of {key!r} is not UTF-8; download it again") from error
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def pairs(self) -> bytes:
        """All of them as they are stored."""
        raw = ((key, kind, self._read(at, at + size)) for key, (kind, at, size) in self._places.items())
        return b"".join(_stored_string(key) + _U32.pack(kind) + value for key, kind, value in raw)


def read_gguf(path: Path, files: Files) -> Header:
    """The tensors and metadata of a GGUF file, or of all its shards when it is the first of several.

    Raises InputError naming the file when it is damaged, a shard is missing, or it is not the first shard.
    """
    return with_shards(path, lambda shard: _read_header(shard, files))


def with_shards(path: Path, header: Callable[[Path], Header]) -> Header:
    """As `read_gguf`, of files whose headers are had from `header`."""
    tensors, metadata = header(path)
    shards = metadata.get("split.count", 1)
    if type(shards) is not int:
        raise _refusal(path, "split.count is no number")
    if shards <= 1:
        return tensors, metadata
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or int(name[2]) != 1 or int(name[3]) != shards:
        raise InputError(f"{path} is one of {shards} shards: give the one named ...-00001-of-....gguf")
    for number in range(2, int(name[3]) + 1):
        shard, _ = header(path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}{name[4]}"))
        if repeated := tensors.keys() & shard.keys():
            raise InputError(f"{path}: the tensor {min(repeated)!r} is in two shards; download them again")
        tensors |= shard
    return tensors, metadata


def distant_header(read: Read, path: Path, size: int) -> Header:
    """The tensors and metadata of one file of `size` bytes that is elsewhere: of its beginning as much as it takes.

    What `read` raises is passed on. Raises InputError naming `path` for a damaged header.
    """
    data = bytearray()
    while True:
        data += read(len(data), min(size, max(_FIRST_BYTES, 2 * len(data))))
        if data[:4] != b"GGUF":
            raise _refusal(path, "it does not begin with GGUF")
        try:
            return _parse(data, path, partial(_slice, data), size)
        except (struct.error, OverflowError, UnicodeDecodeError) as error:
            if len(data) >= min(size, _LARGEST_HEADER) or not isinstance(error, struct.error):
                raise _refusal(path, "its header ends too soon or holds garbage") from error


def header_of(tensors: Mapping[str, TensorInfo], metadata: GgufMetadata) -> bytes:
    """The header of a file of these tensors and this metadata, as `read_listing` reads it: of no part of a file."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata)), metadata.pairs()]
    for name, info in tensors.items():
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        out += [_stored_string(name), dims, struct.pack("<IQ", _type_number(info.dtype), 0)]
    return b"".join(out)


def read_listing(path: Path, files: Files) -> Header:
    """A header behind which there are no tensors. Raises InputError naming the file when it is damaged."""
    return _read_header(path, files, sys.maxsize)


def _stored_string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _type_number(dtype: str) -> int:
    new = {name: number for number, (name, _, _) in _NEW_TYPES.items()}
    return new[dtype] if dtype in new else GGMLQuantizationType[dtype].value


def _slice(data: bytearray, start: int, stop: int) -> bytes:
    return bytes(data[start:stop])


def _read_header(path: Path, files: Files, size: int | None = None) -> Header:
    """That of a file, whose bytes are `size` where it is not all there."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise _refusal(path, "it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

                def read(start: int, stop: int) -> bytes:
                    return files.read_range(path, start, stop - start).tobytes()

                return _parse(data, path, read, size or len(data))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there") from error
    except (struct.error, OverflowError, UnicodeDecodeError) as error:
        raise _refusal(path, "its header ends too soon or holds garbage") from error


def _parse(data: mmap.mmap | bytearray, path: Path, read: Read, size: int) -> Header:
    """The header at the beginning of a file of `size` bytes, whose values `read` reads when they are asked for."""
    (version,) = _U32.unpack_from(data, 4)
    if version not in (2, 3):
        told = "big-endian GGUF" if version % 0x1000000 == 0 and version else f"GGUF version {version}"
        raise InputError(f"{path} is {told}; convert it to a little-endian file of version 2 or 3")
    tensor_count, pair_count = struct.unpack_from("<QQ", data, 8)
    if (count := max(tensor_count, pair_count)) > MOST_TENSORS:
        raise _refusal(path, f"it has {count} tensors or keys, and no file has more than {MOST_TENSORS}")
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
    metadata = GgufMetadata(path, read, places)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _refusal(path, f"general.alignment is {alignment!r}")
    data_start = position + -position % alignment
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, offset, nbytes in stored:
        if name in tensors:
            raise _refusal(path, f"the tensor {name!r} appears twice")
        if offset % alignment or data_start + offset + nbytes > size:
            if cut := _CUT_NAME.fullmatch(path.name):
                raise InputError(f"{path} is a part of a file that was cut: join all parts, in order, to {cut[1]}")
            raise InputError(f"{path} is truncated or damaged: {name!r} lies outside it; download it again")
        tensors[name] = TensorInfo(name, dtype, shape, path, data_start + offset, nbytes)
    return tensors, metadata


def _string(data: mmap.mmap | bytearray, position: int) -> tuple[str, int]:
    end = position + 8 + _U64.unpack_from(data, position)[0]
    if end > len(data):
        raise struct.error("string beyond the end")
    return data[position + 8 : end].decode("utf-8"), end


def _skip(data: mmap.mmap | bytearray, position: int, kind: int, path: Path) -> int:
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
    if kind in _NEW_TYPES:
        dtype, block, type_size = _NEW_TYPES[kind]
    else:
        try:
            dtype = GGMLQuantizationType(kind).name
        except ValueError as error:
            raise InputError(
                f"{path}: {name!r} has the GGUF type {kind}, which cannot be read; use a file of other types"
            ) from error
        block, type_size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if (dims[0] if dims else 1) % block:
        raise _refusal(path, f"the rows of {name!r} are not whole blocks of {dtype}")
    return dtype, math.prod(dims) // block * type_size


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a sound GGUF file: {reason}; download it again")

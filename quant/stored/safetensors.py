"""The safetensors format: an 8-byte little-endian length, a JSON header, then the tensors' bytes in order.

Reads headers only and gives byte ranges. The checks are those of the format's specification
(https://github.com/huggingface/safetensors#format), so that a damaged or hostile file is refused before use.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from numoe.quant.documents import refuse_lfs_pointer
from numoe.quant.errors import InputError
from numoe.quant.files import MOST_TENSORS, TensorInfo

HEADER_LIMIT = 100_000_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the `__metadata__` of one file, without reading its data.

    Raises InputError naming the file for anything the format does not allow.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise InputError(f"{path} is not an ordinary file; put the model's own file there")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == 8 and length <= min(HEADER_LIMIT, size - 8):
                return parse_header(file.read(length), path, size)
            refuse_lfs_pointer(prefix + file.read(64), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check that it is there") from error
    raise InputError(
        f"{path} is not a whole safetensors file: its header would be {length} bytes in a file of {size}; "
        "download it again"
    )


def parse_header(header: bytes, path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and `__metadata__` of a header, its length prefix left off, of a file of `size` bytes.

    Raises InputError naming `path` for anything the format does not allow.
    """
    if (count := header.count(b'"data_offsets"')) > MOST_TENSORS:
        raise _refusal(path, f"it has {count} tensors, and no file has more than {MOST_TENSORS}")
    document = _header_table(header, path)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refusal(path, "__metadata__ is not a table of strings")
    data_start = 8 + len(header)
    tensors = {name: _tensor_info(name, entry, path, data_start) for name, entry in document.items()}
    position = data_start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            raise _refusal(path, f"the bytes of {info.name!r} overlap another tensor's or leave a gap")
        position += info.nbytes
    if position != size:
        raise _refusal(path, f"its tensors end at byte {position} but the file at byte {size}")
    return tensors, metadata


def file_start(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What comes before the data of a file of these tensors, (name, dtype, shape) in order: length and header."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_table(text: bytes, path: Path) -> dict[str, Any]:
    # Stricter than `parse_json`: the specification allows no byte order mark and no key twice.
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"it is not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise _refusal(path, "it is not a JSON object")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _refusal(path, f"{name!r} is not described by a table")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refusal(path, f"{name!r} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape):
        raise _refusal(path, f"{name!r} has the shape {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refusal(path, f"{name!r} has the data offsets {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BITS[dtype] != nbytes * 8:
        raise _refusal(path, f"{name!r} of shape {shape} in {dtype} does not fill its {nbytes} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + offsets[0], nbytes)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    # JSON's true is an int to Python, but no size; NumPy arrays have at most 64 dimensions.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
    )


def _refusal(path: Path, reason: str) -> InputError:
    return InputError(f"{path} has a damaged header: {reason}; download it again")

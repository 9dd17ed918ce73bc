"""The safetensors format: an 8-byte little-endian length, a JSON header, then the tensors' bytes in order.

Reads headers only and gives byte ranges. The checks are those of the format's specification
(https://github.com/huggingface/safetensors#format), so that a damaged or hostile file is refused before use.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from numoe.quant.documents import parse_json, read_document, refuse_lfs_pointer
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo, plain_names, shortened

HEADER_LIMIT = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

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


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> shard file name.

    Raises InputError when it cannot be read, or as `parse_index` does.
    """
    return parse_index(read_document(path), path)


def parse_index(text: bytes, path: Path) -> dict[str, str]:
    """The `weight_map` in the text of an index file: tensor name -> shard file name.

    Raises InputError naming `path` when it is malformed or names a file outside its folder.
    """
    document = parse_json(text, path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f'{path} has no "weight_map" that is a table of file names; fetch it again')
    for shard in plain_names(sorted(set(weight_map.values())), path):
        if not shard.endswith(".safetensors"):
            raise InputError(f"{path} names {shortened(shard)}, which is not a .safetensors file: do not use it")
    return weight_map


def model_shards(names: Iterable[str], folder: str | Path) -> list[str]:
    """Which of a folder's files hold the model when no index says it; [] without any .safetensors file.

    model.safetensors alone, as transformers takes it: what lies beside it (consolidated.safetensors, an adapter) is
    another model. Or else the only .safetensors file, or those numbered -00001-of-0000N when all N are there.

    Raises InputError naming `folder` when there are several and nothing tells which.
    """
    found = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("."))
    if SINGLE_NAME in found:
        return [SINGLE_NAME]
    numbered = [match for name in found if (match := _NUMBERED.fullmatch(name))]
    sets = {(match[1], int(match[3])) for match in numbered}
    alone = len(found) < 2 and not numbered
    if alone or (len(sets) == 1 and len(found) == len(numbered) == sets.pop()[1]):
        return found
    raise InputError(
        f"{folder} holds {len(found)} .safetensors files ({', '.join(found[:2])}, ...) and no {INDEX_NAME} that says "
        f"which make up the model; get the index, or remove what is not the model"
    )


def read_folder(folder: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata of a folder: the shards of its index, or else its `model_shards`.

    Raises InputError when there are none, a shard is missing, or the index and the shards disagree.
    """
    index = folder / INDEX_NAME
    weight_map = read_index(index) if index.exists() else None
    names = model_shards((p.name for p in folder.iterdir()), folder) if weight_map is None else set(weight_map.values())
    shards = [folder / name for name in sorted(names)]
    for shard in shards:
        if not shard.exists():
            raise InputError(
                f"{folder}: the shard {shard.name} is missing; download it (the folder needs {len(shards)})"
            )
    return join_shards(folder, {shard.name: read_header(shard) for shard in shards}, weight_map)


def join_shards(
    folder: Path,
    headers: Mapping[str, tuple[Mapping[str, TensorInfo], Mapping[str, str]]],
    weight_map: Mapping[str, str] | None,
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata of the model that shards make up.

    `headers` are (tensors, metadata) by the shard's file name, as `read_header` gives them; `weight_map` is that of
    the index, if there is one. Raises InputError naming `folder` when the two disagree.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard, (stored, shard_metadata) in headers.items():
        metadata |= shard_metadata
        for name, info in stored.items():
            # Tensors that the index leaves out are no part of the model.
            if weight_map is not None and name not in weight_map:
                continue
            if name in tensors or (weight_map is not None and weight_map[name] != shard):
                raise InputError(f"{folder}: the tensor {name!r} is in two shards; download the folder again")
            tensors[name] = info
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise InputError(f"{folder}: {file} lacks the tensor {name!r} of the index; download it again")
    return tensors, metadata


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

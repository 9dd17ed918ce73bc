"""The safetensors files that a model's weights are in, one or several: which they are, and what they hold together.

Of a folder on disk, or of one that is elsewhere, whose files' names and beginnings are at hand.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from numoe.quant.documents import is_there, parse_json, read_document
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo, plain_names, shortened
from numoe.quant.stored.safetensors import HEADER_LIMIT, parse_header, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_FIRST_BYTES = 1 << 18  # more than most headers take


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
    weight_map = read_index(index) if is_there(index) else None
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


def distant_header(
    read: Callable[[int, int], bytes], path: Path, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata of a shard of `size` bytes that is elsewhere.

    `read` gives its bytes from one position to another; what it raises is passed on. Raises InputError naming `path`
    for a damaged header.
    """
    start = read(0, min(size, _FIRST_BYTES))
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or end > min(size, 8 + HEADER_LIMIT):
        raise InputError(f"{path} is not a whole safetensors file; tell the model's authors")
    if end > len(start):
        start += read(len(start), end)
    return parse_header(start[8:end], path, size)

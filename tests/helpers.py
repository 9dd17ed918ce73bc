"""What several test modules share: safetensors files of any dtype, written byte by byte.

The safetensors library's NumPy front end cannot write BF16, F8_E4M3 or F8_E8M0: the tests write the format themselves.
"""

import json
from collections.abc import Mapping
from pathlib import Path

RawTensor = tuple[str, tuple[int, ...], bytes]
"""(dtype as safetensors spells it, shape, little-endian bytes)"""


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write one safetensors file and return its path: u64 header length, JSON header, the bytes in order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(data)
    return path


def write_sharded(folder: Path, tensors: Mapping[str, RawTensor], shards: int) -> Path:
    """Write `shards` safetensors files and `model.safetensors.index.json` into an existing folder; return it."""
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder

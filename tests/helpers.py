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


def tiny_tokenizer(folder: Path, vocab: int, ending: str = "assistant: ") -> None:
    """Write a tokenizer of `vocab` ids (60 to 128) and a chat template into a model folder.

    Ids 0 to 2 are <pad>, <s> and </s>, the others one character each. No id ends a text. `ending` is what the template
    puts before an answer.
    """
    # GPT-2's spelling of bytes: the space and the newline, letters and marks as they are, then bytes from 0xA1.
    characters = "\u0120\u010a" + "abcdefghijklmnopqrstuvwxyz.,:?!</>|ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    characters += "".join(map(chr, range(0xAE, 0xFF)))
    pieces = ["<pad>", "<s>", "</s>", *characters][:vocab]
    special = [
        {"id": i, "content": piece, "special": True, "normalized": False, "single_word": False, "lstrip": False}
        | {"rstrip": False}
        for i, piece in enumerate(pieces[:3])
    ]
    spec = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": []},
    }
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ENDING{% endif %}"
    ).replace("ENDING", ending)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))

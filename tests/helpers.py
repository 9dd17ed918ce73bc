"""What several test modules share: safetensors files of any dtype, written byte by byte; a tokenizer; V4's tensors.

The safetensors library's NumPy front end cannot write BF16, F8_E4M3 or F8_E8M0: the tests write the format themselves.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import stored

from numoe.quant.stored.safetensors import read_header

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


def reshard(source: Path, folder: Path, shards: int, key: Callable[[str], Any] | None = None) -> Path:
    """Write a model folder anew in `shards` files of about as many tensors, in the order of `key`; return it."""
    tensors: dict[str, RawTensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        data = path.read_bytes()
        for name, info in read_header(path)[0].items():
            tensors[name] = (info.dtype, info.shape, data[info.offset : info.offset + info.nbytes])
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    return write_sharded(folder, {name: tensors[name] for name in sorted(tensors, key=key)} if key else tensors, shards)


MARKS = '{}[]":,.-+/\\_<>@'
"""The ASCII characters beside letters and digits that JSON and the tests' patterns need."""


def tiny_tokenizer(
    folder: Path, vocab: int, ending: str = "assistant: ", marks: str = ".,:?!</>|", eos: bool = False
) -> None:
    """Write a tokenizer of `vocab` ids (60 to 128) and a chat template into a model folder.

    Ids 0 to 2 are <pad>, <s> and </s>, the others one character each. `ending` is what the template puts before an
    answer, `marks` the ASCII characters beside letters and digits; `eos`: </s> ends a text, which else none does.
    """
    # GPT-2's spelling of bytes: the space and the newline, letters and marks as they are, then bytes from 0xA1.
    letters = "abcdefghijklmnopqrstuvwxyz"
    characters = f"\u0120\u010a{letters}{marks}{letters.upper()}0123456789"
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
    config = {"bos_token": "<s>", "chat_template": template} | ({"eos_token": "</s>"} if eos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    described = folder / "config.json"
    if not eos and described.exists():  # transformers writes an id that ends texts there
        described.write_text(json.dumps(json.loads(described.read_text()) | {"eos_token_id": None}))


Listing = dict[str, tuple[str, tuple[int, ...]]]
"""Stored name -> (dtype as safetensors spells it, shape)."""

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
_FP8 = ("wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "e_proj", "h_proj", "main_proj", "w1", "w2", "w3")


def released_v4_listing(config: dict[str, Any]) -> Listing:
    """The tensors of a released DeepSeek-V4 checkpoint with this config.json, the heads that draft tokens included.

    Written from the tensor table of the model cards and not from the engine's own specification, to check it.
    """
    c = config
    hidden, heads, dim, vocab = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["vocab_size"]
    rank, streams, groups = c["q_lora_rank"], c["hc_mult"], c["o_groups"]
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    listing: Listing = {}

    def weight(name: str, *shape: int) -> None:
        """A matrix or vector in the dtype its name implies, with its scales."""
        stem = name.removesuffix(".weight")
        if ".experts." in name:
            listing[name] = ("I8", (shape[0], shape[1] // 2))
            listing[f"{stem}.scale"] = ("F8_E8M0", (shape[0], shape[1] // 32))
        elif stem.endswith(_FP8):
            listing[name] = ("F8_E4M3", shape)
            listing[f"{stem}.scale"] = ("F8_E8M0", (-(-shape[0] // 128), -(-shape[1] // 128)))
        else:
            listing[name] = ("BF16", shape)

    def mixing(prefix: str, outputs: int, scales: int) -> None:
        listing[f"{prefix}_fn"] = ("F32", (outputs, streams * hidden))
        listing[f"{prefix}_base"] = ("F32", (outputs,))
        listing[f"{prefix}_scale"] = ("F32", (scales,))

    def compressor(prefix: str, ratio: int, size: int) -> None:
        columns = size * (2 if ratio == 4 else 1)
        listing[f"{prefix}.ape"] = ("F32", (ratio, columns))
        weight(f"{prefix}.wkv.weight", columns, hidden)
        weight(f"{prefix}.wgate.weight", columns, hidden)
        weight(f"{prefix}.norm.weight", size)

    def block(prefix: str, ratio: int, hashed: bool) -> None:
        for part in ("attn", "ffn"):
            mixing(f"{prefix}.hc_{part}", (2 + streams) * streams, 3)
            weight(f"{prefix}.{part}_norm.weight", hidden)
        attn, ffn = f"{prefix}.attn", f"{prefix}.ffn"
        listing[f"{attn}.attn_sink"] = ("F32", (heads,))
        weight(f"{attn}.wq_a.weight", rank, hidden)
        weight(f"{attn}.wq_b.weight", heads * dim, rank)
        weight(f"{attn}.wkv.weight", dim, hidden)
        weight(f"{attn}.wo_a.weight", groups * c["o_lora_rank"], heads * dim // groups)
        weight(f"{attn}.wo_b.weight", hidden, groups * c["o_lora_rank"])
        weight(f"{attn}.q_norm.weight", rank)
        weight(f"{attn}.kv_norm.weight", dim)
        if ratio:
            compressor(f"{attn}.compressor", ratio, dim)
        if ratio == 4:
            compressor(f"{attn}.indexer.compressor", ratio, c["index_head_dim"])
            weight(f"{attn}.indexer.wq_b.weight", c["index_n_heads"] * c["index_head_dim"], rank)
            weight(f"{attn}.indexer.weights_proj.weight", c["index_n_heads"], hidden)
        weight(f"{ffn}.gate.weight", experts, hidden)
        if hashed:
            listing[f"{ffn}.gate.tid2eid"] = ("I64", (vocab, c["num_experts_per_tok"]))
        else:
            listing[f"{ffn}.gate.bias"] = ("F32", (experts,))
        for expert in [*(f"experts.{e}" for e in range(experts)), "shared_experts"]:
            weight(f"{ffn}.{expert}.w1.weight", width, hidden)
            weight(f"{ffn}.{expert}.w2.weight", hidden, width)
            weight(f"{ffn}.{expert}.w3.weight", width, hidden)

    weight("embed.weight", vocab, hidden)
    weight("head.weight", vocab, hidden)
    weight("norm.weight", hidden)
    mixing("hc_head", streams, 1)
    for layer in range(c["num_hidden_layers"]):
        block(f"layers.{layer}", c["compress_ratios"][layer], layer < c["num_hash_layers"])
    if "dspark_block_size" in c:  # instead of multi-token prediction
        last, targets = len(c["compress_ratios"]) - c["num_hidden_layers"] - 1, len(c["dspark_target_layer_ids"])
        for layer in range(last + 1):
            block(f"mtp.{layer}", 0, False)
        weight("mtp.0.main_proj.weight", hidden, targets * hidden)
        weight("mtp.0.main_norm.weight", hidden)
        mixing(f"mtp.{last}.hc_head", streams, 1)
        weight(f"mtp.{last}.norm.weight", hidden)
        for number in (1, 2):
            weight(f"mtp.{last}.markov_head.markov_w{number}.weight", vocab, c["dspark_markov_rank"])
        weight(f"mtp.{last}.confidence_head.proj.weight", 1, hidden + c["dspark_markov_rank"])
        return listing
    for layer in range(c["num_nextn_predict_layers"]):
        prefix = f"mtp.{layer}"
        block(prefix, 0, False)
        mixing(f"{prefix}.hc_head", streams, 1)
        weight(f"{prefix}.e_proj.weight", hidden, hidden)
        weight(f"{prefix}.h_proj.weight", hidden, hidden)
        for norm in ("enorm", "hnorm", "norm"):
            weight(f"{prefix}.{norm}.weight", hidden)
    return listing


def refused(result: tuple[int, str, str], *words: str, code: int = 1) -> None:
    """Of a command: the exit code, nothing on stdout, one line on stderr that holds the words."""
    left, out, err = result
    assert (left, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def dequantized(source: Path, folder: Path, dtype: str) -> Path:
    """gpt-oss with its experts as transformers holds them: (E, in, out), of a float dtype; all else in float32."""
    tensors = stored(source)
    written: dict[str, RawTensor] = {}
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    for name, array in tensors.items():
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            codes = np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], 32)
            scales = tensors[name.replace("_blocks", "_scales")].astype(np.float32)[..., None] - 127
            expanded = (values[codes] * np.exp2(scales)).reshape(*array.shape[:2], -1).swapaxes(1, 2)
            kept = {"F32": expanded, "F16": expanded.astype("<f2"), "F64": expanded.astype("<f8")}.get(dtype)
            data = (expanded.copy().view("<u4") >> 16).astype("<u2") if kept is None else kept
            written[name.removesuffix("_blocks")] = dtype, expanded.shape, np.ascontiguousarray(data).tobytes()
        else:
            written[name] = "F32", array.shape, np.ascontiguousarray(array).tobytes()
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", written)
    return folder


def stack_experts(tensors: dict[str, np.ndarray], count: int) -> None:
    """The `count` experts of each layer of a Mixtral in one tensor, gate and up fused."""
    for name in [n for n in tensors if n.endswith("experts.0.w1.weight")]:
        layer = name.removesuffix(".block_sparse_moe.experts.0.w1.weight")
        w1, w2, w3 = (
            [tensors.pop(f"{layer}.block_sparse_moe.experts.{e}.{w}.weight") for e in range(count)]
            for w in ("w1", "w2", "w3")
        )
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = np.stack([np.concatenate(p) for p in zip(w1, w3, strict=True)])
        tensors[f"{layer}.mlp.experts.down_proj"] = np.stack(w2)


def rounds_alike() -> bool:
    """Whether BLAS rounds a row of a product alike wherever it lies among few others. That for AVX2 does not."""
    random = np.random.default_rng(0)
    rows, weights = random.standard_normal((5, 256), np.float32), random.standard_normal((256, 1024), np.float32)
    return np.array_equal((rows @ weights)[::-1], rows[::-1] @ weights)


def of_company(bound: float) -> float:
    """How much of a logit the others in a pass may change, where `bound` holds if rows round alike."""
    return bound if rounds_alike() else 4 * bound

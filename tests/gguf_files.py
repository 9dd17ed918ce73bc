"""Golden checkpoints as GGUF files, tensors named and turned as llama.cpp's converter does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """A head's rows i and i + C/2, which rotate together, become neighbours (llama.cpp's convert_hf_to_gguf.py)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    folder: Path,
    config: dict[str, Any],
    path: Path,
    architecture: str,
    besides: Mapping[str, np.ndarray] = {},
    **more: Any,
) -> Path:
    """The checkpoint as a float32 GGUF file; `besides`: more tensors; `more` adds or replaces keys."""
    tensors = load_file(folder / "model.safetensors")
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A name")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys: dict[str, Any] = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if "num_local_experts" in config:
        keys |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    if "moe_intermediate_size" in config:
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    for key, value in (keys | more).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    for name, values in besides.items():
        writer.add_tensor(name, values)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        *parts, kind = name.split(".")
        prefix = ""
        if parts[:2] == ["model", "layers"]:
            prefix, parts = f"blk.{parts[2]}.", parts[3:]
        if "experts" in parts:
            stacks.setdefault(f"{prefix}ffn_{EXPERTS[parts[-1]]}_exps.weight", {})[int(parts[-2])] = values
            continue
        if architecture == "llama" and parts[-1] in ("q_proj", "k_proj"):
            values = neighbours(values, heads if parts[-1] == "q_proj" else kv_heads)
        writer.add_tensor(f"{prefix}{NAMES['.'.join(parts)]}.{kind}", np.ascontiguousarray(values))
    for name, stack in stacks.items():
        writer.add_tensor(name, np.stack([stack[e] for e in range(len(stack))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

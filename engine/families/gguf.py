"""GGUF files: their metadata said as a config.json, and their tensors' names.

A file's `general.architecture` is mapped to one of the families, so that there is one reading of every
architecture. Converters to GGUF reorder the rows of llama's query and key heads so that rotated channels are
neighbours; rotating interleaved pairs is then the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from numoe.engine.spec import Family, LayerSpec, ModelSpec, Names, Source
from numoe.quant.errors import InputError


def from_gguf(metadata: Mapping[str, Any], tensors: set[str], path: Path) -> tuple[dict[str, Any], Family, ModelSpec]:
    """The config.json that a GGUF file's metadata amounts to, its family with GGUF's names, and its spec.

    Raises:
        InputError: the architecture or one of its settings is not supported, or a key is missing.
    """
    from numoe.engine.families import family

    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f'{path}: GGUF architecture "{architecture}" is not supported yet; known are {", ".join(_ARCHITECTURES)}'
        )
    named = [key for key in metadata if key.startswith(f"{architecture}.")]
    keys = {key.removeprefix(f"{architecture}."): metadata[key] for key in named}  # the others are not decoded
    config = _config(architecture, keys, metadata, tensors, path)
    kind = family(config["model_type"])
    spec = kind.spec(config)
    if architecture == "llama":
        spec = replace(spec, layers=tuple(map(_interleaved, spec.layers)))
    return config, Family(kind.spec, NAMES), spec


_ARCHITECTURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "llama": lambda keys: "mixtral" if keys.get("expert_count") else "llama",
    "qwen3": lambda keys: "qwen3",
    "qwen3moe": lambda keys: "qwen3_moe",
}

# Key below the architecture's name -> config.json key.
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_EXPERT_KEYS = {
    "mixtral": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "qwen3_moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
}
# Keys that restate others or only describe the file.
_UNREAD = {"attention.value_length", "rope.dimension_count", "expert_count", "expert_used_count"}


def _config(
    architecture: str, keys: dict[str, Any], metadata: Mapping[str, Any], tensors: set[str], path: Path
) -> dict[str, Any]:
    model_type = _ARCHITECTURES[architecture](keys)
    config: dict[str, Any] = {"model_type": model_type, "tie_word_embeddings": "output.weight" not in tensors}
    config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    left = dict(keys)
    for key, name in (_KEYS | _EXPERT_KEYS.get(model_type, {})).items():
        if (value := left.pop(key, None)) is not None:
            config[name] = value
    config.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    scaling = {k.removeprefix("rope.scaling."): left.pop(k) for k in list(left) if k.startswith("rope.scaling.")}
    if scaling.get("type", "none") != "none":
        config["rope_scaling"] = {"type": scaling.pop("type")} | {
            {"original_context_length": "original_max_position_embeddings"}.get(k, k): v for k, v in scaling.items()
        }
    if model_type == "qwen3_moe":
        config["norm_topk_prob"] = True  # llama.cpp's src/models/qwen3moe.cpp normalises whatever was trained
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise InputError(
                f"{path}: {architecture}.{key} is {keys[key]}, and only the head size {head_dim} is supported"
            )
    for key, value in left.items():
        if key not in _UNREAD and value not in (0, False):
            raise InputError(f'{path}: GGUF key "{architecture}.{key}" is not understood and could change the results')
    return config


def _interleaved(layer: LayerSpec) -> LayerSpec:
    return replace(layer, attention=replace(layer.attention, rope=replace(layer.attention.rope, interleaved=True)))


def _names() -> Names:
    names = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
    layer = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "ffn.router": "ffn_gate_inp"}
    layer |= {
        f"attention.{ours}": f"attn_{theirs}" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    }
    layer |= {f"attention.{n}_norm": f"attn_{n}_norm" for n in "qk"}
    layer |= {f"ffn.{n}": f"ffn_{n}" for n in ("gate", "up", "down")}
    table: dict[str, tuple[Source, ...]] = {ours: (Source(f"{theirs}.weight"),) for ours, theirs in names.items()}
    for ours, theirs in layer.items():
        table[f"layers.{{layer}}.{ours}"] = (Source(f"blk.{{layer}}.{theirs}.weight"),)
        table[f"layers.{{layer}}.{ours}_bias"] = (Source(f"blk.{{layer}}.{theirs}.bias"),)
    for n in ("gate", "up", "down"):
        stacked = Source(f"blk.{{layer}}.ffn_{n}_exps.weight", stacked=True)
        one = Source(f"blk.{{layer}}.ffn_{n}.{{expert}}.weight")
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{n}"] = (stacked, one)
    return table


NAMES = _names()

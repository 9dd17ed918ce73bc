"""Granite 3 with experts: llama's attention, softmax-routed experts, multipliers; some models have a shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Kind, Layer
from numoe.engine.layers.residual import PlainResidual
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 0,
}


def read(config: Config) -> ModelSpec:
    return model(config, [decoder_layer(attention(config), mixture(config))] * common.layer_count(config))


def attention(config: Config) -> GroupedQueryAttention:
    plain = common.grouped_query_attention(config, biases=common.attention_biases(config))
    return replace(plain, scale=config.number("attention_multiplier"))


def mixture(config: Config) -> Kind:
    """The experts, with a shared one where it has a width."""
    shared = common.swiglu(config, "shared_intermediate_size") if config.count("shared_intermediate_size") else None
    return common.mixture(
        config, config.size("num_local_experts"), common.swiglu(config), Router("softmax"), shared=shared
    )


def model(config: Config, layers: list[Layer]) -> ModelSpec:
    """With what blocks, embeddings and logits are multiplied with."""
    residual = PlainResidual(config.number("residual_multiplier"))
    embedding, logits = config.number("embedding_multiplier"), config.number("logits_scaling")
    return replace(common.model(config, layers, residual), embedding_scale=embedding, logit_scale=1 / logits)


def names(layer: dict[str, str]) -> Names:
    """`layer`: what one has besides, below it."""
    moe, shared = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.shared_mlp"
    table = dict(common.names(common.NORMS | common.GROUPED_QUERY, experts="block_sparse_moe.experts"))
    for ours, theirs in layer.items():
        name = f"layers.{{layer}}.{ours}"
        table[name] = (*table.get(name, ()), Source(f"model.layers.{{layer}}.{theirs}"))
    table["layers.{layer}.ffn.router"] = (Source(f"{moe}.router.layer.weight"), Source(f"{moe}.router.weight"))
    for part in ("gate", "up", "down"):
        stored, fused = ("output", ()) if part == "down" else ("input", ("gate", "up"))
        one = Source(f"{moe}.{stored}_linear.weight", stacked=True, fused=fused)
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] += (one,)
        for ours in ("ffn", "ffn.shared"):
            table[f"layers.{{layer}}.{ours}.{part}"] = (Source(f"{shared}.{stored}_linear.weight", fused=fused),)
    return table


MULTIPLIERS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
GGUF_KEYS = MULTIPLIERS | {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_feed_forward_length": "shared_intermediate_size",
}
GGUF_OPTIONAL = dict.fromkeys(MULTIPLIERS, 1.0) | {"expert_shared_feed_forward_length": 0}


def settle(config: dict[str, Any], file: GgufFile) -> None:
    """A missing `attention.scale` is the usual one."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if "attention.scale" not in file.keys and type(heads) is int and type(hidden) is int and heads > 0:
        config["attention_multiplier"] = (config["head_dim"] or hidden // heads) ** -0.5


FAMILY = Family(
    "Granite 3 with experts (1B-A400M, 3B-A800M), also with a shared one",
    ("granitemoe", "granitemoeshared"),
    read,
    names({}),
    DEFAULTS,
    common.IGNORED,
    (Gguf("granitemoe", gguf.NAMES, GGUF_KEYS, GGUF_OPTIONAL, settle=settle, arranged=gguf.neighbours),),
)

"""Mixtral: llama's attention, eight or so experts a layer, the chosen ones weighted to sum to one."""

from __future__ import annotations

from typing import Any

from numoe.engine.config import Config
from numoe.engine.families import common
from numoe.engine.families.names import Family, Source
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    ffn = MixtureOfExperts(
        config.size("num_local_experts"),
        config.size("num_experts_per_tok"),
        common.swiglu(config),
        Router("softmax"),
    )
    layer = decoder_layer(common.grouped_query_attention(config, window=config.size("sliding_window", None)), ffn)
    return common.model(config, [layer] * config.size("num_hidden_layers"))


def _names() -> dict[str, tuple[Source, ...]]:
    moe = "model.layers.{layer}.block_sparse_moe"
    table = dict(common.names(common.NORMS | common.GROUPED_QUERY, experts="mlp.experts"))
    table["layers.{layer}.ffn.router"] = (Source(f"{moe}.gate.weight"), Source("model.layers.{layer}.mlp.gate.weight"))
    for part, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        one = Source(f"{moe}.experts.{{expert}}.{w}.weight")
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] += (one,)
    return table


FAMILY = Family(spec, _names())

"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): Qwen3's attention, softmax-routed experts, no shared expert."""

from __future__ import annotations

from typing import Any

from numoe.engine.config import Config
from numoe.engine.families import common
from numoe.engine.families.names import Family
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    window = config.size("sliding_window", None) if config.take("use_sliding_window", False) else None
    config.ignore(["sliding_window", "max_window_layers"])
    attention = common.grouped_query_attention(config, window=window, head_norm=True)
    dense = decoder_layer(attention, common.swiglu(config))
    moe = decoder_layer(
        attention,
        MixtureOfExperts(
            config.size("num_experts", None) or config.size("num_local_experts"),  # transformers 5 writes the latter
            config.size("num_experts_per_tok"),
            common.swiglu(config, "moe_intermediate_size"),
            Router("softmax", normalize=config.take("norm_topk_prob", False)),
        ),
    )
    step, dense_layers = config.size("decoder_sparse_step", 1), config.take("mlp_only_layers", [])
    layers = [dense if i in dense_layers or (i + 1) % step else moe for i in range(config.size("num_hidden_layers"))]
    return common.model(config, layers)


FAMILY = Family(
    spec,
    common.names(
        common.NORMS | common.GROUPED_QUERY | common.dense() | {"ffn.router": "mlp.gate.weight"},
        experts="mlp.experts",
    ),
)

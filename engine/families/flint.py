"""Flint: Qwen3-MoE with attention sinks, rope on windows alone, sigmoid routing and a shared expert without a gate."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Source
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

FULL, SLIDING = common.FULL, common.SLIDING
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 262144,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": 513,
    "decoder_sparse_step": 1,
    "num_experts": 256,
    "num_experts_per_tok": 6,
    "shared_expert_intermediate_size": 1024,
    "norm_topk_prob": True,
}


def read(config: Config) -> ModelSpec:
    layers = common.layer_count(config)
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING))
    if kinds is None:
        kinds = [FULL if i < 2 or i % 4 == 1 or i == layers - 1 else SLIDING for i in range(layers)]
    attention = common.grouped_query_attention(config, head_norm=True, biases=common.attention_biases(config))
    attention = replace(attention, sinks=True)
    of_kind = {
        SLIDING: replace(attention, window=config.size("sliding_window")),
        FULL: replace(attention, rope=None),
    }
    moe = common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        Router("sigmoid", normalize=config.flag("norm_topk_prob")),
        common.swiglu(config, "shared_expert_intermediate_size"),
    )
    ffns = common.feed_forwards(config, moe, common.sparse_layers(config, dense=(0, 1)))
    return common.model(config, [decoder_layer(of_kind[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=True)])


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_expert", "ffn.shared")
LAYER |= {"ffn.router": "mlp.gate.weight"}
NAMES = common.names(LAYER, experts="mlp.experts") | {
    "layers.{layer}.attention.sink": tuple(
        Source(f"model.layers.{{layer}}.self_attn.{name}") for name in ("sinks", "softmax_offset")
    )
}
FAMILY = Family("Flint 40B-A2.5B", ("flint",), read, NAMES, DEFAULTS, common.IGNORED)

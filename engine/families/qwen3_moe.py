"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): Qwen3's attention, softmax-routed experts, no shared expert."""

from __future__ import annotations

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "head_dim": None,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}


def read(config: Config) -> ModelSpec:
    window = config.size("sliding_window", null=None) if config.flag("use_sliding_window") else None
    config.ignore(["sliding_window", "max_window_layers"])
    config.expect("use_qk_norm", True)
    attention = common.grouped_query_attention(
        config, window=window, head_norm=True, biases=common.attention_biases(config)
    )
    moe = common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),  # transformers 5 writes the latter
        common.swiglu(config, "moe_intermediate_size"),
        Router("softmax", normalize=config.flag("norm_topk_prob")),
    )
    ffns = common.feed_forwards(config, moe, common.sparse_layers(config))
    return common.model(config, [decoder_layer(attention, ffn) for ffn in ffns])


GGUF = Gguf(
    "qwen3moe",
    gguf.NAMES,
    gguf.EXPERT_KEYS,
    given={"norm_topk_prob": True},  # llama.cpp's src/models/qwen3moe.cpp normalises whatever was trained
)
LAYER = common.NORMS | common.GROUPED_QUERY | common.dense() | {"ffn.router": "mlp.gate.weight"}
NAMES = common.names(LAYER, experts="mlp.experts")
FAMILY = Family(
    "Qwen3-30B-A3B, 235B-A22B, Coder", ("qwen3_moe",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,), mlx=True
)

"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): softmax-routed experts, and a shared one with a gate."""

from __future__ import annotations

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, Source
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 16,
    "head_dim": None,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "qkv_bias": True,
}


def read(config: Config) -> ModelSpec:
    config.expect("use_sliding_window", False)
    config.kinds("layer_types", common.layer_count(config), (common.FULL,))
    attention = common.grouped_query_attention(config, biases="qkv" if config.flag("qkv_bias") else "")
    moe = common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        Router("softmax", normalize=config.flag("norm_topk_prob")),
        common.swiglu(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    ffns = common.feed_forwards(config, moe, common.sparse_layers(config))
    config.ignore(["sliding_window", "max_window_layers", "attention_bias"])
    return common.model(config, [decoder_layer(attention, ffn) for ffn in ffns])


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_expert", "ffn.shared")
LAYER |= {"ffn.router": "mlp.gate.weight", "ffn.shared_gate": "mlp.shared_expert_gate.weight"}
NAMES = common.names(LAYER, experts="mlp.experts")
GGUF = Gguf(
    "qwen2moe",
    gguf.names({"ffn.shared_gate": (Source("ffn_gate_inp_shexp.weight", flat=True),)}),
    gguf.SHARED_EXPERT_KEYS,
    biases="qkv",
    given={"norm_topk_prob": False},  # as llama.cpp's src/models/qwen2moe.cpp computes
)
FAMILY = Family("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", ("qwen2_moe",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

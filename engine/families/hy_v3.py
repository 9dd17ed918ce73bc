"""Hunyuan 3: Qwen3's attention, DeepSeek-V3's router without groups, a shared expert, the first layer dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 11158840.0,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "router_scaling_factor": 2.826,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}


def read(config: Config) -> ModelSpec:
    # What releases say of every model.
    for key in ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        config.expect(key, True)
    config.expect("scoring_func", "sigmoid")
    config.expect("expert_hidden_dim", config.size("moe_intermediate_size"))
    config.ignore(["enable_*_fp32*"])  # in which precision GPUs add
    common.drafting_layers(config)
    attention = common.grouped_query_attention(config, head_norm=True, biases=common.attention_biases(config))
    expert = common.swiglu(config, "moe_intermediate_size")
    dense = common.swiglu(config, bias=config.flag("mlp_bias"))
    shared = replace(dense, width=expert.width * config.size("num_shared_experts"))
    router = Router("sigmoid", bias=True, scale=config.number("router_scaling_factor"))
    experts = config.size("num_experts", also="num_local_experts")
    moe = common.mixture(config, experts, expert, router, shared)
    return common.model(
        config, [decoder_layer(attention, moe if sparse else dense) for sparse in latent.sparse_layers(config)]
    )


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_experts", "ffn.shared")
LAYER |= {"ffn.router": "mlp.gate.weight", "ffn.router_bias": "mlp.e_score_correction_bias"}
# As they were released.
RELEASED = {
    "mlp.gate.": "mlp.router.gate.",
    "mlp.shared_experts.": "mlp.shared_mlp.",
    "mlp.e_score_correction_bias": "mlp.expert_bias",
}
NAMES = common.also_called(common.names(LAYER, experts="mlp.experts"), RELEASED)


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    config["scoring_func"] = config["scoring_func"] or 2  # what llama.cpp takes where a file says nothing
    latent.name_gating(config)
    config["mlp_layer_types"] = gguf.layer_kinds(config, file, {"ffn_gate_inp": "sparse"}, "dense")
    width, shared = config["moe_intermediate_size"], config["num_shared_experts"]
    if type(width) is int and type(shared) is int and width > 0 and shared % width == 0:
        config["num_shared_experts"] = shared // width


GGUF = Gguf(
    "hy_v3",
    gguf.names({"ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    gguf.EXPERT_KEYS
    | {
        "expert_shared_feed_forward_length": "num_shared_experts",
        "expert_weights_scale": "router_scaling_factor",
        "expert_weights_norm": "route_norm",
        "expert_gating_func": "scoring_func",
    },
    optional={"expert_shared_feed_forward_length": 1, "expert_weights_scale": 1.0, "expert_gating_func": None},
    settle=_settle,
)
FAMILY = Family("Hunyuan 3, Hy-MT2-30B-A3B", ("hy_v3",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

"""GLM-4.5 and 4.6: grouped-query attention that rotates half of a head, and the router of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "head_dim": None,
    "attention_bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def read(config: Config) -> ModelSpec:
    norm, biases = config.flag("use_qk_norm"), "qkv" if config.flag("attention_bias") else ""
    attention = common.grouped_query_attention(config, head_norm=norm, biases=biases, turn=partial_rope)
    experts = config.size("n_routed_experts", also="num_local_experts")
    return latent.model(config, attention, experts, latent.sigmoid(config))


NAMES = latent.NAMES | common.names(common.GROUPED_QUERY)


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    config["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.shapes
    config["scoring_func"] = config["scoring_func"] or 2  # what llama.cpp takes where a file says nothing
    latent.name_gating(config)
    gguf.rotate_first(config, file)


GGUF = Gguf(
    "glm4moe",
    gguf.names({"ffn_norm": "post_attention_norm", "ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    latent.EXPERT_KEYS,
    optional=latent.EXPERT_OPTIONAL,
    unread=("rope.dimension_count",),
    settle=_settle,
    biases="qkv",
)
FAMILY = Family("GLM-4.5, 4.5-Air, 4.6", ("glm4_moe",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

"""Ling 2.0 and Ring 2.0: normed heads of which half is rotated, DeepSeek-V3's router and a shared expert.

Transformers has no such family: the model's own code (modeling_bailing_moe_v2.py) computes what GLM-4.5's does with
`use_qk_norm`, from tensors of other names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32768,
    "rope_theta": 600000.0,
    "partial_rotary_factor": 1.0,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "use_qk_norm": False,
    "use_qkv_bias": False,
    "use_bias": False,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 512,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def read(config: Config) -> ModelSpec:
    config = config.renamed({"num_shared_experts": "n_shared_experts", "score_function": "scoring_func"})
    if not config.flag("use_qk_norm"):
        raise config.refusal("use_qk_norm", "is not true, and of this family Ling 2.0 and Ring 2.0 alone are supported")
    for key in ("moe_router_enable_expert_bias", "norm_topk_prob", "use_rmsnorm"):
        config.expect(key, True)
    config.expect("moe_shared_expert_intermediate_size", config.size("moe_intermediate_size"))
    config.ignore(["router_dtype", "max_window_layers", "mtp_loss_scaling_factor"])
    biases = "qkv" * config.flag("use_qkv_bias") + "o" * config.flag("use_bias")
    attention = common.grouped_query_attention(config, head_norm=True, biases=biases, turn=partial_rope)
    router = replace(latent.sigmoid(config), normalize=config.size("num_experts_per_tok") > 1)
    return latent.model(config, attention, config.size("num_experts"), router)


def _names() -> Names:
    layer = common.NORMS | common.dense() | common.dense("mlp.shared_experts", "ffn.shared")
    layer |= {"attention.o": "attention.dense.weight", "attention.o_bias": "attention.dense.bias"}
    layer |= {f"attention.{n[0]}_norm": f"attention.{n}_layernorm.weight" for n in ("query", "key")}
    layer |= {"ffn.router": "mlp.gate.weight", "ffn.router_bias": "mlp.gate.expert_bias"}
    table = dict(common.names(layer, experts="mlp.experts"))
    table["embed"] = (Source("model.word_embeddings.weight"),)
    for ours, theirs in common.SUFFIXES:
        parts = tuple(f"{n}{ours}" for n in "qkv")
        both = Source(f"model.layers.{{layer}}.attention.query_key_value.{theirs}", fused=parts)
        table |= {f"layers.{{layer}}.attention.{part}": (both,) for part in parts}
    return table


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    latent.name_gating(config)
    config["use_qkv_bias"] = config.pop("attention_bias") or "blk.0.attn_qkv.bias" in file.shapes
    config["use_bias"] = "blk.0.attn_output.bias" in file.shapes
    gguf.rotate_first(config, file)


GGUF = Gguf(
    "bailingmoe2",
    gguf.names({"ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    {**latent.EXPERT_KEYS, "expert_count": "num_experts"},
    optional={**latent.EXPERT_OPTIONAL, "expert_weights_norm": True},
    given={"use_qk_norm": True},
    unread=("expert_shared_feed_forward_length", "rope.dimension_count"),
    settle=_settle,
    biases="qkv",
)
FAMILY = Family(
    "Ling 2.0, Ring 2.0 (mini, flash, 1T)", ("bailing_moe",), read, _names(), DEFAULTS, common.IGNORED, (GGUF,)
)

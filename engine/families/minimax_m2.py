"""MiniMax-M2: norms over all query heads together and all key heads, half of a head rotated, sigmoid routing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent, mixtral
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Source
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 196608,
    "rope_theta": 5e6,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": None,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["router_jitter_noise"])  # of training
    config.ignore(["use_mtp", "num_mtp_modules", "mtp_transformer_layers"])  # heads that only draft tokens
    # What its releases say of every model, and what code for its forebears alone looks at.
    for key, value in (("use_qk_norm", True), ("qk_norm_type", "per_layer"), ("use_routing_bias", True),
                       ("scoring_func", "sigmoid"), ("shared_intermediate_size", 0)):  # fmt: skip
        config.expect(key, value)
    config.kinds("attn_type_list", common.layer_count(config), (1,))
    config.ignore(["shared_moe_mode", "mlp_intermediate_size"])
    attention = replace(common.grouped_query_attention(config, turn=_rope), whole_norm=True)
    experts = config.size("num_local_experts", also="num_experts")
    moe = common.mixture(config, experts, common.swiglu(config), Router("sigmoid", bias=True))
    return common.model(config, [decoder_layer(attention, moe)] * common.layer_count(config))


def _rope(config: Config, head_dim: int) -> Rope:
    """Releases say how many channels are rotated, where transformers saves what part of a head they are."""
    return partial_rope(config, head_dim, config.size("rotary_dim", null=head_dim) / head_dim)


NAMES = mixtral.NAMES | {
    "layers.{layer}.ffn.router_bias": tuple(
        Source(f"model.layers.{{layer}}.{part}.e_score_correction_bias") for part in ("block_sparse_moe", "mlp")
    )
}


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    latent.name_gating(config)
    gguf.rotate_first(config, file)


GGUF = Gguf(
    "minimax-m2",
    gguf.names({"ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    {
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
        "expert_gating_func": "scoring_func",
    },
    optional={"expert_gating_func": None},
    unread=("feed_forward_length", "rope.dimension_count"),
    settle=_settle,
)
FAMILY = Family("MiniMax-M2, M2.5, M2.7", ("minimax_m2",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

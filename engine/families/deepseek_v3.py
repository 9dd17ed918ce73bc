"""DeepSeek-V3 and R1: latent attention, sigmoid scores with a balancing bias, experts chosen within groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from numoe.engine.families import common
from numoe.engine.families.config import Config, rope_block, scaled_rope, yarn_mscale
from numoe.engine.families.names import Family
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.rope import Yarn
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
}


def read(config: Config) -> ModelSpec:
    attention = latent_attention(config, interleaved=config.flag("rope_interleave"))
    return latent_model(config, attention, config.size("n_routed_experts", also="num_local_experts"), sigmoid(config))


def sigmoid(config: Config) -> Router:
    """The router of V3: sigmoid scores, chosen with a learned correction within the best groups."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    return Router(
        "sigmoid",
        bias=True,
        groups=config.size("n_group"),
        top_groups=config.size("topk_group"),
        group_score="top2",
        normalize=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor"),
    )


def latent_attention(config: Config, *, interleaved: bool) -> MultiHeadLatentAttention:
    """MLA as V2 and V3 configure it. Where YaRN has `mscale_all_dim`, its square scales the softmax."""
    heads, nope, rotary = (config.size(key) for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    config.expect("num_key_value_heads", heads)
    config.ignore(["head_dim", "qk_head_dim"])  # restate the sizes above
    block = rope_block(config)
    rotation = scaled_rope(config, block, rotary, interleaved=interleaved)
    scale = (nope + rotary) ** -0.5
    if isinstance(rotation.scaling, Yarn) and block.values.get("mscale_all_dim"):
        scale *= yarn_mscale(rotation.scaling.factor, block.values["mscale_all_dim"]) ** 2
    return MultiHeadLatentAttention(
        heads,
        config.size("q_lora_rank", null=None),
        config.size("kv_lora_rank"),
        nope,
        config.size("v_head_dim"),
        rotation,
        scale,
    )


def latent_model(
    config: Config,
    attention: MultiHeadLatentAttention,
    experts: int,
    router: Router,
    sparse: Sequence[bool] | None = None,
) -> ModelSpec:
    """Mixtures with shared experts in the layers that are `sparse`, by default after `first_k_dense_replace` others."""
    config.expect("moe_layer_freq", 1)
    common.drafting_layers(config)
    expert = common.swiglu(config, "moe_intermediate_size")
    shared = replace(expert, width=expert.width * config.size("n_shared_experts"))
    moe = common.mixture(config, experts, expert, router, shared)
    if sparse is None:
        first = config.count("first_k_dense_replace")
        sparse = [i >= first for i in range(common.layer_count(config))]
    dense = expert if all(sparse) else common.swiglu(config)
    config.ignore(["intermediate_size"])  # of dense layers alone
    return common.model(config, [decoder_layer(attention, moe if one else dense) for one in sparse])


LATENT = {
    "attention.q": "self_attn.q_proj.weight",
    "attention.q_a": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_b": "self_attn.q_b_proj.weight",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": "self_attn.kv_b_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
}
NAMES = common.names(
    common.NORMS
    | LATENT
    | common.dense()
    | common.dense("mlp.shared_experts", "ffn.shared")
    | {"ffn.router": "mlp.gate.weight", "ffn.router_bias": "mlp.gate.e_score_correction_bias"},
    experts="mlp.experts",
)

FAMILY = Family(("deepseek_v3",), read, NAMES, DEFAULTS, common.IGNORED)

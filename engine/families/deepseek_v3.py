"""DeepSeek-V3 and R1: latent attention, sigmoid scores with a balancing bias, experts chosen within groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.config import Config, rope, yarn_mscale
from numoe.engine.families import common
from numoe.engine.families.names import Family
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.ffn import SwiGLU
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    experts = config.size("n_routed_experts")
    router = Router(
        "sigmoid",
        bias=True,
        groups=config.size("n_group", 1),
        top_groups=config.size("topk_group", 1),
        group_score="top2",
        normalize=config.take("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor"),
    )
    interleaved = config.take("rope_interleave", True)
    return latent_model(config, latent_attention(config, interleaved=interleaved), experts, router)


def latent_attention(config: Config, *, interleaved: bool) -> MultiHeadLatentAttention:
    """MLA as V2 and V3 configure it. Where YaRN has `mscale_all_dim`, its square scales the softmax."""
    config.expect("attention_bias", False)
    heads, nope, rotary = (config.size(key) for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    config.ignore(["num_key_value_heads", "head_dim", "qk_head_dim"])  # restate the sizes above
    parameters = values if (values := config.values.get("rope_parameters")) else config.values.get("rope_scaling")
    scale = (nope + rotary) ** -0.5
    rotation: Rope = rope(config, rotary, interleaved=interleaved)
    if rotation.scaling is not None and parameters and parameters.get("mscale_all_dim"):
        scale *= yarn_mscale(rotation.scaling.factor, parameters["mscale_all_dim"]) ** 2
    return MultiHeadLatentAttention(
        heads,
        config.size("q_lora_rank", None),
        config.size("kv_lora_rank"),
        nope,
        config.size("v_head_dim"),
        rotation,
        scale,
    )


def latent_model(config: Config, attention: MultiHeadLatentAttention, experts: int, router: Router) -> ModelSpec:
    """`first_k_dense_replace` dense layers, then mixtures with shared experts."""
    if experts % router.groups:
        raise InputError(f'config.json: {experts} experts cannot form "n_group" {router.groups} equal groups')
    config.expect("moe_layer_freq", 1)
    config.ignore(["num_nextn_predict_layers", "num_mtp_layers"])
    expert = common.swiglu(config, "moe_intermediate_size")
    moe = MixtureOfExperts(
        experts,
        config.size("num_experts_per_tok"),
        expert,
        router,
        replace(expert, width=expert.width * config.size("n_shared_experts")),
    )
    dense: SwiGLU = common.swiglu(config)
    first = config.take("first_k_dense_replace", 0)
    layers = [decoder_layer(attention, dense if i < first else moe) for i in range(config.size("num_hidden_layers"))]
    return common.model(config, layers)


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

FAMILY = Family(spec, NAMES)

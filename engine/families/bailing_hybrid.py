"""Ling 3.0: Kimi Delta Attention with a lower bound, and gated latent attention in the last layer of every group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from numoe.engine.families import common, kda, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Source
from numoe.engine.layers.recurrent.kda import KimiDeltaAttention
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import shown

DEFAULTS = kda.DEFAULTS | {
    "max_position_embeddings": 262144,
    "rope_theta": 6e6,
    "num_local_experts": 512,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
    "head_dim": 128,
    "linear_head_dim": None,
    "linear_num_heads": None,
    "short_conv_kernel_size": 4,
    "linear_conv_kernel_dim": None,
    "layer_group_size": 6,
    "kda_safe_gate": True,
    "kda_lower_bound": -5.0,
}


def read(config: Config) -> ModelSpec:
    config = config.renamed(kda.SPELLINGS)
    config.expect("no_kda_lora", True)
    config.expect("gated_attention_proj_granularity_type", "head_wise")
    config.expect("rope_interleave", True)
    config.expect("score_function", "sigmoid")
    config.expect("moe_router_enable_expert_bias", True)
    config.expect("router_dtype", "fp32")
    config.expect("use_rmsnorm", True)
    config.expect("moe_shared_expert_intermediate_size", config.size("moe_intermediate_size"))
    config.ignore(["mtp_loss_scaling_factor"])
    layers, every = common.layer_count(config), config.size("layer_group_size")
    kinds = config.kinds("layer_types", layers, (kda.LINEAR, common.FULL))
    if kinds is None:
        kinds = [kda.LINEAR if (i + 1) % every else common.FULL for i in range(layers)]
    full = replace(latent.attention(config, interleaved=True), gate=True)
    return kda.model(config, kinds, _linear(config), full)


def _linear(config: Config) -> KimiDeltaAttention:
    """Saved configs have its sizes under names of their own, where `head_dim` is what is rotated."""
    heads = config.size("linear_num_heads", null=None) or config.size("num_attention_heads")
    dim = config.size("linear_head_dim", null=None) or config.size("head_dim")
    key = "short_conv_kernel_size" if config.values.get("linear_conv_kernel_dim") is None else "linear_conv_kernel_dim"
    config.ignore(["short_conv_kernel_size", "linear_conv_kernel_dim"])
    bound = config.take("kda_lower_bound")
    if type(bound) not in (int, float) or not -100 <= bound < 0:
        raise config.refusal("kda_lower_bound", f"must be a number from -100 to 0, not {shown(bound)}")
    lower = float(bound) if config.flag("kda_safe_gate") else None
    return KimiDeltaAttention(heads, dim, kda.kernel(config, key), lower_bound=lower)


# As they were released.
RELEASED = {
    "model.embed_tokens": "model.word_embeddings", ".self_attn.o_proj": ".attention.dense",
    ".self_attn.": ".attention.",
    "e_score_correction_bias": "expert_bias",
}  # fmt: skip
NAMES = common.also_called(kda.NAMES, RELEASED)
_KEYS = {
    "kda.safe_gate": "kda_safe_gate",
    "kda.gate_lower_bound": "kda_lower_bound",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
}
GGUF = kda.of_gguf(
    "bailingmoe3",
    _KEYS,
    Source("ssm_a", made=np.negative),
    {"kda.safe_gate": True, "expert_shared_feed_forward_length": None},
)
FAMILY = Family(
    "Ling-3.0-flash, tiny: Kimi Delta Attention, and gated latent attention",
    ("bailing_hybrid",),
    read,
    NAMES,
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
)

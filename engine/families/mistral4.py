"""Mistral Small 4: DeepSeek's latent attention with queries that grow with their positions, softmax-routed experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, latent, ministral3
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, GgufFile
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec

ROPE = ministral3.ROPE | {"rope_theta": 10000.0, "factor": 128.0, "original_max_position_embeddings": 8192}
DEFAULTS = latent.DEFAULTS | {
    "max_position_embeddings": 1048576,
    "num_key_value_heads": 32,
    "q_lora_rank": 1024,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "routed_scaling_factor": 1.0,
}


def read(config: Config) -> ModelSpec:
    block, temperature = ministral3.growing(config, ROPE)
    attention = latent.attention(config, interleaved=config.flag("rope_interleave"), block=block)
    router = Router(
        "softmax",
        groups=config.size("n_group"),
        top_groups=config.size("topk_group"),
        group_score="top2",
        normalize=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor"),
    )
    config.expect("scoring_func", "softmax")
    experts = config.size("n_routed_experts", also="num_local_experts")
    return latent.model(config, replace(attention, temperature=temperature), experts, router)


NAMES = common.also_below(common.also_below(latent.NAMES, "", "language_model."), "model.", "model.language_model.")
_DEEPSEEK2 = latent.deepseek2(architecture="mistral4")


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    _DEEPSEEK2.settle(config, file)
    ministral3.grow(config, file)


GGUF = replace(_DEEPSEEK2, unread=(*_DEEPSEEK2.unread, ministral3.STRENGTH), settle=_settle)
FAMILY = Family("Mistral Small 4 (text)", ("mistral4",), read, NAMES, DEFAULTS, ministral3.IGNORED, (GGUF,))

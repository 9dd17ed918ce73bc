"""GLM-4.7-Flash: DeepSeek-V3's layers, with all experts in one group."""

from __future__ import annotations

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = latent.DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "first_k_dense_replace": 1,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "routed_scaling_factor": 1.8,
}


def read(config: Config) -> ModelSpec:
    attention = latent.attention(config, interleaved=config.flag("rope_interleave"))
    experts = config.size("n_routed_experts", also="num_local_experts")
    return latent.model(config, attention, experts, latent.sigmoid(config))


# Its files have the vocabulary of no other one.
GGUF = latent.deepseek2(latent.scores_by_sigmoid, lambda file: latent.vocabulary(file) == 154880)
FAMILY = Family("GLM-4.7-Flash", ("glm4_moe_lite",), read, latent.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

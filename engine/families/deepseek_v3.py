"""DeepSeek-V3 and R1: latent attention, sigmoid scores with a balancing bias, experts chosen within groups."""

from __future__ import annotations

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = latent.DEFAULTS | {
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
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
    attention = latent.attention(config, interleaved=config.flag("rope_interleave"))
    experts = config.size("n_routed_experts", also="num_local_experts")
    return latent.model(config, attention, experts, latent.sigmoid(config))


GGUF = latent.deepseek2(latent.scores_by_sigmoid)
FAMILY = Family("DeepSeek-V3, R1", ("deepseek_v3",), read, latent.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

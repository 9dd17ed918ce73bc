"""DeepSeek-V3.2: DeepSeek-V3's layers, in which an indexer picks the tokens that each one attends to."""

from __future__ import annotations

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = latent.DEFAULTS | {
    "max_position_embeddings": 163840,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}


def read(config: Config) -> ModelSpec:
    config.kinds("layer_types", common.layer_count(config), latent.INDEXED)
    config.expect("rope_interleave", True)
    attention = latent.indexed(config, latent.attention(config, interleaved=True), interleaved=False)
    experts = config.size("n_routed_experts", also="num_local_experts")
    config.expect("num_experts", experts)  # as transformers called it before
    return latent.model(config, attention, experts, latent.sigmoid(config))


GGUF = latent.deepseek2(architecture="deepseek32", keys=latent.INDEXER_KEYS)
FAMILY = Family(
    "DeepSeek-V3.2: an indexer picks the tokens",
    ("deepseek_v32",),
    read,
    latent.NAMES,
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
)

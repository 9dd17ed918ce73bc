"""dots.llm1: Qwen3's attention, and the mixture of DeepSeek-V3."""

from __future__ import annotations

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 2048,
    "num_key_value_heads": 32,
    "head_dim": None,
    "attention_bias": False,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "max_window_layers": 62,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}


def read(config: Config) -> ModelSpec:
    config.choice("scoring_func", "sigmoid", "noaux_tc")  # which is the sigmoid with a correction of the choice
    config.expect("topk_method", "noaux_tc")
    attention = common.grouped_query_attention(config, head_norm=True, biases=common.attention_biases(config))
    experts = config.size("n_routed_experts", also="num_local_experts")
    return latent.model(config, common.windowed(config, attention), experts, common.corrected_sigmoid(config))


NAMES = latent.NAMES | common.names(common.GROUPED_QUERY)
FAMILY = Family("dots.llm1", ("dots1",), read, NAMES, DEFAULTS, common.IGNORED)

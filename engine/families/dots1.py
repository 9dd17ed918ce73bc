"""dots.llm1: Qwen3's attention, and the mixture of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
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
    router = common.corrected_sigmoid(config, null_groups=True)
    return latent.model(config, common.windowed(config, attention), experts, router)


NAMES = latent.NAMES | common.names(common.GROUPED_QUERY)


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    config["scoring_func"] = config["scoring_func"] or 2
    latent.name_gating(config)


GGUF = Gguf(
    "dots1",
    gguf.names({"ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    latent.EXPERT_KEYS,
    optional=latent.EXPERT_OPTIONAL,
    given={"sliding_window": None},
    unread=("expert_shared_feed_forward_length",),
    settle=_settle,
)
FAMILY = Family("dots.llm1", ("dots1",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

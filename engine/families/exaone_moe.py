"""K-EXAONE: EXAONE 4's attention between usual norms, and the mixture of DeepSeek-V3."""

from __future__ import annotations

from typing import Any

from numoe.engine.families import common, exaone4, gguf, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Source
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = exaone4.DEFAULTS | {
    "first_k_dense_replace": 1,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1024,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def read(config: Config) -> ModelSpec:
    config = config.renamed({"num_shared_experts": "n_shared_experts"})
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    config.ignore(["first_last_k_dense_replace", "is_moe_layer"])  # restate which layers have experts
    router = common.corrected_sigmoid(config)
    return latent.model(config, exaone4.attentions(config), config.size("num_experts"), router)


NAMES = latent.NAMES | common.names(common.GROUPED_QUERY)
NAMES["layers.{layer}.ffn.router_bias"] += (Source("model.layers.{layer}.mlp.e_score_correction_bias"),)


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    gguf.expect(file, "expert_gating_func", gguf.SIGMOID)
    exaone4.settle(config, file)


KEYS = latent.EXPERT_KEYS | {"attention.sliding_window": "sliding_window", "expert_count": "num_experts"}
GGUF = Gguf(
    "exaone-moe",
    gguf.names({"ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    {key: name for key, name in KEYS.items() if key != "expert_gating_func"},
    optional=latent.EXPERT_OPTIONAL | {"expert_weights_norm": True},
    unread=(*gguf.WINDOW_KEYS, "expert_gating_func", "expert_shared_feed_forward_length"),
    settle=_settle,
    arranged=gguf.divided,
)
FAMILY = Family("K-EXAONE-236B-A23B", ("exaone_moe",), read, NAMES, DEFAULTS, (r"mtp\..*", *common.IGNORED), (GGUF,))

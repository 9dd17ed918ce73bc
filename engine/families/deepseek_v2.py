"""DeepSeek-V2 (also Lite, Coder): latent attention, softmax scores, experts chosen freely or within groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, GgufFile
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = latent.DEFAULTS | {
    "max_position_embeddings": 2048,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}


def read(config: Config) -> ModelSpec:
    config.expect("scoring_func", "softmax")
    config.expect("norm_topk_prob", False)
    groups = top_groups = 1
    if config.choice("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy":
        groups, top_groups = config.size("n_group"), config.size("topk_group")
    config.ignore(["n_group", "topk_group"])
    router = Router(
        "softmax",
        groups=groups,
        top_groups=top_groups,
        normalize=False,
        scale=config.number("routed_scaling_factor"),
    )
    experts = config.size("n_routed_experts", also="num_experts")
    return latent.model(config, latent.attention(config, interleaved=True), experts, router)


def _by_groups(config: dict[str, Any], file: GgufFile) -> None:
    GGUF.settle(config, file)
    if config["n_group"] != 1:
        config["topk_method"] = "group_limited_greedy"


GGUF = latent.deepseek2()
FAMILY = Family(
    "DeepSeek-V2, V2-Lite",
    ("deepseek_v2",),
    read,
    latent.NAMES,
    DEFAULTS,
    common.IGNORED,
    (replace(GGUF, settle=_by_groups),),
)

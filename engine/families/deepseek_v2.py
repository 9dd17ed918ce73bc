"""DeepSeek-V2 (also Lite, Coder): latent attention, softmax scores, experts chosen freely or within groups."""

from __future__ import annotations

from typing import Any

from numoe.engine.config import Config
from numoe.engine.families.deepseek_v3 import NAMES, latent_attention, latent_model
from numoe.engine.families.names import Family
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    config.expect("scoring_func", "softmax")
    config.expect("norm_topk_prob", False)
    method = config.take("topk_method", "greedy")
    config.expect("topk_method", "greedy", "group_limited_greedy")
    groups, top_groups = config.size("n_group", 1), config.size("topk_group", 1)
    grouped = method == "group_limited_greedy"
    router = Router(
        "softmax",
        groups=groups if grouped else 1,
        top_groups=top_groups if grouped else 1,
        normalize=False,
        scale=config.number("routed_scaling_factor", 1.0),
    )
    attention = latent_attention(config, interleaved=True)
    return latent_model(config, attention, config.size("n_routed_experts"), router)


FAMILY = Family(spec, NAMES)

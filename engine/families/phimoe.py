"""Phi-3.5-MoE and its small ones: Mixtral's layout with LayerNorms and biases, routed by a sparse mixer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, mixtral
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.block import Block
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec

NORM = Norm(center=True, bias=True)
DEFAULTS = common.DEFAULTS | {
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "attention_bias": False,
    "lm_head_bias": False,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
}


def read(config: Config) -> ModelSpec:
    if config.size("num_experts_per_tok") != 2:
        raise config.refusal("num_experts_per_tok", "must be 2: its sparse mixer takes two experts in turn")
    config.ignore(["input_jitter_noise", "original_max_position_embeddings"])  # of training; restated in the table
    attention = common.grouped_query_attention(
        config,
        window=config.size("sliding_window", null=None),
        biases=common.attention_biases(config),
    )
    router = Router("sparse mixer", normalize=False, tolerance=2 * config.number("router_jitter_noise"))
    ffn = common.mixture(config, config.size("num_local_experts", also="num_experts"), common.swiglu(config), router)
    layer = Block("attention", attention, before=NORM), Block("ffn", ffn, before=NORM)
    head_bias = config.flag("lm_head_bias")
    spec = common.model(config, [layer] * common.layer_count(config))
    return replace(spec, norm=NORM, head_bias=head_bias)


def _names() -> Names:
    table = dict(mixtral.NAMES)
    biased = {f"layers.{{layer}}.{name}": f"model.layers.{{layer}}.{stored}" for name, stored in common.NORMS.items()}
    biased |= {"norm": "model.norm.weight", "head": "lm_head.weight"}
    table |= {f"{name}_bias": (Source(stored.replace(".weight", ".bias")),) for name, stored in biased.items()}
    table["layers.{layer}.ffn.router"] += (Source("model.layers.{layer}.mlp.router.weight"),)
    return table


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    gguf.expect(file, "expert_gating_func", gguf.SOFTMAX)  # of which a sparse mixer is a kind
    config["sliding_window"] = config["sliding_window"] or None
    config["lm_head_bias"] = "output.bias" in file.shapes
    gguf.long(config, file, "short_mscale")


def _gguf_names() -> Names:
    biases = {"norm_bias": (Source("output_norm.bias"),), "head_bias": (Source("output.bias"),)}
    return {**gguf.NAMES, **biases}


GGUF = Gguf(
    "phimoe",
    _gguf_names(),
    {
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    optional={"attention.sliding_window": None},
    unread=("expert_gating_func", "rope.scaling.attn_factor"),
    settle=_settle,
)
FAMILY = Family(
    "Phi-3.5-MoE (4096 tokens), Phi-mini-MoE, Phi-tiny-MoE",
    ("phimoe",),
    read,
    _names(),
    DEFAULTS,
    (r"rope_factors_(short|long)\.weight", *common.IGNORED),
    (GGUF,),
)

"""Mellum 2: Qwen3-MoE with windows in some layers, and a rope of its own for each kind of layer."""

from __future__ import annotations

from typing import Any

from numoe.engine.families import common, gguf, latent, qwen3_moe
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "first_k_dense_replace": 0,
}
ROPES = {
    common.FULL: {"rope_type": "default", "rope_theta": 500000.0},
    common.SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
}


def read(config: Config) -> ModelSpec:
    common.drafting_layers(config)
    config.ignore(["mtp_layer_types", "mtp_mlp_layer_types"])
    attentions = common.each_by_kind(config, ROPES)
    moe = common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        Router("softmax", normalize=config.flag("norm_topk_prob")),
    )
    ffns = common.feed_forwards(config, moe, latent.sparse_layers(config))
    return common.model(config, [decoder_layer(*both) for both in zip(attentions, ffns, strict=True)])


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    gguf.windows(config, file, 4, 3)
    config["mlp_layer_types"] = gguf.layer_kinds(config, file, {"ffn_gate_inp": "sparse"}, "dense")


GGUF = Gguf(
    "mellum",
    gguf.NAMES,
    gguf.EXPERT_KEYS | {"attention.sliding_window": "sliding_window"},
    optional={"attention.sliding_window": None},
    given={"norm_topk_prob": True},  # as llama.cpp's src/models/mellum.cpp computes
    unread=gguf.WINDOW_KEYS,
    settle=_settle,
)
IGNORED = (r"mtp\..*", *common.IGNORED)
FAMILY = Family("Mellum2-12B-A2.5B", ("mellum",), read, qwen3_moe.NAMES, DEFAULTS, IGNORED, (GGUF,))

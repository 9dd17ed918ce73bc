"""Trinity: gated attention, windows with rope and global layers without, sigmoid routing, norms on both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gemma3, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.attention.grouped import OutputGate
from numoe.engine.layers.block import Block
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": None,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": 1024,
    "global_attn_every_n_layers": 4,
    "num_dense_layers": 1,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "route_scale": 1.0,
    "mup_enabled": False,
}


def read(config: Config) -> ModelSpec:
    # What releases say of every model.
    for key, value in (("score_func", "sigmoid"), ("route_norm", True), ("n_group", 1), ("topk_group", 1),
                       ("num_expert_groups", 1), ("num_limited_groups", 1)):  # fmt: skip
        config.expect(key, value)
    config.ignore(["load_balance_coeff", "use_grouped_mm"])  # of training
    kinds = gemma3.kinds(config, "global_attn_every_n_layers")
    attention = common.grouped_query_attention(config, head_norm=True, biases=common.attention_biases(config))
    attention = replace(attention, output_gate=OutputGate("sigmoid"))
    of_kind = {
        common.SLIDING: replace(attention, window=config.size("sliding_window")),
        common.FULL: replace(attention, rope=None),
    }
    expert = common.swiglu(config, "moe_intermediate_size")
    moe = common.mixture(
        config,
        config.size("num_experts"),
        expert,
        Router("sigmoid", bias=True, scale=config.number("route_scale")),
        replace(expert, width=expert.width * config.size("num_shared_experts")),
    )
    dense, first = common.swiglu(config), config.count("num_dense_layers")
    layers = [
        (Block("attention", of_kind[kind], after=Norm()), Block("ffn", dense if i < first else moe, after=Norm()))
        for i, kind in enumerate(kinds)
    ]
    scaled = config.flag("mup_enabled")
    spec = common.model(config, layers)
    return replace(spec, embedding_scale=spec.hidden**0.5) if scaled else spec


LAYER = common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_experts", "ffn.shared")
LAYER |= {
    "attention_norm": "input_layernorm.weight",
    "attention_post_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_mlp_layernorm.weight",
    "ffn_post_norm": "post_mlp_layernorm.weight",
    "attention.gate": "self_attn.gate_proj.weight",
    "ffn.router": "mlp.router.gate.weight",
    "ffn.router_bias": "mlp.expert_bias",
}
NAMES = common.names(LAYER, experts="mlp.experts")


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    gguf.windows(config, file, 4, 3)
    config["rope_parameters"] = config["rope_parameters"]["sliding_attention"]  # the others have none


GGUF = Gguf(
    "afmoe",
    gguf.names(
        {
            "attention_post_norm": "post_attention_norm",
            "ffn_post_norm": "post_ffw_norm",
            "attention.gate": "attn_gate",
            "ffn.router_bias": ("exp_probs_b.bias",),
        }
    ),
    gguf.EXPERT_KEYS
    | {
        "leading_dense_block_count": "num_dense_layers",
        "expert_shared_count": "num_shared_experts",
        "expert_weights_scale": "route_scale",
        "attention.sliding_window": "sliding_window",
    },
    optional={"leading_dense_block_count": 0, "expert_weights_scale": 1.0},
    given={"mup_enabled": True},  # as llama.cpp's src/models/afmoe.cpp computes
    unread=(*gguf.WINDOW_KEYS, "expert_gating_func"),
    settle=_settle,
)
FAMILY = Family("Arcee's Trinity-Nano, Mini, Large", ("afmoe",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

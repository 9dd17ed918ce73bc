"""ERNIE 4.5: softmax routing with a correction of the choice, shared experts, rope of neighbouring channels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Source
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import shown

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "head_dim": None,
    "use_bias": False,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def read(config: Config) -> ModelSpec:
    config = config.renamed({"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"})
    config.expect("moe_use_aux_free", True)
    config.expect("compression_ratio", 1.0)
    config.ignore(["moe_capacity", "moe_gate"])  # of training
    common.drafting_layers(config)
    biased = config.flag("use_bias")
    attention = common.grouped_query_attention(
        config, biases="qkvo" if biased else "", turn=partial(rope, interleaved=True)
    )
    expert, shared = common.swiglu(config, "moe_intermediate_size"), config.count("moe_num_shared_experts")
    moe = common.mixture(
        config,
        config.size("moe_num_experts"),
        expert,
        Router("softmax", bias=True, least=config.number("moe_norm_min")),
        replace(expert, width=expert.width * shared, bias=biased) if shared else None,
        chosen="moe_k",
    )
    dense = common.swiglu(config, bias=biased)
    layers = [decoder_layer(attention, moe if sparse else dense) for sparse in _sparse_layers(config)]
    return replace(common.model(config, layers), head_bias=biased)


def _sparse_layers(config: Config) -> list[bool]:
    layers, every = common.layer_count(config), config.size("moe_layer_interval")
    first = config.count("moe_layer_start_index")
    last = config.take("moe_layer_end_index")
    if type(last) is not int or last < -1:
        raise config.refusal("moe_layer_end_index", f"must be the number of a layer, or -1, not {shown(last)}")
    return [first <= i <= (layers if last == -1 else last) and (i + 1) % every == 0 for i in range(layers)]


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_experts", "ffn.shared")
LAYER |= {"ffn.router": "mlp.gate.weight"}
NAMES = common.names(LAYER, experts="mlp.experts") | {
    "layers.{layer}.ffn.router_bias": tuple(
        Source(f"model.layers.{{layer}}.mlp.{part}moe_statics.e_score_correction_bias", flat=True)
        for part in ("", "gate.")
    ),
    "head_bias": (Source("lm_head.bias"),),
}


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    config["use_bias"] = config.pop("attention_bias") or config.pop("mlp_bias", False)
    kinds = gguf.layer_kinds(config, file, {"ffn_gate_inp": "sparse"}, "dense")
    config["moe_layer_end_index"] = max((i for i, kind in enumerate(kinds) if kind == "sparse"), default=0)


GGUF = Gguf(
    "ernie4_5-moe",
    gguf.names({"ffn.router_bias": (Source("exp_probs_b.bias", flat=True),)}),
    {
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "moe_num_shared_experts",
        "interleave_moe_layer_step": "moe_layer_interval",
        "leading_dense_block_count": "moe_layer_start_index",
    },
    optional={"expert_shared_count": 0, "leading_dense_block_count": 0},
    unread=("expert_shared_feed_forward_length",),  # the converter writes another number there
    settle=_settle,
)
FAMILY = Family(
    "ERNIE-4.5-21B-A3B, 300B-A47B",
    ("ernie4_5_moe",),
    read,
    NAMES,
    DEFAULTS,
    (r"model\.mtp_.*", *common.IGNORED),
    (GGUF,),
)

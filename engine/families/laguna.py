"""Laguna: gated attention with heads of their own number in each layer, windows, sigmoid routing, a shared expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention, OutputGate
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import shown

GATES = {True: True, "per-head": True, "per-element": False}
"""What `gating` says -> whether there is one number a head."""
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "sliding_window": 512,
    "gating": True,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "moe_routed_scaling_factor": 1.0,
    "moe_router_logit_softcapping": 0.0,
    "first_k_dense_replace": 1,
}
ROPES = {
    common.FULL: {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    common.SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}


def read(config: Config) -> ModelSpec:
    config.expect("norm_topk_prob", True)
    config.ignore(["mlp_only_layers", "decoder_sparse_step"])  # restate `mlp_layer_types`
    capped = config.take("moe_router_logit_softcapping") != 0
    router = Router(
        "sigmoid",
        bias=True,
        scale=config.number("moe_routed_scaling_factor"),
        cap=config.number("moe_router_logit_softcapping") if capped else None,
    )
    moe = common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        router,
        common.swiglu(config, "shared_expert_intermediate_size"),
    )
    ffns = common.feed_forwards(config, moe, latent.sparse_layers(config))
    return common.model(config, [decoder_layer(*both) for both in zip(_attentions(config), ffns, strict=True)])


def _attentions(config: Config) -> list[GroupedQueryAttention]:
    made = common.each_by_kind(config, ROPES, partial_rope=True)
    gating = config.take("gating")
    if not isinstance(gating, bool | str) or gating not in GATES:
        raise config.refusal("gating", f"is {shown(gating)}; true, 'per-head' and 'per-element' are known")
    gate = OutputGate("softplus", GATES[gating])
    config.kinds(
        "gating_types", len(made), ("per_head", "per-head") if gate.by_head else ("per_element", "per-element")
    )
    heads = config.listing("num_attention_heads_per_layer")
    if heads is None:
        heads = [made[0].heads] * len(made)
    if len(heads) != len(made) or any(type(one) is not int or one < 1 for one in heads):
        raise config.refusal(
            "num_attention_heads_per_layer", f"must be {len(made)} positive integers, not {shown(heads)}"
        )
    for one in set(heads):
        common.check_heads(config, one, made[0].kv_heads)
    return [replace(one, heads=own, output_gate=gate) for one, own in zip(made, heads, strict=True)]


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_experts", "ffn.shared")
LAYER |= {"attention.gate": "self_attn.g_proj.weight", "ffn.router": "mlp.gate.weight"}
_TABLE = common.names(LAYER, experts="mlp.experts") | {
    "layers.{layer}.ffn.router_bias": tuple(
        Source(f"model.layers.{{layer}}.mlp.{part}.e_score_correction_bias") for part in ("gate", "experts")
    )
}
NAMES = common.also_called(
    _TABLE, {"mlp.shared_experts.": "mlp.shared_expert."}
)  # as transformers saves and as released


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    heads, count = config["num_attention_heads"], config["num_hidden_layers"]
    if isinstance(heads, list) and heads:
        config |= {"num_attention_heads": heads[0], "num_attention_heads_per_layer": heads[:count]}
    first = heads[0] if isinstance(heads, list) and heads else heads
    config["gating"] = "per-head" if file.shapes.get("blk.0.attn_gate.weight", ())[:1] == (first,) else "per-element"
    gguf.windows(config, file, 4, 0)
    config["mlp_layer_types"] = gguf.layer_kinds(config, file, {"ffn_gate_inp": "sparse"}, "dense")
    for kind, key in ((common.FULL, "rope.dimension_count"), (common.SLIDING, "rope.dimension_count_swa")):
        config["rope_parameters"][kind]["partial_rotary_factor"] = gguf.rotated_part(config, file, key)


GGUF = Gguf(
    "laguna",
    gguf.names({"attention.gate": "attn_gate", "ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b")}),
    gguf.SHARED_EXPERT_KEYS
    | {"expert_weights_scale": "moe_routed_scaling_factor", "attention.sliding_window": "sliding_window"},
    optional={"expert_weights_scale": 1.0, "attention.sliding_window": None},
    unread=(*gguf.WINDOW_KEYS, "rope.dimension_count", "rope.dimension_count_swa", "leading_dense_block_count",
            "expert_gating_func"),
    settle=_settle,
)  # fmt: skip
FAMILY = Family("Poolside's Laguna-XS, S", ("laguna",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

"""gpt-oss: attention with sinks and biases, windows on every other layer, experts of a SwiGLU of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.ffn import SwiGLU
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "head_dim": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}


def read(config: Config) -> ModelSpec:
    if not config.table("rope_scaling") and not config.table("rope_parameters"):
        raise config.refusal("rope_scaling", "is missing, and every gpt-oss scales its positions; check the file")
    config.ignore(["initial_context_length", "experts_per_token"])  # restate others
    layers = common.layer_count(config)
    kinds = config.kinds("layer_types", layers, (SLIDING, FULL))
    if kinds is None:
        kinds = [FULL if i % 2 else SLIDING for i in range(layers)]
    full = replace(common.grouped_query_attention(config, biases=common.attention_biases(config)), sinks=True)
    mixers = {FULL: full, SLIDING: replace(full, window=config.size("sliding_window"))}
    config.choice("hidden_act", "silu")
    limit, alpha = config.number("swiglu_limit"), config.number("swiglu_alpha")
    expert = SwiGLU(config.size("intermediate_size"), limit, bias=True, alpha=alpha, shift=1.0)
    experts = config.size("num_local_experts", also="num_experts")
    ffn = common.mixture(config, experts, expert, Router("softmax", logit_bias=True))
    return common.model(config, [decoder_layer(mixers[kind], ffn) for kind in kinds])


def _names() -> Names:
    layer = common.NORMS | common.GROUPED_QUERY
    layer |= {"attention.sink": "self_attn.sinks", "ffn.router": "mlp.router.weight"}
    layer |= {"ffn.router_logit_bias": "mlp.router.bias"}
    names = dict(common.names(layer))
    stored = "model.layers.{layer}.mlp.experts"
    both: dict[str, Any] = {"stacked": True, "fused": ("gate", "up"), "alternating": True}
    for part in ("gate", "up"):  # in MXFP4, or turned
        source = Source(f"{stored}.gate_up_proj", **both)
        names[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] = (replace(source, transposed=True), source)
        bias = Source(f"{stored}.gate_up_proj_bias", False, ("gate_bias", "up_bias"), alternating=True)
        names[f"layers.{{layer}}.ffn.experts.{part}_bias"] = (bias,)
    down = Source(f"{stored}.down_proj", True)
    names["layers.{layer}.ffn.experts.{expert}.down"] = (replace(down, transposed=True), down)
    names["layers.{layer}.ffn.experts.down_bias"] = (Source(f"{stored}.down_proj_bias"),)
    return names


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    if "rope_scaling" in config:
        config["rope_scaling"]["truncate"] = False  # as every gpt-oss has it


GGUF = Gguf(
    "gpt-oss",
    gguf.names(
        {
            "ffn_norm": "post_attention_norm",
            "attention.sink": ("attn_sinks.weight",),
            "ffn.router_logit_bias": ("ffn_gate_inp.bias",),
        }
    ),
    {
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
    unread=("feed_forward_length",),
    settle=_settle,
)
FAMILY = Family(
    "gpt-oss-20b, 120b: attention sinks, windows, MXFP4 experts",
    ("gpt_oss",),
    read,
    _names(),
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
)

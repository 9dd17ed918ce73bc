"""Llama 4: chunks but for every fourth layer, which has no rope; one expert of a weighted input, and a shared one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.rope import Temperature
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import shown

FULL, CHUNKED = common.FULL, "chunked_attention"
DEFAULTS = common.DEFAULTS | {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "intermediate_size_mlp": 16384,
    "interleave_moe_layer_step": 1,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["router_jitter_noise"])  # of training
    layers = common.layer_count(config)
    turned = common.rotated_layers(config)
    kinds = config.kinds("layer_types", layers, (FULL, CHUNKED)) or [CHUNKED if turns else FULL for turns in turned]
    with_rope = common.grouped_query_attention(
        config,
        biases=common.attention_biases(config),
        turn=lambda config, head_dim: rope(config, head_dim, interleaved=True),
    )
    tuned = config.flag("attn_temperature_tuning")
    tuning = Temperature(config.size("floor_scale"), config.number("attn_scale"))
    without = replace(with_rope, rope=None, temperature=tuning if tuned else None)
    with_rope = replace(with_rope, plain_norms="qk" if config.flag("use_qk_norm") else "")
    chunk = config.size("attention_chunk_size")
    attentions = [
        replace(with_rope if turns else without, chunk=chunk if kind == CHUNKED else None)
        for turns, kind in zip(turned, kinds, strict=True)
    ]
    expert = common.swiglu(config)
    router = Router("sigmoid", normalize=False)
    sparse = common.mixture(config, config.size("num_local_experts"), expert, router, expert)
    sparse = replace(sparse, weighted_inputs=True)
    dense = common.swiglu(config, "intermediate_size_mlp")
    routed = _sparse_layers(config)
    ffns = [sparse if i in routed else dense for i in range(layers)]
    return common.model(config, [decoder_layer(a, ffn) for a, ffn in zip(attentions, ffns, strict=True)])


def _sparse_layers(config: Config) -> list[int]:
    step, listed = config.size("interleave_moe_layer_step"), config.listing("moe_layers")
    if listed is None:
        return list(range(step - 1, common.layer_count(config), step))
    if wrong := [layer for layer in listed if type(layer) is not int]:
        raise config.refusal("moe_layers", f"has {shown(wrong[0])}, which is not the number of a layer")
    return listed


def _names() -> Names:
    layer = common.NORMS | common.GROUPED_QUERY | common.dense("feed_forward")
    layer |= common.dense("feed_forward.shared_expert", "ffn.shared") | {"ffn.router": "feed_forward.router.weight"}
    table = dict(common.names(layer))
    stored = "model.layers.{layer}.feed_forward.experts"
    for part in ("gate", "up"):
        both = Source(f"{stored}.gate_up_proj", True, ("gate", "up"), transposed=True)
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] = (both,)
    table["layers.{layer}.ffn.experts.{expert}.down"] = (Source(f"{stored}.down_proj", True, transposed=True),)
    table["head"] += (Source("language_model.lm_head.weight"),)
    return common.also_below(table, "model.", "language_model.model.")


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    """What llama.cpp has in its code (src/models/llama4.cpp) and not in keys: the defaults above, but for Maverick."""
    gguf.expect(file, "expert_gating_func", gguf.SIGMOID)
    gguf.expect(file, "expert_weights_norm", False)
    gguf.expect(file, "attention.sliding_window", DEFAULTS["attention_chunk_size"])
    gguf.expect(file, "attention.sliding_window_pattern", DEFAULTS["no_rope_layer_interval"])
    gguf.expect(file, "rope.freq_base_swa", config["rope_theta"])
    config["use_qk_norm"] = config["num_local_experts"] != _OF_MAVERICK


_OF_MAVERICK = 128
"""Experts of the one model that norms no heads."""
GGUF = Gguf(
    "llama4",
    gguf.NAMES,
    {
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    unread=("expert_gating_func", "expert_weights_norm", "attention.sliding_window",
            "attention.sliding_window_pattern", "rope.freq_base_swa"),
    settle=_settle,
    arranged=gguf.neighbours,
)  # fmt: skip
FAMILY = Family(
    "Llama 4 Scout, Maverick (text)",
    ("llama4", "llama4_text"),
    read,
    _names(),
    DEFAULTS,
    (r"(vision_model|multi_modal_projector)\..*", *common.IGNORED),
    (GGUF,),
)

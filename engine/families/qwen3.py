"""Qwen3, dense: llama's layout with an RMS norm on every query and key head."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(config: Config) -> ModelSpec:
    layers = common.layer_count(config)
    attention = common.grouped_query_attention(config, head_norm=True, biases=common.attention_biases(config))
    ffn = common.swiglu(config)
    config.expect("use_qk_norm", True)
    window = config.size("sliding_window", null=None) if config.flag("use_sliding_window") else None
    first = config.count("max_window_layers")
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING))
    if kinds is None:
        kinds = [SLIDING if window and i >= first else FULL for i in range(layers)]
    config.ignore(["sliding_window"])
    of_kind = {FULL: decoder_layer(attention, ffn), SLIDING: decoder_layer(replace(attention, window=window), ffn)}
    return common.model(config, [of_kind[kind] for kind in kinds])


NAMES = common.names(common.NORMS | common.GROUPED_QUERY | common.dense())
FAMILY = Family("Qwen3", ("qwen3",), read, NAMES, DEFAULTS, common.IGNORED, (Gguf("qwen3", gguf.NAMES),))

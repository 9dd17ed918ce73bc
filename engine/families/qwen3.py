"""Qwen3, dense: llama's layout with an RMS norm on every query and key head."""

from __future__ import annotations

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


def read(config: Config) -> ModelSpec:
    attention = common.grouped_query_attention(config, head_norm=True, biases=common.attention_biases(config))
    ffn = common.swiglu(config)
    config.expect("use_qk_norm", True)
    return common.model(config, [decoder_layer(one, ffn) for one in common.windowed(config, attention)])


NAMES = common.names(common.NORMS | common.GROUPED_QUERY | common.dense())
FAMILY = Family("Qwen3", ("qwen3",), read, NAMES, DEFAULTS, common.IGNORED, (Gguf("qwen3", gguf.NAMES),), mlx=True)

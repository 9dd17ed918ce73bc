"""Qwen2 and Qwen2.5, dense: llama's layout with biases on queries, keys and values."""

from __future__ import annotations

from numoe.engine.families import common, gguf, llama
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read(config: Config) -> ModelSpec:
    config.expect("attention_bias", True)
    attention = common.grouped_query_attention(config, biases="qkv")
    ffn = common.swiglu(config)
    return common.model(config, [decoder_layer(one, ffn) for one in common.windowed(config, attention)])


GGUF = Gguf("qwen2", gguf.NAMES, biases="qkv")
FAMILY = Family("Qwen2, Qwen2.5", ("qwen2",), read, llama.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

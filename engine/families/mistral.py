"""Mistral: llama's layers, in old releases with a window. Its GGUF files are of the architecture `llama`."""

from __future__ import annotations

from numoe.engine.families import common, llama
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "head_dim": None,
    "sliding_window": 4096,
}


def read(config: Config) -> ModelSpec:
    attention = common.grouped_query_attention(config, window=config.size("sliding_window", null=None))
    return common.model(config, [decoder_layer(attention, common.swiglu(config))] * common.layer_count(config))


FAMILY = Family("Mistral 7B, Nemo, Small 24B (text)", ("mistral",), read, llama.NAMES, DEFAULTS, common.IGNORED)

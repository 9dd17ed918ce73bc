"""OLMo 2: llama's blocks with their norms behind them, and norms over all queries and all keys."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["clip_qkv"])  # of OLMo 1
    attention = common.grouped_query_attention(config, biases=common.attention_biases(config))
    layer = common.after_blocks(replace(attention, whole_norm=True), common.swiglu(config))
    return common.model(config, [layer] * common.layer_count(config))


NAMES = common.names(common.NORMS_AFTER | common.GROUPED_QUERY | common.dense())
GGUF_NAMES = gguf.names(gguf.NORMS_AFTER)
FAMILY = Family("OLMo 2", ("olmo2",), read, NAMES, DEFAULTS, common.IGNORED, (Gguf("olmo2", GGUF_NAMES),))

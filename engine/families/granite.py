"""Granite 3, dense: llama's layout with multipliers."""

from __future__ import annotations

from numoe.engine.families import common, gguf, granitemoe, llama
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = llama.DEFAULTS | {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


def read(config: Config) -> ModelSpec:
    ffn = common.swiglu(config, bias=config.flag("mlp_bias"))
    layer = decoder_layer(granitemoe.attention(config), ffn)
    return granitemoe.model(config, [layer] * common.layer_count(config))


GGUF = Gguf(
    "granite",
    gguf.NAMES,
    granitemoe.MULTIPLIERS,
    dict.fromkeys(granitemoe.MULTIPLIERS, 1.0),
    settle=granitemoe.settle,
    arranged=gguf.neighbours,
)
FAMILY = Family("Granite 3, dense", ("granite",), read, llama.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

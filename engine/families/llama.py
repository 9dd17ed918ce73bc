"""Llama 2 and 3, and the many dense decoders of the same layout (SmolLM2, ...)."""

from __future__ import annotations

from typing import Any

from numoe.engine.config import Config
from numoe.engine.families import common
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec, decoder_layer


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    layer = decoder_layer(common.grouped_query_attention(config), common.swiglu(config))
    config.ignore(["rope_interleaved", "is_llama_config"])
    return common.model(config, [layer] * config.size("num_hidden_layers"))


FAMILY = Family(
    spec,
    common.names(common.NORMS | common.GROUPED_QUERY | common.dense()),
    ignored=(r".*\.rotary_emb\.inv_freq",),
)

"""Qwen3, dense: llama's layout with an RMS norm on every query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.config import Config
from numoe.engine.families import common
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    layers = config.size("num_hidden_layers")
    attention, ffn = common.grouped_query_attention(config, head_norm=True), common.swiglu(config)
    window = config.size("sliding_window", None) if config.take("use_sliding_window", False) else None
    first = config.take("max_window_layers", layers)
    types = config.take("layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise InputError(f'config.json: "layer_types" must name full or sliding attention for each of {layers} layers')
    config.ignore(["sliding_window"])
    full, sliding = decoder_layer(attention, ffn), decoder_layer(replace(attention, window=window), ffn)
    return common.model(config, [sliding if kind == "sliding_attention" else full for kind in types])


FAMILY = Family(spec, common.names(common.NORMS | common.GROUPED_QUERY | common.dense()))

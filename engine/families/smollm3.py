"""SmolLM3: llama's layers, of which every fourth knows no positions."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, gguf, llama
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec, decoder_layer

FULL, SLIDING = common.FULL, common.SLIDING
DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layer_interval": 4,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["max_window_layers"])
    turned, windows = common.rotated_layers(config), config.flag("use_sliding_window")
    windows = windows and config.values.get("sliding_window") is not None
    kinds = config.kinds("layer_types", len(turned), (FULL, SLIDING))
    if kinds is None:
        kinds = [SLIDING if windows and not turns else FULL for turns in turned]
    window = config.size("sliding_window", null=None)
    if SLIDING in kinds and window is None:
        raise config.refusal("sliding_window", "is null, and there are such layers")
    attention = common.grouped_query_attention(config, biases=common.attention_biases(config))
    ffn = common.swiglu(config, bias=config.flag("mlp_bias"))
    attentions = [
        replace(attention, rope=attention.rope if turns else None, window=window if kind == SLIDING else None)
        for turns, kind in zip(turned, kinds, strict=True)
    ]
    return common.model(config, [decoder_layer(one, ffn) for one in attentions])


GGUF = Gguf("smollm3", gguf.NAMES, given={"no_rope_layer_interval": 4}, arranged=gguf.neighbours)
FAMILY = Family("SmolLM3", ("smollm3",), read, llama.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

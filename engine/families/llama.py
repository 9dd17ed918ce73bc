"""Llama 2 and 3, and the many dense decoders of the same layout (SmolLM2, ...)."""

from __future__ import annotations

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def read(config: Config) -> ModelSpec:
    attention = common.grouped_query_attention(config, biases=common.attention_biases(config))
    layer = decoder_layer(attention, common.swiglu(config, bias=config.flag("mlp_bias")))
    config.expect("rope_interleaved", False)
    config.ignore(["is_llama_config"])
    return common.model(config, [layer] * common.layer_count(config))


NAMES = common.names(common.NORMS | common.GROUPED_QUERY | common.dense())
GGUF = Gguf("llama", gguf.NAMES, arranged=gguf.neighbours)
FAMILY = Family(
    "Llama 2 and 3, SmolLM2 and others of that layout",
    ("llama",),
    read,
    NAMES,
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
    mlx=True,
)

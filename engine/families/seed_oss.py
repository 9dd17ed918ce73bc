"""Seed-OSS: llama's layout with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from numoe.engine.families import common, gguf, llama
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 524288,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["residual_dropout"])  # of training
    biases = "qkv" * config.flag("attention_bias") + "o" * config.flag("attention_out_bias")
    attention = common.grouped_query_attention(config, biases=biases)
    layer = decoder_layer(attention, common.swiglu(config, bias=config.flag("mlp_bias")))
    return common.model(config, [layer] * common.layer_count(config))


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    config["attention_out_bias"] = "blk.0.attn_output.bias" in file.shapes


GGUF = Gguf("seed_oss", gguf.names({"ffn_norm": "post_attention_norm"}), biases="qkv", settle=_settle)
FAMILY = Family("Seed-OSS", ("seed_oss",), read, llama.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

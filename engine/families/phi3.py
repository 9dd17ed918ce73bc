"""Phi-3, Phi-3.5-mini, Phi-4: llama's layout with fused matrices; the long ones have LongRoPE."""

from __future__ import annotations

from functools import partial
from typing import Any

from numoe.engine.families import common, gguf, llama
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}


def read(config: Config) -> ModelSpec:
    config.expect("attention_bias", False)
    config.ignore(["original_max_position_embeddings"])  # of LongRoPE alone
    attention = common.grouped_query_attention(
        config, window=config.size("sliding_window", null=None), turn=partial(partial_rope, part=1.0)
    )
    return common.model(config, [decoder_layer(attention, common.swiglu(config))] * common.layer_count(config))


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    config["sliding_window"] = config["sliding_window"] or None
    gguf.rotate_first(config, file)
    gguf.long(config, file, "attention_factor")


GGUF = Gguf(
    "phi3",
    gguf.names(gguf.GATE_IN_UP),
    {"attention.sliding_window": "sliding_window"},
    optional={"attention.sliding_window": None},
    unread=("rope.scaling.attn_factor", "rope.dimension_count"),
    settle=_settle,
)
FAMILY = Family(
    "Phi-3 and Phi-3.5-mini, Phi-4 and Phi-4-mini (the long ones 4096 tokens)",
    ("phi3",),
    read,
    llama.NAMES,
    DEFAULTS,
    (r"rope_factors_(short|long)\.weight", *common.IGNORED),
    (GGUF,),
)

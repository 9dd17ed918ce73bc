"""Ministral 3 and Devstral 2: llama's layers with YaRN, and queries that grow with their positions.

The text part of `mistral3` is one of these, or Mistral's, which lacks the growth (Small 3.1 and 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, llama
from numoe.engine.families.config import Config, arranged_rope, nested, rope_block
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.rope import Temperature
from numoe.engine.layers.spec import ModelSpec, decoder_layer

# What rope_parameters stand for where they are left out.
ROPE = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
DEFAULTS = common.DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262144,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
}


def read(config: Config) -> ModelSpec:
    block, temperature = growing(config, ROPE)
    attention = common.grouped_query_attention(
        config,
        window=config.size("sliding_window", null=None),
        turn=lambda config, head_dim: arranged_rope(config, block, head_dim),
    )
    layer = decoder_layer(replace(attention, temperature=temperature), common.swiglu(config))
    return common.model(config, [layer] * common.layer_count(config))


def growing(config: Config, otherwise: Mapping[str, Any]) -> tuple[Config, Temperature | None]:
    """The table of rope settings, and how queries grow by it."""
    said = config.values.get("rope_parameters") or config.values.get("rope_scaling")
    block = rope_block(config) if said else nested(config, "rope_parameters", otherwise)
    config.ignore(["rope_theta"])
    block.ignore(["max_position_embeddings", "llama_4_scaling_beta"])
    if block.values.get("llama_4_scaling_beta") is None:
        return block, None
    every = block.size("original_max_position_embeddings")
    return block, Temperature(every, block.number("llama_4_scaling_beta"), ahead=0)


NAMES = common.also_below(common.also_below(llama.NAMES, "", "language_model."), "model.", "model.language_model.")
STRENGTH = "attention.temperature_scale"


def grow(config: dict[str, Any], file: GgufFile) -> None:
    """How queries grow, in the table of rope settings."""
    table = config.setdefault("rope_scaling", {"rope_type": "default", "rope_theta": config["rope_theta"]})
    table["llama_4_scaling_beta"] = file.keys.get(STRENGTH) or None


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    grow(config, file)
    if multiplier := file.keys.get(gguf.YARN_MULTIPLIER):
        config["rope_scaling"] |= dict.fromkeys(("mscale", "mscale_all_dim"), multiplier)


GGUF = Gguf(
    "mistral3",
    gguf.NAMES,
    unread=(gguf.YARN_MULTIPLIER, STRENGTH),
    settle=_settle,
    arranged=gguf.neighbours,
)
IGNORED = (r"(model\.)?(vision_tower|multi_modal_projector)\..*", *common.IGNORED)
FAMILY = Family(
    "Ministral 3, Devstral 2, Mistral Small 3.1 and 3.2 (text)",
    ("ministral3", "mistral3"),
    read,
    NAMES,
    DEFAULTS,
    IGNORED,
    (GGUF,),
)

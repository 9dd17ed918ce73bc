"""EXAONE 4: normed heads and norms behind blocks; with windows, whose layers alone know positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import shown

FULL, SLIDING = common.FULL, common.SLIDING
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 2048,
    "num_key_value_heads": 32,
    "head_dim": None,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def read(config: Config) -> ModelSpec:
    ffn = common.swiglu(config)
    return common.model(config, [common.after_blocks(one, ffn) for one in attentions(config)])


def attentions(config: Config) -> list[GroupedQueryAttention]:
    """Of each layer; full ones turn queries and keys only where there are no windows at all."""
    layers, window = common.layer_count(config), config.size("sliding_window", null=None)
    pattern = config.take("sliding_window_pattern", null=0)
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING)) or _repeated(config, layers, window and pattern)
    if SLIDING in kinds and window is None:
        raise config.refusal("sliding_window", "is null, and there are such layers")
    plain = common.grouped_query_attention(config, head_norm=True)
    of_kind = {FULL: replace(plain, rope=None if window else plain.rope), SLIDING: replace(plain, window=window)}
    return [of_kind[kind] for kind in kinds]


def _repeated(config: Config, layers: int, pattern: Any) -> list[str]:
    """One full layer in so many, or as letters tell: "LLLG"."""
    if not pattern:
        return [FULL] * layers
    if isinstance(pattern, str) and not set(pattern) - {"L", "G"}:
        return [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(layers)]
    if type(pattern) is not int or pattern < 1:
        raise config.refusal("sliding_window_pattern", f"is {shown(pattern)}, no number and no letters L and G")
    return [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]


def settle(config: dict[str, Any], file: GgufFile) -> None:
    """Which layers have windows; all have one rope."""
    theta, scaling = config["rope_theta"], config.get("rope_scaling")
    gguf.windows(config, file, every=4, full=3)
    config |= {"rope_theta": theta, "rope_parameters": None, "sliding_window": config["sliding_window"] or None}
    if scaling:
        config["rope_scaling"] = scaling


GGUF = Gguf(
    "exaone4",
    gguf.names(gguf.NORMS_AFTER),
    {"attention.sliding_window": "sliding_window"},
    optional={"attention.sliding_window": None},
    unread=gguf.WINDOW_KEYS,
    settle=settle,
    arranged=gguf.divided,
)
NAMES = common.names(common.NORMS_AFTER | common.GROUPED_QUERY | common.dense())
FAMILY = Family("EXAONE 4", ("exaone4",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

"""OLMo 3: OLMo 2 with windows in three layers of four, which know no YaRN."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from numoe.engine.families import common, gguf, olmo2
from numoe.engine.families.config import Config, rope_of_kind
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.spec import ModelSpec

FULL, SLIDING = common.FULL, common.SLIDING
THETA = 500000.0
DEFAULTS = olmo2.DEFAULTS | {"rope_theta": THETA, "sliding_window": 4096}


def read(config: Config) -> ModelSpec:
    config.ignore(["clip_qkv"])  # of OLMo 1
    layers, ffn = common.layer_count(config), common.swiglu(config)
    ropes = common.ropes_by_kind(config, {FULL: config.number("rope_theta"), SLIDING: THETA})
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING))
    kinds = kinds or [SLIDING if (i + 1) % 4 else FULL for i in range(layers)]
    of_kind = {
        kind: replace(
            common.grouped_query_attention(
                config,
                window=config.size("sliding_window") if kind == SLIDING else None,
                biases=common.attention_biases(config),
                turn=partial(rope_of_kind, tables=ropes, kind=kind),
            ),
            whole_norm=True,
        )
        for kind in dict.fromkeys(kinds)
    }
    config.ignore(["sliding_window"])  # where all layers are full
    return common.model(config, [common.after_blocks(of_kind[kind], ffn) for kind in kinds])


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    gguf.windows(config, file, every=4, full=3)


GGUF = Gguf(
    "olmo2",
    olmo2.GGUF_NAMES,
    {"attention.sliding_window": "sliding_window"},
    unread=gguf.WINDOW_KEYS,
    settle=_settle,
    marks=(lambda file: bool(file.keys.get("attention.sliding_window")),),
)
FAMILY = Family("OLMo 3", ("olmo3",), read, olmo2.NAMES, DEFAULTS, common.IGNORED, (GGUF,))

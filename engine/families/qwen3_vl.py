"""Qwen3-VL, dense: the text part is Qwen3."""

from __future__ import annotations

from numoe.engine.families import common, gguf, qwen3
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = qwen3.DEFAULTS | {"max_position_embeddings": 128000, "rope_theta": 500000.0}


def read(config: Config) -> ModelSpec:
    config.expect("use_sliding_window", False)
    return qwen3.read(config)


NAMES = common.also_below(qwen3.NAMES, "model.", "model.language_model.")
IGNORED = (r"model\.visual\..*", *common.IGNORED)
# Keys of what is done with images.
UNREAD = ("n_deepstack_layers", "rope.dimension_sections")
GGUF = Gguf("qwen3vl", gguf.NAMES, unread=UNREAD)
FAMILY = Family("Qwen3-VL, dense (text)", ("qwen3_vl", "qwen3_vl_text"), read, NAMES, DEFAULTS, IGNORED, (GGUF,))

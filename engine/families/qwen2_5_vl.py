"""Qwen2-VL and Qwen2.5-VL: the text part is Qwen2."""

from __future__ import annotations

from numoe.engine.families import common, llama, qwen2
from numoe.engine.families.names import Family

DEFAULTS = qwen2.DEFAULTS | {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1000000.0,
}
# Released files have no part in their names, and the towers beside.
NAMES = common.also_below(llama.NAMES, "model.", "model.language_model.")
IGNORED = (r"(model\.)?visual\..*", *common.IGNORED)
FAMILY = Family(
    "Qwen2-VL, Qwen2.5-VL (text)",
    ("qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text"),
    qwen2.read,
    NAMES,
    DEFAULTS,
    IGNORED,
)

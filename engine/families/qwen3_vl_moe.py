"""Qwen3-VL with experts: the text part is Qwen3-MoE, with experts that are stored turned."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, qwen3_moe, qwen3_vl
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = qwen3_moe.DEFAULTS | {
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}


def read(config: Config) -> ModelSpec:
    config.expect("norm_topk_prob", True)
    config.expect("use_sliding_window", False)
    return qwen3_moe.read(config)


# Released files have (experts, in, out), those that transformers 5 saves (experts, out, in).
NAMES = common.also_below(
    {
        ours: tuple(replace(one, transposed=True, either=True) if one.stacked else one for one in theirs)
        for ours, theirs in qwen3_moe.NAMES.items()
    },
    "model.",
    "model.language_model.",
)
GGUF = replace(qwen3_moe.GGUF, architecture="qwen3vlmoe", unread=qwen3_vl.UNREAD)
FAMILY = Family(
    "Qwen3-VL-30B-A3B, 235B-A22B (text)",
    ("qwen3_vl_moe", "qwen3_vl_moe_text"),
    read,
    NAMES,
    DEFAULTS,
    qwen3_vl.IGNORED,
    (GGUF,),
)

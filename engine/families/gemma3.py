"""Gemma 3: windows but for every sixth layer, GeGLU, norms before and after blocks, stored as what is added to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, rope_of_kind
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.block import Block, Layer
from numoe.engine.layers.ffn import SwiGLU
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.spec import ModelSpec

FULL, SLIDING = common.FULL, common.SLIDING
# What released files of several parts leave out, sizes included.
SIZES: dict[str, Any] = common.DEFAULTS | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "final_logit_softcapping": None,
}
DEFAULTS = SIZES | {
    "vocab_size": 262208,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
}


def read(config: Config) -> ModelSpec:
    thetas = {FULL: config.number("rope_theta"), SLIDING: config.number("rope_local_base_freq")}
    ropes = common.ropes_by_kind(config, thetas)
    mixers = {}
    for kind in (FULL, SLIDING):
        mixers[kind] = common.grouped_query_attention(
            config,
            window=config.size("sliding_window") if kind == SLIDING else None,
            head_norm=True,
            biases=common.attention_biases(config),
            turn=partial(rope_of_kind, tables=ropes, kind=kind),
        )
        mixers[kind] = replace(mixers[kind], scale=config.number("query_pre_attn_scalar") ** -0.5)
    ffn = Block("ffn", geglu(config), after=Norm())
    layers = [(Block("attention", mixers[kind], after=Norm()), ffn) for kind in kinds(config)]
    config.ignore(["_sliding_window_pattern"])
    return model(config, layers)


def kinds(config: Config, every: str = "sliding_window_pattern") -> list[str]:
    """What each layer's attention is; one in so many is full where `layer_types` is left out."""
    layers, period = common.layer_count(config), config.size(every)
    made = config.kinds("layer_types", layers, (FULL, SLIDING))
    return made or [SLIDING if (i + 1) % period else FULL for i in range(layers)]


def geglu(config: Config, width: str = "intermediate_size") -> SwiGLU:
    config.choice("hidden_activation", "gelu_pytorch_tanh")
    return SwiGLU(config.size(width), gelu=True)


def model(config: Config, layers: Sequence[Layer]) -> ModelSpec:
    """`common.model`, with embeddings times the root of their size, and bounded logits if the config says so."""
    capped = config.take("final_logit_softcapping", null=None) is not None
    cap = config.number("final_logit_softcapping") if capped else None
    spec = common.model(config, layers)
    return replace(spec, embedding_scale=spec.hidden**0.5, logit_cap=cap)


LAYER = common.GROUPED_QUERY | common.dense() | common.NORMS_AFTER
LAYER |= {"attention_norm": "input_layernorm.weight", "ffn_norm": "pre_feedforward_layernorm.weight"}
_PREFIXES = ("model.language_model.", "language_model.model.")
NAMES = common.made(common.names(LAYER), r"(.*[_.])?norm", lambda weight: weight + 1)
for _prefix in _PREFIXES:
    NAMES = common.also_below(NAMES, "model.", _prefix)


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    layers, hidden, heads = (config[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    windows = config["sliding_window_pattern"]
    if isinstance(windows, list):
        config |= {"layer_types": [SLIDING if one else FULL for one in windows], "sliding_window_pattern": 1}
    if config["sliding_window"] in (None, 0):  # one in one layer is full
        config |= {"sliding_window": 1, "sliding_window_pattern": 1, "layer_types": None}
    if layers == 62 and type(hidden) is type(heads) is int and heads > 0:  # 27B alone, as llama.cpp tells it
        config["query_pre_attn_scalar"] = hidden // heads
    else:
        config["query_pre_attn_scalar"] = config["head_dim"]


GGUF = Gguf(
    "gemma3",
    gguf.names(gguf.NORMS_AFTER),
    {
        "attention.sliding_window": "sliding_window",
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    optional={
        "attention.sliding_window": None,
        "attention.sliding_window_pattern": 6,
        "rope.freq_base_swa": 10000.0,
        "final_logit_softcapping": None,
    },
    settle=_settle,
)
IMAGES = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
FAMILY = Family("Gemma 3 (text)", ("gemma3", "gemma3_text"), read, NAMES, DEFAULTS, (IMAGES, *common.IGNORED), (GGUF,))

"""OLMoE: norms over all query heads together and all key heads, softmax-routed experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "clip_qkv": None,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}


def read(config: Config) -> ModelSpec:
    clipped = config.take("clip_qkv", null=None) is not None
    attention = replace(
        common.grouped_query_attention(config, biases=common.attention_biases(config)),
        whole_norm=True,
        clip=config.number("clip_qkv") if clipped else None,
    )
    moe = common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config),
        Router("softmax", normalize=config.flag("norm_topk_prob")),
    )
    return common.model(config, [decoder_layer(attention, moe)] * common.layer_count(config))


LAYER = common.NORMS | common.GROUPED_QUERY | {"ffn.router": "mlp.gate.weight"}
NAMES = common.names(LAYER, experts="mlp.experts")
GGUF = Gguf(
    "olmoe",
    gguf.NAMES,
    {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
    given={"norm_topk_prob": False},  # as llama.cpp's src/models/olmoe.cpp computes
)
FAMILY = Family("OLMoE-1B-7B", ("olmoe",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

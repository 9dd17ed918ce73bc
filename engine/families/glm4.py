"""GLM-4, dense: half of each head turned in pairs, biases on queries, keys and values, norms around blocks."""

from __future__ import annotations

from functools import partial

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.block import Block
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def read(config: Config) -> ModelSpec:
    attention = common.grouped_query_attention(
        config, biases="qkv" * config.flag("attention_bias"), turn=partial(partial_rope, interleaved=True)
    )
    layer = Block("attention", attention, after=Norm()), Block("ffn", common.swiglu(config), after=Norm())
    return common.model(config, [layer] * common.layer_count(config))


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense()
LAYER |= {
    "attention_post_norm": "post_self_attn_layernorm.weight",
    "ffn_post_norm": "post_mlp_layernorm.weight",
}
GGUF = Gguf(
    "glm4",
    gguf.names(gguf.NORMS_AFTER | gguf.GATE_IN_UP),
    biases="qkv",
    settle=gguf.rotate_first,
    unread=("rope.dimension_count",),
)
FAMILY = Family("GLM-4-9B, 32B, Z1", ("glm4",), read, common.names(LAYER), DEFAULTS, common.IGNORED, (GGUF,))

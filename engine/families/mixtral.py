"""Mixtral: llama's attention, eight or so experts a layer, the chosen ones weighted to sum to one."""

from __future__ import annotations

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, Source
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_key_value_heads": 8,
    "head_dim": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "sliding_window": None,
}


def read(config: Config) -> ModelSpec:
    config.ignore(["router_jitter_noise"])  # of training
    experts = config.size("num_local_experts", also="num_experts")
    ffn = common.mixture(config, experts, common.swiglu(config), Router("softmax"))
    window = config.size("sliding_window", null=None)
    layer = decoder_layer(common.grouped_query_attention(config, window=window), ffn)
    return common.model(config, [layer] * common.layer_count(config))


def _names() -> dict[str, tuple[Source, ...]]:
    moe = "model.layers.{layer}.block_sparse_moe"
    table = dict(common.names(common.NORMS | common.GROUPED_QUERY, experts="mlp.experts"))
    table["layers.{layer}.ffn.router"] = (Source(f"{moe}.gate.weight"), Source("model.layers.{layer}.mlp.gate.weight"))
    for part, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        one = Source(f"{moe}.experts.{{expert}}.{w}.weight")
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] += (one,)
    return table


GGUF = Gguf(
    "llama",
    gguf.NAMES,
    {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    arranged=gguf.neighbours,
    marks=(lambda file: bool(file.keys.get("expert_count")),),
)
NAMES = _names()
FAMILY = Family("Mixtral", ("mixtral",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

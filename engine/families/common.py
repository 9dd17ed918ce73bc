"""Config keys and tensor names that most Hugging Face decoders share."""

from __future__ import annotations

from typing import Any

from numoe.engine.config import Config, rope
from numoe.engine.families.names import Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Layer
from numoe.engine.layers.ffn import SwiGLU
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError


def grouped_query_attention(
    config: Config, *, window: int | None = None, head_norm: bool = False
) -> GroupedQueryAttention:
    """The attention of llama-like configs; `head_dim` defaults to hidden / heads."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise InputError(f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    head_dim = config.size("head_dim", hidden // heads)
    biases = "qkvo" if config.take("attention_bias", False) else ""
    return GroupedQueryAttention(heads, kv_heads, head_dim, rope(config, head_dim), window, head_norm, biases)


def swiglu(config: Config, width: str = "intermediate_size") -> SwiGLU:
    config.expect("hidden_act", "silu")
    return SwiGLU(config.size(width), bias=config.take("mlp_bias", False))


def model(config: Config, layers: list[Layer]) -> ModelSpec:
    """The keys every decoder has; refuses what nobody took."""
    spec = ModelSpec(
        config.values["model_type"],
        config.size("vocab_size"),
        config.size("hidden_size"),
        tuple(layers),
        config.size("max_position_embeddings"),
        config.number("rms_norm_eps", 1e-6),
        config.take("tie_word_embeddings", False),
    )
    config.done()
    return spec


TOP: dict[str, Any] = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
NORMS = {"attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"}
GROUPED_QUERY = {
    **{f"attention.{n}": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"attention.{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"attention.{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
}


def dense(prefix: str = "mlp", ours: str = "ffn") -> dict[str, str]:
    """Names of one SwiGLU."""
    names = {f"{ours}.{n}": f"{prefix}.{n}_proj.weight" for n in ("gate", "up", "down")}
    return names | {f"{ours}.{n}_bias": f"{prefix}.{n}_proj.bias" for n in ("gate", "up", "down")}


def names(layer: dict[str, str], experts: str | None = None) -> dict[str, tuple[Source, ...]]:
    """The full table. `experts`: prefix of the routed experts, which may be stored one by one or stacked."""
    table: dict[str, tuple[Source, ...]] = {ours: (Source(theirs),) for ours, theirs in TOP.items()}
    table |= {f"layers.{{layer}}.{a}": (Source(f"model.layers.{{layer}}.{b}"),) for a, b in layer.items()}
    if experts:
        stored = f"model.layers.{{layer}}.{experts}"
        for i, part in enumerate(("gate", "up", "down")):
            one = Source(f"{stored}.{{expert}}.{part}_proj.weight")
            fused = Source(f"{stored}.gate_up_proj", True, (i, 2)) if i < 2 else Source(f"{stored}.down_proj", True)
            table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] = (one, fused)
    return table

"""Config keys and tensor names that most Hugging Face decoders share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.engine.families.config import MOST_EXPERTS, MOST_LAYERS, Config, rope, rope_of_kind, short_context
from numoe.engine.families.names import Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Block, Kind, Layer
from numoe.engine.layers.ffn import FeedForward, SwiGLU
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.recurrent.mamba2 import Mamba2
from numoe.engine.layers.residual import PlainResidual, Residual
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError, shown

DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
"""What keys that are left out stand for in most families. Sizes that tensors must have cannot be left out."""


def grouped_query_attention(
    config: Config,
    *,
    window: int | None = None,
    head_norm: bool = False,
    biases: str = "",
    turn: Callable[[Config, int], Rope] = rope,
) -> GroupedQueryAttention:
    """The attention of llama-like configs; a `head_dim` of null is hidden / heads. `turn` reads the rope of a head."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", null=heads)
    check_heads(config, heads, kv_heads)
    head_dim = config.size("head_dim", null=None) or hidden // heads
    if head_dim < 1:
        raise InputError(f"{config.where}: a hidden size of {hidden} is too small for {heads} attention heads")
    return GroupedQueryAttention(heads, kv_heads, head_dim, turn(config, head_dim), window, head_norm, biases)


FULL, SLIDING = "full_attention", "sliding_attention"


def windowed(config: Config, attention: GroupedQueryAttention) -> list[GroupedQueryAttention]:
    """That of each layer: with a window where `layer_types` says so, or from layer `max_window_layers` on."""
    layers = layer_count(config)
    window = config.size("sliding_window", null=None) if config.flag("use_sliding_window") else None
    first = config.count("max_window_layers")
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING))
    if kinds is None:
        kinds = [SLIDING if window and i >= first else FULL for i in range(layers)]
    config.ignore(["sliding_window"])
    of_kind = {FULL: attention, SLIDING: replace(attention, window=window)}
    return [of_kind[kind] for kind in kinds]


def each_by_kind(
    config: Config, ropes: Mapping[str, Any], *, partial_rope: bool = False
) -> list[GroupedQueryAttention]:
    """Of each layer, full or with a window as `layer_types` says, with the rope of its kind and a norm of heads.

    ropes: the tables that stand for `rope_parameters` where those are left out.
    partial_rope: they may say that only the first channels of a head are rotated.
    """
    layers = layer_count(config)
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING)) or [FULL] * layers
    of_all = {key: config.take(key) for key in ("rope_theta", "partial_rotary_factor") if config.values.get(key)}
    tables = {
        kind: of_all | table if isinstance(table, dict) else table
        for kind, table in (config.table("rope_parameters") or ropes).items()
    }
    of_kind = {
        kind: grouped_query_attention(
            config,
            window=config.size("sliding_window") if kind == SLIDING else None,
            head_norm=True,
            biases=attention_biases(config),
            turn=partial(rope_of_kind, tables=tables, kind=kind, part=1.0 if partial_rope else None),
        )
        for kind in dict.fromkeys(kinds)
    }
    config.ignore(["sliding_window"])  # where all layers are full
    return [of_kind[kind] for kind in kinds]


def ropes_by_kind(config: Config, thetas: Mapping[str, float]) -> dict[str, Any]:
    """The tables of rope settings of `rope_of_kind`, by kind; the `rope_scaling` of older files is of full layers.

    thetas: of each kind, where its table does not say it.
    """
    tables, scaling = config.table("rope_parameters"), config.table("rope_scaling")
    if flat := set(tables) - thetas.keys():
        raise config.refusal("rope_parameters", f"must have a table for each kind of layers, not {shown(min(flat))}")
    ropes: dict[str, Any] = {}
    for kind, theta in thetas.items():
        table = tables.get(kind) or {}
        more = scaling if kind == FULL else {}
        ropes[kind] = {"rope_theta": theta} | table | more if isinstance(table, dict) else table
    return ropes


def after_blocks(attention: Kind, ffn: Kind) -> Layer:
    """A layer whose norms come after its blocks, and none before (OLMo 2)."""
    return tuple(
        Block(name, kind, before=None, after=Norm()) for name, kind in (("attention", attention), ("ffn", ffn))
    )


def sparse_layers(config: Config, dense: Sequence[int] = ()) -> list[bool]:
    """Which layers have experts: every `decoder_sparse_step`-th but for `mlp_only_layers`, or `dense` without those."""
    step, listed = config.size("decoder_sparse_step"), config.listing("mlp_only_layers")
    dense = dense if listed is None else listed
    if wrong := [layer for layer in dense if type(layer) is not int]:
        raise config.refusal("mlp_only_layers", f"has {shown(wrong[0])}, which is not the number of a layer")
    return [i not in dense and (i + 1) % step == 0 for i in range(layer_count(config))]


def feed_forwards(
    config: Config, moe: MixtureOfExperts, sparse: Sequence[bool]
) -> list[FeedForward | MixtureOfExperts]:
    """The mixture in the layers that have experts, and a dense one in the others."""
    dense = moe.expert if all(sparse) else swiglu(config)
    config.ignore(["intermediate_size"])  # of dense layers alone
    return [moe if one else dense for one in sparse]


def rotated_layers(config: Config) -> list[bool]:
    """In which layers positions turn queries and keys: all but every `no_rope_layer_interval`-th, or as listed."""
    layers, every = layer_count(config), config.size("no_rope_layer_interval")
    listed = config.listing("no_rope_layers") and config.kinds("no_rope_layers", layers, (0, 1), longer=True)
    return [one == 1 for one in listed] if listed else [(i + 1) % every != 0 for i in range(layers)]


def check_heads(config: Config, heads: int, kv_heads: int) -> None:
    """Each key/value head must serve as many of the others. Raises InputError."""
    if heads % kv_heads:
        raise InputError(f"{config.where}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")


def attention_biases(config: Config) -> str:
    """On all four projections or on none."""
    return "qkvo" if config.flag("attention_bias") else ""


def swiglu(config: Config, width: str = "intermediate_size", *, bias: bool = False) -> SwiGLU:
    config.choice("hidden_act", "silu")
    return SwiGLU(config.size(width), bias=bias)


def layer_count(config: Config) -> int:
    return config.size("num_hidden_layers", most=MOST_LAYERS)


def drafting_layers(config: Config) -> int:
    """Layers after the last one that only draft tokens (multi-token prediction) and are left alone."""
    return config.count("num_nextn_predict_layers", also="num_mtp_layers", null=0)


def mixture(
    config: Config,
    experts: int,
    expert: FeedForward,
    router: Router,
    shared: FeedForward | None = None,
    *,
    shared_gate: bool = False,
    expert_norm: bool = False,
    chosen: str = "num_experts_per_tok",
) -> MixtureOfExperts:
    """The choice of a few among experts, which must be possible."""
    layers, top_k = layer_count(config), config.size(chosen)
    if experts * layers > MOST_EXPERTS:
        raise InputError(f"{config.where}: {experts} experts in {layers} layers are more than any model has")
    if experts % router.groups or router.top_groups > router.groups:
        raise InputError(
            f'{config.where}: {experts} experts cannot form "n_group" {router.groups} equal groups of which '
            f'"topk_group" {router.top_groups} are taken'
        )
    group = experts // router.groups
    if top_k > group * router.top_groups or (router.groups > 1 and router.group_score == "top2" and group < 2):
        raise config.refusal(chosen, f"is {top_k}, more than the experts that can be chosen")
    return MixtureOfExperts(experts, top_k, expert, router, shared, shared_gate, expert_norm)


def mamba2(
    config: Config, keys: Mapping[str, str], head_dim: int, biases: str, step_limits: tuple[float, float]
) -> Mamba2:
    """`keys`: what sizes of it are called, heads, groups, states and kernel."""
    heads, groups, states, kernel = (config.size(keys[name]) for name in ("heads", "groups", "states", "kernel"))
    if heads % groups:
        raise config.refusal(keys["groups"], f"is {groups}, which does not divide {heads} heads")
    if kernel < 2:
        raise config.refusal(keys["kernel"], f"is {kernel}, and only 2 and more are supported")
    return Mamba2(heads, head_dim, groups, states, kernel, biases, step_limits)


def corrected_sigmoid(config: Config, *, null_groups: bool = False) -> Router:
    """DeepSeek-V3's router: sigmoid scores, chosen with a learned correction within the best groups.

    null_groups: files may say null where there are none.
    """
    groups, top_groups = (
        1 if null_groups and config.take(key, null=None) is None else config.size(key)
        for key in ("n_group", "topk_group")
    )
    return Router(
        "sigmoid",
        bias=True,
        groups=groups,
        top_groups=top_groups,
        group_score="top2",
        normalize=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor", null=1.0),
    )


def model(
    config: Config, layers: Sequence[Layer], residual: Residual | None = None, *, norm_eps: str = "rms_norm_eps"
) -> ModelSpec:
    """The keys every decoder has, of which one goes by several names; refuses what nobody took."""
    config.expect("is_causal", True)
    spec = ModelSpec(
        config.values["model_type"],
        config.size("vocab_size"),
        config.size("hidden_size"),
        tuple(layers),
        short_context(config),
        config.number(norm_eps),
        config.flag("tie_word_embeddings"),
        residual or PlainResidual(),
    )
    config.done()
    return spec


TOP: dict[str, str] = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
NORMS = {"attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"}
NORMS_AFTER = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}
GROUPED_QUERY = {
    **{f"attention.{n}": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"attention.{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"attention.{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
}
SUFFIXES = (("", "weight"), ("_bias", "bias"))
"""What ends a canonical name -> what ends a stored one."""
MAMBA2 = {
    "decay": "A_log", "skip": "D", "dt_bias": "dt_bias", "norm": "norm.weight",
    **{f"in{ours}": f"in_proj.{theirs}" for ours, theirs in SUFFIXES},
    **{f"conv{ours}": f"conv1d.{theirs}" for ours, theirs in SUFFIXES},
    **{f"o{ours}": f"out_proj.{theirs}" for ours, theirs in SUFFIXES},
}  # fmt: skip
# Stored name below a layer -> the tensors whose rows it holds one after another.
FUSED = {
    "self_attn.qkv_proj.weight": ("attention.q", "attention.k", "attention.v"),
    "self_attn.qkv_proj.bias": ("attention.q_bias", "attention.k_bias", "attention.v_bias"),
    "self_attn.W_pack.weight": ("attention.q", "attention.k", "attention.v"),
    "mlp.gate_up_proj.weight": ("ffn.gate", "ffn.up"),
    "mlp.gate_up_proj.bias": ("ffn.gate_bias", "ffn.up_bias"),
    "mlp.shared_experts.gate_up_proj.weight": ("ffn.shared.gate", "ffn.shared.up"),
}
IGNORED = (r"(.*\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)", r".*\.masked_bias")
"""Tables that older versions of transformers saved and that follow from the config."""


def dense(prefix: str = "mlp", ours: str = "ffn") -> dict[str, str]:
    """Names of one SwiGLU."""
    names = {f"{ours}.{n}": f"{prefix}.{n}_proj.weight" for n in ("gate", "up", "down")}
    return names | {f"{ours}.{n}_bias": f"{prefix}.{n}_proj.bias" for n in ("gate", "up", "down")}


def names(layer: dict[str, str], experts: str | None = None) -> dict[str, tuple[Source, ...]]:
    """The full table. `experts`: prefix of the routed experts, which may be stored one by one or stacked."""
    table: dict[str, tuple[Source, ...]] = {ours: (Source(theirs),) for ours, theirs in TOP.items()}
    table |= {f"layers.{{layer}}.{a}": (Source(f"model.layers.{{layer}}.{b}"),) for a, b in layer.items()}
    for stored, parts in FUSED.items():
        for part in parts:
            if part in layer:
                source = Source(f"model.layers.{{layer}}.{stored}", fused=tuple(p.rpartition(".")[2] for p in parts))
                table[f"layers.{{layer}}.{part}"] += (source,)
    if experts:
        stored = f"model.layers.{{layer}}.{experts}"
        for part in ("gate", "up", "down"):
            one = Source(f"{stored}.{{expert}}.{part}_proj.weight")
            both = Source(f"{stored}.gate_up_proj", True, ("gate", "up"))
            stack = Source(f"{stored}.down_proj", True) if part == "down" else both
            table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] = (one, stack)
    return table


def inside(names: Names, places: Mapping[str, str]) -> dict[str, tuple[Source, ...]]:
    """The same names, where what begins as one of these below a layer begins in another way there; no others."""
    table: dict[str, tuple[Source, ...]] = {}
    for ours, sources in names.items():
        place = next((p for p in places if ours.startswith(f"layers.{{layer}}.{p}")), None)
        if place is not None:
            table[ours.replace(place, places[place], 1)] = sources
    return table


def made(names: Names, pattern: str, make: Callable[[NDArray[Any]], NDArray[Any]]) -> Names:
    """The same names, where arrays whose canonical name matches are made of what is stored."""
    return {
        ours: tuple(replace(one, made=make) for one in theirs) if re.fullmatch(pattern, ours) else theirs
        for ours, theirs in names.items()
    }


def negative_exponential(values: NDArray[Any]) -> NDArray[Any]:
    """-exp(values): what a state space's A_log stands for."""
    return -np.exp(values)


def also_called(names: Names, parts: Mapping[str, str]) -> Names:
    """The same names, where these parts of what is stored may all be called otherwise."""

    def other(name: str) -> str:
        for theirs, another in parts.items():
            name = name.replace(theirs, another)
        return name

    return {
        ours: theirs + tuple(replace(one, name=other(one.name)) for one in theirs if other(one.name) != one.name)
        for ours, theirs in names.items()
    }


def also_below(names: Names, prefix: str, other: str) -> Names:
    """The same names, where what is stored below a prefix may be below another one."""

    def moved(sources: tuple[Source, ...]) -> tuple[Source, ...]:
        stored = (one for one in sources if one.name.startswith(prefix))
        return tuple(replace(one, name=other + one.name.removeprefix(prefix)) for one in stored)

    return {ours: theirs + moved(theirs) for ours, theirs in names.items()}

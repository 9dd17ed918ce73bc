"""Granite 4: Mamba-2 and attention, mostly without rope, experts with a shared one or that alone, multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

from numoe.engine.families import common, gguf, granitemoe
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Kind
from numoe.engine.layers.recurrent.mamba2 import Mamba2
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError, shown

_MAMBA, _FULL = ("linear_attention", "mamba"), ("full_attention", "attention")
_SIZES = {"heads": "mamba_n_heads", "groups": "mamba_n_groups", "states": "mamba_d_state", "kernel": "mamba_d_conv"}
DEFAULTS = granitemoe.DEFAULTS | {
    "shared_intermediate_size": 1024,
    "position_embedding_type": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


def read(config: Config) -> ModelSpec:
    config.expect("normalization_function", "rmsnorm")
    config.ignore(("init_method",))
    layers = common.layer_count(config)
    kinds = config.kinds("layers_block_type", layers, _MAMBA + _FULL)
    kinds = config.kinds("layer_types", layers, _MAMBA + _FULL) or kinds or [_MAMBA[0]] * layers
    makers = dict.fromkeys(_MAMBA, _mamba) | dict.fromkeys(_FULL, _attention)
    mixers = {kind: makers[kind](config) for kind in dict.fromkeys(kinds)}
    config.ignore(("mamba_*", "time_step_*", "num_*_heads", "attention_multiplier", "rope_*", "position_*"))
    ffn = _feed_forward(config)
    return granitemoe.model(config, [decoder_layer(mixers[kind], ffn) for kind in kinds])


def _attention(config: Config) -> GroupedQueryAttention:
    attention = granitemoe.attention(config)
    kind = config.take("position_embedding_type", null="nope")
    if kind not in ("rope", "nope"):
        raise config.refusal("position_embedding_type", f"is {shown(kind)}, and only 'rope' and 'nope' are supported")
    return attention if kind == "rope" else replace(attention, rope=None)


def _mamba(config: Config) -> Mamba2:
    heads, inner = config.size("mamba_n_heads"), config.size("mamba_expand") * config.size("hidden_size")
    head_dim = inner // heads if config.take("mamba_d_head") == "auto" else config.size("mamba_d_head")
    if heads * head_dim != inner:
        raise config.refusal("mamba_n_heads", f"is {heads}, which {inner} channels of heads of {head_dim} do not make")
    biases = ("io" if config.flag("mamba_proj_bias") else "") + ("c" if config.flag("mamba_conv_bias") else "")
    return common.mamba2(config, _SIZES, head_dim, biases, _step_limits(config))


def _step_limits(config: Config) -> tuple[float, float]:
    """`time_step_limit`, where infinity is spelt in several ways."""
    limits = config.listing("time_step_limit") or [0.0, inf]
    numbers = [float(one["__float__"]) if isinstance(one, dict) and one == _INFINITY else one for one in limits]
    if len(numbers) != 2 or not all(type(one) in (int, float) for one in numbers) or not 0 <= numbers[0] <= numbers[1]:
        raise config.refusal("time_step_limit", f"must be two numbers from 0 on, not {shown(limits)}")
    return float(numbers[0]), float(numbers[1])


_INFINITY: Mapping[str, Any] = {"__float__": "Infinity"}
"""What transformers writes."""


def _feed_forward(config: Config) -> Kind:
    if config.count("num_local_experts"):
        config.size("shared_intermediate_size")
        return granitemoe.mixture(config)
    config.ignore(("intermediate_size", "num_experts_per_tok"))
    return common.swiglu(config, "shared_intermediate_size")


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    granitemoe.settle(config, file)
    config["layer_types"] = gguf.layer_kinds(config, file, {"attn_output": _FULL[0]}, _MAMBA[0])
    config["num_key_value_heads"] = gguf.largest(config["num_key_value_heads"])
    config["position_embedding_type"] = "rope" if file.keys.get("rope.scaling.finetuned", True) else "nope"
    config["shared_intermediate_size"] = config["shared_intermediate_size"] or config["intermediate_size"]
    inner, heads, hidden = (config[key] for key in ("mamba_expand", "mamba_n_heads", "hidden_size"))
    if any(type(size) is not int or size < 1 for size in (inner, heads, hidden)):
        raise InputError(f"{file.path}: a size of its heads is missing or no positive number; take another file")
    config["mamba_d_head"], config["mamba_expand"] = inner // heads, inner // hidden
    for key, name in (("mamba_proj_bias", "ssm_in.bias"), ("mamba_conv_bias", "ssm_conv1d.bias")):
        config[key] = any(one.endswith(name) for one in file.shapes)


_SSM = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.inner_size": "mamba_expand",
}
GGUF = Gguf(
    "granitehybrid",
    gguf.names(gguf.MAMBA2),
    granitemoe.GGUF_KEYS | _SSM,
    granitemoe.GGUF_OPTIONAL | {"expert_count": 0, "expert_used_count": 0},
    settle=_settle,
    arranged=gguf.neighbours,
)
_MIXER = {f"attention.{ours}": f"mamba.{theirs}" for ours, theirs in common.MAMBA2.items()}
FAMILY = Family(
    "Granite 4 (H-Tiny 7B-A1B, H-Small 32B-A9B, Micro): Mamba-2 and attention",
    ("granitemoehybrid",),
    read,
    common.made(granitemoe.names(_MIXER), r".*\.decay", common.negative_exponential),
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
)

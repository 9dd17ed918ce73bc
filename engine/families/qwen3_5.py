"""Qwen3.5 and 3.6, dense and with experts: three layers of gated DeltaNet to one of gated attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Kind
from numoe.engine.layers.recurrent.deltanet import GatedDeltaNet
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError

LINEAR, FULL = "linear_attention", "full_attention"
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def read(config: Config) -> ModelSpec:
    config.expect("attn_output_gate", True)
    config.expect("mamba_ssm_dtype", "float32")
    config.ignore(["mtp_*"])  # a head that only drafts tokens
    layers = common.layer_count(config)
    every = config.size("full_attention_interval")
    kinds = config.kinds("layer_types", layers, (LINEAR, FULL))
    if kinds is None:
        kinds = [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    mixers = {LINEAR: _delta_net(config), FULL: _attention(config)}
    ffn = _feed_forward(config)
    return common.model(config, [decoder_layer(mixers[kind], ffn) for kind in kinds])


def _attention(config: Config) -> GroupedQueryAttention:
    heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    common.check_heads(config, heads, kv_heads)
    head_dim = config.size("head_dim")
    biases = common.attention_biases(config)
    return GroupedQueryAttention(
        heads, kv_heads, head_dim, partial_rope(config, head_dim), None, True, biases, gate=True
    )


def _delta_net(config: Config) -> GatedDeltaNet:
    key_heads, value_heads = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
    if value_heads % key_heads:
        raise config.refusal("linear_num_value_heads", f"{value_heads} is no multiple of {key_heads} key heads")
    kernel = config.size("linear_conv_kernel_dim")
    if kernel < 2:
        raise config.refusal("linear_conv_kernel_dim", f"is {kernel}, and only 2 and more are supported")
    dims = config.size("linear_key_head_dim"), config.size("linear_value_head_dim")
    return replace(GatedDeltaNet(key_heads, value_heads, *dims, kernel), **config.arranged.get("deltanet", {}))


def _feed_forward(config: Config) -> Kind:
    if not str(config.values["model_type"]).startswith("qwen3_5_moe"):
        return common.swiglu(config)
    config.ignore(["intermediate_size"])
    return common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        Router("softmax"),
        common.swiglu(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _names() -> Names:
    linear = {
        "qkv": "in_proj_qkv.weight", "gate": "in_proj_z.weight", "b": "in_proj_b.weight", "a": "in_proj_a.weight",
        "conv": "conv1d.weight", "decay": "A_log", "dt_bias": "dt_bias", "norm": "norm.weight",
    }  # fmt: skip
    layer = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_expert", "ffn.shared")
    layer |= {f"attention.{ours}": f"linear_attn.{theirs}" for ours, theirs in linear.items()}
    layer |= {"ffn.router": "mlp.gate.weight", "ffn.shared_gate": "mlp.shared_expert_gate.weight"}
    table = dict(common.names(layer, experts="mlp.experts"))
    table["layers.{layer}.attention.o"] += (Source("model.layers.{layer}.linear_attn.out_proj.weight"),)
    one_more = r"norm|layers\.\{layer\}\.(attention_norm|ffn_norm|attention\.[qk]_norm)"
    names = common.made(table, one_more, lambda weight: weight + 1)  # stored as what is added to one
    names = common.made(names, r".*\.decay", common.negative_exponential)
    return common.also_below(names, "model.", "model.language_model.")


_GGUF_NAMES = gguf.names(
    {
        "ffn_norm": "post_attention_norm", "ffn.shared_gate": (Source("ffn_gate_inp_shexp.weight", flat=True),),
        "attention.qkv": "attn_qkv", "attention.gate": "attn_gate", "attention.b": "ssm_beta",
        "attention.a": "ssm_alpha", "attention.conv": "ssm_conv1d", "attention.norm": "ssm_norm",
        "attention.decay": ("ssm_a",), "attention.dt_bias": ("ssm_dt.bias", "ssm_dt"),
        "attention.o": ("attn_output.weight", "ssm_out.weight"),
    }
)  # fmt: skip
_GGUF_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": "linear_value_head_dim",
    "full_attention_interval": "full_attention_interval",
}
_GGUF_EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    recurrent = file.keys.get("attention.recurrent_layers")
    if isinstance(recurrent, list):  # layers that only draft tokens may follow
        kinds = [LINEAR if one else FULL for one in recurrent]
        config["layer_types"] = kinds[: config["num_hidden_layers"]]
    heads, inner = config["linear_num_value_heads"], config["linear_value_head_dim"]
    if any(type(size) is not int or size < 1 for size in (heads, inner)):
        raise InputError(f"{file.path}: a size of its heads is missing or no positive number; take another file")
    config["linear_value_head_dim"] = inner // heads
    gguf.rotate_first(config, file)


def _gguf(architecture: str, model_type: str, keys: dict[str, str]) -> Gguf:
    return Gguf(
        architecture,
        _GGUF_NAMES,
        _GGUF_KEYS | keys,
        optional={"full_attention_interval": 4, "feed_forward_length": None},
        given={"model_type": model_type},
        unread=("attention.recurrent_layers", "rope.dimension_count", "rope.dimension_sections"),
        settle=_settle,
        arranged=lambda file: {"deltanet": {"tiled": True}},
    )


FAMILY = Family(
    "Qwen3.5 and 3.6, dense and with experts (text): gated DeltaNet and gated attention",
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    read,
    _names(),
    DEFAULTS,
    (r"mtp\..*", r"model\.visual\..*", *common.IGNORED),
    (_gguf("qwen35", "qwen3_5", {}), _gguf("qwen35moe", "qwen3_5_moe", _GGUF_EXPERT_KEYS)),
)

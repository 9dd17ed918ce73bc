"""What Qwen3-Next and Qwen3.5 share: layers of gated DeltaNet and layers of gated attention, and their GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import NEXT, GgufFile, Mtp, Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Kind
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.recurrent.deltanet import GatedDeltaNet
from numoe.engine.layers.router import Router
from numoe.quant.errors import InputError

LINEAR = "linear_attention"
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
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def mixers(config: Config, joined: tuple[str, ...] = ()) -> list[Kind]:
    """That of each layer; `joined` as `GatedDeltaNet` has it."""
    return each_by_kind(config, {LINEAR: delta_net(config, joined), common.FULL: attention(config)})


def each_by_kind(config: Config, of_kind: Mapping[str, Kind]) -> list[Kind]:
    """That of each layer, by the kinds that `layer_types` may name; without it every few layers one is full."""
    layers, every = common.layer_count(config), config.size("full_attention_interval")
    kinds = config.kinds("layer_types", layers, of_kind)
    if kinds is None:
        kinds = [LINEAR if (i + 1) % every else common.FULL for i in range(layers)]
    return [of_kind[kind] for kind in kinds]


def mixture(config: Config, *, normalize: bool = True) -> MixtureOfExperts:
    """Experts chosen by softmax, and a gated shared one."""
    return common.mixture(
        config,
        config.size("num_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        Router("softmax", normalize=normalize),
        common.swiglu(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )


def attention(config: Config) -> GroupedQueryAttention:
    heads, kv_heads = config.size("num_attention_heads"), config.size("num_key_value_heads")
    common.check_heads(config, heads, kv_heads)
    head_dim = config.size("head_dim")
    biases = common.attention_biases(config)
    return GroupedQueryAttention(
        heads, kv_heads, head_dim, partial_rope(config, head_dim), None, True, biases, gate=True
    )


def delta_net(config: Config, joined: tuple[str, ...] = ()) -> GatedDeltaNet:
    key_heads, value_heads = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
    if value_heads % key_heads:
        raise config.refusal("linear_num_value_heads", f"{value_heads} is no multiple of {key_heads} key heads")
    kernel = config.size("linear_conv_kernel_dim")
    if kernel < 2:
        raise config.refusal("linear_conv_kernel_dim", f"is {kernel}, and only 2 and more are supported")
    dims = config.size("linear_key_head_dim"), config.size("linear_value_head_dim")
    made = GatedDeltaNet(key_heads, value_heads, *dims, kernel, joined=joined)
    return replace(made, **config.arranged.get("deltanet", {}))


def names(projections: Mapping[str, str]) -> Names:
    """`projections`: canonical name -> what checkpoints call the gated DeltaNet's."""
    linear = {
        **{ours: f"{theirs}.weight" for ours, theirs in projections.items()},
        **{"conv": "conv1d.weight", "decay": "A_log", "dt_bias": "dt_bias", "norm": "norm.weight"},
    }
    layer = common.NORMS | common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_expert", "ffn.shared")
    layer |= {f"attention.{ours}": f"linear_attn.{theirs}" for ours, theirs in linear.items()}
    layer |= {"ffn.router": "mlp.gate.weight", "ffn.shared_gate": "mlp.shared_expert_gate.weight"}
    table = dict(common.names(layer, experts="mlp.experts"))
    table["layers.{layer}.attention.o"] += (Source("model.layers.{layer}.linear_attn.out_proj.weight"),)
    one_more = r"norm|layers\.\{layer\}\.(attention_norm|ffn_norm|attention\.[qk]_norm)"
    table = dict(common.made(table, one_more, lambda weight: weight + 1))  # stored as what is added to one
    return common.made(table, r".*\.decay", common.negative_exponential)


def gguf_names(projections: Mapping[str, str]) -> Names:
    """The same of GGUF files."""
    return gguf.names(
        {f"attention.{ours}": theirs for ours, theirs in projections.items()}
        | {
            "ffn_norm": "post_attention_norm", "ffn.shared_gate": (Source("ffn_gate_inp_shexp.weight", flat=True),),
            "attention.qkv": "attn_qkv", "attention.gate": "attn_gate", "attention.conv": "ssm_conv1d",
            "attention.norm": "ssm_norm", "attention.decay": ("ssm_a",), "attention.dt_bias": ("ssm_dt.bias", "ssm_dt"),
            "attention.o": ("attn_output.weight", "ssm_out.weight"),
        }
    )  # fmt: skip


def _own(name: str, ours: str) -> tuple[Source, ...]:
    """Of the head that predicts further: in GGUF files its norms have the one added."""
    stored = Source(f"mtp.{name}.weight")
    return (stored if ours == "eh_proj" else replace(stored, made=lambda weight: weight + 1), *NEXT[ours])


MTP = Mtp(
    {
        "eh_proj": _own("fc", "eh_proj"),
        "enorm": _own("pre_fc_norm_embedding", "enorm"),
        "hnorm": _own("pre_fc_norm_hidden", "hnorm"),
        "norm": _own("norm", "norm"),
    },
    ("model.layers.{layer}.", "mtp.layers.0."),
)


GGUF_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": "linear_value_head_dim",
    "full_attention_interval": "full_attention_interval",
}
GGUF_OPTIONAL = {"full_attention_interval": 4, "feed_forward_length": None}
GGUF_UNREAD = ("attention.recurrent_layers", "rope.dimension_count", "rope.dimension_sections")


def settle(config: dict[str, Any], file: GgufFile) -> None:
    """What a GGUF file says of its layers and of the sizes of their heads."""
    recurrent = file.keys.get("attention.recurrent_layers")
    if isinstance(recurrent, list):  # layers that only draft tokens may follow
        kinds = [LINEAR if one else common.FULL for one in recurrent]
        config["layer_types"] = kinds[: config["num_hidden_layers"]]
    heads, inner = config["linear_num_value_heads"], config["linear_value_head_dim"]
    if any(type(size) is not int or size < 1 for size in (heads, inner)):
        raise InputError(f"{file.path}: a size of its heads is missing or no positive number; take another file")
    config["linear_value_head_dim"] = inner // heads
    gguf.rotate_first(config, file)

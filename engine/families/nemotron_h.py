"""Nemotron-H and Nemotron 3: Mamba-2, attention without rope, or a feed-forward with squared ReLU, one a layer."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Block
from numoe.engine.layers.ffn import SquaredReLU
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.recurrent.mamba2 import Mamba2
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError

# Where a file says what its layers are, the last one by letters; and their names.
_LISTS = ("layers_block_type", "layer_types", "hybrid_override_pattern")
_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_NAMES = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}
DEFAULTS = common.DEFAULTS | {
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "time_step_min": 0.001,
    "use_conv_bias": True,
    "use_bias": False,
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
# Restated by other keys, of training, of one program, or of layers that only draft tokens.
_UNREAD = (
    "chunk_size", "expand", "intermediate_size", "mamba_ssm_cache_dtype", "moe_*", "mtp_*", "n_shared_experts",
    "norm_eps", "num_logits_to_keep", "num_nextn_predict_layers", "partial_rotary_factor", "rescale_prenorm_residual",
    "residual_in_fp32", "rms_norm_eps", "rope_*", "time_step_*", "use_mamba_kernels",
)  # fmt: skip


def read(config: Config) -> ModelSpec:
    config = _with_layers(config)
    for key in ("attention_bias", "mamba_proj_bias", "tie_word_embeddings"):
        config.expect(key, False)
    config.expect("sliding_window", None)
    kinds = config.kinds(_LISTS[0], common.layer_count(config), (*_NAMES, *_NAMES.values()))
    if kinds is None:
        raise config.refusal(_LISTS[0], "is missing; check the file")
    kinds = [_NAMES.get(kind, kind) for kind in kinds]
    makers = {"mamba": _mamba, "attention": _attention, "mlp": _dense, "moe": _mixture}
    made = {kind: makers[kind](config) for kind in dict.fromkeys(kinds)}
    config.ignore(_UNREAD)
    names = {kind: "attention" if kind in ("mamba", "attention") else "ffn" for kind in made}
    return common.model(config, [(Block(names[kind], made[kind]),) for kind in kinds], norm_eps="layer_norm_epsilon")


def _with_layers(config: Config) -> Config:
    """The same with `layers_block_type` and a number of layers: older files have letters, newer ones no number."""
    key = next((one for one in _LISTS if config.values.get(one) is not None), _LISTS[0])
    kinds = config.values.get(key)
    if isinstance(kinds, str):
        kinds = [_LETTERS.get(letter, letter) for letter in kinds]
    values = {one: value for one, value in config.values.items() if one not in _LISTS}
    values = {"num_hidden_layers": len(kinds) if isinstance(kinds, list) else None} | values | {_LISTS[0]: kinds}
    return Config(
        values,
        config.defaults,
        config.where,
        lambda one: config.spelt(key if one == _LISTS[0] else one),
        config.arranged,
    )


def _mamba(config: Config) -> Mamba2:
    config.choice("mamba_hidden_act", "silu")
    return common.mamba2(
        config,
        {"heads": "mamba_num_heads", "groups": "n_groups", "states": "ssm_state_size", "kernel": "conv_kernel"},
        config.size("mamba_head_dim"),
        ("io" if config.flag("use_bias") else "") + ("c" if config.flag("use_conv_bias") else ""),
        (config.number("time_step_min"), inf),
    )


def _attention(config: Config) -> GroupedQueryAttention:
    heads, head_dim = config.size("num_attention_heads"), config.size("head_dim")
    config.expect("attention_head_dim", head_dim)
    kv_heads = config.size("num_key_value_heads", null=heads)
    common.check_heads(config, heads, kv_heads)
    return GroupedQueryAttention(heads, kv_heads, head_dim, None)


def _dense(config: Config, width: str = "intermediate_size") -> SquaredReLU:
    config.choice("mlp_hidden_act", "relu2")
    return SquaredReLU(config.size(width), config.flag("mlp_bias"))


def _mixture(config: Config) -> MixtureOfExperts:
    router = common.corrected_sigmoid(config)
    latent, shared = config.size("moe_latent_size", null=None), _dense(config, "moe_shared_expert_intermediate_size")
    if latent is not None and shared.bias:
        raise config.refusal(
            "mlp_bias", "is true, and projections to latent channels are only supported without biases"
        )
    experts = config.size("n_routed_experts", also="num_local_experts")
    expert = SquaredReLU(config.size("moe_intermediate_size"))
    return replace(common.mixture(config, experts, expert, router, shared), latent=latent)


def _names() -> Names:
    layer = {f"{block}_norm": "norm.weight" for block in ("attention", "ffn")}
    layer |= {f"attention.{ours}": f"mixer.{theirs}" for ours, theirs in common.MAMBA2.items()}
    layer |= {f"attention.{n}": f"mixer.{n}_proj.weight" for n in "qkv"}
    for ours, theirs in (("ffn", "mixer"), ("ffn.shared", "mixer.shared_experts")):
        layer |= {f"{ours}.{n}{s}": f"{theirs}.{n}_proj.{w}" for n in ("up", "down") for s, w in common.SUFFIXES}
    layer |= {"ffn.router": "mixer.gate.weight", "ffn.router_bias": "mixer.gate.e_score_correction_bias"}
    layer |= {"ffn.latent": "mixer.fc1_latent_proj.weight", "ffn.hidden": "mixer.fc2_latent_proj.weight"}
    table = dict(common.names(layer, experts="mixer.experts"))
    table["layers.{layer}.attention.o"] += (Source("model.layers.{layer}.mixer.o_proj.weight"),)
    stacked = Source("model.layers.{layer}.mixer.experts.up_proj", stacked=True)
    table["layers.{layer}.ffn.experts.{expert}.up"] += (stacked,)
    table |= {"embed": (Source("model.embeddings.weight"),), "norm": (Source("model.norm_f.weight"),)}
    return common.also_below(common.made(table, r".*\.decay", common.negative_exponential), "model.", "backbone.")


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    parts = {"ffn_gate_inp": "moe", "ffn_up": "mlp", "attn_output": "attention"}
    kinds = config[_LISTS[0]] = gguf.layer_kinds(config, file, parts, "mamba")
    if config["layer_norm_epsilon"] is None:
        config["layer_norm_epsilon"] = file.keys.get("attention.layer_norm_epsilon")
    config["num_key_value_heads"] = gguf.largest(config["num_key_value_heads"])
    dense = kinds.index("mlp") if "mlp" in kinds else None
    config["intermediate_size"] = None if dense is None else file.shapes[f"blk.{dense}.ffn_up.weight"][0]
    inner, heads = config["mamba_head_dim"], config["mamba_num_heads"]
    if any(type(size) is not int or size < 1 for size in (inner, heads)):
        raise InputError(f"{file.path}: a size of its heads is missing or no positive number; take another file")
    config["mamba_head_dim"] = inner // heads
    biases = {"use_bias": "ssm_in", "use_conv_bias": "ssm_conv1d", "mlp_bias": "ffn_up(_shexp)?"}
    for key, name in biases.items():
        config[key] = any(re.fullmatch(rf"blk\.\d+\.{name}\.bias", one) for one in file.shapes)


_KEYS = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
    "ssm.inner_size": "mamba_head_dim",
}
_EXPERT_KEYS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "moe_latent_size": "moe_latent_size",
}
_OPTIONAL = {
    "attention.layer_norm_rms_epsilon": None,
    "expert_weights_norm": False,
    "expert_weights_scale": 1.0,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "moe_latent_size": None,
}
_BELOW: dict[str, str | tuple[str | Source, ...]] = {
    "ffn_norm": "attn_norm",
    "ffn.latent": "ffn_latent_down",
    "ffn.hidden": "ffn_latent_up",
}
_GGUF = Gguf(
    "nemotron_h",
    gguf.names(gguf.MAMBA2 | _BELOW | {"ffn.router_bias": ("exp_probs_b.bias",)}),
    _KEYS,
    _OPTIONAL,
    {"time_step_min": 1e-30},  # llama.cpp bounds no step
    ("attention.layer_norm_epsilon", "expert_gating_func", "expert_shared_count", "rope.dimension_count"),
    _settle,
)
FAMILY = Family(
    "Nemotron-H, Nemotron 3 (Nano 30B-A3B, Super 120B-A12B): Mamba-2 and squared ReLU",
    ("nemotron_h",),
    read,
    _names(),
    DEFAULTS,
    (r"mtp\..*", *common.IGNORED),
    (_GGUF, replace(_GGUF, architecture="nemotron_h_moe", keys=_KEYS | _EXPERT_KEYS)),
)

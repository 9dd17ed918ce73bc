"""Gemma 4, dense and with experts: windows but for every sixth layer, which has heads of its own and no values.

Where there are experts, a dense feed-forward is beside them in every layer.
"""

from __future__ import annotations

from math import nextafter
from typing import Any

from numoe.engine.families import common, gemma3, gguf
from numoe.engine.families.config import Config, rope_of_kind
from numoe.engine.families.names import Family, Gguf, GgufFile, Names
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Block
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.parallel import Parallel
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError, shown

FULL, SLIDING = common.FULL, common.SLIDING
DEFAULTS = gemma3.SIZES | {
    "vocab_size": 262144,
    "full_attention_interval": 6,
    "sliding_window": 512,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
ROPES = {
    SLIDING: {"rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def read(config: Config) -> ModelSpec:
    config.expect("use_bidirectional_attention", "vision")  # of images, which are not read
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if value := config.count(key):
            raise config.refusal(key, f"is {value}, and only 0 is supported: of Gemma 4 26B-A4B and 31B run")
    config.ignore(["rope_theta", "vocab_size_per_layer_input", "use_double_wide_mlp", "expert_intermediate_size"])
    kinds = gemma3.kinds(config, "full_attention_interval")
    kinds[-1] = FULL  # as in transformers, whatever is said of it
    attentions = _attentions(config, kinds)
    ffn = _feed_forward(config)
    layers = [(Block("attention", attention, after=Norm()), ffn) for attention in attentions]
    return gemma3.model(config, layers)


def _attentions(config: Config, kinds: list[str]) -> list[GroupedQueryAttention]:
    heads, kv_heads, head_dim = (config.size(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    window, shared = config.size("sliding_window"), config.flag("attention_k_eq_v")
    biases = common.attention_biases(config)
    tables = config.table("rope_parameters") or ROPES
    made = []
    for own, kind in zip(_own_sizes(config, kinds), kinds, strict=True):
        sizes = own.size("num_key_value_heads", null=kv_heads), own.size("head_dim", null=head_dim)
        if left := sorted(set(own.values) - {"num_key_value_heads", "head_dim"}):
            raise own.refusal(left[0], "is not understood of single layers")
        common.check_heads(config, heads, sizes[0])
        made.append(
            GroupedQueryAttention(
                heads, *sizes, rope_of_kind(config, sizes[1], tables, kind), window if kind == SLIDING else None,
                head_norm=True, biases=biases, scale=1.0, plain_norms="v", shared_values=shared and kind == FULL,
            )
        )  # fmt: skip
    return made


def _own_sizes(config: Config, kinds: list[str]) -> list[Config]:
    """What differs in each layer: of `per_layer_config`, as transformers 5.23 saves it, or of the keys of releases."""
    sizes = {"head_dim": config.size("global_head_dim")}
    kv_heads = config.size("num_global_key_value_heads", null=None)
    if kv_heads is not None and config.flag("attention_k_eq_v"):
        sizes["num_key_value_heads"] = kv_heads
    own: dict[str, Any] = {str(i): sizes for i, kind in enumerate(kinds) if kind == FULL}
    if config.values.get("per_layer_config") is not None:
        own = config.table("per_layer_config")
    config.ignore(["per_layer_config"])
    if wrong := [key for key in own if key not in map(str, range(len(kinds))) or not isinstance(own[key], dict)]:
        raise config.refusal("per_layer_config", f"has {shown(wrong[0])}, which is no layer with a table")
    neutral = {"num_key_value_heads": None, "head_dim": None}
    return [
        Config(own.get(str(i), {}), neutral, config.where, config.spelt(f"per_layer_config.{i}.").__add__)
        for i in range(len(kinds))
    ]


def _feed_forward(config: Config) -> Block:
    dense = gemma3.geglu(config)
    if not config.flag("enable_moe_block"):
        config.ignore(["num_experts", "top_k_experts", "moe_intermediate_size"])
        return Block("ffn", dense, after=Norm(), scale=True)
    routed = common.mixture(
        config,
        config.size("num_experts"),
        gemma3.geglu(config, "moe_intermediate_size"),
        Router("softmax", norm=True, expert_scale=True),
        expert_norm=True,
        chosen="top_k_experts",
    )
    both = Parallel((Block("dense", dense, after=Norm()), Block("routed", routed, before=None, after=Norm())))
    return Block("ffn", both, before=None, after=Norm(), scale=True)


def _names() -> Names:
    layer = gemma3.LAYER | {
        "ffn_scale": "layer_scalar",
        "ffn.dense_norm": "pre_feedforward_layernorm.weight",
        "ffn.dense_post_norm": "post_feedforward_layernorm_1.weight",
        "ffn.routed_post_norm": "post_feedforward_layernorm_2.weight",
        "ffn.experts_norm": "pre_feedforward_layernorm_2.weight",
        "ffn.router": "router.proj.weight",
        "ffn.router_norm": "router.scale",
        "ffn.router_scale": "router.per_expert_scale",
    }
    return common.also_below(_in_parts(common.names(layer, experts="experts")), "model.", "model.language_model.")


def _in_parts(table: Names) -> Names:
    """The names of a model's tensors where a dense feed-forward is beside experts, too."""
    places = {"ffn.router": "ffn.routed.router", "ffn.experts": "ffn.routed.experts"}
    places |= {f"ffn.{n}": f"ffn.dense.{n}" for n in ("gate", "up", "down")}
    names = dict(table) | common.inside(table, places)
    return common.made(names, r".*\.router_norm", lambda scale: scale * len(scale) ** -0.5)


_GGUF_NAMES = gguf.names(
    gguf.NORMS_AFTER
    | {
        "ffn_scale": ("layer_output_scale.weight",),
        "ffn.dense_norm": ("ffn_norm.weight",),
        "ffn.dense_post_norm": ("post_ffw_norm_1.weight",),
        "ffn.routed_post_norm": ("post_ffw_norm_2.weight",),
        "ffn.experts_norm": ("pre_ffw_norm_2.weight",),
        "ffn.router_norm": ("ffn_gate_inp.scale",),
        "ffn.router_scale": ("ffn_down_exps.scale",),
    }
)


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    windows, layers = file.keys.get("attention.sliding_window_pattern"), config["num_hidden_layers"]
    if not isinstance(windows, list) or len(windows) != layers:
        raise InputError(f"{file.path}: gemma4.attention.sliding_window_pattern must tell of all {layers} layers")
    kinds = [SLIDING if window else FULL for window in windows]
    kv_heads = config.pop("num_key_value_heads")
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
    if len(kv_heads) != layers:
        raise InputError(f"{file.path}: gemma4.attention.head_count_kv tells of {len(kv_heads)} layers of {layers}")
    sizes = {FULL: config.pop("global_head_dim"), SLIDING: config["head_dim"]}
    for name, kind in (("{}", FULL), ("{}_swa", SLIDING)):
        for key in ("attention.value_length", "rope.dimension_count"):
            if file.keys.get(name.format(key), sizes[kind]) != sizes[kind]:
                raise InputError(f"{file.path}: gemma4.{name.format(key)} is not the size of a head, {sizes[kind]}")
    own = zip(kinds, kv_heads, strict=True)
    full = {"rope_type": "proportional", "rope_theta": config["rope_theta"], **_turning(file)}
    config |= {
        "layer_types": kinds,
        "num_key_value_heads": kv_heads[0],
        "per_layer_config": {
            str(i): {"num_key_value_heads": count, "head_dim": sizes[kind]} for i, (kind, count) in enumerate(own)
        },
        "attention_k_eq_v": any(
            kind == FULL and not {f"blk.{i}.attn_v.weight", f"blk.{i}.attn_qkv.weight"} & set(file.shapes)
            for i, kind in enumerate(kinds)
        ),
        "rope_parameters": {FULL: full, SLIDING: {"rope_theta": config.pop("rope_local_base_freq")}},
        "enable_moe_block": bool(config["num_experts"]),
    }


def _turning(file: GgufFile) -> dict[str, float]:
    """The share of a head's pairs that turn in full layers, of the divisors of their frequencies."""
    divisors = list(file.divisors or [1.0])
    turning = divisors.count(1.0)
    if any(one != 1 for one in divisors[:turning]) or any(one < 1e29 for one in divisors[turning:]):
        raise InputError(f"{file.path}: {gguf.ROPE_FREQS} must be ones, and then 1e30; convert the model again")
    return {"partial_rotary_factor": min(1.0, nextafter(turning / len(divisors), 2))}


GGUF = Gguf(
    "gemma4",
    _in_parts(_GGUF_NAMES),
    {
        "attention.key_length": "global_head_dim",
        "attention.key_length_swa": "head_dim",
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
        "expert_count": "num_experts",
        "expert_used_count": "top_k_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    optional={
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "final_logit_softcapping": None,
        "expert_count": None,
        "expert_used_count": None,
        "expert_feed_forward_length": None,
    },
    unread=(
        "attention.sliding_window_pattern", "attention.value_length", "attention.value_length_swa",
        "rope.dimension_count", "rope.dimension_count_swa",
    ),
    settle=_settle,
)  # fmt: skip


FAMILY = Family(
    "Gemma 4 26B-A4B, 31B (text)",
    ("gemma4", "gemma4_text"),
    read,
    _names(),
    DEFAULTS,
    (r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*", r"rope_freqs\.weight", *common.IGNORED),
    (GGUF,),
)

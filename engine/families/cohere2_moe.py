"""Cohere 2 with experts: attention beside the feed-forward, windows with rope, and global layers without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import MOST_LAYERS, Config, rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Names
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Block, Kind
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.parallel import Parallel
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError, shown

FULL, SLIDING = common.FULL, common.SLIDING
DENSE, SPARSE = "dense", "sparse"
DEFAULTS = common.DEFAULTS | {
    "num_key_value_heads": None,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "rms_norm_eps": None,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "prefix_dense_sliding_window_pattern": 1,
    "prefix_dense_intermediate_size": None,
    "first_k_dense_replace": 0,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "shared_expert_combination_strategy": "average",
    "expert_selection_fn": "softmax",
    "norm_topk_prob": True,
}


def read(config: Config) -> ModelSpec:
    # What files of Cohere's own say of every model.
    for key in ("use_parallel_block", "use_gated_activation", "use_embedding_sharing"):
        config.expect(key, True)
    config.expect("position_embedding_type", "rope_gptj")
    config.expect("rotary_pct", 1.0)
    config.ignore(["layer_switch", "order_of_interleaved_layers", "use_parallel_embedding", "_sliding_window_pattern"])
    by_root = config.take("rms_norm_eps", null=None) is not None
    config.ignore(["layer_norm_eps"])
    attentions, ffns = _attentions(config), _feed_forwards(config)
    norm = Norm(center=not by_root)
    layers = []
    for attention, ffn in zip(attentions, ffns, strict=True):
        both = Parallel((Block("attention", attention, before=None), Block("ffn", ffn, before=None)))
        layers.append((Block("parallel", both, before=norm),))
    scale = config.number("logit_scale")
    spec = common.model(config, layers, norm_eps="rms_norm_eps" if by_root else "layer_norm_eps")
    return replace(spec, norm=norm, logit_scale=scale)


def _dense(config: Config) -> list[bool]:
    """Which layers have no experts."""
    layers, first = common.layer_count(config), config.count("first_k_dense_replace")
    kinds = config.kinds("mlp_layer_types", layers, (DENSE, SPARSE))
    return [kind == DENSE for kind in kinds] if kinds else [i < first for i in range(layers)]


def _attentions(config: Config) -> list[GroupedQueryAttention]:
    layers, first = common.layer_count(config), config.count("first_k_dense_replace")
    prefix, period = config.size("prefix_dense_sliding_window_pattern"), config.size("sliding_window_pattern")
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING))
    if kinds is None:
        places = [(i + 1) % prefix if i < first else (i - first + 1) % period for i in range(layers)]
        kinds = [SLIDING if place else FULL for place in places]
    sliding = common.grouped_query_attention(
        config,
        window=config.size("sliding_window"),
        biases=common.attention_biases(config),
        turn=lambda config, head_dim: rope(config, head_dim, interleaved=True),
    )
    turned = replace(sliding, window=None)
    full = replace(turned, rope=None)
    dense = _dense(config)
    return [
        sliding if kind == SLIDING else turned if dense[i] and prefix == 1 else full for i, kind in enumerate(kinds)
    ]


def _feed_forwards(config: Config) -> list[Kind]:
    expert, shared = common.swiglu(config), config.count("num_shared_experts")
    average = config.choice("shared_expert_combination_strategy", "average", "sum") == "average"
    score = config.choice("expert_selection_fn", "softmax", "sigmoid")
    normalize = config.flag("norm_topk_prob") or score == "softmax"
    router = Router("sigmoid" if score == "sigmoid" else "softmax", normalize=normalize)
    sparse = common.mixture(
        config,
        config.size("num_experts"),
        expert,
        router,
        replace(expert, width=expert.width * shared) if shared else None,
    )
    if shared and average:
        sparse = replace(sparse, scale=0.5)
    width = config.size("prefix_dense_intermediate_size", null=expert.width)
    return [replace(expert, width=width) if dense else sparse for dense in _dense(config)]


LAYER = common.GROUPED_QUERY | common.dense() | common.dense("mlp.shared_experts", "ffn.shared")
LAYER |= {"ffn.router": "mlp.gate.weight", "parallel_norm": "input_layernorm.weight"}


def _in_parallel(table: Names) -> Names:
    return {**table, **common.inside(table, {name: f"parallel.{name}" for name in ("attention.", "ffn.")})}


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    layers, windows = config["num_hidden_layers"], file.keys.get("attention.sliding_window_pattern", 4)
    if isinstance(windows, list):
        if len(windows) < layers:
            raise InputError(f"{file.path}: attention.sliding_window_pattern must tell of all {layers} layers")
        config["layer_types"] = [SLIDING if window else FULL for window in windows[:layers]]
    elif type(windows) is int and windows > 0:  # the first of so many is full
        kinds = [SLIDING if i % windows else FULL for i in range(min(layers, MOST_LAYERS))]
        config["layer_types"] = kinds
    else:
        raise InputError(f"{file.path}: attention.sliding_window_pattern is {shown(windows)}, no list and no number")
    score = {0: "sigmoid", gguf.SIGMOID: "sigmoid", gguf.SOFTMAX: "softmax"}
    gating = config["expert_selection_fn"]
    config["expert_selection_fn"] = score.get(gating, gating) if type(gating) is int else gating
    if gating == gguf.SOFTMAX:
        gguf.expect(file, "expert_weights_norm", True)
    gguf.expect(file, "rope.freq_base_swa", config["rope_theta"])
    width, shared = config["intermediate_size"], config["num_shared_experts"]
    if type(width) is type(shared) is int:
        gguf.expect(file, "expert_shared_feed_forward_length", width * shared)


NAMES = _in_parallel(common.names(LAYER, experts="mlp.experts"))
GGUF = Gguf(
    "cohere2moe",
    _in_parallel(gguf.names({"parallel_norm": "attn_norm"})),
    {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "feed_forward_length": "prefix_dense_intermediate_size",
        "expert_feed_forward_length": "intermediate_size",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_shared_count": "num_shared_experts",
        "expert_weights_norm": "norm_topk_prob",
        "expert_gating_func": "expert_selection_fn",
        "leading_dense_block_count": "first_k_dense_replace",
        "attention.sliding_window": "sliding_window",
        "logit_scale": "logit_scale",
    },
    optional={
        "feed_forward_length": None,
        "attention.layer_norm_epsilon": None,
        "attention.layer_norm_rms_epsilon": None,
        "expert_shared_count": 0,
        "expert_weights_norm": False,
        "expert_gating_func": 0,
    },
    unread=("attention.sliding_window_pattern", "rope.freq_base_swa", "expert_shared_feed_forward_length"),
    settle=_settle,
)
FAMILY = Family(
    "Cohere's North-Mini-Code: attention beside the feed-forward",
    ("cohere2_moe",),
    read,
    NAMES,
    DEFAULTS,
    common.IGNORED,
    (GGUF,),
)

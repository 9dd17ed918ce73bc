"""LFM2 and LFM2.5 with experts: gated short convolutions, and attention in some layers; the first layers are dense."""

from __future__ import annotations

from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.recurrent.shortconv import ShortConvolution
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer

CONVOLUTION, FULL = "conv", "full_attention"
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "num_key_value_heads": 8,
    "head_dim": None,
    "conv_bias": False,
    "conv_L_cache": 3,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1792,
    "norm_topk_prob": True,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
}


def read(config: Config) -> ModelSpec:
    config.expect("tie_embedding", True)
    layers = common.layer_count(config)
    kinds = config.kinds("layer_types", layers, (CONVOLUTION, FULL))
    if kinds is None:
        raise config.refusal("layer_types", "is missing; check the file")
    kernel = config.size("conv_L_cache")
    if kernel < 2:
        raise config.refusal("conv_L_cache", f"is {kernel}, and only 2 and more are supported")
    mixers = {
        CONVOLUTION: ShortConvolution(config.size("hidden_size"), kernel, config.flag("conv_bias")),
        FULL: common.grouped_query_attention(config, head_norm=True),
    }
    router = Router(
        "sigmoid",
        bias=config.flag("use_expert_bias"),
        normalize=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor"),
    )
    sparse = common.mixture(config, config.size("num_experts"), common.swiglu(config, "moe_intermediate_size"), router)
    dense, first = common.swiglu(config), config.count("num_dense_layers")
    ffns = [dense if i < first else sparse for i in range(layers)]
    blocks = [decoder_layer(mixers[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=True)]
    return common.model(config, blocks, norm_eps="norm_eps")


def _names() -> Names:
    layer = {"attention_norm": "operator_norm.weight", "ffn_norm": "ffn_norm.weight"}
    layer |= {f"attention.{n}": f"self_attn.{n}_proj.weight" for n in "qkv"}
    layer |= {f"attention.{n}_norm": f"self_attn.{n}_layernorm.weight" for n in "qk"}
    for ours, theirs in (("in", "in_proj"), ("conv", "conv"), ("o", "out_proj")):
        layer |= {f"attention.{ours}": f"conv.{theirs}.weight", f"attention.{ours}_bias": f"conv.{theirs}.bias"}
    layer |= {"ffn.router": "feed_forward.gate.weight", "ffn.router_bias": "feed_forward.expert_bias"}
    layer |= {f"ffn.{n}": f"feed_forward.{w}.weight" for n, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))}
    table = dict(common.names(layer, experts="feed_forward.experts"))
    table["norm"] = (Source("model.embedding_norm.weight"),)
    table["layers.{layer}.attention.o"] += (Source("model.layers.{layer}.self_attn.out_proj.weight"),)
    for part, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        one = Source(f"model.layers.{{layer}}.feed_forward.experts.{{expert}}.{w}.weight")
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{part}"] += (one,)
    return table


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    gguf.expect(file, "expert_gating_func", gguf.SIGMOID)
    gguf.expect(file, "expert_weights_norm", True)  # as llama.cpp has it whatever is said
    config["layer_types"] = gguf.layer_kinds(config, file, {"shortconv.conv": CONVOLUTION}, FULL)
    config["num_key_value_heads"] = gguf.largest(config["num_key_value_heads"])
    for key, name in (("use_expert_bias", ".exp_probs_b.bias"), ("conv_bias", ".shortconv.conv.bias")):
        config[key] = any(one.endswith(name) for one in file.shapes)


_GGUF_NAMES = {
    **gguf.names(
        {"attention.in": "shortconv.in_proj", "attention.conv": "shortconv.conv"}
        | {"attention.o": ("attn_output.weight", "shortconv.out_proj.weight")}
        | {"attention.o_bias": ("attn_output.bias", "shortconv.out_proj.bias")}
        | {"ffn.router_bias": ("exp_probs_b.bias",)}
    ),
    "norm": (Source("token_embd_norm.weight"), Source("output_norm.weight")),  # mostly the first, by mistake
}
GGUF = Gguf(
    "lfm2moe",
    _GGUF_NAMES,
    {
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "shortconv.l_cache": "conv_L_cache",
        "leading_dense_block_count": "num_dense_layers",
        "expert_weights_scale": "routed_scaling_factor",
        **gguf.EXPERT_KEYS,
    },
    optional={"leading_dense_block_count": 0, "expert_weights_scale": 1.0},
    unread=("expert_gating_func", "expert_weights_norm"),
    settle=_settle,
)
FAMILY = Family(
    "LFM2-8B-A1B, LFM2.5-8B-A1B: short convolutions", ("lfm2_moe",), read, _names(), DEFAULTS, common.IGNORED, (GGUF,)
)

"""MiMo-V2-Flash: windows with sinks and more key/value heads, and full layers; scaled values of another size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config, rope_of_kind
from numoe.engine.families.names import NEXT, Family, Gguf, GgufFile, Mtp, Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Layer
from numoe.engine.layers.spec import ModelSpec, decoder_layer

FULL, SLIDING = common.FULL, common.SLIDING
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.334,
    "num_key_value_heads": 4,
    "swa_num_key_value_heads": None,
    "head_dim": 192,
    "v_head_dim": 128,
    "attention_bias": False,
    "attention_value_scale": 0.707,
    "sliding_window": 129,
    "sliding_window_size": None,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}
THETAS = {FULL: "rope_theta", SLIDING: "swa_rope_theta"}
ROPES = {FULL: {"rope_theta": 5e6}, SLIDING: {"rope_theta": 1e4}}


def read(config: Config) -> ModelSpec:
    config = config.renamed({"layernorm_epsilon": "rms_norm_eps"})
    config.expect("n_shared_experts", None)
    config.ignore(["attention_chunk_size"])  # read by no program
    attentions = _attentions(config)
    moe = common.mixture(
        config,
        config.size("n_routed_experts", also="num_local_experts"),
        common.swiglu(config, "moe_intermediate_size"),
        latent.sigmoid(config),
    )
    layers, dense = common.layer_count(config), common.swiglu(config)
    sparse = config.kinds("moe_layer_freq", layers, (0, 1))
    if config.values.get("mlp_layer_types") is not None or sparse is None:
        sparse = latent.sparse_layers(config)
    ffns = [moe if one else dense for one in sparse]
    return common.model(config, [decoder_layer(one, ffn) for one, ffn in zip(attentions, ffns, strict=True)])


def _attentions(config: Config) -> list[GroupedQueryAttention]:
    layers = common.layer_count(config)
    kinds = config.kinds("layer_types", layers, (FULL, SLIDING))
    pattern = config.kinds("hybrid_layer_pattern", layers, (0, 1)) or [
        int(i > 0 and (i + 1) % 6 != 0) for i in range(layers)
    ]
    kinds = kinds or [SLIDING if one else FULL for one in pattern]
    tables = config.table("rope_parameters") or ROPES
    if tables is ROPES and config.values.get("swa_rope_theta") is not None:  # as releases say it
        tables = {kind: {"rope_theta": config.take(key)} for kind, key in THETAS.items()}
    config.ignore(["rope_theta", "swa_rope_theta"])
    part = config.number("partial_rotary_factor")
    full = replace(
        common.grouped_query_attention(
            config,
            biases="qkv" if config.flag("attention_bias") else "",
            turn=lambda config, head_dim: rope_of_kind(config, head_dim, tables, FULL, part),
        ),
        sinks=config.flag("add_full_attention_sink_bias"),
        value_dim=config.size("v_head_dim"),
        value_scale=config.number("attention_value_scale", null=1.0),
    )
    for key, value in (
        ("num_attention_heads", full.heads),
        ("head_dim", full.head_dim),
        ("v_head_dim", full.value_dim),
    ):
        config.expect(f"swa_{key}", value)
    window, before = config.size("sliding_window"), config.size("sliding_window_size", null=None)
    kv_heads = config.size("swa_num_key_value_heads", null=2 * full.kv_heads)
    common.check_heads(config, full.heads, kv_heads)
    sliding = replace(
        full,
        kv_heads=kv_heads,
        rope=rope_of_kind(config, full.head_dim, tables, SLIDING, part) if SLIDING in kinds else None,
        window=window if before is None else before + 1,  # as many before a token as this says, and itself
        sinks=config.flag("add_swa_attention_sink_bias"),
    )
    return [sliding if kind == SLIDING else full for kind in kinds]


def _names() -> Names:
    layer = common.NORMS | common.GROUPED_QUERY | common.dense()
    layer |= {
        "attention.sink": "self_attn.sinks",
        "ffn.router": "mlp.gate.weight",
        "ffn.router_bias": "mlp.gate.e_score_correction_bias",
    }
    table = common.names(layer, experts="mlp.experts")
    # V2.5 has queries, keys and values in one tensor, in parts for several GPUs: not one after another as elsewhere.
    apart = {ours: tuple(one for one in theirs if "qkv" not in one.name) for ours, theirs in table.items()}
    return common.also_called(apart, {".sinks": ".attention_sink_bias"})


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    latent.name_gating(config)
    config["v_head_dim"] = file.keys.get("attention.value_length", config["head_dim"])
    pattern, heads = file.keys.get("attention.sliding_window_pattern"), config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    if isinstance(pattern, list):  # layers that only draft tokens may follow
        config["hybrid_layer_pattern"] = pattern = [int(bool(one)) for one in pattern[:layers]]
        if isinstance(heads, list):
            of_kind = dict(zip(pattern, heads, strict=False))
            config["swa_num_key_value_heads"] = of_kind.get(1)
            config["num_key_value_heads"] = of_kind.get(0, of_kind.get(1))
    config["mlp_layer_types"] = gguf.layer_kinds(config, file, {"ffn_gate_inp": "sparse"}, "dense")
    gguf.rotate_first(config, file)


GGUF = Gguf(
    "mimo2",
    gguf.names({"ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b"), "attention.sink": ("attn_sinks.weight",)}),
    {
        "attention.sliding_window": "sliding_window",
        "attention.value_scale": "attention_value_scale",
        "rope.freq_base_swa": "swa_rope_theta",
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_gating_func": "scoring_func",
    },
    optional={**latent.EXPERT_OPTIONAL, "attention.value_scale": 1.0, "rope.freq_base_swa": 10000.0},
    unread=("attention.value_length", "attention.sliding_window_pattern", "rope.dimension_count"),
    settle=_settle,
    biases="qkv",
)


def _mtp_layer(config: Config, spec: ModelSpec) -> Layer:
    """Of three that follow each other the first: a window and a dense block."""
    config = config.renamed({"layernorm_epsilon": "rms_norm_eps"})
    every = _attentions(config)
    return decoder_layer(next((one for one in every if one.window is not None), every[-1]), common.swiglu(config))


_MTP = Mtp(
    {
        **{one: (Source(f"model.mtp.layers.0.{one}.weight"), *NEXT[one]) for one in ("eh_proj", "enorm", "hnorm")},
        "norm": (Source("model.mtp.layers.0.final_layernorm.weight"), *NEXT["norm"]),
        "layers.0.ffn_norm": (Source("model.mtp.layers.0.pre_mlp_layernorm.weight"),),
    },
    ("model.layers.{layer}.", "model.mtp.layers.0."),
    _mtp_layer,
    normed=False,
)
FAMILY = Family(
    "MiMo-V2-Flash",
    ("mimo_v2_flash",),
    read,
    _names(),
    DEFAULTS,
    (r"model\.mtp\..*", *common.IGNORED),
    (GGUF,),
    mtp=_MTP,
)

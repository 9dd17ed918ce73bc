"""What DeepSeek-V2, V3 and the models built like them share: latent attention, shared experts, and their GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Arrangement, Config, rope_block, scaled_rope, yarn_mscale
from numoe.engine.families.names import Gguf, GgufFile, Source
from numoe.engine.layers.attention.indexer import TokenIndexer
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.block import Kind
from numoe.engine.layers.rope import Yarn
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError

DEFAULTS = common.DEFAULTS | {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def attention(
    config: Config, *, interleaved: bool, rotated: bool = True, block: Config | None = None
) -> MultiHeadLatentAttention:
    """MLA as V2 and V3 configure it. Where YaRN has `mscale_all_dim`, its square scales the softmax.

    block: the table of rope settings, where more than the usual is read of it; its part of a head is the rotated one.
    """
    heads, nope, rotary = (config.size(key) for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    config.expect("num_key_value_heads", heads)
    config.ignore(["head_dim", "qk_head_dim"])  # restate the sizes above
    rope, scale = None, (nope + rotary) ** -0.5
    if rotated:
        whole = None if block is None else nope + rotary
        block = block or rope_block(config)
        rope = scaled_rope(config, block, rotary, interleaved=interleaved, whole=whole)
        if isinstance(rope.scaling, Yarn) and block.values.get("mscale_all_dim"):
            scale *= yarn_mscale(rope.scaling.factor, block.values["mscale_all_dim"]) ** 2
    made = MultiHeadLatentAttention(
        heads,
        config.size("q_lora_rank", null=None),
        config.size("kv_lora_rank"),
        nope,
        rotary,
        config.size("v_head_dim"),
        rope,
        scale,
    )
    return replace(made, **config.arranged.get("latent", {}))


def indexed(config: Config, made: MultiHeadLatentAttention, *, interleaved: bool) -> MultiHeadLatentAttention:
    """The same with an indexer of tokens, whose heads and keys rotate their first channels as the attention does."""
    dim = config.size("index_head_dim")
    if dim < made.shared_dim:
        raise config.refusal("index_head_dim", f"is {dim}, fewer than the {made.shared_dim} channels that are rotated")
    if made.q_rank is None:
        raise config.refusal("q_lora_rank", "is null, and the indexer needs the latents of queries")
    assert made.rope
    rope = replace(made.rope, interleaved=interleaved, first=True)
    return replace(made, indexer=TokenIndexer(config.size("index_n_heads"), dim, config.size("index_topk"), rope))


def sparse_layers(config: Config) -> list[bool]:
    """Which layers have experts: those that `mlp_layer_types` says, or all after `first_k_dense_replace` others."""
    layers = common.layer_count(config)
    kinds = config.kinds("mlp_layer_types", layers, ("dense", "sparse"))
    if kinds is not None:
        config.ignore(["first_k_dense_replace"])
        return [kind == "sparse" for kind in kinds]
    first = config.count("first_k_dense_replace")
    return [i >= first for i in range(layers)]


def sigmoid(config: Config) -> Router:
    """The router of V3, which configs call by two names."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    return common.corrected_sigmoid(config)


def model(
    config: Config,
    attention: Kind | Sequence[Kind],
    experts: int,
    router: Router,
) -> ModelSpec:
    """Mixtures with shared experts in the layers of `sparse_layers`; `attention` of all layers, or of each."""
    config.expect("moe_layer_freq", 1)
    common.drafting_layers(config)
    expert = common.swiglu(config, "moe_intermediate_size")
    shared = replace(expert, width=expert.width * config.size("n_shared_experts"))
    moe = common.mixture(config, experts, expert, router, shared)
    ffns = common.feed_forwards(config, moe, sparse_layers(config))
    mixers = attention if isinstance(attention, Sequence) else [attention] * len(ffns)
    return common.model(config, [decoder_layer(mixer, ffn) for mixer, ffn in zip(mixers, ffns, strict=True)])


NAMES = common.names(
    common.NORMS
    | common.dense()
    | common.dense("mlp.shared_experts", "ffn.shared")
    | {
        "attention.q": "self_attn.q_proj.weight",
        "attention.q_a": "self_attn.q_a_proj.weight",
        "attention.q_norm": "self_attn.q_a_layernorm.weight",
        "attention.q_b": "self_attn.q_b_proj.weight",
        "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
        "attention.kv_b": "self_attn.kv_b_proj.weight",
        "attention.o": "self_attn.o_proj.weight",
        "attention.indexer.q": "self_attn.indexer.wq_b.weight",
        "attention.indexer.k": "self_attn.indexer.wk.weight",
        "attention.indexer.k_norm": "self_attn.indexer.k_norm.weight",
        "attention.indexer.k_norm_bias": "self_attn.indexer.k_norm.bias",
        "attention.indexer.weights": "self_attn.indexer.weights_proj.weight",
        "ffn.router": "mlp.gate.weight",
        "ffn.router_bias": "mlp.gate.e_score_correction_bias",
    },
    experts="mlp.experts",
)

# What follows is llama.cpp's `deepseek2` (src/models/deepseek2.cpp, conversion/deepseek.py).
_GATING = None, "softmax", "sigmoid"
_GGUF_NAMES = gguf.names(
    {
        "attention.q_a": "attn_q_a", "attention.q_b": "attn_q_b", "attention.q_norm": "attn_q_a_norm",
        "attention.kv_a": "attn_kv_a_mqa", "attention.kv_norm": "attn_kv_a_norm", "attention.kv_b": "attn_kv_b",
        "attention.k_b": (Source("attn_k_b.weight", flat=True),),
        "attention.v_b": (Source("attn_v_b.weight", flat=True),),
        "ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b"),
        "attention.indexer.q": "indexer.attn_q_b", "attention.indexer.k": "indexer.attn_k",
        "attention.indexer.k_norm": "indexer.k_norm", "attention.indexer.weights": "indexer.proj",
    }
)  # fmt: skip
INDEXED = "indexed_attention", "deepseek_sparse_attention"
"""What `layer_types` calls layers with an indexer, which all are."""
INDEXER_KEYS = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
}


MIXTURE_KEYS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": "scoring_func",
}
EXPERT_KEYS = MIXTURE_KEYS | {
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
EXPERT_OPTIONAL = {
    "leading_dense_block_count": 0,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": False,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_gating_func": None,
}


def deepseek2(
    *marks: Callable[[GgufFile], bool], architecture: str = "deepseek2", keys: Mapping[str, str] = MappingProxyType({})
) -> Gguf:
    """Files of that architecture, or of another one with more keys, for which all marks hold."""
    return Gguf(
        architecture,
        _GGUF_NAMES,
        {**keys, "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank", **EXPERT_KEYS},
        optional={"attention.q_lora_rank": None} | EXPERT_OPTIONAL,
        unread=("attention.key_length", "attention.value_length", "attention.key_length_mla",
                "attention.value_length_mla", "attention.head_count_kv", "rope.dimension_count",
                gguf.YARN_MULTIPLIER),
        settle=_settle,
        arranged=_arranged,
        marks=marks,
    )  # fmt: skip


def vocabulary(file: GgufFile) -> int:
    """How many tokens its embedding is of, by which llama.cpp tells models of one architecture apart too."""
    return file.shapes.get("token_embd.weight", (0,))[0]


def scores_by_sigmoid(file: GgufFile) -> bool:
    """Files that do not say it have the correction of the choice, which softmax routers have not."""
    gating = file.keys.get("expert_gating_func")
    return gating == 2 or (not gating and any(".exp_probs_b" in name for name in file.shapes))


def name_gating(config: dict[str, Any]) -> None:
    """Say the number of `expert_gating_func` as config.json does."""
    if config["scoring_func"] in range(len(_GATING)):
        config["scoring_func"] = _GATING[config["scoring_func"]]


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    rotary = _size(file, "rope.dimension_count")
    whole, value = (
        _size(file, f"attention.{part}_length_mla", f"attention.{part}_length") for part in ("key", "value")
    )
    config |= {"qk_rope_head_dim": rotary, "qk_nope_head_dim": whole - rotary, "v_head_dim": value}
    name_gating(config)
    multiplier = file.keys.get(gguf.YARN_MULTIPLIER)
    if multiplier and "rope_scaling" in config:  # the converter writes a tenth of `mscale_all_dim`
        if not isinstance(multiplier, float):
            raise InputError(f"{file.path}: {gguf.YARN_MULTIPLIER} is no number")
        config["rope_scaling"] |= dict.fromkeys(("mscale", "mscale_all_dim"), 10 * multiplier)


def _size(file: GgufFile, *keys: str) -> int:
    """The first of these keys that is there."""
    value = next((file.keys[key] for key in keys if key in file.keys), None)
    if type(value) is not int:
        raise InputError(f"{file.path}: {keys[-1]} is missing or no number; take a file of another converter")
    return value


def _arranged(file: GgufFile) -> Arrangement:
    """Files of converters of 2025 and later have Wk and Wv apart."""
    return {"latent": {"split": any(name.endswith(".attn_k_b.weight") for name in file.shapes)}}

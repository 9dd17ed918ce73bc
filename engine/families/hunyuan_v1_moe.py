"""Hunyuan-A13B: norms of queries and keys after rope, softmax-routed experts, and a shared one of their size."""

from __future__ import annotations

from dataclasses import replace

from numoe.engine.families import common, gguf
from numoe.engine.families.config import Config, rope_block, scaled_rope
from numoe.engine.families.names import Family, Gguf
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import shown

DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "num_experts": 1,
    "moe_topk": 1,
}
# What releases say of vision and of attention that other models of this code have; none of it is used here.
UNUSED = ("im_*", "vit_*", "text_*_id", "video_*_id", "image_token_id", "mask_init_id", "num_media_embeds", "pool_type",
          "class_num", "dense_list", "org_vocab_size", "pad_id", "eod_token_id", "cla_share_factor")  # fmt: skip


def read(config: Config) -> ModelSpec:
    config = config.renamed({"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"})
    for key, value in (("use_qk_norm", True), ("use_mixed_mlp_moe", True), ("use_rotary_pos_emb", True),
                       ("norm_topk_prob", True), ("norm_type", "rms")):  # fmt: skip
        config.expect(key, value)
    config.ignore(UNUSED)
    expert = common.swiglu(config)
    config.expect("shared_expert_intermediate_size", expert.width)
    for key, supported in (("moe_intermediate_size", expert.width), ("num_shared_expert", 1)):
        if wrong := [one for one in _of_layers(config, key, supported) if one != supported]:
            raise config.refusal(key, f"has {wrong[0]}, and only {supported} is supported")
    attention = common.grouped_query_attention(
        config, head_norm=True, biases=common.attention_biases(config), turn=_rope
    )
    config.expect("attention_head_dim", attention.head_dim)
    attention, experts = replace(attention, late_norm=True), config.size("num_experts")
    moes = [
        common.mixture(_with(config, "moe_topk", top_k), experts, expert, Router("softmax"), expert, chosen="moe_topk")
        for top_k in _of_layers(config, "moe_topk", DEFAULTS["moe_topk"])
    ]
    return common.model(config, [decoder_layer(attention, moe) for moe in moes])


def _of_layers(config: Config, key: str, default: int) -> list[int]:
    """What each layer has, of a number for all or a list of them."""
    layers, value = common.layer_count(config), config.values.get(key)
    values = value if isinstance(value, list) else [default if value is None else value] * layers
    config.ignore([key])
    if len(values) != layers:
        raise config.refusal(key, f"is about {len(values)} layers, but has to be about {layers}")
    return [_with(config, key, one).size(key) for one in values]


def _with(config: Config, key: str, value: object) -> Config:
    return Config({**config.values, key: value}, config.defaults, config.where, config.spelt)


def _rope(config: Config, head_dim: int) -> Rope:
    """The kind "dynamic" with an `alpha` is a larger base, theta alpha^(C / (C - 2)), however long the sequence is."""
    block = rope_block(config)
    if block.values.get("rope_type", block.values.get("type")) != "dynamic" or block.values.get("alpha") is None:
        return scaled_rope(config, block, head_dim, interleaved=False)
    if head_dim < 4:
        raise config.refusal("head_dim", f"is {head_dim}, and rope with an alpha needs 4 at least")
    theta = block.number("rope_theta") * block.number("alpha") ** (head_dim / (head_dim - 2))
    if theta > 1e30:
        raise block.refusal("alpha", f"is {shown(block.values['alpha'])}, which makes frequencies vanish")
    plain = scaled_rope(config, _with(block, "rope_type", "default"), head_dim, interleaved=False)
    return replace(plain, theta=theta)


LAYER = common.NORMS | common.GROUPED_QUERY | common.dense("mlp.shared_mlp", "ffn.shared")
LAYER |= {f"attention.{n[0]}_norm": f"self_attn.{n}_layernorm.weight" for n in ("query", "key")}
LAYER |= {"ffn.router": "mlp.gate.wg.weight"}
NAMES = common.names(LAYER, experts="mlp.experts")
GGUF = Gguf(
    "hunyuan-moe",
    gguf.NAMES,
    {
        "expert_count": "num_experts",
        "expert_used_count": "moe_topk",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "num_shared_expert",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
)
FAMILY = Family("Hunyuan-A13B", ("hunyuan_v1_moe",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

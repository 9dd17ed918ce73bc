"""Kimi-Linear: three layers of Kimi Delta Attention to one of latent attention, which knows no positions."""

from __future__ import annotations

from numoe.engine.families import common, kda, latent
from numoe.engine.families.config import Config
from numoe.engine.families.names import Family, Source
from numoe.engine.layers.recurrent.kda import KimiDeltaAttention
from numoe.engine.layers.spec import ModelSpec

DEFAULTS = kda.DEFAULTS | {
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 256,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
}


def read(config: Config) -> ModelSpec:
    config = config.renamed(kda.SPELLINGS)
    config.expect("mla_use_nope", True)
    config.expect("moe_router_activation_func", "sigmoid")
    config.expect("use_grouped_topk", True)
    config.ignore(["rope_theta", "rope_scaling", "rope_parameters"])
    linear, kinds = _linear(config)
    return kda.model(config, kinds, linear, latent.attention(config, interleaved=False, rotated=False))


def _linear(config: Config) -> tuple[KimiDeltaAttention, list[str]]:
    """The Kimi Delta Attention, and the kind of each layer. Older files have a table of it, which counts."""
    sizes = {"num_heads": "linear_num_heads", "head_dim": "linear_head_dim",
             "short_conv_kernel_size": "linear_conv_kernel_dim"}  # fmt: skip
    older = {ours: config.take(key) for ours, key in sizes.items()}
    table = config.table("linear_attn_config")
    inner = Config(table, older, config.where, lambda key: config.spelt(
        f"linear_attn_config.{key}" if key in table else sizes.get(key, key)))  # fmt: skip
    heads, dim = inner.size("num_heads"), inner.size("head_dim")
    made = KimiDeltaAttention(heads, dim, kda.kernel(inner, "short_conv_kernel_size"), rank=dim)
    layers = common.layer_count(config)
    kinds = config.kinds("layer_types", layers, (kda.LINEAR, common.FULL))
    full, delta = inner.listing("full_attn_layers"), inner.listing("kda_layers")
    inner.done()
    if kinds is None and full is not None and delta is not None:
        if sorted([*full, *delta], key=str) != sorted(range(1, layers + 1), key=str):
            raise inner.refusal("kda_layers", f'and "full_attn_layers" do not name each of {layers} layers once')
        kinds = [common.FULL if i + 1 in full else kda.LINEAR for i in range(layers)]
    return made, kinds or [common.FULL if i and i % 4 == 0 else kda.LINEAR for i in range(layers)]


# As they were released: dense layers are below `mlp`, mixtures below `block_sparse_moe`.
RELEASED = {f"experts.{{expert}}.{n}_proj": f"experts.{{expert}}.{w}"
            for n, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))}  # fmt: skip
NAMES = common.also_called(kda.NAMES, {".mlp.": ".block_sparse_moe.", **RELEASED})
GGUF = kda.of_gguf("kimi-linear", {}, Source("ssm_a"), {"expert_weights_norm": True})
TITLE = "Kimi-Linear-48B-A3B: Kimi Delta Attention, and latent attention without rope"
FAMILY = Family(TITLE, ("kimi_linear",), read, NAMES, DEFAULTS, common.IGNORED, (GGUF,))

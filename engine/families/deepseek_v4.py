"""DeepSeek-V4 (Flash, Pro): hyper-connections, window attention with compressed entries, hash and score routing.

Two spellings of config.json and of the tensors' names are in circulation: the released checkpoints' and the one
that transformers' `save_pretrained` writes for fine-tunes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numoe.engine.config import Config, scaled_rope
from numoe.engine.families.names import Family, Names, Source
from numoe.engine.layers.attention.compressed import CompressedAttention
from numoe.engine.layers.attention.indexer import Compressor, Indexer
from numoe.engine.layers.ffn import SwiGLU
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.residual import HyperConnections
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def spec(values: dict[str, Any]) -> ModelSpec:
    config = Config(values)
    layers = config.size("num_hidden_layers")
    heads, head_dim = config.size("num_attention_heads"), config.size("head_dim")
    config.expect("num_key_value_heads", 1)
    for key in ("attention_bias", "mlp_bias"):
        config.expect(key, False)
    config.expect("hidden_act", "silu")
    config.expect("norm_topk_prob", True)
    config.expect("scoring_func", "sqrtsoftplus")
    config.expect("topk_method", "noaux_tc")
    config.expect("n_shared_experts", 1)
    # Heads that only draft tokens: multi-token prediction, and the dspark_* keys of dated releases.
    config.ignore(["num_nextn_predict_layers", "num_mtp_layers", "dspark_*", "expert_dtype"])

    plain, compressed = _ropes(config, head_dim)
    limit = config.number("swiglu_limit")
    ffn = MixtureOfExperts(
        config.size("n_routed_experts"),
        config.size("num_experts_per_tok"),
        SwiGLU(config.size("moe_intermediate_size"), limit),
        Router("sqrtsoftplus", bias=True, scale=config.number("routed_scaling_factor")),
        SwiGLU(config.size("moe_intermediate_size"), limit),
    )
    vocab = config.size("vocab_size")
    hashed = replace(ffn, router=Router("sqrtsoftplus", hash_vocab=vocab, scale=ffn.router.scale))
    out_groups = config.size("o_groups")
    if heads % out_groups:
        raise InputError(f'config.json: "o_groups" {out_groups} does not divide {heads} attention heads')

    def attention(kind: str, ratio: int) -> CompressedAttention:
        compressor = indexer = None
        if kind == HEAVY:
            compressor = Compressor(ratio, head_dim, overlap=False)
        if kind == SPARSE:
            compressor = Compressor(ratio, head_dim, overlap=True)
            indexer = Indexer(
                config.size("index_n_heads"),
                config.size("index_topk"),
                Compressor(ratio, config.size("index_head_dim"), overlap=True),
            )
        return CompressedAttention(
            heads,
            head_dim,
            config.size("q_lora_rank"),
            config.size("sliding_window"),
            out_groups,
            config.size("o_lora_rank"),
            plain if compressor is None else compressed,
            compressor,
            indexer,
        )

    residual = HyperConnections(config.size("hc_mult"), config.size("hc_sinkhorn_iters"), config.number("hc_eps", 1e-6))
    kinds = [attention(*kind) for kind in _layer_kinds(config, layers)]
    is_hash = _hash_layers(config, layers)
    result = ModelSpec(
        "deepseek_v4",
        vocab,
        config.size("hidden_size"),
        tuple(decoder_layer(a, hashed if h else ffn) for a, h in zip(kinds, is_hash, strict=True)),
        config.size("max_position_embeddings"),
        config.number("rms_norm_eps"),
        config.take("tie_word_embeddings", False),
        residual,
    )
    config.ignore(["index_*", "rope_theta", "compress_rope_theta"])  # unread where no layer is of that kind
    config.done()
    return result


def _ropes(config: Config, head_dim: int) -> tuple[Rope, Rope]:
    """The rope of sliding layers (never scaled), and that of compressed ones (YaRN, cos and sin unscaled)."""
    theta, compress_theta = config.number("rope_theta", 10000.0), config.number("compress_rope_theta", 160000.0)
    partial = config.take("partial_rotary_factor", None)
    dim = config.size("qk_rope_head_dim", int(head_dim * partial) if partial else None)
    if dim is None or dim % 2 or dim > head_dim:
        raise InputError(f'config.json: "qk_rope_head_dim" must be even and at most head_dim {head_dim}, not {dim!r}')
    nested = config.take("rope_parameters", {})
    if "main" in nested:
        main, compress = nested["main"], nested["compress"]
    else:
        scaling = nested or config.take("rope_scaling", {})
        main, compress = {}, {"attention_factor": 1.0} | scaling
        if "rope_type" not in compress and "type" not in compress:
            compress = {}
    config.ignore(["rope_scaling"])

    def make(parameters: dict[str, Any], theta: float) -> Rope:
        theta = parameters.get("rope_theta", theta)
        return scaled_rope(parameters, dim, theta, config.values, interleaved=True)

    return make(main, theta), make(compress, compress_theta)


def _layer_kinds(config: Config, layers: int) -> list[tuple[str, int]]:
    """(kind, ratio) of each layer, from `compress_ratios` (MTP layers' entries follow) or `layer_types`."""
    ratios = config.take("compress_ratios", None)
    types = config.take("layer_types", None)
    rates = config.take("compress_rates", {SPARSE: 4, HEAVY: 128})
    if types is None and ratios is None:
        raise InputError('config.json has neither "compress_ratios" nor "layer_types", one of which is needed')
    if types is None:
        of_ratio = {0: SLIDING, 4: SPARSE, 128: HEAVY}
        for ratio in ratios:
            if ratio not in of_ratio:
                raise InputError(f'config.json: "compress_ratios" has {ratio!r}, and only 0, 4 and 128 are known')
        types = [of_ratio[ratio] for ratio in ratios]
    if len(types) < layers:
        raise InputError(f"config.json names the attention of {len(types)} layers, but has {layers} layers")
    for kind in types[:layers]:
        if kind not in (SLIDING, SPARSE, HEAVY):
            raise InputError(f'config.json: "layer_types" has {kind!r}, which is not an attention of this family')
    return [(kind, rates.get(kind, 0)) for kind in types[:layers]]


def _hash_layers(config: Config, layers: int) -> list[bool]:
    """Which layers route by token id."""
    types = config.take("mlp_layer_types", None)
    count = config.take("num_hash_layers", 3)
    if types is None:
        return [i < count for i in range(layers)]
    if len(types) != layers or set(types) - {"hash_moe", "moe"}:
        raise InputError(f'config.json: "mlp_layer_types" must name "hash_moe" or "moe" for each of {layers} layers')
    return [kind == "hash_moe" for kind in types]


def _names() -> Names:
    """Canonical names -> released names, and the mixture of both worlds that transformers writes."""
    local = {
        "attention_norm": "attn_norm.weight",
        "ffn_norm": "ffn_norm.weight",
        "attention.q_a": "attn.wq_a.weight",
        "attention.q_norm": "attn.q_norm.weight",
        "attention.q_b": "attn.wq_b.weight",
        "attention.kv": "attn.wkv.weight",
        "attention.kv_norm": "attn.kv_norm.weight",
        "attention.sink": "attn.attn_sink",
        "attention.o_a": "attn.wo_a.weight",
        "attention.o_b": "attn.wo_b.weight",
        "attention.indexer.q": "attn.indexer.wq_b.weight",
        "attention.indexer.weights": "attn.indexer.weights_proj.weight",
        "ffn.router": "ffn.gate.weight",
        "ffn.router_bias": "ffn.gate.bias",
        "ffn.router_table": "ffn.gate.tid2eid",
    }
    for ours, theirs in (("compressor", "compressor"), ("indexer.compressor", "indexer.compressor")):
        for a, b in {"ape": "ape", "kv": "wkv.weight", "gate": "wgate.weight", "norm": "norm.weight"}.items():
            local[f"attention.{ours}.{a}"] = f"attn.{theirs}.{b}"
    for block, short in (("attention", "attn"), ("ffn", "ffn")):
        for part in ("fn", "base", "scale"):
            local[f"{block}_residual.{part}"] = f"hc_{short}_{part}"
    for part, w in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        local[f"ffn.shared.{part}"] = f"ffn.shared_experts.{w}.weight"
        local[f"ffn.experts.{{expert}}.{part}"] = f"ffn.experts.{{expert}}.{w}.weight"

    top = {"embed": "embed.weight", "head": "head.weight", "norm": "norm.weight"}
    top |= {f"head_residual.{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")}
    names = {ours: [theirs] for ours, theirs in top.items()}
    names |= {f"layers.{{layer}}.{ours}": [f"layers.{{layer}}.{theirs}"] for ours, theirs in local.items()}

    names["embed"].append("model.embed_tokens.weight")
    for alternatives in names.values():
        alternatives.append("model." + alternatives[0])
    names["head"].append("lm_head.weight")
    for part in ("fn", "base", "scale"):
        names[f"head_residual.{part}"].append(f"model.hc_head.hc_{part}")
    names["layers.{layer}.attention.kv_norm"].append("model.layers.{layer}.attn.norm.weight")
    return {ours: tuple(Source(name) for name in theirs) for ours, theirs in names.items()}


FAMILY = Family(spec, _names(), ignored=(r"(model\.)?mtp\..*",))

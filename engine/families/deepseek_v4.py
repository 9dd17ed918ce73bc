"""DeepSeek-V4 (Flash, Pro): hyper-connections, window attention with compressed entries, hash and score routing.

Two spellings of config.json and of the tensors' names are in circulation: the released checkpoints' and the one
that transformers' `save_pretrained` writes for fine-tunes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numoe.engine.families import common, gguf, latent
from numoe.engine.families.config import Config, nested, scaled_rope
from numoe.engine.families.names import Drafts, DSpark, Family, Gguf, GgufFile, Mtp, Names, Source
from numoe.engine.layers.attention.compressed import CompressedAttention
from numoe.engine.layers.attention.drafts import DraftAttention
from numoe.engine.layers.attention.indexer import Compressor, EntryIndexer
from numoe.engine.layers.block import Layer
from numoe.engine.layers.ffn import SwiGLU
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.residual import HyperConnections
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.router import Router
from numoe.engine.layers.spec import ModelSpec, decoder_layer
from numoe.quant.errors import InputError, shown

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
DEFAULTS = common.DEFAULTS | {
    "max_position_embeddings": 1048576,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "sliding_window": 128,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "compress_rope_theta": 160000.0,
    "compress_rates": {SPARSE: 4, HEAVY: 128},
    "partial_rotary_factor": 0.125,
}
_MOST_ITERATIONS = 1000
_MOST_DRAFTS = 64
_BLOCKS = {"attention": "attn", "ffn": "ffn"}


def read(config: Config) -> ModelSpec:
    layers = common.layer_count(config)
    attention, ffn, hashed = _blocks(config)
    residual = HyperConnections(
        config.size("hc_mult"), config.size("hc_sinkhorn_iters", most=_MOST_ITERATIONS), config.number("hc_eps")
    )
    kinds = [attention(*kind) for kind in _layer_kinds(config, layers)]
    is_hash = _hash_layers(config, layers)
    config.ignore(["index_*", "rope_theta", "compress_rope_theta"])  # unread where no layer is of that kind
    return common.model(
        config, [decoder_layer(a, hashed if h else ffn) for a, h in zip(kinds, is_hash, strict=True)], residual
    )


def _blocks(config: Config) -> tuple[Callable[[str, int], CompressedAttention], MixtureOfExperts, MixtureOfExperts]:
    """What makes the attention of a kind and ratio; and the mixtures that route by score and by token id."""
    heads, head_dim = config.size("num_attention_heads"), config.size("head_dim")
    config.expect("num_key_value_heads", 1)
    config.expect("norm_topk_prob", True)
    config.expect("scoring_func", "sqrtsoftplus")
    config.expect("topk_method", "noaux_tc")
    config.expect("n_shared_experts", 1)
    common.drafting_layers(config)
    config.ignore(["dspark_*", "expert_dtype"])  # of a head that only drafts tokens, see `_drafts`
    config.ignore(["vision_*", "image_*"])  # of towers, and of the markers where they put what they see

    plain, compressed = _ropes(config, head_dim)
    config.choice("hidden_act", "silu")
    width = config.size("moe_intermediate_size", also="intermediate_size")
    expert = SwiGLU(width, config.number("swiglu_limit"))
    vocab, scale = config.size("vocab_size"), config.number("routed_scaling_factor")
    experts = config.size("n_routed_experts", also="num_local_experts")
    ffn = common.mixture(config, experts, expert, Router("sqrtsoftplus", bias=True, scale=scale), expert)
    hashed = replace(ffn, router=Router("sqrtsoftplus", hash_vocab=vocab, scale=scale))
    out_groups = config.size("o_groups")
    if heads % out_groups:
        raise config.refusal("o_groups", f"{out_groups} does not divide {heads} attention heads")

    def attention(kind: str, ratio: int) -> CompressedAttention:
        compressor = indexer = None
        if kind == HEAVY:
            compressor = Compressor(ratio, head_dim, overlap=False)
        if kind == SPARSE:
            compressor = Compressor(ratio, head_dim, overlap=True)
            dim = config.size("index_head_dim")
            keys = Compressor(ratio, dim, overlap=True)
            indexer = EntryIndexer(config.size("index_n_heads"), dim, config.size("index_topk"), keys)
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

    return attention, ffn, hashed


def _mtp_layer(config: Config, spec: ModelSpec) -> Layer:
    attention, ffn, _ = _blocks(config)
    return decoder_layer(attention(SLIDING, 0), ffn)


def _drafts(config: Config, spec: ModelSpec, count: int) -> Drafts:
    """A DSpark head of so many layers, where what the config says of it is all known."""
    attention, ffn, _ = _blocks(config)
    kind = DraftAttention(**vars(attention(SLIDING, 0)))
    layers = len(spec.layers)
    known = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
    if unknown := [key for key in config.values if key.startswith("dspark_") and key not in known]:
        raise config.refusal(unknown[0], "is not known")
    if any((config.listing("compress_ratios") or [])[layers : layers + count]):
        raise config.refusal("compress_ratios", "has windows for drafting layers")
    size, noise = config.size(known[0], most=_MOST_DRAFTS), config.count(known[1])
    targets, rank = config.listing(known[2]), config.size(known[3])
    if noise >= spec.vocab:
        raise config.refusal(known[1], f"is {noise}, and there are {spec.vocab} tokens")
    if not targets or any(type(target) is not int or not 0 <= target < layers for target in targets):
        raise config.refusal(known[2], f"must be numbers of layers, not {shown(targets)}")
    return Drafts((decoder_layer(kind, ffn),) * count, size, noise, tuple(targets), rank, kind.window)


def _ropes(config: Config, head_dim: int) -> tuple[Rope, Rope]:
    """The rope of sliding layers (never scaled), and that of compressed ones (YaRN, cos and sin unscaled)."""
    if config.values.get("partial_rotary_factor") is None and config.values.get("qk_rope_head_dim") is not None:
        dim = config.size("qk_rope_head_dim")
    else:
        dim = int(head_dim * config.number("partial_rotary_factor"))
    config.ignore(["qk_rope_head_dim", "partial_rotary_factor"])
    if dim % 2 or not 0 < dim <= head_dim:
        raise config.refusal("qk_rope_head_dim", f"must be even and at most head_dim {head_dim}, not {dim}")
    scaling, parameters = config.table("rope_scaling"), config.table("rope_parameters")
    inner = Config(parameters, {}, config.where, lambda key: config.spelt(f"rope_parameters.{key}"))
    main, compress = inner.table("main"), inner.table("compress")
    if main and compress and scaling:
        raise config.refusal("rope_parameters", 'says otherwise than "rope_scaling"; keep one of the two')
    if not (main and compress):
        # One table for both kinds of layers: the thetas are beside it.
        main = {}
        compress = {k: v for k, v in (scaling or parameters).items() if k not in ("main", "compress", "rope_theta")}
        if "yarn" in (compress.get("rope_type"), compress.get("type")):
            compress = {"attention_factor": 1.0} | compress

    def make(name: str, values: dict[str, Any], theta: str) -> Rope:
        theta_here = {"rope_theta": config.number(theta)} | {k: v for k, v in values.items() if v is not None}
        return scaled_rope(config, nested(config, name, theta_here), dim, interleaved=True, whole=head_dim)

    return make("rope_parameters.main", main, "rope_theta"), make("rope_scaling", compress, "compress_rope_theta")


def _layer_kinds(config: Config, layers: int) -> list[tuple[str, int]]:
    """(kind, ratio) of each layer, from `layer_types` or `compress_ratios`; entries of MTP layers may follow."""
    of_ratio = {0: SLIDING, 4: SPARSE, 128: HEAVY}
    kinds = config.kinds("layer_types", layers, of_ratio.values(), longer=True)
    if kinds is None:
        ratios = config.kinds("compress_ratios", layers, of_ratio, longer=True)
        if ratios is None:
            raise InputError(f'{config.where} has neither "compress_ratios" nor "layer_types", one of which is needed')
        kinds = [of_ratio[ratio] for ratio in ratios]
    config.ignore(["compress_ratios"])
    rates = config.table("compress_rates") or config.defaults["compress_rates"]
    for kind in sorted({SPARSE, HEAVY} & set(kinds)):
        if type(rates.get(kind)) is not int or not 0 < rates[kind] < 1 << 20:
            raise config.refusal("compress_rates", f"has {shown(rates.get(kind))} for {kind}, not a positive integer")
    return [(kind, rates.get(kind, 0)) for kind in kinds]


def _hash_layers(config: Config, layers: int) -> list[bool]:
    """Which layers route by token id."""
    count = config.count("num_hash_layers")
    kinds = config.kinds("mlp_layer_types", layers, ("hash_moe", "moe"), longer=True)
    return [i < count for i in range(layers)] if kinds is None else [kind == "hash_moe" for kind in kinds]


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
    for block, short in _BLOCKS.items():
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


# What follows is llama.cpp's `deepseek4` (src/models/deepseek4.cpp, conversion/deepseek.py).
_SQRT_SOFTPLUS = 4


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    if config["scoring_func"] == _SQRT_SOFTPLUS:
        config["scoring_func"] = "sqrtsoftplus"
    config["qk_rope_head_dim"] = file.keys.get("rope.dimension_count")
    limits = [file.keys.get(f"swiglu_clamp_{part}") for part in ("exp", "shexp")]
    said = {repr(one) for limit in limits for one in (limit if isinstance(limit, list) else [limit]) if one is not None}
    if len(said) != 1:
        raise InputError(f"{file.path}: swiglu_clamp_exp and swiglu_clamp_shexp must be one number for all layers")
    config["swiglu_limit"] = limits[0][0] if isinstance(limits[0], list) and limits[0] else limits[0]
    streams = file.keys.get("embedding_length_out")
    if streams is not None and streams != config["hidden_size"] * config["hc_mult"]:
        raise InputError(f"{file.path}: embedding_length_out is {shown(streams)}, not that of all streams together")


def _gguf_names() -> Names:
    below: dict[str, str | tuple[str | Source, ...]] = {
        "attention.q_a": "attn_q_a", "attention.q_norm": "attn_q_a_norm", "attention.q_b": "attn_q_b",
        "attention.kv": "attn_kv", "attention.kv_norm": "attn_kv_a_norm",
        "attention.sink": ("attn_sinks.weight",), "attention.o_a": "attn_output_a", "attention.o_b": "attn_output_b",
        "attention.indexer.q": "indexer.attn_q_b", "attention.indexer.weights": "indexer.proj",
        "ffn.router_bias": ("exp_probs_b.bias", "exp_probs_b"), "ffn.router_table": ("ffn_gate_tid2eid.weight",),
    }  # fmt: skip
    for part in ("ape", "kv", "gate", "norm"):
        below[f"attention.compressor.{part}"] = (f"attn_compressor_{part}.weight",)
        spellings = "indexer_compressor", "indexer.compressor", "indexer.compress"
        below[f"attention.indexer.compressor.{part}"] = tuple(f"{one}_{part}.weight" for one in spellings)
    for part in ("fn", "base", "scale"):
        below |= {f"{ours}_residual.{part}": (f"hc_{theirs}_{part}.weight",) for ours, theirs in _BLOCKS.items()}
    head = {f"head_residual.{part}": (Source(f"output_hc_{part}.weight"),) for part in ("fn", "base", "scale")}
    return {**gguf.names(below), **head}


GGUF = Gguf(
    "deepseek4",
    _gguf_names(),
    latent.INDEXER_KEYS
    | latent.MIXTURE_KEYS
    | {
        "attention.q_lora_rank": "q_lora_rank",
        "attention.sliding_window": "sliding_window",
        "attention.output_group_count": "o_groups",
        "attention.output_lora_rank": "o_lora_rank",
        "attention.compress_rope_freq_base": "compress_rope_theta",
        "attention.compress_ratios": "compress_ratios",
        "hyper_connection.count": "hc_mult",
        "hyper_connection.sinkhorn_iterations": "hc_sinkhorn_iters",
        "hyper_connection.epsilon": "hc_eps",
        "hash_layer_count": "num_hash_layers",
    },
    unread=("feed_forward_length", "rope.dimension_count", "swiglu_clamp_exp", "swiglu_clamp_shexp",
            "embedding_length_out"),
    settle=_settle,
)  # fmt: skip
_MTP = Mtp(
    {
        **{one: (Source(f"mtp.0.{one}.weight"),) for one in ("e_proj", "h_proj", "enorm", "hnorm", "norm")},
        **{f"head_residual.{part}": (Source(f"mtp.0.hc_head_{part}"),) for part in ("fn", "base", "scale")},
    },
    ("layers.{layer}.", "mtp.0."),
    _mtp_layer,
    normed=False,
)
_DSPARK = DSpark(
    {
        "main_proj": (Source("mtp.0.main_proj.weight"),),
        "main_norm": (Source("mtp.0.main_norm.weight"),),
        "norm": (Source("mtp.{last}.norm.weight"),),
        **{f"head_residual.{part}": (Source(f"mtp.{{last}}.hc_head_{part}"),) for part in ("fn", "base", "scale")},
        "markov.embed": (Source("mtp.{last}.markov_head.markov_w1.weight"),),
        "markov.head": (Source("mtp.{last}.markov_head.markov_w2.weight"),),
        "confidence": (Source("mtp.{last}.confidence_head.proj.weight"),),
    },
    ("layers.{layer}.", "mtp.{number}."),
    drafts=_drafts,
)
FAMILY = Family(
    "DeepSeek-V4-Flash, V4-Pro: sliding, CSA and HCA attention, hyper-connections, hash and score routing",
    ("deepseek_v4",),
    read,
    _names(),
    DEFAULTS,
    # Layers that route by token id have a bias that nobody reads, and one for what is no text.
    (
        r"(model\.)?mtp\..*",
        r"blk\.\d+\.exp_probs_b_vl\.bias",
        r"(vision|aligner)\..*",
        r"image_.*",
        r"(model\.)?layers\.\d+\.ffn\.gate\.bias(_vl)?",
        *common.IGNORED,
    ),
    (GGUF,),
    mtp=_MTP,
    dspark=_DSPARK,
)

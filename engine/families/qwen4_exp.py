"""Qwen3.8-Flash-Next: Qwen3.5's layers in gated streams, attention to chosen blocks, and n-grams looked up on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import accumulate
from math import isqrt
from typing import Any

from numoe.engine.families import common, deltanet, gguf
from numoe.engine.families.config import Config, partial_rope
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.attention.indexer import BlockIndexer
from numoe.engine.layers.block import Block
from numoe.engine.layers.ngram import NgramEmbedding
from numoe.engine.layers.residual import GatedStreams, PlainResidual
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError, shown

DEFAULTS = deltanet.DEFAULTS | {
    "partial_rotary_factor": 1.0,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "norm_topk_prob": True,
    "output_gate_type": None,
    "hc_count": 4,
    "hc_lowrank": 320,
    "ple_embed_dim": None,
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 512,
    "seed": 1234,
}
INDEXED = "indexed_attention"
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def read(config: Config) -> ModelSpec:
    config.expect("attn_output_gate", True)
    config.expect("mamba_ssm_dtype", "float32")
    config.ignore(["mtp_*", "intermediate_size", "number_of_conv_states"])
    gate = config.take("output_gate_type", null=None) and config.choice("output_gate_type", "silu", "sigmoid")
    net = replace(deltanet.delta_net(config), sigmoid_gate=gate == "sigmoid")
    indexer = _indexer(config, partial_rope(config, config.size("head_dim")))
    attention = replace(deltanet.attention(config), indexer=indexer)
    of_kind = {deltanet.LINEAR: net, **dict.fromkeys((common.FULL, INDEXED), attention)}
    moe = deltanet.mixture(config, normalize=config.flag("norm_topk_prob"))
    residual = GatedStreams(config.size("hc_count"), config.size("hc_lowrank"))
    looked_up = _ngrams(config, residual.streams)
    layers = [
        (*looked_up.get(i, ()), Block("attention", mixer, None), Block("ffn", moe, None))
        for i, mixer in enumerate(deltanet.each_by_kind(config, of_kind))
    ]
    return replace(common.model(config, layers, residual), norm=None)


def _indexer(config: Config, rope: Rope) -> BlockIndexer:
    config.expect("indexer_kv_heads", 1)
    heads, dim, tokens, ratio = (
        config.size(f"indexer_{name}") for name in ("n_heads", "head_dim", "budget", "compress_ratio")
    )
    if tokens % ratio:
        raise config.refusal("indexer_budget", f"is {tokens}, which is no multiple of the {ratio} tokens of a block")
    if rope.dim > dim:
        raise config.refusal("indexer_head_dim", f"is {dim}, and rotary embeddings turn {rope.dim} channels")
    return BlockIndexer(heads, dim, tokens // ratio, ratio, rope)


def _ngrams(config: Config, streams: int) -> dict[int, tuple[Block]]:
    """The blocks of n-grams, by their layers' numbers, which `ple_layer_ids` counts from one."""
    listed = config.listing("ple_layer_ids") or []
    longest, per = config.size("ngram_size", most=8), config.size("heads_per_ngram", most=64)
    hidden, kernel, parts = (
        config.size("hidden_size"),
        config.size("ple_conv_kernel_size"),
        config.size("split_ngram_parts"),
    )
    width, heads = config.size("ple_embed_dim", null=hidden), (longest - 1) * per
    divisor, seed = config.size("make_ngram_vocab_size_divisible_by"), config.count("seed")
    least, told = config.size("ngram_vocab_size_base", most=1 << 31), config.listing("ple_head_vocab_sizes")
    multipliers = config.listing("ple_layer_multipliers")
    if not listed:
        return {}
    layers = common.layer_count(config)
    if wrong := [one for one in listed if type(one) is not int or not 0 < one <= layers]:
        raise config.refusal("ple_layer_ids", f"has {shown(wrong[0])}, and layers are 1 to {layers}")
    if longest < 2 or width % heads:
        raise config.refusal("ple_embed_dim", f"is {width}, which {heads} heads of n-grams cannot share")
    for key, numbers, count in (("head_vocab_sizes", told, heads), ("layer_multipliers", multipliers, longest)):
        if numbers and (len(numbers) != count or any(type(one) is not int or one < 1 for one in numbers)):
            raise config.refusal(f"ple_{key}", f"must be {count} positive whole numbers, not {shown(numbers)}")
    end = config.values.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if type(end) is not int:
        raise config.refusal("eos_token_id", f"is {shown(end)}, and n-grams begin anew after that token")
    made, layer_ids = {}, sorted(set(listed))
    for number, layer in enumerate(layer_ids):
        sizes = tuple(told or _primes(least, heads * len(layer_ids))[heads * number : heads * (number + 1)])
        by = tuple(multipliers or _multipliers(config.size("vocab_size"), longest, number, seed))
        rows = -(-sum(sizes) // divisor) * divisor
        kind = NgramEmbedding(streams, hidden, sizes, by, width, kernel, end, rows, parts)
        made[layer - 1] = (Block("ngram", kind, None, join=PlainResidual()),)
    return made


def _multipliers(vocab: int, count: int, number: int, seed: int) -> list[int]:
    """Odd, and small enough that ids times them stay below 2^63: splitmix64 of numbers that the layer's begins."""

    def mixed(value: int) -> int:
        value = (value + _GAMMA) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)

    half, first = max(1, ((1 << 63) - 1) // vocab // 2), seed + 10007 * number
    return [2 * (mixed((first + _GAMMA * (i + 1)) & _MASK) % half) + 1 for i in range(count)]


@cache
def _primes(least: int, count: int) -> list[int]:
    """The first ones from `least` on."""
    found: list[int] = []
    candidate = max(2, least)
    while len(found) < count:
        if all(candidate % divisor for divisor in range(2, isqrt(candidate) + 1)):
            found.append(candidate)
        candidate += 1
    return found


def _mixer(place: str) -> dict[str, str]:
    return {"norm": f"{place}.hc_norm.weight", "down": f"{place}.input_mix_weight_down.weight",
            "up": f"{place}.input_mix_weight_up.weight", "inject": f"{place}.block_inject_weight.weight"}  # fmt: skip


def _names() -> Names:
    table = dict(deltanet.names({"qkv": "in_proj_qkv", "gate": "in_proj_z", "b": "in_proj_b", "a": "in_proj_a"}))
    del table["norm"]
    table |= {
        f"head_residual.{ours}": (Source(f"model.{theirs}"),)
        for ours, theirs in _mixer("hyper_connection_mixer").items()
    }
    layer = {
        **{f"attention_residual.{ours}": theirs for ours, theirs in _mixer("attn_hyper_connection").items()},
        **{f"ffn_residual.{ours}": theirs for ours, theirs in _mixer("mlp_hyper_connection").items()},
        **{f"ngram.{name}": f"ple.{name}_proj.weight" for name in ("key", "value")},
        **{f"ngram.{name}_norm": f"ple.norm_{name}.weight" for name in ("key", "query", "conv")},
        **{f"attention.indexer.{name}_norm": f"self_attn.indexer.{name}_layernorm.weight" for name in "qk"},
        "ngram.conv": "ple.conv1d.weight",
        "ngram.table.{part}": "ple.ple_embedding.ngram_embedding.shard_{part}.weight",
    }
    table |= {
        f"layers.{{layer}}.{ours}": (Source(f"model.layers.{{layer}}.{theirs}"),) for ours, theirs in layer.items()
    }
    both = Source("model.layers.{layer}.self_attn.indexer.index_qk_proj.weight", fused=("q", "k"))
    table |= dict.fromkeys((f"layers.{{layer}}.attention.indexer.{name}" for name in "qk"), (both,))
    return common.made(table, r".*(residual\.norm|ngram\..*_norm|indexer\..*_norm)", lambda weight: weight + 1)


def _gguf_names() -> Names:
    table = dict(deltanet.gguf_names({"b": "ssm_beta", "a": "ssm_alpha"}))
    of = {"norm": "norm", "down": "down", "up": "up", "inject": "inject"}
    layer = {
        **{f"attention_residual.{ours}": f"hc_attn_{theirs}.weight" for ours, theirs in of.items()},
        **{f"ffn_residual.{ours}": f"hc_ffn_{theirs}.weight" for ours, theirs in of.items()},
        **{f"attention.indexer.{name}": f"indexer.{name}_proj.weight" for name in "qk"},
        **{f"attention.indexer.{name}_norm": f"indexer.{name}_norm.weight" for name in "qk"},
        **{f"ngram.{name}": f"ple_{name}.weight" for name in ("key", "value")},
        **{f"ngram.{name}_norm": f"ple_norm_{name}.weight" for name in ("key", "query", "conv")},
        "ngram.conv": "ple_conv1d.weight",
    }
    table |= {f"layers.{{layer}}.{ours}": (Source(f"blk.{{layer}}.{theirs}"),) for ours, theirs in layer.items()}
    table |= {f"head_residual.{ours}": (Source(f"output_hc_{ours}.weight"),) for ours in of}
    return table | {"layers.{layer}.ngram.table.{part}": (Source(_TABLE),)}


_TABLE = "per_layer_token_embd.weight"
_NGRAM_KEYS = {
    "ple.ngram_size": "ngram_size",
    "ple.heads_per_ngram": "heads_per_ngram",
    "ple.conv_kernel": "ple_conv_kernel_size",
    "ple.eos_token_id": "eos_token_id",
    "ple.layer_multipliers": "ple_layer_multipliers",
    "ple.head_vocab_sizes": "ple_head_vocab_sizes",
    "embedding_length_per_layer_input": "ple_embed_dim",
}


def _settle(config: dict[str, Any], file: GgufFile) -> None:
    """One layer at most has n-grams, and their whole table is one tensor."""
    deltanet.settle(config, file)
    config["indexer_compress_ratio"] = gguf.largest(file.keys.get("attention.compress_ratios"))
    layers = file.keys.get("ple.layers") or []
    if not isinstance(layers, list) or len(layers) > 1 or any(type(one) is not int for one in layers):
        raise InputError(f"{file.path}: ple.layers is {shown(layers)}, and one layer can have n-grams in such a file")
    config["ple_layer_ids"] = [one + 1 for one in layers]
    if not layers:
        for key in _NGRAM_KEYS.values():
            del config[key]
        return
    sizes, width = config["ple_head_vocab_sizes"], config["ple_embed_dim"]
    if not isinstance(sizes, list) or any(type(one) is not int or one < 1 for one in sizes) or type(width) is not int:
        raise InputError(f"{file.path}: ple.head_vocab_sizes must be positive numbers; convert the model again")
    gguf.expect(file, "ple.head_offsets", list(accumulate(sizes[:-1], initial=0)))
    config["ple_embed_dim"] = width * len(sizes)
    rows = file.shapes.get(_TABLE, (0,))[0]
    config |= {"split_ngram_parts": 1, "make_ngram_vocab_size_divisible_by": max(rows, 1)}


GGUF = Gguf(
    "qwen4exp",
    _gguf_names(),
    deltanet.GGUF_KEYS
    | gguf.SHARED_EXPERT_KEYS
    | _NGRAM_KEYS
    | {
        "hyper_connection.count": "hc_count",
        "hyper_connection.low_rank": "hc_lowrank",
        "attention.indexer.head_count": "indexer_n_heads",
        "attention.indexer.key_length": "indexer_head_dim",
        "attention.indexer.top_k": "indexer_budget",
    },
    optional=deltanet.GGUF_OPTIONAL | dict.fromkeys(_NGRAM_KEYS),
    given={"model_type": "qwen4_exp_text", "output_gate_type": "sigmoid"},  # as llama.cpp's src/models/qwen4exp.cpp
    unread=(*deltanet.GGUF_UNREAD, "attention.compress_ratios", "ple.layers", "ple.head_offsets", "ple.image_token_id"),
    settle=_settle,
    arranged=lambda file: {"deltanet": {"tiled": True}},
)
FAMILY = Family(
    "Qwen3.8-Flash-Next (text): gated streams, attention to chosen blocks, n-grams looked up on disk",
    ("qwen4_exp", "qwen4_exp_text"),
    read,
    common.also_below(_names(), "model.", "model.language_model."),
    DEFAULTS,
    # What the config says of hashes is stored once more.
    (r"mtp\..*", r"model\.visual\..*", r".*\.ple_embedding\.(layer_multipliers|ngram_heads_.*)", *common.IGNORED),
    (GGUF,),
)

"""GGUF files: their metadata said as a config.json, so that there is one reading of every architecture.

What an architecture has of its own stands beside its family, as `Gguf`; here is what they have in common: the keys, the
tensors' names and llama.cpp's meaning of what is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nextafter
from typing import Any

from numoe.engine.families.config import MOST_LAYERS, Arrangement
from numoe.engine.families.names import Family, Gguf, GgufFile, Names, Source
from numoe.engine.layers.rope import DividedFrequencies
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError, shown

ROPE_FREQS = "rope_freqs.weight"
"""What converters make of Llama 3's `rope_scaling`: the divisor of each pair's frequency, (head_dim / 2,)."""
DIVISORS = (ROPE_FREQS, "rope_factors_short.weight")
"""Tensors of such numbers; the second is of LongRoPE."""

# Key below the architecture's name -> config.json key.
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_SCALING_KEYS = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_attn_factor": "attention_factor",
}
YARN_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
# Keys that must be the size of a head, unless the architecture reads them.
_HEAD_SIZES = ("attention.value_length", "rope.dimension_count")
# Keys that restate others, and what others say when they say nothing: llama.cpp's defaults.
_UNREAD = ("rope.scaling.finetuned", "nextn_predict_layers")
_NEUTRAL = {
    "attention.causal": True,
    "expert_gating_func": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
_OF_EACH_LAYER = "attention.head_count", "attention.head_count_kv", "feed_forward_length"
"""What llama.cpp reads as one number or as one for each layer, whatever the architecture."""
_OPTIONAL: dict[str, Any] = {"rope.freq_base": 10000.0, "attention.head_count_kv": None, "attention.key_length": None}
"""Where a file leaves these out, llama.cpp takes the same for every architecture."""


def chosen(families: Sequence[Family], architecture: Any, file: GgufFile) -> tuple[Family, Gguf] | None:
    """The family that a file of this architecture is of; None when none is known."""
    told = [(family, gguf) for family in families for gguf in family.gguf if gguf.architecture == architecture]
    told = [(family, gguf) for family, gguf in told if all(mark(file) for mark in gguf.marks)]
    return max(told, key=lambda one: len(one[1].marks), default=None)


def read(family: Family, gguf: Gguf, file: GgufFile) -> tuple[dict[str, Any], Family, ModelSpec]:
    """The config.json that a file amounts to, its family with GGUF's names, and its spec.

    Raises:
        InputError: one of its settings is not supported, or a key is missing.
    """
    prefix = f"{gguf.architecture}."
    drafting = _drafting(file)
    config = _config(family, gguf, file, len(drafting))
    spellings = {ours: prefix + theirs for theirs, ours in {**_KEYS, **gguf.keys}.items()}
    spellings |= {f"rope_scaling.{ours}": f"{prefix}rope.scaling.{theirs}" for theirs, ours in _SCALING_KEYS.items()}
    also = {"rope_scaling": "rope.scaling.type", "rope_scaling.short_mscale": "rope.scaling.attn_factor"}
    spellings |= {ours: prefix + theirs for ours, theirs in also.items()}
    spellings["rope_scaling.short_factor"] = DIVISORS[1]
    ignored = [*family.ignored, *(rf"blk\.{number}\..*" for number in drafting), r"(v|mm|mtp|nextn)\..*"]
    arranged = gguf.arranged(file)
    if arranged.get("rope", {}).get("scaling") is not None:
        _check_divisors(config, file)
        ignored.append(re.escape(ROPE_FREQS))
    theirs = replace(family, names=gguf.names, ignored=tuple(ignored), arranged=arranged)
    spec = theirs.spec(config, str(file.path), lambda key: spellings.get(key, key))
    for key in _HEAD_SIZES:
        head_dim = _head_dim(config)
        if key not in gguf.unread and file.keys.get(key, head_dim) != head_dim:
            raise InputError(
                f"{file.path}: {prefix}{key} is {shown(file.keys[key])}, and only the head size {head_dim} is supported"
            )
    return config, theirs, spec


def expect(file: GgufFile, key: str, only: Any) -> None:
    """Of what an architecture can say and its family always means. Raises InputError where it says something else."""
    if key in file.keys and file.keys[key] != only:
        raise InputError(f"{file.path}: {key} is {shown(file.keys[key])}, and only {shown(only)} is supported here")


def neighbours(file: GgufFile) -> Arrangement:
    """Of converters that reorder the rows of queries and keys so that rotated channels are neighbours.

    Rotating interleaved pairs is then the same computation.
    """
    return {"rope": {"interleaved": True, **divided(file).get("rope", {})}}


def divided(file: GgufFile) -> Arrangement:
    """Of files whose frequencies may be divided by numbers of their own."""
    return {} if file.divisors is None else {"rope": {"scaling": DividedFrequencies(tuple(file.divisors))}}


def long(config: dict[str, Any], file: GgufFile, factor: str) -> None:
    """LongRoPE, where a file has factors of it; `factor`: what config.json calls that of cos and sin."""
    known = file.keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    if file.divisors is None:
        expect(file, "rope.scaling.attn_factor", 1.0)
        return
    config["rope_scaling"] = {
        "rope_type": "longrope",
        "short_factor": list(file.divisors),
        factor: file.keys.get("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": known,
    }


def rotate_first(config: dict[str, Any], file: GgufFile) -> None:
    """Of architectures that rotate the first `rope.dimension_count` channels of a head."""
    config["partial_rotary_factor"] = rotated_part(config, file, "rope.dimension_count")


def rotated_part(config: Mapping[str, Any], file: GgufFile, key: str) -> float:
    """What part of a head has as many channels as a key says. Raises InputError when it has fewer."""
    head_dim = _head_dim(config)
    rotary = file.keys.get(key, head_dim)
    if type(rotary) is not int or not 0 < rotary <= head_dim:
        raise InputError(f"{file.path}: {key} is {shown(rotary)}, and heads have {head_dim} channels")
    return nextafter(rotary / head_dim, 2)  # of which a head has exactly that many


def _check_divisors(config: Mapping[str, Any], file: GgufFile) -> None:
    if "rope_scaling" in config:
        raise InputError(f"{file.path} has both {ROPE_FREQS} and rope scaling in its metadata, which is not supported")
    pairs, divisors = _head_dim(config) // 2, file.divisors or ()
    if len(divisors) != pairs or min(divisors) <= 0:
        raise InputError(f"{file.path}: {ROPE_FREQS} must be {pairs} positive numbers; convert the model again")


def _head_dim(config: Mapping[str, Any]) -> int:
    """The size of a head; 0 where the config does not tell."""
    hidden, heads, head_dim = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is None and type(hidden) is int and type(heads) is int and heads > 0:
        head_dim = hidden // heads
    return head_dim if type(head_dim) is int else 0


def _drafting(file: GgufFile) -> Sequence[int]:
    """The numbers of the blocks after the last layer, which only draft tokens.

    `block_count` counts them. Files that do not say how many there are have them told by their tensors.
    """
    blocks, count = file.keys.get("block_count"), file.keys.get("nextn_predict_layers")
    if type(blocks) is not int:
        return ()
    if count is None:
        named = (re.match(r"blk\.(\d+)\.nextn\.", name) for name in file.shapes)
        first = min((int(match[1]) for match in named if match), default=blocks)
        return range(min(first, blocks), blocks)
    if type(count) is not int or not 0 <= count < max(blocks, 1):
        raise InputError(f"{file.path}: nextn_predict_layers is {shown(count)}, and there are {shown(blocks)} blocks")
    block = f"blk.{blocks - count}."
    if any(name.startswith(block) for name in file.shapes) and not any(
        name.startswith(f"{block}nextn.") for name in file.shapes
    ):
        return ()  # the key was kept and the blocks left out: these are layers
    return range(blocks - count, blocks)


def _alike(value: Any, layers: int) -> Any:
    """What a list says of every layer, if that is one number; else the value itself."""
    numbers = isinstance(value, list) and len(value) >= layers and all(type(one) is int for one in value)
    return value[0] if numbers and len(set(value[:layers])) == 1 else value


def _config(family: Family, gguf: Gguf, file: GgufFile, drafting: int) -> dict[str, Any]:
    path, shapes, left = file.path, file.shapes, dict(file.keys)
    config: dict[str, Any] = {"model_type": family.model_types[0], **gguf.given}
    config["tie_word_embeddings"] = "output.weight" not in shapes
    biased = [name for name in shapes if re.fullmatch(r"blk\.\d+\.attn_q\.bias", name)]
    config["attention_bias"] = bool(biased)
    if "o" in gguf.biases and any(name.replace("attn_q", "attn_output") not in shapes for name in biased):
        raise InputError(f"{path} has biases on queries, keys and values alone, which is not supported yet")
    if "blk.0.ffn_gate.bias" in shapes:
        config["mlp_bias"] = True
    if shapes.get("token_embd.weight"):
        left.setdefault("vocab_size", shapes["token_embd.weight"][0])
    optional = {**_OPTIONAL, **gguf.optional}
    for key, name in {**_KEYS, **gguf.keys}.items():
        if key in gguf.unread:
            continue
        if key not in left and key not in optional:
            raise InputError(f'{path} has no key "{gguf.architecture}.{key}", which this architecture needs')
        config[name] = left.pop(key, optional.get(key))
    if type(config["num_hidden_layers"]) is not int:
        raise InputError(f"{path}: {gguf.architecture}.block_count is {shown(config['num_hidden_layers'])}, no number")
    config["num_hidden_layers"] -= drafting
    # A factor without a kind is linear, as in llama.cpp.
    kind = left.get("rope.scaling.type", "linear" if "rope.scaling.factor" in left else "none")
    scaling = {name: left.pop(f"rope.scaling.{key}", None) for key, name in _SCALING_KEYS.items()}
    if scaling["attention_factor"] is None:
        del scaling["attention_factor"]  # what is left out differs between families
    if kind != "none":
        config["rope_scaling"] = scaling | {"rope_type": kind}
        if kind == "linear":
            del config["rope_scaling"]["original_max_position_embeddings"]
    gguf.settle(config, file)
    for name in ({**_KEYS, **gguf.keys}[key] for key in _OF_EACH_LAYER):
        if name in config:
            config[name] = _alike(config[name], config["num_hidden_layers"])
    read_elsewhere = (*_UNREAD, *_HEAD_SIZES, *gguf.unread)
    for key, value in left.items():
        values = value if isinstance(value, list) else [value]  # of each layer
        if all(one in (0, False, None, "", _NEUTRAL.get(key)) for one in values) or key in read_elsewhere:
            continue
        raise InputError(f'{path}: GGUF key "{gguf.architecture}.{key}" is not understood and could change the results')
    return config


# The usual tensors: canonical name below a layer -> name below blk.N, to which .weight and .bias belong.
USUAL = {
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "ffn.router": "ffn_gate_inp",
    "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v", "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
    "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down",
    "ffn.shared.gate": "ffn_gate_shexp", "ffn.shared.up": "ffn_up_shexp", "ffn.shared.down": "ffn_down_shexp",
}  # fmt: skip
NORMS_AFTER = {"attention_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"}
"""Of those after blocks."""
GATE_IN_UP: dict[str, str | tuple[str | Source, ...]] = {
    f"ffn.{part}": (Source("ffn_up.weight", fused=("gate", "up")),) for part in ("gate", "up")
}
"""Of architectures whose gate and up are one."""
MAMBA2: dict[str, str | tuple[str | Source, ...]] = {
    "attention.in": "ssm_in", "attention.conv": "ssm_conv1d", "attention.decay": ("ssm_a",),
    "attention.skip": ("ssm_d",), "attention.dt_bias": ("ssm_dt.bias",), "attention.norm": "ssm_norm",
    "attention.o": ("attn_output.weight", "ssm_out.weight"), "attention.o_bias": ("attn_output.bias", "ssm_out.bias"),
}  # fmt: skip
_QKV = ("q", "k", "v")


def names(more: Mapping[str, str | tuple[str | Source, ...]] = {}) -> Names:
    """The full table: the usual names and `more`, where a tuple holds whole names below blk.N that may be used."""

    def below(one: str | Source) -> Source:
        source = Source(one) if isinstance(one, str) else one
        return replace(source, name=f"blk.{{layer}}.{source.name}")

    table: dict[str, tuple[Source, ...]] = {
        ours: (Source(f"{theirs}.weight"),)
        for ours, theirs in {"embed": "token_embd", "norm": "output_norm", "head": "output"}.items()
    }
    for ours, theirs in (*USUAL.items(), *more.items()):
        if isinstance(theirs, tuple):
            table[f"layers.{{layer}}.{ours}"] = tuple(map(below, theirs))
            continue
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            table[f"layers.{{layer}}.{ours}{suffix}"] = (Source(f"blk.{{layer}}.{theirs}.{kind}"),)
    for n in _QKV:
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            fused = Source(f"blk.{{layer}}.attn_qkv.{kind}", fused=tuple(f"{one}{suffix}" for one in _QKV))
            table[f"layers.{{layer}}.attention.{n}{suffix}"] += (fused,)
    for n in ("gate", "up", "down"):
        stacked = Source(f"blk.{{layer}}.ffn_{n}_exps.weight", stacked=True)
        one = Source(f"blk.{{layer}}.ffn_{n}.{{expert}}.weight")
        both = (Source("blk.{layer}.ffn_gate_up_exps.weight", True, ("gate", "up")),) if n != "down" else ()
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{n}"] = (stacked, one, *both)
        table[f"layers.{{layer}}.ffn.experts.{n}_bias"] = (Source(f"blk.{{layer}}.ffn_{n}_exps.bias"),)
    return table


SOFTMAX, SIGMOID = 1, 2
"""Values of `expert_gating_func`."""
EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Keys of routed experts -> config.json's, as most families spell them."""
SHARED_EXPERT_KEYS = EXPERT_KEYS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
"""The same where there is one that every token takes."""


def layer_kinds(config: Mapping[str, Any], file: GgufFile, parts: Mapping[str, str], other: str) -> list[str]:
    """What each layer is: the first of these parts, by their tensors' names, that it has tells; `other` where none."""
    count = min(config["num_hidden_layers"], MOST_LAYERS)  # more are refused later on
    return [
        next((kind for part, kind in parts.items() if f"blk.{i}.{part}.weight" in file.shapes), other)
        for i in range(count)
    ]


def windows(config: dict[str, Any], file: GgufFile, every: int, full: int) -> None:
    """Say which layers have windows, and each kind's rope, as `layer_types` and `rope_parameters`.

    every, full: of so many layers the one of this number sees all, where the file does not say it.
    """
    window, pattern = config.get("sliding_window"), file.keys.get("attention.sliding_window_pattern", every)
    count = min(config["num_hidden_layers"], MOST_LAYERS)
    if not isinstance(pattern, list):
        if type(pattern) is not int or pattern < 1:
            raise InputError(f"{file.path}: attention.sliding_window_pattern is {shown(pattern)}, no number of layers")
        pattern = [i % pattern != full % pattern for i in range(count)]
    config["layer_types"] = ["sliding_attention" if window and slides else "full_attention" for slides in pattern]
    theta = config.pop("rope_theta")
    scaling = config.pop("rope_scaling", {"rope_type": "default"})
    config["rope_parameters"] = {
        "full_attention": scaling | {"rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": file.keys.get("rope.freq_base_swa", theta)},
    }


WINDOW_KEYS = "attention.sliding_window_pattern", "rope.freq_base_swa"
"""What `windows` reads."""


def largest(value: Any) -> Any:
    """Of a key with a value for each layer, which is zero where it does not apply."""
    return max(value, default=0) if isinstance(value, list) and all(type(one) is int for one in value) else value


NAMES = names()

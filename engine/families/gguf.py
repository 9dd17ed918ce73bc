"""GGUF files: their metadata said as a config.json, and their tensors' names.

A file's `general.architecture` is mapped to one of the families, so that there is one reading of every
architecture. Converters to GGUF reorder the rows of llama's query and key heads so that rotated channels are
neighbours; rotating interleaved pairs is then the same computation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numoe.engine.families.config import shown, word
from numoe.engine.families.names import Family, Gguf, Names, Source
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.block import Layer
from numoe.engine.layers.rope import DividedFrequencies, Rope
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError


def from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], divisors: Sequence[float] | None, path: Path
) -> tuple[dict[str, Any], Family, ModelSpec]:
    """The config.json that a GGUF file's metadata amounts to, its family with GGUF's names, and its spec.

    Args:
        shapes: of its tensors by name.
        divisors: the values of `ROPE_FREQS`, if it is among them.

    Raises:
        InputError: the architecture or one of its settings is not supported, or a key is missing.
    """
    kind_of_file = metadata.get("general.type", "model")
    if kind_of_file != "model":
        raise InputError(f'{path} is GGUF of the type "{word(kind_of_file)}" and no model; give the file of the model')
    # Only what is needed is decoded: a name that is no UTF-8, or a large vocabulary, is nothing to the spec.
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    kind, gguf = _family(architecture, keys, path)
    config = _config(kind, gguf, keys, shapes, path)
    spellings = {ours: theirs for theirs, ours in {**_KEYS, **gguf.keys}.items()}
    spellings |= {f"rope_scaling.{ours}": f"rope.scaling.{theirs}" for theirs, ours in _SCALING_KEYS.items()}
    spec = kind.spec(config, str(path), lambda key: prefix + spellings[key] if key in spellings else key)
    ignored, attention = kind.ignored, spec.layers[0][0].kind
    assert isinstance(attention, GroupedQueryAttention)
    head_dim = attention.head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise InputError(
                f"{path}: {prefix}{key} is {shown(keys[key])}, and only the head size {head_dim} is supported"
            )
    if gguf.interleaved:
        assert attention.rope is not None
        rope = replace(attention.rope, interleaved=True)
        if divisors is not None:
            rope = _divided(rope, divisors, path)
            ignored += (re.escape(ROPE_FREQS),)
        spec = replace(spec, layers=tuple(_rotated(one, rope) for one in spec.layers))
    return config, Family(kind.model_types, kind.reader, NAMES, kind.defaults, ignored), spec


def _rotated(layer: Layer, rope: Rope) -> Layer:
    """The same layer with another rope."""
    attention, *others = layer
    assert isinstance(attention.kind, GroupedQueryAttention)
    return replace(attention, kind=replace(attention.kind, rope=rope)), *others


ROPE_FREQS = "rope_freqs.weight"
"""What converters make of Llama 3's `rope_scaling`: the divisor of each pair's frequency, (head_dim / 2,)."""


def _divided(rope: Rope, divisors: Sequence[float], path: Path) -> Rope:
    if rope.scaling is not None:
        raise InputError(f"{path} has both {ROPE_FREQS} and rope scaling in its metadata, which is not supported")
    if len(divisors) != rope.dim // 2 or min(divisors) <= 0:
        raise InputError(f"{path}: {ROPE_FREQS} must be {rope.dim // 2} positive numbers; convert the model again")
    return replace(rope, scaling=DividedFrequencies(tuple(divisors)))


def _family(architecture: Any, keys: Mapping[str, Any], path: Path) -> tuple[Family, Gguf]:
    """The family of a file with these keys. Raises InputError when there is none."""
    from numoe.engine.families import FAMILIES

    families = {one.model_types: one for one in FAMILIES.values()}.values()
    known = [(family, family.gguf) for family in families if family.gguf]
    told = [(family, gguf) for family, gguf in known if gguf.architecture == architecture]
    if not told:
        architectures = ", ".join(sorted({gguf.architecture for _, gguf in known}))
        raise InputError(
            f'{path}: GGUF architecture "{word(architecture)}" is not supported yet; known are {architectures}'
        )
    told.sort(key=lambda one: one[1].mark is None)  # who has a mark comes first
    return next((family, gguf) for family, gguf in told if gguf.mark is None or keys.get(gguf.mark))


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
}
# Keys that restate others, and what others say when they say nothing: llama.cpp's defaults.
_UNREAD = {"attention.value_length", "rope.dimension_count", "rope.scaling.finetuned"}
_NEUTRAL = {
    "attention.causal": True,
    "expert_gating_func": 1,
    "expert_weights_norm": True,
    "expert_weights_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
_OPTIONAL: dict[str, Any] = {"rope.freq_base": 10000.0, "attention.head_count_kv": None, "attention.key_length": None}
"""Where a file leaves these out, llama.cpp takes the same for every architecture."""


def _config(
    family: Family, gguf: Gguf, keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": family.model_types[0], **gguf.given}
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if config["attention_bias"] and "blk.0.attn_output.bias" not in shapes:
        raise InputError(f"{path} has biases on queries, keys and values alone, which is not supported yet")
    if "blk.0.ffn_gate.bias" in shapes:
        config["mlp_bias"] = True
    left = dict(keys)
    if shapes.get("token_embd.weight"):
        left.setdefault("vocab_size", shapes["token_embd.weight"][0])
    for key, name in {**_KEYS, **gguf.keys}.items():
        if key not in left and key not in _OPTIONAL:
            raise InputError(f'{path} has no key "{gguf.architecture}.{key}", which this architecture needs')
        config[name] = left.pop(key, _OPTIONAL.get(key))
    # A factor without a kind is linear, as in llama.cpp.
    kind = left.get("rope.scaling.type", "linear" if "rope.scaling.factor" in left else "none")
    scaling = {name: left.pop(f"rope.scaling.{key}", None) for key, name in _SCALING_KEYS.items()}
    if kind != "none":
        config["rope_scaling"] = scaling | {"rope_type": kind}
        if kind == "linear":
            del config["rope_scaling"]["original_max_position_embeddings"]
    for key, value in left.items():
        if key not in _UNREAD and value not in (0, False, None, "", _NEUTRAL.get(key)):
            raise InputError(
                f'{path}: GGUF key "{gguf.architecture}.{key}" is not understood and could change the results'
            )
    return config


def _names() -> Names:
    names = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
    layer = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "ffn.router": "ffn_gate_inp"}
    layer |= {
        f"attention.{ours}": f"attn_{theirs}" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)
    }
    layer |= {f"attention.{n}_norm": f"attn_{n}_norm" for n in "qk"}
    layer |= {f"ffn.{n}": f"ffn_{n}" for n in ("gate", "up", "down")}
    table: dict[str, tuple[Source, ...]] = {ours: (Source(f"{theirs}.weight"),) for ours, theirs in names.items()}
    for ours, theirs in layer.items():
        table[f"layers.{{layer}}.{ours}"] = (Source(f"blk.{{layer}}.{theirs}.weight"),)
        table[f"layers.{{layer}}.{ours}_bias"] = (Source(f"blk.{{layer}}.{theirs}.bias"),)
    for n in ("gate", "up", "down"):
        stacked = Source(f"blk.{{layer}}.ffn_{n}_exps.weight", stacked=True)
        one = Source(f"blk.{{layer}}.ffn_{n}.{{expert}}.weight")
        both = (Source("blk.{layer}.ffn_gate_up_exps.weight", True, ("gate", "up")),) if n != "down" else ()
        table[f"layers.{{layer}}.ffn.experts.{{expert}}.{n}"] = (stacked, one, *both)
    return table


NAMES = _names()

"""What can be told of a model that numoe does not run: by its tensors' names, shapes and dtypes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from numoe.quant.errors import InputError
from numoe.quant.stored.checkpoint import Checkpoint
from numoe.quant.stored.quantization import PLAIN, Convention, read_quantization

# What routed experts and tables of n-grams are called, in folders and in GGUF files; shared experts are no routed ones.
_EXPERT = re.compile(r"[._](?:experts|switch_mlp)\.(?:(\d+)\.)?|_exps\.|\.ffn_(?:gate|up|down)\.(\d+)\.")
_SHARED = re.compile(r"shared|shexp|_shexps")
_TABLE = re.compile(r"ngram|n_gram|engram|per_layer_token_embd|embed_tokens_per_layer", re.IGNORECASE)
# What answers text without, and whose names say so.
_ASIDE = {
    "drafting": re.compile(r"(^|[._])(mtp\w*|nextn|dspark\w*|eagle\w*|medusa\w*|draft\w*)[._]"),
    "vision": re.compile(
        r"(^|\.)(visual|vision\w*|aligner|image\w*|v|mm|mm_projector|multi_modal_projector|embed_vision)\.|^image_|bias_vl$|_b_vl\."
    ),
    "audio": re.compile(r"(^|\.)(audio\w*|a|speech\w*|embed_audio)\."),
}
# Keys that tell how many experts a token takes.
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "num_selected_experts",
    "expert_used_count", "moe_k", "n_activated_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Totals:
    """Bytes and parameters by dtype, scales among the bytes alone, and what a runner could leave on disk."""

    dtypes: Mapping[str, int]
    parameters: Mapping[str, int]
    expert_bytes: int
    """Of routed experts."""
    experts: int
    """Most of a layer, 0 where none is known by its name."""
    chosen: int
    """How many of them a token takes, 0 where no key tells it."""
    table_bytes: int
    """Of tables of which a token takes a few rows."""
    aside_bytes: int
    """Of what answers text without: towers that see or hear, heads that only draft."""

    @property
    def nbytes(self) -> int:
        return sum(self.dtypes.values())

    @property
    def resident_bytes(self) -> int:
        """What would have to be in memory, beside the context."""
        return self.nbytes - self.expert_bytes - self.table_bytes - self.aside_bytes


def convention_of(config: Mapping[str, Any]) -> Convention:
    """How a config.json says that weights are quantized, where it says so in words that are known."""
    try:
        return read_quantization(dict(config), None)
    except InputError:
        return PLAIN


def totals(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Totals:
    """Add up a checkpoint; `config` is its config.json, or a GGUF file's metadata."""
    dtypes: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    most = 0
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.nbytes
        part = _part(info.name)
        parts[part] += info.nbytes
        if part == "experts" and (match := _EXPERT.search(info.name)):
            number = next((one for one in match.groups() if one), None)
            stack = info.shape[0] if len(info.shape) == 3 else 0
            most = max(most, stack if number is None else int(number) + 1)
    parameters: Counter[str] = Counter()
    for name in checkpoint.names():
        try:
            stored = checkpoint[name]
            parameters[stored.parts[0].dtype] += prod(stored.shape)
        except InputError:  # its codes and scales are of a kind that is not known
            if name in checkpoint.tensors:
                parameters[checkpoint.tensors[name].dtype] += prod(checkpoint.tensors[name].shape)
    return Totals(
        dict(dtypes.most_common()),
        dict(parameters),
        parts["experts"],
        most,
        _chosen(config),
        parts["table"],
        parts["aside"],
    )


def aside(name: str) -> str | None:
    """What a tensor serves that answers text without: drafting, vision, audio; None where its name says nothing."""
    return next((part for part, pattern in _ASIDE.items() if pattern.search(name)), None)


def _part(name: str) -> str:
    if aside(name):
        return "aside"
    if _TABLE.search(name):
        return "table"
    return "experts" if _EXPERT.search(name) and not _SHARED.search(name) else ""


def _chosen(config: Mapping[str, Any]) -> int:
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key in values:
            if key.rpartition(".")[2] in _CHOSEN and type(count := values[key]) is int and count > 0:
                return count
    return 0

"""Where a model says how its weights are quantized; what is not read is refused by its own name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numoe.quant.errors import word
from numoe.quant.stored.conventions.announced import Announced, unsupported
from numoe.quant.stored.conventions.registry import PLAIN as PLAIN
from numoe.quant.stored.conventions.registry import read_convention
from numoe.quant.stored.conventions.spelling import Convention as Convention

SIDE_FILE = "hf_quant_config.json"
"""Where older checkpoints of NVIDIA's ModelOpt name the quantization, and config.json does not."""

# What `quant_method` calls a format -> what people call it. Others are called as they are spelt.
_METHODS = {
    "aqlm": "AQLM", "auto-round": "AutoRound", "awq": "AWQ", "awq_marlin": "AWQ", "bitnet": "BitNet",
    "eetq": "EETQ int8", "exl2": "EXL2", "exl3": "EXL3", "fbgemm_fp8": "FBGEMM FP8", "fp8": "FP8",
    "fp_quant": "FP-Quant", "gptq": "GPTQ", "gptq_marlin": "GPTQ", "higgs": "HIGGS", "hqq": "HQQ",
    "intel/auto-round": "AutoRound", "mxfp4": "MXFP4", "quanto": "Quanto", "quark": "Quark", "spqr": "SpQR",
    "torchao": "torchao", "vptq": "VPTQ",
}  # fmt: skip
_BITS = ("bits", "w_bit", "nbits", "num_bits")
# How the names of tensors end that other formats store beside or in place of weights.
_FOREIGN = {
    ".SCB": "bitsandbytes int8", ".absmax": "bitsandbytes", ".biases": "MLX", ".g_idx": "GPTQ",
    ".input_scale": "FP8 or NVFP4 with scales for activations", ".q_weight": "EXL2", ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ", ".trellis": "EXL3", ".weight_global_scale": "NVFP4",
    ".weight_packed": "compressed-tensors", ".weight_scale": "FP8 or int8 with a scale a tensor or row",
    ".weight_scale_2": "NVFP4",
}  # fmt: skip


def read_quantization(values: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> Convention:
    """How the weights are quantized that a config tells of.

    Args:
        values: a config.json.
        beside: what `SIDE_FILE` holds, if it is there.

    Raises:
        InputError: the weights are quantized in another way, which the message names, or a value is of a wrong type.
    """
    table = _table(values, beside)
    if table is None:
        return PLAIN
    convention = read_convention(table)
    if convention is None:
        raise table.unsupported(format_name(table.values))
    return convention


def announced_name(values: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
    """What people call the format that a config names; "" where it names none. As `read_quantization`."""
    table = _table(values, beside)
    return "" if table is None else format_name(table.values)


def _table(values: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Announced | None:
    """What tells how weights are quantized, if something does."""
    config = Announced("config.json", values)
    for inside in (config, config.below("text_config")):
        own = inside.below("quantization")
        if {"bits", "group_size"} <= own.values.keys():
            return own  # MLX's; beside it may stand what its weights were made of
        for name in ("quantization_config", "compression_config", "quantization"):
            if (table := inside.below(name)).values:
                return table
    table = Announced(SIDE_FILE, beside or {}).below("quantization")
    return table if table.values.get("quant_algo") else None


def format_name(table: Mapping[str, Any]) -> str:
    """What people call the format that a quantization config describes, with its bits."""
    method = table.get("quant_method")
    if algorithm := table.get("moe_quant_algo") or table.get("quant_algo"):
        parts = table.get("quantized_layers")
        if algorithm == "MIXED_PRECISION" and isinstance(parts, dict):
            kinds = {word(part.get("quant_algo")) for part in parts.values() if isinstance(part, dict)}
            return " and ".join(sorted(kinds)) or algorithm
        return "FP8 with one scale a tensor" if algorithm == "FP8" else word(algorithm)
    if method == "bitsandbytes":
        kind = table.get("bnb_4bit_quant_type") or "fp4"
        return f"bitsandbytes {word(kind)}" if table.get("load_in_4bit") else "bitsandbytes int8"
    if method == "compressed-tensors" or (method is None and "config_groups" in table):
        return f"compressed-tensors {word(table.get('format') or '')}".rstrip()
    bits = next((table[key] for key in _BITS if table.get(key)), None)
    if method is None and "group_size" in table:
        name = "MLX" if table.get("mode") in (None, "affine") else f"MLX {word(table['mode'])}"
    else:
        name = _METHODS.get(method, word(method)) if isinstance(method, str) else "without a quant_method"
    for key in ("weights", "quant_type", "mode"):
        if bits is None and isinstance(table.get(key), str):
            return f"{name} {word(table[key])}"
    return f"{name} {word(bits)}-bit" if bits is not None else name


def refuse_foreign(names: Iterable[str], where: Path) -> None:
    """Refuse a checkpoint with tensors of a format that is not read, whatever its config.json says.

    Raises:
        InputError: one of the stored names is such a tensor's.
    """
    endings = tuple(_FOREIGN)
    for name in names:
        if name.endswith(endings):
            kind = next(kind for ending, kind in _FOREIGN.items() if name.endswith(ending))
            raise unsupported(f"{where} holds {name}", kind)

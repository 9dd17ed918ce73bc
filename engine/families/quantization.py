"""What a config.json says of quantized weights: FP8 in blocks is read, every other kind is refused by its own name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numoe.engine.families.config import Config, shown, word
from numoe.quant.errors import InputError

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
_E4M3 = ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn")
# Keys of FP8 that say what was left out or how products may be computed: the tensors tell how each of them is stored.
_UNREAD = (
    "dequantize", "expert_dtype", "ignored_layers", "kv_cache_*", "modules_to_convert", "modules_to_not_convert",
    "scale_fmt",
)  # fmt: skip
# How the names of tensors end that other formats store beside or in place of weights.
_FOREIGN = {
    ".SCB": "bitsandbytes int8", ".absmax": "bitsandbytes", ".biases": "MLX", ".g_idx": "GPTQ",
    ".input_scale": "FP8 or NVFP4 with scales for activations", ".q_weight": "EXL2", ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ", ".trellis": "EXL3", ".weight_global_scale": "NVFP4",
    ".weight_packed": "compressed-tensors", ".weight_scale": "FP8 or int8 with a scale a tensor or row",
    ".weight_scale_2": "NVFP4",
}  # fmt: skip


def fp8_block(values: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """Rows and columns that share a scale in FP8 weights; (128, 128) where nothing is quantized.

    Args:
        values: a config.json.
        beside: what `SIDE_FILE` holds, if it is there.

    Raises:
        InputError: the weights are quantized in another way, which the message names, or a value is of a wrong type.
    """
    config = Config(values, {})
    for name in ("quantization_config", "compression_config", "quantization"):
        if table := config.table(name):
            return _block(Config(table, {"weight_block_size": [128, 128]}, spelt=f"{name}.{{}}".format))
    table = Config(beside or {}, {}, SIDE_FILE).table("quantization")
    if table.get("quant_algo"):
        raise _refusal(SIDE_FILE, format_name(table))
    return 128, 128


def _block(config: Config) -> tuple[int, int]:
    table = config.values
    if table.get("quant_method") == "mxfp4" and not table.keys() - {"quant_method", "modules_to_not_convert"}:
        return 128, 128  # gpt-oss's blocks and scales, which the tensors' names tell
    if table.get("quant_method") != "fp8" or table.get("quant_algo") or table.get("moe_quant_algo"):
        raise _refusal(config.where, format_name(table))
    if table.get("fmt") not in (None, *_E4M3):
        raise _refusal(config.where, f"FP8 {word(table['fmt'])}")
    if table.get("activation_scheme") not in (None, "dynamic"):
        raise _refusal(config.where, f"FP8 with {word(table['activation_scheme'])} scales for activations")
    block = config.take("weight_block_size", null=None)
    if block is None:
        raise _refusal(config.where, "FP8 with one scale a tensor")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in block)):
        raise config.refusal("weight_block_size", f"must be two positive integers, not {shown(block)}")
    config.ignore(("quant_method", "fmt", "activation_scheme", *_UNREAD))
    config.done()
    return block[0], block[1]


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
            raise InputError(f"{where} holds {name}: {_unsupported(kind)}")


def _refusal(where: str, name: str) -> InputError:
    return InputError(f"{where}: {_unsupported(name)}")


def _unsupported(name: str) -> str:
    return (
        f'quantization "{name}" is not supported; numoe reads fp8 e4m3 with block scales, mxfp4 experts, bf16, f16, '
        "f32 and GGUF: the BF16 or FP8 release of the same model runs"
    )

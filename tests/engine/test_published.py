"""Quantized models as their authors publish them: what their configs say is read, and what they take is told.

tests/published.json is written by tests/reference/make_published.py.
"""

import json
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from helpers import Listing, released_v4_listing

from numoe.engine.description import Description, _read, arrange
from numoe.engine.families.names import Family
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError
from numoe.quant.files import TensorInfo
from numoe.quant.stored.checkpoint import Checkpoint
from numoe.quant.stored.safetensors import DTYPE_BITS

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "published.json").read_text())
PRICED = {
    "MiniMaxAI/MiniMax-M2.5": "attention fp8; experts fp8",
    "MiniMaxAI/MiniMax-M2.7": "attention fp8; experts fp8",
    "Qwen/Qwen3-235B-A22B-FP8": "attention fp8; experts fp8",
    "Qwen/Qwen3-30B-A3B-FP8": "attention fp8; experts fp8",
    "Qwen/Qwen3-32B-FP8-Static-PerTensor": "attention fp8; dense ffn fp8",
    "Qwen/Qwen3-32B-FP8": "attention fp8; dense ffn fp8",
    "XiaomiMiMo/MiMo-V2-Flash": "attention fp8; dense ffn fp8; experts fp8",
    "deepseek-ai/DeepSeek-R1": "attention fp8; dense ffn fp8; experts fp8; shared experts fp8",
    "deepseek-ai/DeepSeek-V3.2": "attention fp8; dense ffn fp8; experts fp8; shared experts fp8",
    "deepseek-ai/DeepSeek-V4-Flash": "attention fp8; experts mxfp4; shared experts fp8",
    "deepseek-ai/DeepSeek-V4-Pro": "attention fp8; experts mxfp4; shared experts fp8",
    "moonshotai/Kimi-K2-Instruct": "attention fp8; dense ffn fp8; experts fp8; shared experts fp8",
    "moonshotai/Kimi-K2.5": "attention bf16; dense ffn bf16; experts int4; shared experts bf16",
    "nvidia/DeepSeek-V3.1-NVFP4": "attention bf16+nvfp4; dense ffn nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/DeepSeek-V3.2-NVFP4": "attention bf16+nvfp4; dense ffn nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/DeepSeek-V4-Flash-NVFP4": "attention fp8; experts nvfp4; shared experts fp8",
    "nvidia/DeepSeek-V4-Pro-NVFP4": "attention fp8; experts nvfp4; shared experts fp8",
    "nvidia/GLM-5-NVFP4": "attention bf16; dense ffn nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/GLM-5.1-NVFP4": "attention bf16; dense ffn bf16; experts nvfp4; shared experts bf16",
    "nvidia/GLM-5.2-NVFP4": "attention bf16; dense ffn bf16; experts nvfp4; shared experts bf16",
    "nvidia/Gemma-4-26B-A4B-NVFP4": "attention bf16; dense ffn bf16; experts nvfp4",
    "nvidia/Gemma-4-31B-IT-NVFP4": "attention bf16; dense ffn nvfp4",
    "nvidia/Kimi-K2.5-NVFP4": "attention bf16; dense ffn nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/Kimi-K2.6-NVFP4": "attention bf16; dense ffn bf16; experts nvfp4; shared experts bf16",
    "nvidia/Kimi-K2.7-Code-NVFP4": "attention bf16; dense ffn bf16; experts nvfp4; shared experts bf16",
    "nvidia/Llama-3.1-70B-Instruct-FP8": "attention fp8; dense ffn fp8",
    "nvidia/MiniMax-M2.5-NVFP4": "attention bf16; experts nvfp4",
    "nvidia/MiniMax-M2.7-NVFP4": "attention bf16; experts nvfp4",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": "attention bf16+nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": "attention fp8; experts fp8; shared experts fp8",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": "attention nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8": "attention fp8; experts fp8; shared experts fp8",
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4": "attention nvfp4; experts nvfp4; shared experts nvfp4",
    "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": "attention bf16+fp8; experts nvfp4; shared experts nvfp4",
    "nvidia/Qwen3-235B-A22B-NVFP4": "attention nvfp4; experts nvfp4",
    "nvidia/Qwen3.5-122B-A10B-NVFP4": "attention bf16+nvfp4; experts nvfp4; shared experts bf16",
    "nvidia/Qwen3.5-397B-A17B-NVFP4": "attention bf16+nvfp4; experts nvfp4; shared experts bf16",
    "nvidia/Qwen3.6-27B-NVFP4": "attention bf16+fp8; dense ffn nvfp4",
    "nvidia/Qwen3.6-35B-A3B-NVFP4": "attention bf16+fp8; experts nvfp4; shared experts nvfp4",
    "openai/gpt-oss-120b": "attention bf16; experts mxfp4",
    "zai-org/GLM-5-FP8": "attention fp8; dense ffn fp8; experts fp8; shared experts fp8",
    "zai-org/GLM-5.2-FP8": "attention fp8; dense ffn fp8; experts fp8; shared experts fp8",
}
"""What each role is stored as, beside float32."""
REFUSED = {
    "moonshotai/Kimi-K3": "compressed-tensors mxfp4-pack-quantized",
    "nvidia/MiniMax-M3-NVFP4": "MXFP8 and NVFP4",
    "sgl-project/DeepSeek-V4-Flash-FP8": "FP8",
    "sgl-project/DeepSeek-V4-Pro-FP8": "FP8",
    "stepfun-ai/Step-3.7-Flash-FP8": "FP8",
}


def entries(how: str, shape: tuple[int, ...]) -> Listing:
    """What stands in place of a matrix, by the ends of names; "": of the weight itself."""
    *stack, rows, width = shape
    lead = tuple(stack)
    one: tuple[str, tuple[int, ...]] = ("F32", lead)
    match how:
        case "NVFP4" | "W4A16_NVFP4":
            codes = {"": ("U8", (*lead, rows, width // 2)), "_scale": ("F8_E4M3", (*lead, rows, width // 16))}
            return codes | {"_scale_2": one} | ({"^input_scale": one} if how == "NVFP4" else {})
        case "FP8":
            return {"": ("F8_E4M3", shape), "_scale": one, "^input_scale": one}
        case "fp8":
            return {"": ("F8_E4M3", shape), "_scale_inv": ("F32", (*lead, -(-rows // 128), -(-width // 128)))}
        case "pack-quantized":
            scales = "BF16", (*lead, rows, width // 32)
            return {"_packed": ("I32", (*lead, rows, width // 8)), "_scale": scales, "_shape": ("I64", (2,))}
        case "mxfp4":
            blocks = "U8", (*lead, rows, width // 32, 16)
            return {"_blocks": blocks, "_scales": ("U8", (*lead, rows, width // 32))}
    return {"": ("BF16", shape)}


def quantized(config: dict[str, Any], side: dict[str, Any] | None, module: str, role: str) -> str:
    """How a module is stored by what is published."""
    inside = config.get("text_config", config)
    table = config.get("quantization_config") or inside.get("quantization_config") or (side or {})["quantization"]
    kept = table.get("ignore") or table.get("exclude_modules") or table.get("modules_to_not_convert") or []
    tables = ("embedding", "head", "router", "norms")
    if role in tables or any(is_kept(pattern, module, table.get("quant_method")) for pattern in kept):
        return "bf16"
    if "quantized_layers" in table:
        named = re.sub(r"experts\.\d+", "experts.0", module)
        layers = {re.sub(r"experts\.\d+", "experts.0", name): how for name, how in table["quantized_layers"].items()}
        return str(
            layers.get(named, layers.get(named.partition("experts")[0] + "experts", {})).get("quant_algo", "bf16")
        )
    if table.get("quant_method") == "mxfp4":
        return "mxfp4" if role == "experts" else "bf16"
    return str(table.get("quant_algo") or table.get("format") or table["quant_method"])


def is_kept(pattern: str, module: str, method: str | None) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if method == "fp8":
        return re.search(rf"(^|\.){re.escape(pattern)}($|\.)", module) is not None
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")


def listing(
    kind: Family, spec: ModelSpec, config: dict[str, Any], side: dict[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    """The tensors of a release, by the names that a family takes first."""
    inside = (
        "backbone" if "backbone" in json.dumps([config, side]) else "language_model" if "text_config" in config else ""
    )
    tensors = spec.tensors()
    experts = {layer: count for layer, (count, _) in spec.routed.items()}
    for layer, name, tensor in spec.listing():
        sources = list(kind.sources(name, layer, tensor.expert))
        source = next((one for one in sources if inside in one.name), sources[0])
        if source.flat or source.made is not None or tensor.held == "array":
            shape = tensor.shape
        else:
            parts = [f"{name.rpartition('.')[0]}.{part}" for part in source.fused] or [name]
            shape = (sum(tensors[part].shape[0] for part in parts), *tensor.shape[1:])
        if source.stacked and layer is not None:
            shape = (experts[layer], *shape)
        if tensor.held == "array":
            if source.fused:
                parts = [f"{name.rpartition('.')[0]}.{part}" for part in source.fused]
                shape = (*shape[:-1], sum(tensors[part].shape[-1] for part in parts))
            yield source.name, ("BF16", shape)
            continue
        how = quantized(config, side, source.name.removesuffix(".weight"), tensor.role)
        for end, entry in entries(how, shape).items():
            beside = source.name.removesuffix("weight") + end[1:]
            yield beside if end.startswith("^") else source.name + end, entry


def released(name: str, kind: Family, spec: ModelSpec) -> Listing:
    config, side = PUBLISHED[name]["config"], PUBLISHED[name]["side"]
    if config["model_type"] != "deepseek_v4":
        found = dict(listing(kind, spec, config, side))
        scales = ("k_scale", "v_scale") if "kv_cache" in json.dumps([config, side]) else ()
        beside = [one for one in found if re.search(r"[kv]_proj\.weight$", one)]
        return found | {f"{one.removesuffix('weight')}{scale}": ("F32", ()) for one in beside for scale in scales}
    found = dict(released_v4_listing(config))
    if "NVFP4" in name:
        for codes in [one for one in found if re.search(r"\.experts\.\d+\.w\d\.weight$", one)]:
            rows, half = found.pop(codes)[1]
            del found[codes.replace(".weight", ".scale")]
            found |= {codes.replace("^", "") + end if end[:1] != "^" else codes[:-6] + end[1:]: entry
                      for end, entry in entries("NVFP4", (rows, 2 * half)).items()}  # fmt: skip
    return found


def described(name: str) -> Description:
    config, side = PUBLISHED[name]["config"], PUBLISHED[name]["side"]
    kind, spec, convention = _read(config, side)
    tensors, at, path = {}, 0, Path(name) / "model.safetensors"
    for one, (dtype, shape) in released(name, kind, spec).items():
        nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        tensors[one] = TensorInfo(one, dtype, shape, path, at, nbytes)
        at += nbytes
    return arrange(Path(name), config, kind, spec, Checkpoint(Path(name), tensors, {}, convention))


def test_each_of_them_is_priced_or_refused() -> None:
    assert sorted(PUBLISHED) == sorted([*PRICED, *REFUSED])


@pytest.mark.parametrize("name", PRICED)
def test_what_is_published_is_priced(name: str) -> None:
    plan = described(name).plan()
    found = {
        role: "+".join(sorted({format.kind for one, format in plan.weights if one == role} - {"f32"}))
        for role in ("attention", "dense ffn", "experts", "shared experts")
    }
    assert "; ".join(f"{role} {kinds}" for role, kinds in found.items() if kinds) == PRICED[name]
    assert plan.weight_bytes <= plan.disk_bytes * 1.05


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_its_format(name: str) -> None:
    with pytest.raises(InputError, match=r'model_type ".*" is not supported yet.*; its weights are ') as caught:
        _read(PUBLISHED[name]["config"], PUBLISHED[name]["side"])
    assert str(caught.value).endswith(f"its weights are {REFUSED[name]}")

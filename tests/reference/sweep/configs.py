"""Real config.json files: what numoe derives from them against the modules that transformers builds from them."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from report import Report

from numoe.engine.families import family, found
from numoe.engine.layers.attention.compressed import CompressedAttention
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.block import Kind
from numoe.engine.layers.mixture import MixtureOfExperts
from numoe.engine.layers.recurrent.deltanet import GatedDeltaNet
from numoe.engine.layers.rope import Rope, Yarn, frequencies
from numoe.engine.layers.spec import ModelSpec
from numoe.quant.errors import InputError
from numoe.quant.stored.quantization import SIDE_FILE, read_quantization

Numbers = dict[str, Any]
"""What a model computes with, by a name of it; of each layer one entry of a list."""
DETAILED = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_text", "qwen3_5_moe",
    "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3", "deepseek_v4", "glm4_moe_lite", "gpt_oss",
)  # fmt: skip
"""Families of which every number is compared; of the others what all have."""
ALIASES = {"kimi_k2": "deepseek_v3"}
"""What transformers calls a model_type that it has no name for."""


def sweep(folders: Mapping[str, Path], report: Report) -> None:
    """Every config as it is; of those that numoe takes also each key left out, and transformers' own defaults."""
    without: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for name, config, side in configs(folders):
        try:
            read_quantization(config, side)
            family(config.get("model_type")).spec(config)
        except InputError as error:
            report.refuse(error)
            continue
        decoder = config.get("text_config", config)  # of a model of several parts
        plain = {key: value for key, value in decoder.items() if key not in ("quantization_config", "auto_map")}
        _compare(name, plain, report)
        for key in plain:  # of each family once is enough
            without.setdefault((plain["model_type"], key), (name, plain))
    for (_, key), (name, config) in without.items():
        if key != "model_type":
            _compare(f"{name} without {key}", {k: v for k, v in _shallow(config).items() if k != key}, report)
    for model_type in found().keys() - ALIASES.keys():
        defaults = transformers.CONFIG_MAPPING[model_type]().to_dict()
        defaults = defaults.get("text_config", defaults)
        _compare(f"transformers' {model_type}", json.loads(json.dumps(defaults)), report)


def configs(folders: Mapping[str, Path]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """(name, config.json, what stands beside it as hf_quant_config.json) of every model."""
    for path in sorted(folders["aiconfigurator-core"].rglob("*_config.json")):
        if not path.name.endswith(SIDE_FILE):
            side = path.with_name(path.name.replace("_config.json", f"_{SIDE_FILE}"))
            beside = json.loads(side.read_text("utf-8")) if side.is_file() else None
            yield path.name.removesuffix("_config.json"), json.loads(path.read_text("utf-8")), beside


def _shallow(config: dict[str, Any], layers: int = 6) -> dict[str, Any]:
    """The same with few layers, which is faster; but for those that do not tell how many there are."""
    many = config.get("num_hidden_layers")
    if many is None:
        return config
    by_layer = {k for k, v in config.items() if isinstance(v, list) and len(v) >= many} | {"hybrid_override_pattern"}
    cut = {k: v[:layers] if k in by_layer else v for k, v in config.items()}
    return cut | {"num_hidden_layers": layers}


def _compare(name: str, config: dict[str, Any], report: Report) -> None:
    try:
        ours = numbers(family(config["model_type"]).spec(config))
    except InputError as error:
        report.refuse(error)
        return
    try:
        theirs = reference(copy.deepcopy(config))  # which it changes
    except Exception as error:  # it raises whatever its code runs into
        report.wrong(f"{name}: the reference refuses ({type(error).__name__}: {error})")
        return
    different = [key for key in ours if not _equal(ours[key], theirs[key])]
    report.compare(name, *({key: _brief(found[key]) for key in different} for found in (ours, theirs)))


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, np.ndarray):
        return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-6, atol=0)
    return bool(ours == theirs)


def _brief(value: Any) -> Any:
    """What to show of a value: of a list what differs in it."""
    if isinstance(value, np.ndarray):
        return f"{value.size} from {value[:2]} to {value[-2:]}"
    return list(dict.fromkeys(value)) if isinstance(value, list) else value


def numbers(spec: ModelSpec) -> Numbers:
    """Of a ModelSpec."""
    parameters = sum(tensor.size for tensor in spec.tensors().values())
    if spec.family not in DETAILED:
        return {"parameters": parameters, "layers": len(spec.layers), "tied": spec.tied}
    mixers, ffns = ([layer[place].kind for layer in spec.layers] for place in range(2))
    routed = [ffn for ffn in ffns if isinstance(ffn, MixtureOfExperts)]
    return {
        "parameters": parameters,
        "layers": len(spec.layers),
        "context": spec.context,
        "norm eps": spec.norm_eps,
        "tied": spec.tied,
        "attention": [_attention(mixer) for mixer in mixers],
        "experts": [(ffn.experts, ffn.top_k) for ffn in routed],
        "router": [
            (f.router.score, f.router.groups, f.router.top_groups, f.router.normalize, f.router.scale) for f in routed
        ],
        "clip": [ffn.expert.limit for ffn in routed],
        **_rotations({_name(mixer): mixer.rope for mixer in mixers if not isinstance(mixer, GatedDeltaNet)}),
    }


def _name(mixer: Kind) -> str:
    return "compress" if isinstance(mixer, CompressedAttention) and mixer.compressor else "main"


def _attention(mixer: Kind) -> tuple[Any, ...]:
    match mixer:
        case GroupedQueryAttention() as a:
            return a.heads // a.kv_heads, a.head_dim, a.window, a.head_dim**-0.5
        case MultiHeadLatentAttention() as a:
            return a.heads, a.q_rank, a.kv_rank, a.nope_dim, a.rope.dim, a.value_dim, round(a.scale, 9)
        case CompressedAttention() as a:
            return a.heads, a.head_dim, a.window, a.compressor and a.compressor.ratio, a.indexer and a.indexer.top_k
        case GatedDeltaNet() as a:
            return a.key_heads, a.value_heads, a.key_dim, a.value_dim, a.kernel
    raise ValueError(f"what are the numbers of {mixer}?")


def _rotations(ropes: dict[str, Rope]) -> Numbers:
    found: Numbers = {}
    for kind, rope in ropes.items():
        found[f"{kind} frequencies"] = frequencies(rope)
        found[f"{kind} factor"] = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn) else 1.0
    return found


def reference(config: dict[str, Any]) -> Numbers:
    """The same of the modules of transformers, which need no memory on the meta device."""
    model_type = config["model_type"]
    parsed = transformers.CONFIG_MAPPING[ALIASES.get(model_type, model_type)].from_dict(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(parsed)
    kept = {name for name in model.state_dict() if name in dict(model.named_buffers())}
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in kept)
    parameters = sum(parameter.numel() for parameter in model.parameters()) + buffers
    if model_type not in DETAILED:
        return {"parameters": parameters, "layers": parsed.num_hidden_layers, "tied": parsed.tie_word_embeddings}
    rotary = type(model.model.rotary_emb)(parsed)  # on the CPU
    blocks = [getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None)) for layer in model.model.layers]
    routers = [block for block in blocks if block is not None]
    return {
        "parameters": parameters,
        "layers": len(model.model.layers),
        "context": parsed.max_position_embeddings,
        "norm eps": getattr(model.model.norm, "variance_epsilon", getattr(model.model.norm, "eps", None)),
        "tied": parsed.tie_word_embeddings,
        "attention": [_their_attention(parsed, layer) for layer in model.model.layers],
        "experts": [(router.num_experts, router.top_k) for router in routers],
        "router": [_their_router(parsed, router) for router in routers],
        "clip": [getattr(parsed, "swiglu_limit", None)] * len(routers),
        **_their_rotations(rotary),
    }


def _their_attention(config: Any, layer: Any) -> tuple[Any, ...]:
    if hasattr(layer, "linear_attn"):
        a = layer.linear_attn
        return a.num_k_heads, a.num_v_heads, a.head_k_dim, a.head_v_dim, a.conv_kernel_size
    attention = layer.self_attn
    if config.model_type == "deepseek_v4":
        compressor = attention.compressor
        ratio, indexer = (compressor and compressor.compress_rate), getattr(compressor, "indexer", None)
        return attention.num_heads, attention.head_dim, attention.sliding_window, ratio, indexer and indexer.index_topk
    if config.model_type in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        a = attention
        nope, rope, scale = a.qk_nope_head_dim, a.qk_rope_head_dim, round(a.scaling, 9)
        return a.num_heads, a.q_lora_rank, a.kv_lora_rank, nope, rope, a.v_head_dim, scale
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return attention.num_key_value_groups, attention.head_dim, window, attention.scaling


def _their_router(config: Any, router: Any) -> tuple[Any, ...]:
    """Scores, groups, groups taken, whether the weights are made to sum to one, and what scales them."""
    match config.model_type:
        case "mixtral":
            return "softmax", 1, 1, True, 1.0
        case "qwen3_moe":
            return "softmax", 1, 1, router.norm_topk_prob, 1.0
        case "deepseek_v2":
            grouped = router.topk_method == "group_limited_greedy"
            groups = (router.num_group, router.topk_group) if grouped else (1, 1)
            return "softmax", *groups, False, router.routed_scaling_factor
        case "gpt_oss" | "qwen3_5_moe" | "qwen3_5_moe_text":
            return "softmax", 1, 1, True, 1.0
        case "glm4_moe_lite":
            scale = config.routed_scaling_factor
            return "sigmoid", config.n_group, config.topk_group, config.norm_topk_prob, scale
        case "deepseek_v3":
            return "sigmoid", router.num_group, router.topk_group, router.norm_topk_prob, router.routed_scaling_factor
        case "deepseek_v4":
            return config.scoring_func, 1, 1, True, router.routed_scaling_factor
    raise ValueError(f"what is the router of {config.model_type}?")


def _their_rotations(rotary: Any) -> Numbers:
    kinds = ("main", "compress") if hasattr(rotary, "main_inv_freq") else ("",)
    found: Numbers = {}
    for kind in kinds:
        prefix = f"{kind}_" if kind else ""
        found[f"{kind or 'main'} frequencies"] = getattr(rotary, f"{prefix}inv_freq").numpy()
        found[f"{kind or 'main'} factor"] = getattr(rotary, f"{prefix}attention_scaling")
    return found

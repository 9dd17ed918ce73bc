"""Writes golden checkpoints as GGUF files as llama.cpp's converter does, from its facts and not with its code.

`tests/reference/gguf_agreement.py` holds the converter itself against numoe.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from numoe.engine.families import family
from numoe.quant.stored.safetensors import read_header

Arrays = dict[str, np.ndarray]

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    # latent attention
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_b_proj": "attn_q_b", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b", "self_attn.k_b_proj": "attn_k_b", "self_attn.v_b_proj": "attn_v_b",
    "mlp.gate.e_score_correction": "exp_probs_b", "mlp.e_score_correction": "exp_probs_b",
    "block_sparse_moe.e_score_correction": "exp_probs_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "self_attn.indexer.wq_b": "indexer.attn_q_b", "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm", "self_attn.indexer.weights_proj": "indexer.proj",
    # gated DeltaNet
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out", "linear_attn.dt": "ssm_dt", "linear_attn.in_proj_ba": "ssm_ba",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    # gated streams, n-grams, blocks of tokens
    **{f"{theirs}.{a}": f"{ours}_{b}" for theirs, ours in (
        ("attn_hyper_connection", "hc_attn"), ("mlp_hyper_connection", "hc_ffn"),
        ("model.hyper_connection_mixer", "output_hc"),
    ) for a, b in (("hc_norm", "norm"), ("input_mix_weight_down", "down"), ("input_mix_weight_up", "up"),
                   ("block_inject_weight", "inject"))},
    "ple.key_proj": "ple_key", "ple.value_proj": "ple_value", "ple.conv1d": "ple_conv1d",
    **{f"ple.norm_{n}": f"ple_norm_{n}" for n in ("key", "query", "conv")}, "ngram_table": "per_layer_token_embd",
    **{f"self_attn.indexer.{n}_layernorm": f"indexer.{n}_norm" for n in "qk"},
    **{f"self_attn.indexer.{n}_proj": f"indexer.{n}_proj" for n in "qk"},
    # Ling
    "model.word_embeddings": "token_embd", "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "attention.query_layernorm": "attn_q_norm", "attention.key_layernorm": "attn_k_norm",
    # Hunyuan
    "mlp.router.gate": "ffn_gate_inp", "mlp.gate.wg": "ffn_gate_inp",
    "mlp.shared_mlp.gate_proj": "ffn_gate_shexp", "mlp.shared_mlp.up_proj": "ffn_up_shexp",
    "mlp.shared_mlp.down_proj": "ffn_down_shexp",
    "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm",
    # Gemma
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1", "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2", "layer_scalar": "layer_output_scale", "rope_freqs": "rope_freqs",
    **{f"rope_factors_{n}": f"rope_factors_{n}" for n in ("short", "long")},
    "router.proj": "ffn_gate_inp", "router": "ffn_gate_inp", "experts.down_proj": "ffn_down_exps",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    # LFM2, Llama 4
    "model.embedding_norm": "token_embd_norm", "operator_norm": "attn_norm", "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv", "conv.out_proj": "shortconv.out_proj",
    # Trinity, ERNIE, Laguna
    "self_attn.gate_proj": "attn_gate", "pre_mlp_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm", "mlp.moe_statics.e_score_correction": "exp_probs_b",
    "mlp.experts.e_score_correction": "exp_probs_b",
    # gpt-oss
    "self_attn": "attn_sinks",  # and MiMo-V2
    # Phi-3, GLM-4
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up", "post_self_attn_layernorm": "post_attention_norm",
    # Mamba-2, and layers of one norm
    "mamba.in_proj": "ssm_in", "mamba.conv1d": "ssm_conv1d", "mamba.dt": "ssm_dt", "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out", "norm": "attn_norm",
    "mlp.fc1_latent_proj": "ffn_latent_down", "mlp.fc2_latent_proj": "ffn_latent_up",
    # Kimi Delta Attention
    **{f"self_attn.{n}_conv1d": f"ssm_conv1d_{n}" for n in "qkv"}, "self_attn.b_proj": "ssm_beta",
    "self_attn.f_proj": "ssm_f_a", "self_attn.f_a_proj": "ssm_f_a", "self_attn.f_b_proj": "ssm_f_b",
    "self_attn.g_proj": "ssm_g_a", "self_attn.g_a_proj": "ssm_g_a", "self_attn.g_b_proj": "ssm_g_b",
    "self_attn.o_norm": "ssm_norm", "self_attn.dt": "ssm_dt", "self_attn.head_gate": "attn_gate",
}  # fmt: skip


def stored(folder: Path) -> Arrays:
    """The tensors of a folder, bfloat16 as float32."""
    dtypes = {"F32": "<f4", "BF16": "<u2", "U8": "u1"}
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for name, info in read_header(path)[0].items():
            values = np.frombuffer(data, dtypes[info.dtype], info.nbytes // np.dtype(dtypes[info.dtype]).itemsize,
                                   info.offset).reshape(info.shape)  # fmt: skip
            tensors[name] = (values.astype("<u4") << 16).view("<f4") if info.dtype == "BF16" else values
    return tensors


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """A head's rows i and i + C/2, which rotate together, become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def together(tensors: Arrays) -> Arrays:
    """Experts that are stored one by one, as stacks; and gate and up apart."""
    words = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    out: Arrays = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        name = name.replace("language_model.", "")
        one = re.fullmatch(r"(.+\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight", name)
        if one:
            stack = f"{one[1]}.mlp.experts.{words.get(one[3], one[3])}.weight"
            stacks.setdefault(stack, {})[int(one[2])] = values
        elif name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                out[name.replace("gate_up_proj", f"{part}_proj.weight")] = half
        else:
            name = f"{name}.weight" if name.endswith("experts.down_proj") else name
            name = name.replace("attention_sink_bias", "weight").replace("mlp.expert_bias", "mlp.gate.expert_bias")
            name = name.replace("expert_bias", "e_score_correction_bias")
            out[name.replace("correction_bias", "correction.bias")] = values
    return out | {name: np.stack([stack[e] for e in range(len(stack))]) for name, stack in stacks.items()}


def as_llama(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return {
        name: neighbours(values, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else values
        for name, values in together(tensors).items()
    }


def as_deepseek2(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    out: Arrays = {}
    for name, values in together(tensors).items():
        if name.endswith("kv_b_proj.weight"):
            parts = values.reshape(heads, -1, values.shape[-1])
            out[name.replace("kv_b", "k_b")] = parts[:, :nope].swapaxes(1, 2)
            out[name.replace("kv_b", "v_b")] = parts[:, nope:]
        else:
            out[name] = values
    return out


def as_qwen35(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Norms with their one, and the value heads of all key heads in turn."""
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    keys = 2 * groups * config["linear_key_head_dim"]

    def turned(values: np.ndarray) -> np.ndarray:
        return values.reshape(groups, heads // groups, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)

    out: Arrays = {}
    for name, values in together(tensors).items():
        part = name.split("linear_attn.")[-1].removesuffix(".weight")
        if part in ("in_proj_qkv", "conv1d"):
            values = values.squeeze()
            values = np.concatenate([values[:keys], turned(values[keys:])])
        elif part in ("in_proj_z", "in_proj_a", "in_proj_b"):
            values = turned(values)
        elif part == "out_proj":
            values = turned(values.T).T
        elif part == "dt_bias":
            name, values = name.replace("dt_bias", "dt.bias"), turned(values)
        elif part == "A_log":
            values = turned(-np.exp(values))
        elif name.endswith("norm.weight") and part != "norm":
            values = values + 1
        out[name] = values.squeeze()
    return out


def as_qwen4(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """One table, and queries and keys of the indexer apart."""
    out, pieces = {}, {}
    for name, values in tensors.items():
        if "ngram_embedding.shard_" in name:
            pieces[int(name.split("shard_")[1].split(".")[0])] = values
        elif ".ple.norm_" in name:
            out[name] = values + 1
        elif name.endswith("index_qk_proj.weight"):
            rows = config["indexer_n_heads"] * config["indexer_head_dim"]
            for part, half in zip("qk", np.split(values, [rows]), strict=True):
                out[name.replace("index_qk", part)] = half
        else:
            out[name] = values
    table = np.concatenate([pieces[number] for number in sorted(pieces)])
    return as_qwen35(out, config) | {"ngram_table.weight": table}


def as_kda(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Released names said as usual; what decays are made of differs."""
    words = {
        ".block_sparse_moe.": ".mlp.", "model.word_embeddings": "model.embed_tokens", ".attention.": ".self_attn.",
        "self_attn.dense": "self_attn.o_proj", "expert_bias": "e_score_correction_bias", "dt_bias": "dt.bias",
    }  # fmt: skip
    out: Arrays = {}
    for name, values in tensors.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        if name.endswith("A_log"):
            kimi = config["model_type"] == "kimi_linear"
            values = -np.exp(values) if kimi else np.exp(values).reshape(-1, 1)
        elif "conv1d" in name:
            values = values.reshape(1, len(values), 1, -1)
        elif name.endswith("g_proj.weight") and len(values) == config["num_attention_heads"]:
            name = name.replace("g_proj", "head_gate")
        out[name] = values
    return as_deepseek2(out, config)


def as_qwen3next(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Norms with their one, and queries, keys, values and gates apart."""
    key, groups = config["linear_key_head_dim"], config["linear_num_key_heads"]
    value = config["linear_value_head_dim"] * config["linear_num_value_heads"] // groups
    out: Arrays = {}
    for name, values in together(tensors).items():
        if name.endswith("in_proj_qkvz.weight"):
            parts = np.split(values.reshape(groups, -1, values.shape[-1]), [key, 2 * key, 2 * key + value], axis=1)
            *qkv, z = (part.reshape(-1, values.shape[-1]) for part in parts)
            out |= {name.replace("qkvz", "qkv"): np.concatenate(qkv), name.replace("qkvz", "z"): z}
            continue
        if name.endswith("A_log"):
            values = -np.exp(values)
        elif name.endswith("norm.weight") and "linear_attn" not in name:
            values = values + 1
        out[name.replace("dt_bias", "dt.bias")] = values.squeeze()
    return out


def as_mamba(name: str, values: np.ndarray, groups: int) -> tuple[str, np.ndarray]:
    """Numbers of a head in columns, and norms of a group in rows."""
    if name.endswith(".A_log"):
        values = -np.exp(values)
    if name.endswith((".A_log", ".D")):
        values = values[:, None]
    elif name.endswith(".norm.weight"):
        values = values.reshape(groups, -1)
    return name.replace("dt_bias", "dt.bias"), values.squeeze(1) if "conv1d.weight" in name else values


def as_granite(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    shared = "mlp.shared_experts" if config["num_local_experts"] else "mlp"
    places = {"block_sparse_moe.router.layer": "mlp.gate", "block_sparse_moe": "mlp.experts", "shared_mlp": shared}
    out: Arrays = {}
    for name, values in tensors.items():
        part = name.split(".")[-2]
        for theirs, ours in places.items():
            name = name.replace(theirs, ours)
        if ".mamba." in name:
            name, values = as_mamba(name, values, config["mamba_n_groups"])
        if part == "input_linear":
            for ours, half in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=-2), strict=True):
                out[name.replace(part, ours)] = half
        else:
            values = neighbours(values, heads[part]) if part in heads else values
            out[name.replace("output_linear", "down_proj")] = values
    return out


def as_nemotron(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    places = {"linear_attention": "mamba", "full_attention": "self_attn", "moe": "mlp", "mlp": "mlp"}
    out: Arrays = {}
    for name, values in tensors.items():
        name = name.replace("backbone.embeddings", "model.embed_tokens").replace("norm_f", "norm")
        name = name.replace("backbone.", "model.")
        if ".mixer." in name:
            kind = config["layers_block_type"][int(name.split(".")[2])]
            name = name.replace(".mixer.", f".{places[kind]}.")
            if kind == "linear_attention":
                name, values = as_mamba(name, values, config["n_groups"])
        out[name] = values
    return together(out)


def as_gpt_oss(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """MXFP4 in ggml's order: a scale, then codes of which a byte has number j and number j + 16."""
    out: Arrays = {}
    for name, values in tensors.items():
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            codes = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], 32)
            codes = codes[..., :16] | codes[..., 16:] << 4
            scales = tensors[name.replace("_blocks", "_scales")][..., None]
            values = np.concatenate([scales, codes], axis=-1).reshape(*values.shape[:2], -1)
            name = name.replace("_blocks", ".weight")
        name = name.replace("proj_bias", "proj.bias").replace("sinks", "weight")
        if "gate_up_proj" in name:
            out |= {name.replace("gate_up", part): values[:, i::2] for i, part in enumerate(("gate", "up"))}
        else:
            out[name] = values
    return out


def as_gemma3(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    return {name: values + 1 if name.endswith("norm.weight") else values for name, values in tensors.items()}


def as_gemma4(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Pairs of full layers that do not turn have their frequencies divided by a lot."""
    out: Arrays = {}
    for name, values in tensors.items():
        name = name if name.endswith((".weight", ".bias", ".scale", "_scale")) else f"{name}.weight"
        out[name.replace("router.per_expert_scale", "experts.down_proj.scale")] = values
    pairs = {len(values) // 2 for name, values in out.items() if name.endswith("k_norm.weight")}
    turning = int(max(pairs) * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return out | {"rope_freqs.weight": np.array([1] * turning + [1e30] * (max(pairs) - turning), np.float32)}


def renamed(tensors: Arrays, words: Mapping[str, str]) -> Arrays:
    out: Arrays = {}
    for name, values in tensors.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        out[name] = values
    return out


def as_lfm2(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Convolutions of one channel each, as a matrix."""
    words = {
        "self_attn.out_proj": "self_attn.o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
        ".ffn_norm": ".post_attention_layernorm", "feed_forward.expert_bias": "mlp.gate.e_score_correction_bias",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward": "mlp",
    }  # fmt: skip
    out = together(renamed(tensors, words))
    return {name: values.squeeze(1) if name.endswith("conv.conv.weight") else values for name, values in out.items()}


def as_llama4(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Experts are stored (in, out)."""
    words = {"feed_forward.router": "mlp.gate", "feed_forward.shared_expert.": "mlp.shared_experts.",
             "feed_forward": "mlp"}  # fmt: skip
    turned = {n: v.swapaxes(1, 2) if ".experts." in n else v for n, v in renamed(tensors, words).items()}
    return together(turned) | llama3_divisors(config)


def as_exaone4(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    return tensors | llama3_divisors(config)


def llama3_divisors(config: dict[str, Any]) -> Arrays:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "llama3":
        return {}
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] / waves
    smooth = np.clip((turns - low) / max(high - low, 1e-9), 0, 1)
    divisors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return {"rope_freqs.weight": divisors.astype(np.float32)}


def as_phimoe(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    rope = config["rope_parameters"]
    factors = {f"rope_factors_{n}.weight": f"{n}_factor" for n in ("short", "long") if f"{n}_factor" in rope}
    out = together(renamed(tensors, {"block_sparse_moe": "mlp", "mlp.router": "mlp.gate"}))
    return out | {name: np.array(rope[key], np.float32) for name, key in factors.items()}


def longrope_factor(config: dict[str, Any]) -> float:
    """What cos and sin of a model with LongRoPE are multiplied with."""
    known = config["rope_parameters"]["original_max_position_embeddings"]
    return float((1 + np.log(config["max_position_embeddings"] / known) / np.log(known)) ** 0.5)


def as_laguna(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    return together(renamed(tensors, {"self_attn.g_proj": "self_attn.head_gate"}))


WAYS: dict[str, Callable[[Arrays, dict[str, Any]], Arrays]] = {
    "llama": as_llama, "smollm3": as_llama, "mistral3": as_llama, "mistral4": as_deepseek2,
    "granite": as_llama,
    "deepseek2": as_deepseek2, "qwen35": as_qwen35, "qwen35moe": as_qwen35,
    "gpt-oss": as_gpt_oss, "qwen3next": as_qwen3next, "deepseek32": as_deepseek2, "glm-dsa": as_deepseek2,
    "kimi-linear": as_kda,
    "granitemoe": as_granite, "granitehybrid": as_granite, "nemotron_h": as_nemotron, "nemotron_h_moe": as_nemotron,
    "gemma3": as_gemma3, "gemma4": as_gemma4, "bailingmoe3": as_kda, "lfm2moe": as_lfm2, "llama4": as_llama4,
    "phimoe": as_phimoe, "phi3": as_phimoe, "exaone4": as_exaone4, "laguna": as_laguna, "qwen4exp": as_qwen4,
}  # fmt: skip


SPELLINGS = {
    "model_max_length": "max_position_embeddings", "moe_renormalize": "norm_topk_prob", "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok", "num_shared_experts": "n_shared_experts",
}  # fmt: skip


POST_NORMS = ("gpt-oss", "glm4moe", "qwen35", "qwen35moe", "qwen3next", "gemma3", "gemma4", "afmoe", "olmo2",
              "exaone4", "seed_oss")  # fmt: skip
"""Architectures that call the norm after the attention so, whatever it is of."""


def keys(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What the metadata says below the architecture's name; None is left out."""
    config = config | {ours: config[theirs] for theirs, ours in SPELLINGS.items() if theirs in config}
    c = config.get
    heads, kv_heads, hidden = c("num_attention_heads"), c("num_key_value_heads"), c("hidden_size")
    rope = c("rope_parameters") or (c("rope_scaling") or {}) | {"rope_theta": c("rope_theta", 10000.0)}
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    found = {
        "embedding_length": hidden,
        "block_count": c("num_hidden_layers"),
        "context_length": c("max_position_embeddings"),
        "feed_forward_length": c("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": c("head_dim") or hidden // heads,
        "attention.layer_norm_rms_epsilon": c("rms_norm_eps"),
        "rope.freq_base": float(rope["rope_theta"] or 10000),
        "vocab_size": c("vocab_size"),
        "expert_count": c("num_local_experts") or c("num_experts") or c("n_routed_experts"),
        "expert_used_count": c("num_experts_per_tok"),
        "expert_feed_forward_length": c("moe_intermediate_size"),
        "expert_shared_feed_forward_length": c("shared_expert_intermediate_size"),
    }
    if rope.get("rope_type") == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast", 32)),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow", 1)),
        }
    if architecture in ("glm4moe", "bailingmoe2", "dots1", "exaone-moe") or WAYS.get(architecture) in (
        as_deepseek2,
        as_kda,
    ):
        found |= {
            "leading_dense_block_count": c("first_k_dense_replace", int(c("model_type") != "solar_open")),
            "expert_shared_count": c("n_shared_experts", c("num_shared_experts", 1)),
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": c("norm_topk_prob") or None,
            "expert_group_count": c("n_group"),
            "expert_group_used_count": c("topk_group"),
            "expert_gating_func": 1 if c("model_type") in ("deepseek_v2", "mistral4") else 2,
        }
    if WAYS.get(architecture) in (as_deepseek2, as_kda):
        rank, rotary, value = config["kv_lora_rank"], config["qk_rope_head_dim"], config["v_head_dim"]
        found |= {
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": c("q_lora_rank"),
            "attention.kv_lora_rank": rank,
            "attention.key_length": rank + rotary,
            "attention.value_length": rank,
            "attention.key_length_mla": config["qk_nope_head_dim"] + rotary,
            "attention.value_length_mla": value,
            "rope.dimension_count": rotary,
        }
        if rope.get("mscale_all_dim"):
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if WAYS.get(architecture) is as_kda:
        found |= {
            "attention.head_count_kv": [int(kind == "full_attention") for kind in config["layer_types"]],
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "kda.head_dim": config["linear_head_dim"],
            "kda.safe_gate": c("kda_safe_gate"),
            "kda.gate_lower_bound": c("kda_lower_bound"),
            "expert_shared_feed_forward_length": c("moe_intermediate_size") if "kda_lower_bound" in config else None,
        }
    if "index_topk" in config:
        types = c("indexer_types")
        found |= {
            "attention.indexer.head_count": c("index_n_heads"),
            "attention.indexer.key_length": c("index_head_dim"),
            "attention.indexer.top_k": c("index_topk"),
            "attention.indexer.types": types and [kind == "full" for kind in types],
        }
    if architecture in ("minimax-m2",):
        found |= {"expert_feed_forward_length": c("intermediate_size"), "expert_gating_func": 2}
    if architecture == "hy_v3":
        found |= {
            "expert_shared_feed_forward_length": c("moe_intermediate_size") * c("num_shared_experts"),
            "expert_weights_norm": True,
            "expert_weights_scale": config["router_scaling_factor"],
            "expert_gating_func": 2,
        }
    if architecture == "hunyuan-moe":
        width = c("intermediate_size")
        found |= {
            "expert_used_count": config["moe_topk"],
            "expert_shared_count": 1,
            "expert_feed_forward_length": width,
            "expert_shared_feed_forward_length": width,
        }
    if architecture == "mimo2":
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
        found |= {
            "attention.head_count_kv": [kv_heads * (1 + one) for one in sliding],
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": sliding,
            "attention.value_length": config["v_head_dim"],
            "attention.value_scale": c("attention_value_scale"),
            "rope.freq_base_swa": config["rope_parameters"]["sliding_attention"]["rope_theta"],
            "expert_gating_func": 2,
        }
    if architecture == "gpt-oss":
        found |= {"expert_feed_forward_length": c("intermediate_size"), "attention.sliding_window": c("sliding_window")}
    if architecture.startswith(("qwen35", "qwen3next", "qwen4exp")):
        values = config["linear_num_value_heads"]
        found |= {
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": values,
            "ssm.inner_size": values * config["linear_value_head_dim"],
            "full_attention_interval": 4,
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config["layer_types"]],
            "rope.dimension_sections": [*rope["mrope_section"], 0] if "mrope_section" in rope else None,
        }
    if architecture.startswith("granite"):
        found |= {
            "expert_shared_feed_forward_length": c("shared_intermediate_size"),
            "attention.scale": float(config["attention_multiplier"]),
            "embedding_scale": float(config["embedding_multiplier"]),
            "residual_scale": float(config["residual_multiplier"]),
            "logit_scale": float(config["logits_scaling"]),
        }
    if architecture == "granitehybrid":
        found |= {
            "attention.head_count_kv": [kv_heads * (kind == "full_attention") for kind in config["layer_types"]],
            "rope.scaling.finetuned": c("position_embedding_type") == "rope",
            "ssm.conv_kernel": config["mamba_d_conv"],
            "ssm.state_size": config["mamba_d_state"],
            "ssm.group_count": config["mamba_n_groups"],
            "ssm.time_step_rank": config["mamba_n_heads"],
            "ssm.inner_size": config["mamba_expand"] * hidden,
        }
    if architecture.startswith("nemotron_h"):
        kinds = config["layers_block_type"]
        found |= {
            "block_count": len(kinds),
            "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
            "attention.head_count_kv": [kv_heads * (kind == "full_attention") for kind in kinds],
            "feed_forward_length": [config["moe_intermediate_size"] * (kind == "moe") for kind in kinds],
            "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
            "expert_shared_count": config["n_shared_experts"],
            "expert_weights_norm": c("norm_topk_prob"),
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
            "moe_latent_size": c("moe_latent_size"),
            "ssm.conv_kernel": config["conv_kernel"],
            "ssm.state_size": config["ssm_state_size"],
            "ssm.group_count": config["n_groups"],
            "ssm.time_step_rank": config["mamba_num_heads"],
            "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        }
    part = rope.get("partial_rotary_factor", c("partial_rotary_factor"))
    if part is not None:
        found["rope.dimension_count"] = int((c("head_dim") or hidden // heads) * part)
    found |= more_keys(config, architecture, rope)
    if local:
        found |= {"attention.sliding_window": c("sliding_window"), "rope.freq_base_swa": float(local["rope_theta"])}
        found["final_logit_softcapping"] = c("final_logit_softcapping")
    if architecture == "gemma4":
        own = [c("per_layer_config").get(str(i), {}) for i in range(config["num_hidden_layers"])]
        full = next(one["head_dim"] for one in own if one)
        found |= {
            "attention.key_length": full, "attention.value_length": full, "rope.dimension_count": full,
            "attention.key_length_swa": c("head_dim"), "attention.value_length_swa": c("head_dim"),
            "rope.dimension_count_swa": c("head_dim"), "expert_used_count": c("top_k_experts"),
            "attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0,
            "attention.sliding_window_pattern": [not one for one in own],
        }  # fmt: skip
        if any("num_key_value_heads" in one for one in own):
            found["attention.head_count_kv"] = [one.get("num_key_value_heads", kv_heads) for one in own]
    return found


def more_keys(config: dict[str, Any], architecture: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Those of architectures that have no others."""
    c = config.get
    if architecture == "qwen4exp":
        layer, spec = config["ple_layer_ids"][0], family(config["model_type"]).spec(config)
        ngrams: Any = spec.layers[layer - 1][0].kind
        kinds, ratio = config["layer_types"], config["indexer_compress_ratio"]
        return {
            "hyper_connection.count": config["hc_count"],
            "hyper_connection.low_rank": config["hc_lowrank"],
            "attention.indexer.head_count": config["indexer_n_heads"],
            "attention.indexer.key_length": config["indexer_head_dim"],
            "attention.indexer.top_k": config["indexer_budget"],
            "attention.compress_ratios": [ratio * (kind == "indexed_attention") for kind in kinds],
            "ple.layers": [layer - 1],
            "ple.ngram_size": config["ngram_size"],
            "ple.heads_per_ngram": config["heads_per_ngram"],
            "ple.conv_kernel": config["ple_conv_kernel_size"],
            "ple.eos_token_id": config["eos_token_id"][-1],
            "ple.layer_multipliers": list(ngrams.multipliers),
            "ple.head_vocab_sizes": list(ngrams.sizes),
            "ple.head_offsets": np.cumsum((0, *ngrams.sizes[:-1])).tolist(),
            "embedding_length_per_layer_input": config["ple_embed_dim"] // len(ngrams.sizes),
        }
    if architecture == "lfm2moe":
        return {
            "attention.layer_norm_rms_epsilon": config["norm_eps"],
            "attention.head_count_kv": [c("num_key_value_heads") * (kind != "conv") for kind in config["layer_types"]],
            "shortconv.l_cache": config["conv_L_cache"],
            "leading_dense_block_count": config["num_dense_layers"],
            "expert_gating_func": 2,
            "expert_weights_scale": float(config["routed_scaling_factor"]),
        }
    if architecture == "llama4":
        return {
            "feed_forward_length": config["intermediate_size_mlp"],
            "expert_feed_forward_length": config["intermediate_size"],
            "interleave_moe_layer_step": config["interleave_moe_layer_step"],
        }
    if architecture == "cohere2moe":
        kinds, width, shared = config["layer_types"], config["intermediate_size"], config["num_shared_experts"]
        return {
            "attention.layer_norm_epsilon": c("layer_norm_eps"),
            "feed_forward_length": c("prefix_dense_intermediate_size") or width,
            "expert_feed_forward_length": width,
            "expert_shared_count": shared,
            "expert_shared_feed_forward_length": width * shared,
            "expert_gating_func": 2 if c("expert_selection_fn") == "sigmoid" else 1,
            "expert_weights_norm": c("norm_topk_prob"),
            "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
            "attention.sliding_window": c("sliding_window"),
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
            "logit_scale": c("logit_scale"),
            "rope.dimension_count": c("head_dim"),
            "rope.scaling.type": "none",
        }
    if architecture == "afmoe":
        return {
            "expert_shared_count": config["num_shared_experts"],
            "leading_dense_block_count": config["num_dense_layers"],
            "expert_weights_scale": float(config["route_scale"]),
            "attention.sliding_window": config["sliding_window"],
            "rope.dimension_count": c("head_dim"),
        }
    if architecture == "ernie4_5-moe":
        return {
            "expert_count": config["moe_num_experts"],
            "expert_used_count": config["moe_k"],
            "interleave_moe_layer_step": config["moe_layer_interval"],
            "leading_dense_block_count": config["moe_layer_start_index"],
            "expert_shared_count": config["moe_num_shared_experts"],
            "expert_shared_feed_forward_length": config["intermediate_size"] // 2,
        }
    if architecture in ("mistral3", "mistral4"):
        multiplier = rope.get("mscale_all_dim", 0) * (0.1 if architecture == "mistral4" else 1)
        return {
            "rope.scaling.yarn_log_multiplier": multiplier or None,
            "attention.temperature_scale": rope.get("llama_4_scaling_beta"),
            "rope.dimension_count": c("qk_rope_head_dim"),
        }
    if architecture == "laguna":
        return {
            "attention.head_count": config["num_attention_heads_per_layer"],
            "expert_weights_norm": True,
            "expert_weights_scale": config["moe_routed_scaling_factor"],
            "expert_gating_func": 2,
            "leading_dense_block_count": 1,
            "rope.dimension_count_swa": c("head_dim"),
        }
    if architecture in ("mellum", "olmo2", "exaone4", "exaone-moe") and c("sliding_window"):
        found = {
            "attention.sliding_window": config["sliding_window"],
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config["layer_types"]],
        }
        if architecture == "exaone-moe":
            found |= {"rope.scaling.type": "none", "expert_shared_feed_forward_length": config["moe_intermediate_size"]}
        return found
    if architecture == "phi3":
        return {
            "attention.sliding_window": c("sliding_window") or 0,
            "rope.scaling.original_context_length": c("original_max_position_embeddings"),
            "rope.scaling.attn_factor": longrope_factor(config) if "short_factor" in rope else None,
        }
    if architecture == "phimoe":
        return {
            "attention.sliding_window": c("sliding_window") or 0,
            "rope.scaling.original_context_length": rope.get("original_max_position_embeddings", 4096),
            "rope.scaling.attn_factor": rope.get("short_mscale"),
        }
    return {}


def write_gguf(
    folder: Path,
    config: dict[str, Any],
    path: Path,
    architecture: str,
    besides: Mapping[str, np.ndarray] = {},
    change: Callable[[Arrays], Arrays] = lambda tensors: tensors,
    split: int = 0,
    vocabulary: list[str] | None = None,
    **more: Any,
) -> Path:
    """The checkpoint as a GGUF file in float32, or in MXFP4 what is stored so.

    besides: more tensors.
    change: is given the tensors by GGUF's names, and gives those to write.
    split: the most tensors of a part, of which there are several then.
    vocabulary: the tokens, in the byte alphabet; the last one ends an answer, that before it is a pair.
    more: keys to add or replace, below the architecture unless they are of the file or tokenizer; None takes one away.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_name("A name")
    named: dict[str, Any] = {
        key if key.startswith(("general.", "tokenizer.")) else f"{architecture}.{key}": value
        for key, value in (keys(config, architecture) | more).items()
    }
    if vocabulary:
        words = {"model": "gpt2", "pre": "default", "tokens": vocabulary, "token_type": [1] * len(vocabulary),
                 "merges": [" ".join(vocabulary[-2])], "eos_token_id": len(vocabulary) - 1}  # fmt: skip
        named |= {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    for key, value in named.items():
        if isinstance(value, list) and not isinstance(value[0], str) and max(value, default=0) > 1 << 31:
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64)
        elif value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                   list: writer.add_array}[type(value)]  # fmt: skip
            add(key, value)
    tensors = WAYS.get(architecture, lambda tensors, config: together(tensors))(stored(folder), config)
    arrays: Arrays = {}
    for name, values in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        part, _, kind = name[layer.end() if layer else 0 :].rpartition(".")
        bare = {"A_log": "ssm_a", "D": "ssm_d"}.get(kind)
        theirs = bare or NAMES[part]
        if part == "post_attention_layernorm" and architecture in POST_NORMS:
            theirs = "post_attention_norm"
        arrays[f"{f'blk.{layer[1]}.' if layer else ''}{theirs}" + ("" if bare else f".{kind}")] = values
    write_tensors(writer, {**change(arrays), **besides})
    return path


def write_tensors(writer: gguf.GGUFWriter, tensors: Arrays) -> None:
    """Add tensors, of which bytes are MXFP4 blocks, and write the whole file."""
    for name, values in tensors.items():
        packed = gguf.GGMLQuantizationType.MXFP4 if values.dtype == np.uint8 else None
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found

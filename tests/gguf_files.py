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
    "mlp.gate.e_score_correction": "exp_probs_b", "block_sparse_moe.e_score_correction": "exp_probs_b",
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
    # Hunyuan
    "mlp.router.gate": "ffn_gate_inp", "mlp.gate.wg": "ffn_gate_inp",
    "mlp.shared_mlp.gate_proj": "ffn_gate_shexp", "mlp.shared_mlp.up_proj": "ffn_up_shexp",
    "mlp.shared_mlp.down_proj": "ffn_down_shexp",
    "self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm",
    # gpt-oss
    "self_attn": "attn_sinks",
    # Mamba-2, and layers of one norm
    "mamba.in_proj": "ssm_in", "mamba.conv1d": "ssm_conv1d", "mamba.dt": "ssm_dt", "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out", "norm": "attn_norm",
    "mlp.fc1_latent_proj": "ffn_latent_down", "mlp.fc2_latent_proj": "ffn_latent_up",
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
        one = re.fullmatch(r"(.+\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight", name)
        if one:
            stack = f"{one[1]}.mlp.experts.{words.get(one[3], one[3])}.weight"
            stacks.setdefault(stack, {})[int(one[2])] = values
        elif name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                out[name.replace("gate_up_proj", f"{part}_proj.weight")] = half
        else:
            name = f"{name}.weight" if name.endswith("experts.down_proj") else name
            name = name.replace("mlp.expert_bias", "mlp.gate.e_score_correction_bias")
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


WAYS: dict[str, Callable[[Arrays, dict[str, Any]], Arrays]] = {
    "llama": as_llama, "deepseek2": as_deepseek2, "qwen35": as_qwen35, "qwen35moe": as_qwen35, "gpt-oss": as_gpt_oss,
    "qwen3next": as_qwen3next, "deepseek32": as_deepseek2, "glm-dsa": as_deepseek2,
    "granitemoe": as_granite, "granitehybrid": as_granite, "nemotron_h": as_nemotron, "nemotron_h_moe": as_nemotron,
}  # fmt: skip


def keys(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """What the metadata says below the architecture's name; None is left out."""
    c = config.get
    heads, kv_heads, hidden = c("num_attention_heads"), c("num_key_value_heads"), c("hidden_size")
    rope = c("rope_parameters") or (c("rope_scaling") or {}) | {"rope_theta": c("rope_theta")}
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
    if architecture in ("glm4moe", "dots1") or WAYS.get(architecture) is as_deepseek2:
        found |= {
            "leading_dense_block_count": c("first_k_dense_replace", int(c("model_type") != "solar_open")),
            "expert_shared_count": c("n_shared_experts", 1),
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": c("norm_topk_prob") or None,
            "expert_group_count": c("n_group"),
            "expert_group_used_count": c("topk_group"),
            "expert_gating_func": 1 if c("model_type") == "deepseek_v2" else 2,
        }
    if WAYS.get(architecture) is as_deepseek2:
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
    if architecture == "gpt-oss":
        found |= {"expert_feed_forward_length": c("intermediate_size"), "attention.sliding_window": c("sliding_window")}
    if architecture.startswith(("qwen35", "qwen3next")):
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
    if "partial_rotary_factor" in rope:
        found["rope.dimension_count"] = int(config["head_dim"] * rope["partial_rotary_factor"])
    return found


def write_gguf(
    folder: Path,
    config: dict[str, Any],
    path: Path,
    architecture: str,
    besides: Mapping[str, np.ndarray] = {},
    change: Callable[[Arrays], Arrays] = lambda tensors: tensors,
    **more: Any,
) -> Path:
    """The checkpoint as a GGUF file in float32, or in MXFP4 what is stored so.

    besides: more tensors.
    change: is given the tensors by GGUF's names, and gives those to write.
    more: keys to add or replace; None takes one away.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A name")
    for key, value in (keys(config, architecture) | more).items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                   list: writer.add_array}[type(value)]  # fmt: skip
            add(f"{architecture}.{key}", value)
    tensors = WAYS.get(architecture, lambda tensors, config: together(tensors))(stored(folder), config)
    named: Arrays = {}
    for name, values in tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        part, _, kind = name[layer.end() if layer else 0 :].rpartition(".")
        bare = {"A_log": "ssm_a", "D": "ssm_d"}.get(kind)
        theirs = bare or NAMES[part]
        if theirs == "ffn_norm" and architecture in ("gpt-oss", "glm4moe", "qwen35", "qwen35moe", "qwen3next"):
            theirs = "post_attention_norm"
        named[f"{f'blk.{layer[1]}.' if layer else ''}{theirs}" + ("" if bare else f".{kind}")] = values
    for name, values in {**change(named), **besides}.items():
        packed = gguf.GGMLQuantizationType.MXFP4 if values.dtype == np.uint8 else None
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found

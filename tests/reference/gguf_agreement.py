"""Prints how far our logits of GGUF files are from transformers' of the same checkpoints, for every golden case.

llama.cpp's own converter writes the files. It lies in the sdist of llama-cpp-python:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
    python tests/reference/gguf_agreement.py llama_cpp_python-0.3.36/vendor/llama.cpp [CASE ...] [--outtype q8_0|mix]

The converter was written for the hub's spelling of config.json, which transformers' own saving changes: `spelt` changes
it back. `CHANGES` are of what it cannot say at all; transformers computes those cases anew. In a "mix" matrices have
random blocks of `TYPES` in turn.
"""

import argparse
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections import Counter
from math import lcm
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny
from ggml_blocks import blocks_like

from numoe.engine import load
from numoe.engine.layers.ngram import NgramEmbedding
from numoe.engine.layers.spec import ModelSpec

GOLDEN = tiny.GOLDEN
ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM", "gpt_oss": "GptOssForCausalLM", "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
    "mistral": "MistralForCausalLM", "qwen3_next": "Qwen3NextForCausalLM", "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM", "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM", "nemotron_h": "NemotronHForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM", "solar_open": "SolarOpenForCausalLM", "hy_v3": "HYV3ForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM", "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "bailing_moe": "BailingMoeV2ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "qwen3_vl_text": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe_text": "Qwen3VLMoeForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM", "gemma4_text": "Gemma4ForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM", "bailing_hybrid": "BailingMoeV3ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM", "llama4_text": "Llama4ForCausalLM", "phimoe": "PhiMoEForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "dots1": "Dots1ForCausalLM", "olmoe": "OlmoeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM", "mellum": "MellumForCausalLM", "afmoe": "AfmoeForCausalLM",
    "ministral3": "Ministral3ForCausalLM", "mistral4": "Mistral3ForConditionalGeneration",
    "seed_oss": "SeedOssForCausalLM", "granite": "GraniteForCausalLM", "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "exaone4": "Exaone4ForCausalLM",
    "exaone_moe": "ExaoneMoeForCausalLM", "glm4": "Glm4ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM", "laguna": "LagunaForCausalLM", "qwen4_exp_text": "Qwen4ExpForCausalLM",
}  # fmt: skip

SAVED = ("v4_a", "v4_b")
"""Cases as transformers saves them, which the converter reads in their released form alone."""

# What is changed in a case because the converter or the format has no words for it.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v32_b": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "rms_norm_eps": 1e-6},
    "bailing_hybrid_b": {"kda_safe_gate": True, "layer_group_size": 2,
                         "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "cohere2_moe_b": {"attention_bias": False, "shared_expert_combination_strategy": "average",
                      "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
                      "prefix_dense_sliding_window_pattern": 1},
    "gemma3_b": {"layer_types": None, "query_pre_attn_scalar": 12},
    "gemma4_b": {"attention_bias": False, "rope_parameters": None},
    "glm4_moe_lite_b": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "rope_interleave": True},
    "granitemoehybrid_a": {"time_step_limit": None},
    "granitemoehybrid_b": {"position_embedding_type": None, "intermediate_size": 70, "time_step_limit": None},
    "nemotron_h_a": {"mamba_head_dim": 32, "time_step_limit": None},
    "nemotron_h_b": {"mamba_head_dim": 16, "n_group": 1, "topk_group": 1, "time_step_min": 1e-30,
                     "time_step_limit": None},
    "kimi_linear_a": {"num_expert_group": 1, "topk_group": 1},
    "kimi_linear_b": {"mlp_layer_types": ["dense", "sparse", "sparse"], "moe_renormalize": True, "q_lora_rank": None},
    "lfm2_moe_a": {"conv_bias": False, "use_expert_bias": True, "routed_scaling_factor": 1.0},
    "lfm2_moe_b": {"norm_topk_prob": True, "tie_word_embeddings": True},
    "llama4_a": {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "no_rope_layer_interval": 4,
                 "no_rope_layers": None, "layer_types": None, "moe_layers": None},
    "llama4_b": {"attention_chunk_size": 8192, "attn_temperature_tuning": True, "use_qk_norm": True,
                 "no_rope_layers": None, "layer_types": None, "moe_layers": None},
    "phimoe_a": {"router_jitter_noise": 0.01},
    "phimoe_b": {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 3000.0, "original_max_position_embeddings": 1024,
        "short_mscale": 1.0954451150103321, "long_mscale": 1.3,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [2.0, 2.2, 2.6, 3.2, 4.0, 5.0]}},
    "gpt_oss_b": {"layer_types": None, "swiglu_limit": 7.0},
    "minimax_m2_b": {"rotary_dim": 8},
    "hunyuan_v1_moe_a": {"moe_topk": 3, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
                         "head_dim": 128, "max_position_embeddings": 32768, "rope_parameters": {
                             "rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}},
    "mimo_v2_flash_b": {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 9000.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}},
    "afmoe_a": {"global_attn_every_n_layers": 4, "layer_types": None},
    "afmoe_b": {"layer_types": None, "mup_enabled": True},
    "dots1_a": {"sliding_window": None, "layer_types": None},
    "exaone_moe_b": {"mlp_layer_types": ["dense", "sparse", "sparse"], "norm_topk_prob": True},
    "ernie4_5_moe_a": {"moe_norm_min": 1e-12},
    "ernie4_5_moe_b": {"use_bias": False},
    "laguna_a": {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
    "laguna_b": {"moe_router_logit_softcapping": 0.0, "mlp_layer_types": ["dense", "sparse", "sparse"],
                 "layer_types": ["full_attention", *["sliding_attention"] * 2]},
    "mellum_a": {"mlp_layer_types": ["sparse"] * 4},
    "mellum_b": {"norm_topk_prob": True},
    "ministral3_a": {"sliding_window": None},
    "mistral4_a": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 9000.0, "factor": 8.0, "original_max_position_embeddings": 29,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 1e-20,
        "partial_rotary_factor": 0.375}},
    "mistral4_b": {"rope_interleave": True, "norm_topk_prob": True},
    "mistral_a": {"sliding_window": None},
    "olmoe_a": {"clip_qkv": None, "rms_norm_eps": 1e-5},
    "olmoe_b": {"norm_topk_prob": False, "rms_norm_eps": 1e-5},
    "mixtral_b": {"sliding_window": None},
    "qwen2_b": {"use_sliding_window": False, "layer_types": None},
    "qwen2_moe_b": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False, "qkv_bias": True},
    "qwen3_b": {"use_sliding_window": False, "layer_types": None},
    "qwen3_next_b": {"mlp_only_layers": [], "norm_topk_prob": True},
    "qwen4_exp_a": {"ple_layer_ids": [1], "output_gate_type": "sigmoid", "norm_topk_prob": True},
    "qwen3_vl_moe_a": {"mlp_only_layers": []},
    "smollm3_b": {"no_rope_layers": None, "use_sliding_window": False, "layer_types": None},
    "qwen3_moe_a": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_moe_b": {"norm_topk_prob": True},
    "v2_b": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32,
                                 "beta_slow": 1, "original_max_position_embeddings": 256, "mscale": 0.707,
                                 "mscale_all_dim": 0.707}},
}  # fmt: skip


def spelt(config: dict[str, Any]) -> dict[str, Any]:
    """The config as the hub has it."""
    config = config | {"architectures": [ARCHITECTURES[config["model_type"]]]}
    old = {"linear_attention": "mamba", "full_attention": "attention"}
    for key in ("layer_types", "layers_block_type"):
        if config["model_type"] in ("granitemoehybrid", "nemotron_h") and key in config:
            config[key] = [old.get(kind, kind) for kind in config[key]]
    if config["model_type"] == "qwen4_exp_text":
        config |= {"layer_types": [kind.replace("indexed", "full") for kind in config["layer_types"]], "model_type": ""}
    if "mlp_layer_types" in config and config["model_type"] != "laguna":
        config["first_k_dense_replace"] = config.pop("mlp_layer_types").count("dense")
    if config["model_type"] in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "minimax_m2"):
        config["scoring_func"] = "sigmoid"
    if config["model_type"] == "bailing_moe":
        config["score_function"] = "sigmoid"
    if config["model_type"] == "solar_open":
        config |= {"partial_rotary_factor": 1.0, "first_k_dense_replace": 0}
    if config["model_type"] == "mimo_v2_flash":
        ropes = config.pop("rope_parameters")
        full, sliding = (ropes[f"{kind}_attention"] for kind in ("full", "sliding"))
        config |= {
            "model_type": "mimo_v2",  # else transformers reads it, and the converter wants what was released
            "rope_theta": full["rope_theta"], "swa_rope_theta": sliding["rope_theta"],
            "partial_rotary_factor": full["partial_rotary_factor"], "topk_method": "noaux_tc",
            "scoring_func": "sigmoid", "layernorm_epsilon": config["rms_norm_eps"],
            "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config["layer_types"]],
            "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
            **{f"swa_{key}": config[key] for key in ("head_dim", "v_head_dim", "num_attention_heads")},
        }  # fmt: skip
    if config["model_type"] == "hunyuan_v1_moe":
        of_all = {"moe_intermediate_size": config["intermediate_size"], "num_shared_expert": 1}
        config |= {key: [config.get(key, one)] * config["num_hidden_layers"]
                   for key, one in (of_all | {"moe_topk": 1}).items()}  # fmt: skip
    if config["model_type"] == "phimoe":
        config["rope_parameters"].setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if config["model_type"] in ("kimi_linear", "bailing_hybrid"):
        config |= of_delta_attention(config)
    return config


def of_delta_attention(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers spells otherwise or leaves out of models with Kimi Delta Attention."""
    kinds = config["layer_types"]
    numbers = {kind: [i + 1 for i, one in enumerate(kinds) if one == kind] for kind in set(kinds)}
    table = {
        "num_heads": config["linear_num_heads"], "head_dim": config["linear_head_dim"],
        "short_conv_kernel_size": config["linear_conv_kernel_dim"], "kda_layers": numbers["linear_attention"],
        "full_attn_layers": numbers["full_attention"],
    }  # fmt: skip
    if config["model_type"] == "kimi_linear":
        return {"linear_attn_config": table, "moe_router_activation_func": "sigmoid"}
    return {
        "no_kda_lora": True, "gated_attention_proj_granularity_type": "head_wise", "score_function": "sigmoid",
        "head_dim": config["linear_head_dim"], "short_conv_kernel_size": config["linear_conv_kernel_dim"],
        "moe_shared_expert_intermediate_size": config["moe_intermediate_size"],
        "norm_topk_prob": config["moe_renormalize"], "n_group": config["num_expert_group"],
        "num_experts_per_tok": config["num_experts_per_token"],
        "max_position_embeddings": config["model_max_length"],
        "num_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"],
        "model_type": "",  # or transformers spells them its own way before the converter reads them
    }  # fmt: skip


def rename_dense(folder: Path) -> None:
    """Kimi-Linear's dense layers as the hub has them."""
    for path in folder.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        dense = r"block_sparse_moe\.((gate|up|down)_proj)"
        safetensors.numpy.save_file({re.sub(dense, r"mlp.\1", name): one for name, one in tensors.items()}, path)


WIDER = 8
_SIZES = re.compile(
    r"hidden_size$|intermediate_size|head_dim$|lora_rank$|_latent_size$|rotary_dim|lowrank$|"
    r"embed_dim$|d_state$|d_head$|state_size$|linear_(key|value)_head_dim$|shared_intermediate|v_head_dim$"
)


TYPES = ("Q4_K", "MXFP4", "IQ2_XXS", "Q6_K", "IQ4_XS", "Q4_K", "IQ3_XXS", "Q5_K", "IQ2_S", "Q3_K", "IQ1_M", "Q2_K",
         "IQ3_S", "IQ2_XS", "IQ1_S")  # fmt: skip
SHORT = ("Q8_0", "MXFP4", "IQ4_NL", "Q4_0", "Q5_1")
"""For rows that have no whole blocks of 256, as llama-quantize falls back to such."""
KEPT = re.compile(r"norm|ffn_gate_inp|conv|ssm_(a|d|dt)\b|rope_|hc_|sinks|tid2eid|compressor_ape")
"""What it never quantizes."""


def wider(values: Any, key: str = "") -> Any:
    """A config whose sizes are multiples of the blocks' of Q8_0, which the golden ones are not."""
    if isinstance(values, dict):
        return {name: wider(one, name) for name, one in values.items()}
    if isinstance(values, list):
        return [wider(one, key) for one in values]
    scaled = _SIZES.search(key) or key == "mrope_section"
    return values * WIDER if type(values) is int and scaled and "chunk" not in key else values


def changed(case: str, folder: Path, outtype: str = "f32") -> tuple[Path, np.ndarray]:
    """The checkpoint of a case with its `CHANGES`, and transformers' logits of it, unless it is made wide."""
    import make_golden

    make_golden.transformers.utils.logging.disable_progress_bar()
    described = json.loads((tiny.GOLDEN / f"{case}.json").read_text())
    described["config"] |= CHANGES.get(case, {})
    if wide := outtype != "f32":
        described["config"] = wider(described["config"]) | {"pad_token_id": 0}
    if outtype == "mix":  # rows of whole blocks
        free = [key for key in described["config"] if re.search(r"hidden_size$|intermediate_size$", key)]
        scanned = described["config"].get("mamba_n_heads", 1)
        whole = lcm(256, described["config"]["num_attention_heads"], scanned)
        described["config"] |= {key: whole for key in free if type(described["config"][key]) is int}
        if "mamba_d_head" in described["config"]:
            described["config"]["mamba_d_head"] = described["config"]["mamba_expand"] * whole // scanned
    if not make_golden.CASES[case].listing:
        plain = {k: v for k, v in described["config"].items() if v is not None and k != "model_type"}
        one = make_golden.Case(described["config"]["model_type"], 0, plain)
        described["config"], described["listing"] = make_golden.saved_listing(one)
    elif wide:
        described["listing"] = make_golden.CASES[case].listing(described["config"])
    tiny.GOLDEN = folder / "golden"
    tiny.GOLDEN.mkdir(exist_ok=True)
    (tiny.GOLDEN / f"{case}.json").write_text(json.dumps(described))
    source = plain_folder = tiny.write_checkpoint(case, folder / case)
    if make_golden.CASES[case].listing:
        layers = described["config"]["num_hidden_layers"]
        plain_folder = make_golden.dequantized(source, folder / f"{case}-plain", layers)
    tiny.GOLDEN = GOLDEN
    if wide:
        return source, np.zeros(0)
    return source, make_golden.logits_of(make_golden.load_reference(plain_folder), tiny.load_golden(case).ids)


def convert(llama_cpp: Path, folder: Path, out: Path, outtype: str) -> None:
    """Run the converter in this process, without the vocabulary that these folders lack."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        del sys.modules[name]  # the converter needs its own
    import conversion
    from gguf import GGMLQuantizationType as q

    conversion.load_all_models()
    classes = [conversion.ModelBase]
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        if "set_vocab" in vars(one):
            one.set_vocab = _no_vocabulary
        if one.__name__ == "DeepseekV4Model" and outtype == "f32":  # else it rounds what is FP8 to Q8_0
            one.tensor_force_quant = lambda model, name, *more: name in model._dsv4_fp8_dequantized and q.F32
    sys.argv = ["convert", str(folder), "--outfile", str(out), "--outtype", outtype]
    if re.search("qwen3_(5|next)|mimo_v2", (folder / "config.json").read_text()):
        sys.argv.append("--no-mtp")  # it asserts that there are such layers
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


def _no_vocabulary(model: Any) -> None:
    model.gguf_writer.add_tokenizer_model("none")
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def turn_experts(path: Path) -> None:
    tensors = safetensors.numpy.load_file(path)
    stacks = {name: np.ascontiguousarray(v.swapaxes(1, 2)) for name, v in tensors.items() if ".experts." in name}
    safetensors.numpy.save_file(tensors | stacks, path, metadata={"format": "pt"})


def store_hashes(path: Path, spec: ModelSpec) -> None:
    """What n-grams are hashed with, which golden checkpoints leave to the config."""
    tensors = safetensors.numpy.load_file(path)
    for number, blocks in enumerate(spec.layers):
        if isinstance(kind := blocks[0].kind, NgramEmbedding):
            prefix = f"model.layers.{number}.ple.ple_embedding"
            tensors[f"{prefix}.layer_multipliers"] = np.array(kind.multipliers)
            tensors[f"{prefix}.ngram_heads_vocab_sizes"] = np.array(kind.sizes)
            tensors[f"{prefix}.ngram_heads_offsets"] = np.cumsum((0, *kind.sizes[:-1]))
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def agreement(case: str, llama_cpp: Path, outtype: str, folder: Path) -> str:
    golden = tiny.load_golden(case)
    source, logits_there = folder / case, golden.logits
    if case in CHANGES or outtype != "f32":
        source, logits_there = changed(case, folder, outtype)
    else:
        tiny.write_checkpoint(case, source)
    there = load(source)
    own = there.session(1024).feed(golden.ids)
    if "qwen4_exp" in case:
        store_hashes(source / "model.safetensors", there.spec)
    (source / "config.json").write_text(json.dumps(spelt(json.loads((source / "config.json").read_text()))))
    if "qwen3_vl_moe" in case:  # released with turned experts, which the converter turns back
        turn_experts(source / "model.safetensors")
    vocabulary = {str(token): token for token in range(golden.config["vocab_size"])}  # which Gemma's are counted by
    (source / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    if golden.config["model_type"] == "kimi_linear":
        rename_dense(source)
    out = folder / f"{case}.gguf"
    written = "f32" if outtype == "mix" else outtype
    command = [sys.executable, __file__, str(llama_cpp), "--outtype", written, "--convert", str(source), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return f"the converter failed: {ran.stderr.strip().splitlines()[-1]}"
    kinds: Counter[str] = Counter()
    if outtype == "mix":
        out, kinds = mixed(out, folder / "mixed.gguf")
    logits = load(out).session(1024).feed(golden.ids)
    if outtype != "f32":
        plain = load(dequantized(out, folder / "plain.gguf")).session(1024).feed(golden.ids)
        of = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{np.abs(logits - plain).max():.1e}" + (f" of {np.abs(plain).max():.1f} | {of}" if of else "")
    return f"{np.abs(logits - logits_there).max():.1e} | {np.abs(logits - own).max():.1e}"


def begun(reader: gguf.GGUFReader, out: Path) -> gguf.GGUFWriter:
    """Another file of the same keys."""
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(out, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    return writer


def ended(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mixed(path: Path, out: Path) -> tuple[Path, Counter[str]]:
    """The same file with random blocks, of about the size of its weights, in place of its matrices."""
    reader, kinds = gguf.GGUFReader(path), Counter[str]()
    writer = begun(reader, out)
    for one in reader.tensors:
        values = one.data
        if values.ndim < 2 or values.dtype != np.float32 or KEPT.search(one.name) or values.shape[-1] % 32:
            writer.add_tensor(one.name, values, raw_dtype=one.tensor_type if values.dtype == np.uint8 else None)
            continue
        choice = SHORT if values.shape[-1] % 256 else TYPES
        kind = choice[kinds.total() % len(choice)]
        raw = blocks_like(values, kind, kinds.total())
        kinds[kind] += 1
        writer.add_tensor(one.name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    ended(writer)
    return out, kinds


def dequantized(path: Path, out: Path) -> Path:
    """The same file with all floats in float32, as gguf's own code makes them."""
    reader = gguf.GGUFReader(path)
    writer = begun(reader, out)
    for one in reader.tensors:
        integers = one.tensor_type.name.startswith("I") and one.tensor_type.name[1:].isdigit()
        values = one.data if integers else gguf.quants.dequantize(one.data, one.tensor_type).astype(np.float32)
        writer.add_tensor(one.name, values)
    ended(writer)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--outtype", default="f32")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(options.llama_cpp, *options.convert, options.outtype)
        return
    if options.outtype == "f32":
        print("| checkpoint | largest difference from transformers | from the folder |\n| --- | ---: | ---: |")
    else:
        print("| checkpoint | largest difference from the same weights in float32 |\n| --- | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        known = [case for case in tiny.cases() if tiny.load_golden(case).config["model_type"] in ARCHITECTURES]
        known = [case for case in known if case not in SAVED]
        for case in options.cases or known:
            found = agreement(case, options.llama_cpp.resolve(), options.outtype, Path(folder))
            print(f"| {case} | {found} |", flush=True)


if __name__ == "__main__":
    main()

"""Prints how far our logits of GGUF files are from transformers' of the same checkpoints, for every golden case.

llama.cpp's own converter writes the files. It lies in the sdist of llama-cpp-python:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
    python tests/reference/gguf_agreement.py llama_cpp_python-0.3.36/vendor/llama.cpp [CASE ...] [--outtype q8_0]

The converter was written for the hub's spelling of config.json, which transformers' own saving changes: `spelt` changes
it back. `CHANGES` are of what it cannot say at all; transformers computes those cases anew.
"""

import argparse
import json
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

from numoe.engine import load

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
}  # fmt: skip


# What is changed in a case because the converter or the format has no words for it.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v32_b": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "rms_norm_eps": 1e-6},
    "glm4_moe_lite_b": {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "rope_interleave": True},
    "granitemoehybrid_a": {"time_step_limit": None},
    "granitemoehybrid_b": {"position_embedding_type": None, "intermediate_size": 70, "time_step_limit": None},
    "nemotron_h_a": {"mamba_head_dim": 32, "time_step_limit": None},
    "nemotron_h_b": {"mamba_head_dim": 16, "n_group": 1, "topk_group": 1, "time_step_min": 1e-30,
                     "time_step_limit": None},
    "gpt_oss_b": {"layer_types": None, "swiglu_limit": 7.0},
    "mistral_a": {"sliding_window": None},
    "mixtral_b": {"sliding_window": None},
    "qwen2_b": {"use_sliding_window": False, "layer_types": None},
    "qwen2_moe_b": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False, "qkv_bias": True},
    "qwen3_b": {"use_sliding_window": False, "layer_types": None},
    "qwen3_next_b": {"mlp_only_layers": [], "norm_topk_prob": True},
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
    if "mlp_layer_types" in config:
        config["first_k_dense_replace"] = config.pop("mlp_layer_types").count("dense")
    if config["model_type"] in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa"):
        config["scoring_func"] = "sigmoid"
    return config


def changed(case: str, folder: Path) -> tuple[Path, np.ndarray]:
    """The checkpoint of a case with its `CHANGES`, and transformers' logits of it."""
    import make_golden

    make_golden.transformers.utils.logging.disable_progress_bar()
    described = json.loads((tiny.GOLDEN / f"{case}.json").read_text())
    described["config"] |= CHANGES[case]
    if not make_golden.CASES[case].listing:
        plain = {k: v for k, v in described["config"].items() if v is not None and k != "model_type"}
        one = make_golden.Case(described["config"]["model_type"], 0, plain)
        described["config"], described["listing"] = make_golden.saved_listing(one)
    tiny.GOLDEN = folder / "golden"
    tiny.GOLDEN.mkdir(exist_ok=True)
    (tiny.GOLDEN / f"{case}.json").write_text(json.dumps(described))
    source = plain_folder = tiny.write_checkpoint(case, folder / case)
    if make_golden.CASES[case].listing:
        layers = described["config"]["num_hidden_layers"]
        plain_folder = make_golden.dequantized(source, folder / f"{case}-plain", layers)
    tiny.GOLDEN = GOLDEN
    return source, make_golden.logits_of(make_golden.load_reference(plain_folder), tiny.load_golden(case).ids)


def convert(llama_cpp: Path, folder: Path, out: Path, outtype: str) -> None:
    """Run the converter in this process, without the vocabulary that these folders lack."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        del sys.modules[name]  # the converter needs its own
    import conversion

    conversion.load_all_models()
    classes = [conversion.ModelBase]
    while classes:
        one = classes.pop()
        classes += one.__subclasses__()
        if "set_vocab" in vars(one):
            one.set_vocab = _no_vocabulary
    sys.argv = ["convert", str(folder), "--outfile", str(out), "--outtype", outtype]
    if re.search("qwen3_(5|next)", (folder / "config.json").read_text()):
        sys.argv.append("--no-mtp")  # it asserts that there are such layers
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


def _no_vocabulary(model: Any) -> None:
    model.gguf_writer.add_tokenizer_model("none")
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])


def agreement(case: str, llama_cpp: Path, outtype: str, folder: Path) -> str:
    golden = tiny.load_golden(case)
    source, logits_there = folder / case, golden.logits
    if case in CHANGES:
        source, logits_there = changed(case, folder)
    else:
        tiny.write_checkpoint(case, source)
    own = load(source).session(1024).feed(golden.ids)
    (source / "config.json").write_text(json.dumps(spelt(json.loads((source / "config.json").read_text()))))
    out = folder / f"{case}.gguf"
    command = [sys.executable, __file__, str(llama_cpp), "--outtype", outtype, "--convert", str(source), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        return f"the converter failed: {ran.stderr.strip().splitlines()[-1]}"
    logits = load(out).session(1024).feed(golden.ids)
    return f"{np.abs(logits - logits_there).max():.1e} | {np.abs(logits - own).max():.1e}"


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
    print("| checkpoint | largest difference from transformers | from the folder |")
    print("| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        known = [case for case in tiny.cases() if tiny.load_golden(case).config["model_type"] in ARCHITECTURES]
        for case in options.cases or known:
            found = agreement(case, options.llama_cpp.resolve(), options.outtype, Path(folder))
            print(f"| {case} | {found} |", flush=True)


if __name__ == "__main__":
    main()

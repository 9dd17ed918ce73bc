"""Models in GGUF files: golden checkpoints rewritten as converters do, and settings that are refused."""

import json
import re
import shutil
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from gguf_files import Arrays, keys, write_gguf

from numoe.engine import InputError, load
from numoe.engine.families import from_gguf
from numoe.quant.stored.checkpoint import open_checkpoint

Checkpoints = Callable[[str], Path]

ARCHITECTURES = {
    "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "glm4_moe": "glm4moe",
    "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
    "qwen4_exp_text": "qwen4exp",
    "qwen3_next": "qwen3next", "deepseek_v32": "deepseek32", "glm_moe_dsa": "glm-dsa", "kimi_linear": "kimi-linear",
    "bailing_hybrid": "bailingmoe3",
    "lfm2_moe": "lfm2moe", "llama4_text": "llama4", "phimoe": "phimoe", "cohere2_moe": "cohere2moe",
    "granitemoe": "granitemoe", "granitemoeshared": "granitemoe", "granitemoehybrid": "granitehybrid",
    "nemotron_h": "nemotron_h_moe", "dots1": "dots1", "minimax_m2": "minimax-m2", "solar_open": "glm4moe",
    "hy_v3": "hy_v3",
    "hunyuan_v1_moe": "hunyuan-moe", "mimo_v2_flash": "mimo2",
    "bailing_moe": "bailingmoe2", "smollm3": "smollm3", "qwen3_vl_text": "qwen3vl", "qwen3_vl_moe_text": "qwen3vlmoe",
    "gemma3_text": "gemma3", "gemma4_text": "gemma4",
    "afmoe": "afmoe", "ernie4_5_moe": "ernie4_5-moe", "laguna": "laguna", "mellum": "mellum", "olmoe": "olmoe",
    "granite": "granite", "phi3": "phi3", "olmo2": "olmo2", "olmo3": "olmo2", "exaone4": "exaone4",
    "exaone_moe": "exaone-moe", "glm4": "glm4",
    "ministral3": "mistral3", "mistral4": "mistral4", "seed_oss": "seed_oss",
    "gpt_oss": "gpt-oss", "glm4_moe_lite": "deepseek2", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
}  # fmt: skip
CASES = ("llama_a", "mixtral_a", "qwen3_a", "v2_a", "v3_a", "v3_b", "glm4_moe_lite_a", "gpt_oss_a", "qwen3_5_a",
         "qwen3_5_b", "qwen4_exp_b", "qwen3_5_moe_a", "qwen3_5_moe_b", "mistral_b", "qwen2_a",
         "qwen2_moe_a", "glm4_moe_a", "qwen3_next_a", "deepseek_v32_a", "glm_moe_dsa_a", "granitemoe_a",
         "granitemoe_b", "granitemoehybrid_b", "nemotron_h_a", "minimax_m2_a", "solar_open_a", "hy_v3_a",
         "hunyuan_v1_moe_b", "mimo_v2_flash_a", "smollm3_a", "qwen3_vl_a", "qwen3_vl_moe_b", "bailing_moe_b",
         "gemma3_a", "gemma4_a", "kimi_linear_a", "bailing_hybrid_a", "lfm2_moe_a", "phimoe_b",
         "cohere2_moe_a", "dots1_b", "granite_a", "phi3_a", "olmo2_a", "olmo3_a", "exaone4_a",
         "exaone_moe_a", "glm4_a", "ministral3_b", "mistral4_a",
         "seed_oss_a", "seed_oss_b")  # fmt: skip


def written(checkpoint: Checkpoints, case: str, path: Path, *arguments: Any, **more: Any) -> Path:
    config = tiny.load_golden(case).config
    return write_gguf(
        checkpoint(case), config, path, ARCHITECTURES.get(config["model_type"], "llama"), *arguments, **more
    )


def assert_as_golden(path: Path, case: str) -> None:
    golden = tiny.load_golden(case)
    assert np.abs(load(path).session(512).feed(golden.ids) - golden.logits).max() < 2e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_match_the_reference(checkpoint: Checkpoints, tmp_path: Path, case: str) -> None:
    assert_as_golden(written(checkpoint, case, tmp_path / "model.gguf"), case)


def whole(tensors: Arrays) -> Arrays:
    """kv_b as older converters wrote it, and every expert alone."""
    out: Arrays = {}
    for name, values in tensors.items():
        if name.endswith("attn_k_b.weight"):
            both = np.concatenate([values.swapaxes(1, 2), tensors[name.replace("k_b", "v_b")]], axis=1)
            out[name.replace("k_b", "kv_b")] = both.reshape(-1, both.shape[-1])
        elif "_exps" in name:
            out |= {name.replace("_exps", f".{e}"): one for e, one in enumerate(values)}
        elif not name.endswith("attn_v_b.weight"):
            out[name.replace("probs_b.bias", "probs_b")] = values
    return out


def one_of_each_architecture() -> list[str]:
    """Cases of which files are written here, one of each architecture."""
    others = ("llama4_b", "afmoe_b", "ernie4_5_moe_a", "laguna_a", "mellum_a", "olmoe_b", "qwen3_moe_b")
    first = {ARCHITECTURES.get(tiny.load_golden(c).config["model_type"], "llama"): c for c in (*others, *CASES[::-1])}
    return sorted(first.values())


LISTED = "attention.head_count", "attention.head_count_kv", "feed_forward_length"


@pytest.mark.parametrize("case", one_of_each_architecture())
def test_what_converters_write_otherwise_changes_nothing(checkpoint: Checkpoints, tmp_path: Path, case: str) -> None:
    """Experts one by one, matrices in F16 and BF16, lists for numbers, keys that say nothing, towers and heads."""
    config = tiny.load_golden(case).config
    architecture = ARCHITECTURES.get(config["model_type"], "llama")
    said = keys(config, architecture)
    kinds = [np.float16, np.float32]

    def rounded(tensors: Arrays, half: bool) -> Arrays:
        floats = [n for n, v in tensors.items() if v.dtype == np.float32 and v.ndim > 1 and n.startswith("blk.")]
        chosen = {name: kinds[i % 2] for i, name in enumerate(floats) if re.search("attn|ffn_(gate|up|down)", name)}
        out = {name: values.astype(chosen.get(name, values.dtype)) for name, values in tensors.items()}
        return out if half else {n: v.astype(np.float32) if n in chosen else v for n, v in out.items()}

    def otherwise(tensors: Arrays) -> Arrays:
        out = rounded(tensors, half=True)
        out.setdefault("output.weight", out["token_embd.weight"])
        return out if architecture in ("gpt-oss", "qwen4exp") else alone(out)

    ones = np.ones((3, 4), np.float32)
    besides = dict.fromkeys(("v.patch_embd.weight", "mm.0.weight", "mtp.0.fc.weight", "nextn.norm.weight"), ones)
    more = {key: [said[key]] * said["block_count"] for key in LISTED if type(said.get(key)) is int}
    more |= {"rope.scale_linear": 1.0, "vocab_size": None, "attention.causal": True}
    more.setdefault("rope.scaling.finetuned", said.get("rope.scaling.finetuned", False))
    usual = written(checkpoint, case, tmp_path / "usual.gguf", {}, lambda tensors: rounded(tensors, half=False))
    other = written(checkpoint, case, tmp_path / "other.gguf", besides, otherwise, **more)
    ids = tiny.load_golden(case).ids[:24]
    logits = [load(path).session(64).feed(ids) for path in (usual, other)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def alone(tensors: Arrays) -> Arrays:
    """Every expert's matrices in tensors of their own."""
    out: Arrays = {}
    for name, values in tensors.items():
        stacked = name.endswith("_exps.weight") and "gate_up" not in name
        out |= {name.replace("_exps", f".{e}"): one for e, one in enumerate(values)} if stacked else {name: values}
    return out


def fused(tensors: Arrays) -> Arrays:
    """Gate and up, and queries, keys and values, in one tensor; dt without its suffix."""
    out = {name.replace("ssm_dt.bias", "ssm_dt"): values for name, values in tensors.items()}
    for name in tensors:
        if "ffn_gate_exps" in name:
            out[name.replace("gate", "gate_up")] = np.concatenate(
                [out.pop(name), out.pop(name.replace("gate", "up"))], 1
            )
        elif "attn_q.weight" in name:
            parts = [out.pop(name.replace("attn_q", f"attn_{part}")) for part in "qkv"]
            out[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
    return out


OLD = {"attention.key_length_mla": None, "attention.value_length_mla": None, "expert_gating_func": None}


@pytest.mark.parametrize(
    ("case", "change", "more"),
    [
        ("v3_a", whole, OLD),
        ("v2_a", whole, OLD),
        ("glm4_moe_lite_a", whole, OLD),
        ("v3_b", None, {"expert_gating_func": None}),
        ("v2_a", None, {"expert_gating_func": 0}),
        ("v3_a", fused, {}),
        ("qwen3_5_moe_a", fused, {}),
        ("qwen3_5_moe_a", None, {"attention.recurrent_layers": None}),
        ("qwen3_vl_a", None, {"n_deepstack_layers": 3, "rope.dimension_sections": [24, 20, 20, 0]}),
        ("minimax_m2_a", None, {"expert_gating_func": None}),
        ("hy_v3_a", None, {"expert_gating_func": None}),
        ("mimo_v2_flash_a", fused, {"nextn_predict_layers": 0}),
    ],
)
def test_files_of_other_converters_are_the_same_models(
    checkpoint: Checkpoints, tmp_path: Path, case: str, change: Any, more: dict[str, Any]
) -> None:
    config = tiny.load_golden(case).config
    if more is OLD:  # they have the sizes that heads are expanded to
        sizes = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
        more = more | {"attention.key_length": sizes[0], "attention.value_length": sizes[1]}
        more |= {"attention.head_count_kv": config["num_attention_heads"]}
    arguments = () if change is None else ({}, change)
    assert_as_golden(written(checkpoint, case, tmp_path / "model.gguf", *arguments, **more), case)


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("case", ["v3_b", "glm4_moe_lite_a", "qwen3_5_moe_a", "qwen3_a", "hy_v3_a", "mimo_v2_flash_a"])
def test_blocks_that_only_draft_tokens_are_left_aside(
    checkpoint: Checkpoints, tmp_path: Path, case: str, said: bool
) -> None:
    layers = tiny.load_golden(case).config["num_hidden_layers"]
    ones = np.ones((3, 4), np.float32)
    draft = {f"blk.{layers}.{name}.weight": ones for name in ("nextn.eh_proj", "attn_norm", "ffn_gate_exps")}
    draft |= {"v.patch_embd.weight": ones, "mtp.0.fc.weight": ones}
    more = {"block_count": layers + 1, "nextn_predict_layers": 1 if said else None}
    assert_as_golden(written(checkpoint, case, tmp_path / "model.gguf", draft, **more), case)


def test_blocks_that_nothing_tells_of_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    ones = np.ones((3, 4), np.float32)
    path = written(checkpoint, "qwen3_a", tmp_path / "model.gguf", {"blk.3.attn_norm.weight": ones})
    with pytest.raises(InputError, match=r"blk\.3\.attn_norm\.weight is not part of qwen3"):
        load(path)
    for wrong in (4, -1.0, "x"):
        path = written(checkpoint, "qwen3_a", tmp_path / "wrong.gguf", nextn_predict_layers=wrong)
        with pytest.raises(InputError, match="nextn_predict_layers is"):
            load(path)


def test_only_what_is_needed_is_decoded(checkpoint: Checkpoints, tmp_path: Path) -> None:
    golden = tiny.load_golden("llama_a")
    path = write_gguf(checkpoint("llama_a"), golden.config, tmp_path / "model.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"A name", b"A n\xe4me"))
    assert load(path).session(512).feed(golden.ids).argmax() == golden.logits.argmax()


def test_qwen3moe_normalises_the_chosen_weights(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """GGUF does not say `norm_topk_prob`; llama.cpp computes this architecture as if it were true."""
    golden = tiny.load_golden("qwen3_moe_b")
    folder = Path(shutil.copytree(checkpoint("qwen3_moe_b"), tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(golden.config | {"norm_topk_prob": True}))
    path = write_gguf(folder, golden.config, tmp_path / "model.gguf", "qwen3moe")
    same = load(folder).session(512).feed(golden.ids)
    np.testing.assert_allclose(load(path).session(512).feed(golden.ids), same, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"attention.sliding_window": 64}, '"llama.attention.sliding_window" is not understood'),
        ({"rope.dimension_count": 6}, "llama.rope.dimension_count is 6"),
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
            '"rope_factors_short.weight" must be',
        ),
        ({"vocab_size": 7}, "but the file's metadata says"),
    ],
)
def test_settings_that_are_not_computed_are_refused(
    checkpoint: Checkpoints, tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    config = tiny.load_golden("llama_a").config
    path = write_gguf(checkpoint("llama_a"), config, tmp_path / "model.gguf", "llama", **more)
    with pytest.raises(InputError, match=reason):
        load(path)


def llama3_divisors(config: dict[str, Any], dim: int) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter makes it of a config.json."""
    rope = config["rope_parameters"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def test_frequencies_that_a_file_divides_and_biases_are_those_of_the_reference(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    golden = tiny.load_golden("llama_b")
    dim = golden.config.get("head_dim") or golden.config["hidden_size"] // golden.config["num_attention_heads"]
    divisors = llama3_divisors(golden.config, dim)
    assert divisors.min() == 1 < divisors.max()
    source, freqs = checkpoint("llama_b"), "rope_freqs.weight"
    path = write_gguf(source, golden.config, tmp_path / "model.gguf", "llama", {freqs: divisors})
    assert np.abs(load(path).session(512).feed(golden.ids) - golden.logits).max() < 2e-4
    for wrong in (divisors[:-1], -divisors):
        path = write_gguf(source, golden.config, tmp_path / "wrong.gguf", "llama", {freqs: np.ascontiguousarray(wrong)})
        with pytest.raises(InputError, match=r"rope_freqs.weight must be \d+ positive numbers"):
            load(path)
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    path = write_gguf(source, golden.config, tmp_path / "both.gguf", "llama", {freqs: divisors}, **scaling)
    with pytest.raises(InputError, match=r"both rope_freqs\.weight and rope scaling"):
        load(path)


@pytest.mark.parametrize(
    ("case", "architecture", "name"),
    [
        ("qwen3_a", "qwen3", "rope_freqs.weight"),
        ("llama_a", "llama", "rope_factors_long.weight"),
        ("llama_a", "llama", "blk.0.attn_sinks.weight"),
        ("llama_a", "llama", "blk.0.attn_q.bias"),
    ],
)
def test_what_converters_move_into_tensors_is_used_or_refused(
    checkpoint: Checkpoints, tmp_path: Path, case: str, architecture: str, name: str
) -> None:
    config = tiny.load_golden(case).config
    more = {name: np.ones(4, np.float32)}
    path = write_gguf(checkpoint(case), config, tmp_path / "model.gguf", architecture, more)
    reason = "biases on queries" if name.endswith("bias") else f"{name} is not part of {architecture} as the file's"
    with pytest.raises(InputError, match=reason):
        load(path)


def test_what_a_file_leaves_out_is_what_llama_cpp_takes(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A theta of 10000, as many key heads as heads and heads of hidden / heads, whatever transformers takes."""
    config = tiny.load_golden("qwen3_a").config
    path = write_gguf(checkpoint("qwen3_a"), config, tmp_path / "model.gguf", "qwen3")
    opened = open_checkpoint(path)
    shapes = {name: opened[name].shape for name in opened.names()}
    left_out = ("qwen3.rope.freq_base", "qwen3.attention.head_count_kv", "qwen3.attention.key_length")
    metadata = {key: value for key, value in opened.metadata.items() if key not in left_out}
    _, _, spec = from_gguf(metadata, shapes, None, path)
    attention = spec.layers[0][0].kind
    assert (attention.rope.theta, attention.kv_heads) == (10000, attention.heads)
    assert attention.head_dim == config["hidden_size"] // config["num_attention_heads"]
    del metadata["qwen3.attention.layer_norm_rms_epsilon"]
    with pytest.raises(InputError, match=r'no key "qwen3\.attention\.layer_norm_rms_epsilon"'):
        from_gguf(metadata, shapes, None, path)


@pytest.mark.parametrize(
    "case",
    [
        "mixtral_a",
        "glm4_moe_a",
        "v2_a",
        "v3_a",
        "gpt_oss_a",
        "qwen3_5_moe_a",
        "nemotron_h_a",
        "granitemoehybrid_a",
        "granitemoe_b",
        "hy_v3_a",
        "hunyuan_v1_moe_b",
        "bailing_moe_b",
        "gemma3_a",
        "gemma4_a",
        "kimi_linear_a",
        "lfm2_moe_a",
        "llama4_a",
        "phimoe_a",
        "cohere2_moe_a",
        "qwen4_exp_b",
        "laguna_a",
        "ernie4_5_moe_a",
        "afmoe_b",
    ],
)
def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(
    checkpoint: Checkpoints, tmp_path: Path, case: str
) -> None:
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}
    scaling = {} if case == "gemma4_a" else scaling  # which has tables of its own
    opened = open_checkpoint(written(checkpoint, case, tmp_path / "model.gguf", **scaling))
    shapes = {name: opened[name].shape for name in opened.names()}
    metadata = dict(opened.metadata)
    assert from_gguf(metadata, shapes, None, opened.path)[2].layers
    odd = (True, "x", "", -1, 0, 1.5, 10**12, float("nan"), float("inf"), [], [1, 2], ["x"], [0] * 9)
    architecture = metadata["general.architecture"]
    more = ("rope.dimension_count", "attention.causal", "attention.value_length", "nextn_predict_layers")
    for key in (*metadata, "general.type", *(f"{architecture}.{one}" for one in more)):
        for value in odd:
            try:
                from_gguf(metadata | {key: value}, shapes, None, opened.path)
            except InputError as error:
                told = str(error).partition("; known are ")[0]
                assert "config.json" not in told and "\n" not in str(error) and len(told) < 400


def test_refusals_call_keys_as_the_file_does(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = tiny.load_golden("llama_a").config
    more = {"attention.head_count_kv": 5, "rope.scaling.type": "yarn", "rope.scaling.factor": -1.0}
    path = write_gguf(checkpoint("llama_a"), config, tmp_path / "model.gguf", "llama", **more)
    with pytest.raises(InputError, match=r"model.gguf: \d attention heads cannot share 5 key/value heads"):
        load(path)
    del more["attention.head_count_kv"]
    path = write_gguf(checkpoint("llama_a"), config, tmp_path / "model.gguf", "llama", **more)
    with pytest.raises(InputError, match=r'"llama\.rope\.scaling\.factor" must be a positive number'):
        load(path)


def test_the_first_bytes_tell_a_gguf_file_and_a_folder_may_hold_one(checkpoint: Checkpoints, tmp_path: Path) -> None:
    golden = tiny.load_golden("llama_a")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write_gguf(checkpoint("llama_a"), golden.config, folder / "sha256-0f1e", "llama")
    logits = load(path).session(512).feed(golden.ids)
    assert np.abs(logits - golden.logits).max() < 2e-4
    path = path.rename(folder / "model-Q8_0.gguf")
    (folder / "mmproj-model.gguf").write_bytes(b"GGUF of a vision model")
    (folder / "config.json").write_text("{}")  # repositories of GGUF files often have one
    np.testing.assert_array_equal(load(folder).session(512).feed(golden.ids), logits)
    shutil.copy(path, folder / "model-Q4_0.gguf")
    with pytest.raises(InputError, match=r"holds 2 models in GGUF: give the path of one, such as .*model-Q4_0.gguf"):
        load(folder)


def test_a_count_of_parts_that_is_no_number_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("split.count", [2, 3])
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"split\.count is no number"):
        load(tmp_path / "model.gguf")


def test_adapters_are_no_models(tmp_path: Path) -> None:
    metadata = {"general.type": "adapter", "general.architecture": "llama"}
    with pytest.raises(InputError, match='GGUF of the type "adapter"'):
        from_gguf(metadata, {}, None, tmp_path)


def test_names_that_are_not_utf8_and_vocabularies_are_not_read(checkpoint: Checkpoints, tmp_path: Path) -> None:
    class Lazy(UserDict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            assert key not in ("general.name", "tokenizer.ggml.tokens")
            return super().__getitem__(key)

    path = write_gguf(checkpoint("llama_a"), tiny.load_golden("llama_a").config, tmp_path / "model.gguf", "llama")
    opened = open_checkpoint(path)
    shapes = {name: opened[name].shape for name in opened.names()}
    metadata = Lazy({**opened.metadata, "general.name": b"\xff", "tokenizer.ggml.tokens": ["a"]})
    del metadata["llama.vocab_size"]
    from_gguf(metadata, shapes, None, path)


def test_unknown_architectures_are_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = tiny.load_golden("llama_a").config
    path = write_gguf(checkpoint("llama_a"), config, tmp_path / "model.gguf", "mamba")
    with pytest.raises(
        InputError, match=r'GGUF architecture "mamba" is not supported yet; known are .*deepseek2, .*llama, .*qwen3moe'
    ):
        load(path)


def test_a_stack_in_a_block_type_is_one_matrix_of_its_rows(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).standard_normal((3, 4, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek2")
    writer.add_tensor(
        "k", gguf.quants.quantize(stack, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_checkpoint(tmp_path / "model.gguf")
    flat = opened["k"].flat()
    each = [opened["k"].expert(index).matrix().dequantize() for index in range(3)]
    assert flat.shape == (12, 64)
    np.testing.assert_array_equal(flat.matrix().dequantize(), np.concatenate(each))
    np.testing.assert_array_equal(flat.rows(3, 9).matrix().dequantize(), np.concatenate(each)[3:9])
    with pytest.raises(InputError, match=r"'k' cannot be used: it is Q8_0 stored \(in, out\), and only floats"):
        opened["k"].turned()


@pytest.mark.parametrize(
    ("case", "change", "more", "reason"),
    [
        ("gemma4_a", {}, {"attention.sliding_window_pattern": [True]}, "window_pattern must tell of all 5 layers"),
        ("gemma4_a", {}, {"attention.head_count_kv": [3, 2]}, "head_count_kv tells of 2 layers of 5"),
        ("gemma4_a", {}, {"attention.value_length_swa": 10}, "value_length_swa is not the size of a head, 14"),
        ("gemma4_a", {"rope_freqs.weight": [1e30] * 6 + [1] * 6}, {}, "rope_freqs.weight must be ones, and"),
        ("gemma4_a", {}, {"embedding_length_per_layer_input": 8}, 'per_layer_input" is 8, and only 0'),
        ("gemma4_a", {}, {"rope.scaling.type": "yarn"}, 'gemma4.rope.scaling.type" is not understood'),
        ("kimi_linear_a", {}, {"kda.head_dim": 13}, "ssm_dt.bias is not of whole heads of kda.head_dim"),
        ("bailing_hybrid_a", {}, {"swiglu_clamp_exp": [0.0, 7.0]}, 'bailingmoe3.swiglu_clamp_exp" is not understood'),
        ("lfm2_moe_a", {}, {"expert_gating_func": 1}, "expert_gating_func is 1, and only 2"),
        ("lfm2_moe_a", {}, {"attention.sliding_window": 9}, 'lfm2moe.attention.sliding_window" is not understood'),
        ("llama4_a", {}, {"attention.sliding_window": 0}, "attention.sliding_window is 0, and only 8192"),
        ("llama4_a", {}, {"attention.sliding_window_pattern": [True]}, "window_pattern is \\[True\\], and only 4"),
        ("llama4_a", {}, {"attention.scale": 0.5}, 'llama4.attention.scale" is not understood'),
        ("phimoe_a", {}, {"rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor is 1.2.*, and only 1.0"),
        (
            "phimoe_b",
            {"rope_factors_short.weight": [1.0] * 5},
            {},
            'factors_short.weight" must be 6 positive numbers',
        ),
        ("cohere2_moe_a", {}, {"expert_weights_scale": 2.0}, 'cohere2moe.expert_weights_scale" is not understood'),
        ("cohere2_moe_a", {}, {"expert_gating_func": 3}, 'cohere2moe.expert_gating_func" is 3'),
        ("cohere2_moe_a", {}, {"expert_shared_feed_forward_length": 9}, "expert_shared_feed_forward_length is 9"),
        ("cohere2_moe_a", {}, {"attention.sliding_window_pattern": [True]}, "must tell of all 5 layers"),
        ("qwen4_exp_b", {}, {"ple.layer_multipliers": [3, 5]}, 'ple.layer_multipliers" must be 4 positive whole'),
        ("qwen4_exp_b", {}, {"ple.head_offsets": [0] * 15}, "ple.head_offsets is"),
        ("qwen4_exp_b", {}, {"ple.layers": [0, 1]}, "one layer can have n-grams"),
        ("qwen4_exp_b", {}, {"attention.indexer.top_k": 7}, 'top_k" is 7, which is no multiple of the 5 tokens'),
    ],
)
def test_what_is_not_computed_is_refused_by_its_key(
    checkpoint: Checkpoints, tmp_path: Path, case: str, change: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    changed = {name: np.array(values, np.float32) for name, values in change.items()}
    path = written(checkpoint, case, tmp_path / "model.gguf", {}, lambda tensors: {**tensors, **changed}, **more)
    with pytest.raises(InputError, match=reason):
        load(path)


# What files of an architecture cannot say, and llama.cpp has in its code.
WITHOUT_KEYS: dict[str, dict[str, Any]] = {
    "llama4_b": {"attention_chunk_size": 8192, "attn_temperature_tuning": True, "use_qk_norm": True,
                 "no_rope_layers": None, "layer_types": None, "moe_layers": None,
                 "rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 1.0, "original_max_position_embeddings": 64}},
    "phimoe_a": {"router_jitter_noise": 0.01},
    "lfm2_moe_b": {"norm_topk_prob": True},
    "afmoe_b": {"layer_types": None, "mup_enabled": True},
    "ernie4_5_moe_a": {"moe_norm_min": 1e-12},
    "laguna_a": {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
    "mellum_b": {"norm_topk_prob": True},
    "olmoe_b": {"norm_topk_prob": False, "rms_norm_eps": 1e-5},
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_KEYS)
def test_settings_that_no_key_tells(checkpoint: Checkpoints, tmp_path: Path, case: str) -> None:
    golden = tiny.load_golden(case)
    folder = shutil.copytree(checkpoint(case), tmp_path / case)
    config = golden.config | WITHOUT_KEYS[case]
    (folder / "config.json").write_text(json.dumps(config))
    path = write_gguf(folder, config, tmp_path / "model.gguf", ARCHITECTURES[config["model_type"]])
    there = load(folder).session(512).feed(golden.ids)
    assert np.abs(load(path).session(512).feed(golden.ids) - there).max() < 2e-5


def test_maverick_alone_norms_no_heads(checkpoint: Checkpoints, tmp_path: Path) -> None:
    opened = open_checkpoint(written(checkpoint, "llama4_a", tmp_path / "model.gguf"))
    shapes = {name: opened[name].shape for name in opened.names()}
    for experts, norms in ((16, "qk"), (128, "")):
        spec = from_gguf(dict(opened.metadata) | {"llama4.expert_count": experts}, shapes, [1.0] * 6, opened.path)[2]
        assert spec.layers[0][0].kind.plain_norms == norms  # type: ignore[attr-defined]

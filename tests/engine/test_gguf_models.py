"""Models in GGUF files: golden checkpoints rewritten as converters do, and settings that are refused."""

import json
import shutil
from collections import UserDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from numoe.engine import InputError, load
from numoe.engine.families.gguf import from_gguf
from numoe.quant.stored.checkpoint import open_checkpoint

Checkpoints = Callable[[str], Path]

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """A head's rows i and i + C/2, which rotate together, become neighbours (llama.cpp's convert_hf_to_gguf.py)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    folder: Path,
    config: dict[str, Any],
    path: Path,
    architecture: str,
    besides: Mapping[str, np.ndarray] = {},
    **more: Any,
) -> Path:
    """The checkpoint as a float32 GGUF file; `besides`: more tensors; `more` adds or replaces keys."""
    tensors = load_file(folder / "model.safetensors")
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("A name")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    keys: dict[str, Any] = {
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": config.get("head_dim") or config["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if "num_local_experts" in config:
        keys |= {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    if "moe_intermediate_size" in config:
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
    for key, value in (keys | more).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    for name, values in besides.items():
        writer.add_tensor(name, values)
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        *parts, kind = name.split(".")
        prefix = ""
        if parts[:2] == ["model", "layers"]:
            prefix, parts = f"blk.{parts[2]}.", parts[3:]
        if "experts" in parts:
            stacks.setdefault(f"{prefix}ffn_{EXPERTS[parts[-1]]}_exps.weight", {})[int(parts[-2])] = values
            continue
        if architecture == "llama" and parts[-1] in ("q_proj", "k_proj"):
            values = neighbours(values, heads if parts[-1] == "q_proj" else kv_heads)
        writer.add_tensor(f"{prefix}{NAMES['.'.join(parts)]}.{kind}", np.ascontiguousarray(values))
    for name, stack in stacks.items():
        writer.add_tensor(name, np.stack([stack[e] for e in range(len(stack))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("case", "architecture"), [("llama_a", "llama"), ("mixtral_a", "llama"), ("qwen3_a", "qwen3")])
def test_logits_match_the_reference(checkpoint: Checkpoints, tmp_path: Path, case: str, architecture: str) -> None:
    golden = tiny.load_golden(case)
    path = write_gguf(checkpoint(case), golden.config, tmp_path / "model.gguf", architecture)
    logits = load(path).session(512).feed(golden.ids)
    assert np.abs(logits - golden.logits).max() < 2e-4


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
            r"\"llama.rope.scaling.type\" is 'longrope'",
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


def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = tiny.load_golden("mixtral_a").config
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}
    path = write_gguf(checkpoint("mixtral_a"), config, tmp_path / "model.gguf", "llama", **scaling)
    opened = open_checkpoint(path)
    shapes = {name: opened[name].shape for name in opened.names()}
    metadata = dict(opened.metadata)
    assert from_gguf(metadata, shapes, None, path)[2].routed_experts
    odd = (True, "x", "", -1, 0, 1.5, 10**12, float("nan"), float("inf"), [], [1, 2], ["x"], [0] * 9)
    more = ("general.type", "llama.rope.dimension_count", "llama.attention.causal", "llama.attention.value_length")
    for key in (*metadata, *more):
        for value in odd:
            try:
                from_gguf(metadata | {key: value}, shapes, None, path)
            except InputError as error:
                assert "config.json" not in str(error) and "\n" not in str(error) and len(str(error)) < 400


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
    with pytest.raises(InputError, match=r"holds 2 GGUF files: give the path of one, such as .*model-Q4_0.gguf"):
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
    with pytest.raises(InputError, match='GGUF architecture "mamba" is not supported yet; known are llama, qwen3'):
        load(path)

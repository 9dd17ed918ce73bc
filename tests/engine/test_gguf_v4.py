"""DeepSeek-V4 in GGUF files: golden checkpoints rewritten as llama.cpp's converter does, by its names and keys."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from ggml_blocks import blocks_like, size
from gguf_files import write_tensors
from helpers import reshard, write_safetensors

from numoe.engine import InputError, load
from numoe.engine.description import describe
from numoe.engine.families import family, from_gguf
from numoe.quant.formats.mxfp4 import MXFP4

Checkpoints = Callable[[str], Path]
NAMES = {
    "embed": "token_embd", "norm": "output_norm", "head": "output", "head_residual": "output_hc",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.sink": "attn_sinks",
    "attention.q_a": "attn_q_a", "attention.q_norm": "attn_q_a_norm", "attention.q_b": "attn_q_b",
    "attention.kv": "attn_kv", "attention.kv_norm": "attn_kv_a_norm",
    "attention.o_a": "attn_output_a", "attention.o_b": "attn_output_b",
    "attention_residual": "hc_attn", "ffn_residual": "hc_ffn",
    "attention.compressor": "attn_compressor", "attention.indexer.compressor": "indexer_compressor",
    "attention.indexer.q": "indexer.attn_q_b", "attention.indexer.weights": "indexer.proj",
    "ffn.router": "ffn_gate_inp", "ffn.router_table": "ffn_gate_tid2eid",
    "ffn.shared.gate": "ffn_gate_shexp", "ffn.shared.up": "ffn_up_shexp", "ffn.shared.down": "ffn_down_shexp",
}  # fmt: skip
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def keys(c: dict[str, Any]) -> dict[str, Any]:
    ropes = c.get("rope_parameters") or {"compress": c["rope_scaling"]}
    scaling = ropes["compress"]
    layers = c["num_hidden_layers"]
    hashed = c.get("mlp_layer_types", []).count("hash_moe")
    return {
        "embedding_length": c["hidden_size"], "block_count": layers, "context_length": c["max_position_embeddings"],
        "embedding_length_out": c["hc_mult"] * c["hidden_size"], "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1, "attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"],
        "attention.q_lora_rank": c["q_lora_rank"], "attention.sliding_window": c["sliding_window"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"], "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_count": 1, "expert_weights_scale": c["routed_scaling_factor"], "expert_weights_norm": True,
        "expert_gating_func": 4, "swiglu_clamp_exp": [c["swiglu_limit"]] * layers, "swiglu_clamp_shexp":
        c["swiglu_limit"], "attention.indexer.head_count": c["index_n_heads"],
        "attention.indexer.key_length": c["index_head_dim"], "attention.indexer.top_k": c["index_topk"],
        "attention.output_group_count": c["o_groups"], "attention.output_lora_rank": c["o_lora_rank"],
        "attention.compress_rope_freq_base": float(c["compress_rope_theta"]),
        "attention.compress_ratios": c.get("compress_ratios") or [*(RATIOS[kind] for kind in c["layer_types"]), 0],
        "hyper_connection.count": c["hc_mult"], "hyper_connection.sinkhorn_iterations": c["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": c["hc_eps"], "hash_layer_count": c.get("num_hash_layers", hashed),
        "rope.freq_base": float(c["rope_theta"]), "rope.dimension_count": c["qk_rope_head_dim"],
        "rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling["factor"]),
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(scaling["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(scaling["beta_slow"]),
    }  # fmt: skip


def blocks(matrix: MXFP4) -> np.ndarray:
    """ggml's order: a scale, then codes of which a byte has number j and number j + 16; uint8 (rows, bytes)."""
    nibbles = np.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1).reshape(len(matrix.codes), -1, 32)
    packed = nibbles[..., :16] | nibbles[..., 16:] << 4
    return np.concatenate([matrix.scales[..., None], packed], axis=-1).reshape(len(packed), -1)


def theirs(ours: str) -> str:
    """The name below its layer that a tensor has in a file."""
    whole, _, part = ours.rpartition(".")
    if ours == "ffn.router_bias":
        return "exp_probs_b.bias"
    return f"{NAMES[ours] if ours in NAMES else f'{NAMES[whole]}_{part}'}.weight"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All in float32, but the experts that are stored in MXFP4."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    described = describe(folder)
    for layer, name, tensor in described.spec.listing():
        place = described.places[name]
        if tensor.held == "array":
            values = place.array(tensor.shape)
            values = values.astype(np.int32) if values.dtype == np.int64 else values
        else:
            matrix = place.stored.matrix()
            values = blocks(matrix) if isinstance(matrix, MXFP4) else matrix.dequantize()
        below = name if layer is None else name.removeprefix(f"layers.{layer}.")
        blk = "" if layer is None else f"blk.{layer}."
        if tensor.expert is not None:
            stacks.setdefault(f"{blk}ffn_{name.rpartition('.')[2]}_exps.weight", []).append(values)
        else:
            found[blk + theirs(below)] = values
    return found | {name: np.stack(values) for name, values in stacks.items()}


def write(folder: Path, path: Path, besides: dict[str, np.ndarray] | None = None, **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, "deepseek4")
    for key, value in (keys(tiny.load_golden(folder.name).config) | more).items():
        if value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                   list: writer.add_array}[type(value)]  # fmt: skip
            add(f"deepseek4.{key}", value)
    write_tensors(writer, tensors(folder) | (besides or {}))
    return path


@pytest.mark.parametrize("case", ["v4_a", "v4_released"])
def test_logits_match_the_reference(checkpoint: Checkpoints, tmp_path: Path, case: str) -> None:
    golden, source = tiny.load_golden(case), checkpoint(case)
    logits = load(write(source, tmp_path / "model.gguf")).session(512).feed(golden.ids)
    assert np.abs(logits - golden.logits).max() < 2e-4
    np.testing.assert_array_equal(logits, load(source).session(512).feed(golden.ids))  # every value is the same


def test_a_key_of_drafting_blocks_that_were_left_out_takes_no_layer_away(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    golden = tiny.load_golden("v4_released")
    path = write(checkpoint("v4_released"), tmp_path / "model.gguf", nextn_predict_layers=1)
    assert np.abs(load(path).session(512).feed(golden.ids) - golden.logits).max() < 2e-4


def test_towers_of_a_folder_are_left_aside(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Those of V4-Flash that sees, whose routers have a bias more."""
    golden = tiny.load_golden("v4_released")
    folder = reshard(checkpoint("v4_released"), tmp_path / "model", 2)
    names = ("vision.blocks.0.w.weight", "aligner.w1.weight", "image_newline", "layers.0.ffn.gate.bias",
             "layers.3.ffn.gate.bias_vl")  # fmt: skip
    write_safetensors(folder / "seeing.safetensors", {name: ("F32", (9,), bytes(36)) for name in names})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(names, "seeing.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(golden.config | {"vision_n_layers": 3, "vision_dim": 8}))
    model = load(folder)
    assert np.abs(model.session(512).feed(golden.ids) - golden.logits).max() < 2e-4
    assert model.description.aside["vision"] == 4 * 36 and model.description.aside["other"] == 36


def test_heads_that_only_draft_and_towers_are_left_aside(checkpoint: Checkpoints, tmp_path: Path) -> None:
    golden, ones = tiny.load_golden("v4_released"), np.ones((3, 4), np.float32)
    besides = {f"blk.5.{name}.weight": ones for name in ("nextn.eh_proj", "attn_norm", "hc_attn_fn")}
    besides |= {"blk.0.exp_probs_b_vl.bias": np.ones(9, np.float32), "v.patch_embd.weight": ones}
    path = write(checkpoint("v4_released"), tmp_path / "m.gguf", besides, block_count=6, nextn_predict_layers=1)
    assert np.abs(load(path).session(512).feed(golden.ids) - golden.logits).max() < 2e-4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"expert_gating_func": 2}, "expert_gating_func"),
        ({"swiglu_clamp_shexp": 3.0}, "swiglu_clamp_exp and swiglu_clamp_shexp must be one number"),
        ({"attention.compress_ratios": [0, 0, 4, 64, 4]}, "compress_ratios"),
        ({"attention.compress_ratios": [0, 0]}, "compress_ratios"),
        ({"rope.dimension_count": 7}, "must be even"),
        ({"embedding_length_out": 160}, "embedding_length_out is 160"),
        ({"hyper_connection.count": None}, 'no key "deepseek4.hyper_connection.count"'),
        ({"attention.future": 3}, '"deepseek4.attention.future" is not understood'),
    ],
)
def test_settings_that_are_not_computed_are_refused(
    checkpoint: Checkpoints, tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    path = write(checkpoint("v4_released"), tmp_path / "model.gguf", **more)
    with pytest.raises(InputError, match=reason):
        load(path)


@pytest.mark.parametrize(("name", "architecture"), [("deepseek_v41", "deepseek41"), ("inkling2_loop", None)])
def test_what_is_known_by_name_alone_is_refused_in_a_sentence(name: str, architecture: str | None) -> None:
    with pytest.raises(InputError, match=rf'^config.json: model_type "{name}" is [^;]*yet; [^;]*$'):
        family(name)
    if architecture:
        with pytest.raises(InputError, match=f'^m.gguf: GGUF architecture "{architecture}" is [^;]*yet; [^;]*$'):
            from_gguf({"general.architecture": architecture}, {}, None, Path("m.gguf"))


# What gate and up, down, and what all else is stored in: ggml-org's, antirez's and unsloth's mixes.
MIXES = {
    "Q2_K, down in MXFP4": ("Q2_K", "MXFP4", "Q8_0"),
    "IQ2_XXS and Q2_K": ("IQ2_XXS", "Q2_K", "Q8_0"),
    "IQ1_S and IQ2_XXS, Q5_K": ("IQ1_S", "IQ2_XXS", "Q5_K"),
    "IQ1_M and IQ3_XXS, Q6_K": ("IQ1_M", "IQ3_XXS", "Q6_K"),
    "IQ2_XS and IQ4_XS, BF16": ("IQ2_XS", "IQ4_XS", "BF16"),
    "Q4_K and Q6_K": ("Q4_K", "Q6_K", "Q8_0"),
    "Q3_K and Q5_K, F16": ("Q3_K", "Q5_K", "F16"),
}


def encoded(values: np.ndarray, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a type and what they stand for: of these values, or of others about as large in blocks of many."""
    kind = gguf.GGMLQuantizationType[name]
    plain = name in ("F32", "F16", "BF16")
    raw = gguf.quants.quantize(values, kind) if plain else blocks_like(values, name, seed)
    return raw, gguf.quants.dequantize(raw, kind).reshape(values.shape).astype(np.float32)


def write_mix(folder: Path, mix: tuple[str, str, str], parts: int) -> tuple[Path, Path]:
    """A model of random weights in a mix of types, in files of at most so many tensors, and the same in float32."""
    of = tiny.load_golden("v4_released").config
    c = of | {"hidden_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 128, "num_hidden_layers": 3}
    c |= {"compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
    spec = family("deepseek_v4").spec(c)
    routed, stacks, rng = {"gate": mix[0], "up": mix[0], "down": mix[1]}, {}, np.random.default_rng(5)
    files = [folder / "mixed" / "UD-Mix" / "m.gguf", folder / "plain.gguf"]
    files[0].parent.mkdir(parents=True)
    writers = [gguf.GGUFWriter(files[0], "deepseek4", split_max_tensors=parts), gguf.GGUFWriter(files[1], "deepseek4")]
    for writer in writers:
        for key, value in keys(c).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                   list: writer.add_array}[type(value)]  # fmt: skip
            add(f"deepseek4.{key}", value)

    def put(name: str, values: np.ndarray, stored: str) -> None:
        if stored != "F32" and values.shape[-1] % size(stored)[0]:
            stored = "Q8_0"  # as llama-quantize does
        raw, plain = encoded(values, stored, len(name))
        kind = gguf.GGMLQuantizationType[stored]
        writers[0].add_tensor(name, raw, raw_dtype=None if raw.dtype.kind == "f" else kind)
        writers[1].add_tensor(name, plain)

    for layer, name, tensor in spec.listing():
        blk = "" if layer is None else f"blk.{layer}."
        if tensor.below is not None:
            order = rng.permuted(np.tile(np.arange(9, dtype=np.int32), (tensor.shape[0], 1)), axis=1)
            for writer in writers:
                writer.add_tensor(f"{blk}{theirs(name.removeprefix(f'layers.{layer}.'))}", order[:, : tensor.shape[1]])
            continue
        values = rng.standard_normal(tensor.shape).astype(np.float32) / np.float32(tensor.shape[-1] ** 0.5)
        values = np.abs(values) + 1 if "norm" in name and len(tensor.shape) == 1 else values
        part = name.rpartition(".")[2]
        if tensor.expert is not None:
            stacks.setdefault(f"{blk}ffn_{part}_exps.weight", []).append(values)
            continue
        put(blk + theirs(name.removeprefix(f"layers.{layer}.")), values, mix[2] if tensor.held == "matrix" else "F32")
    for name, stack in stacks.items():
        put(name, np.stack(stack), routed[name.split("_")[-2]])
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0].parent, files[1]


@pytest.mark.parametrize("mix", MIXES)
def test_mixes_of_types_in_several_files_are_what_they_stand_for(tmp_path: Path, mix: str) -> None:
    mixed, plain = write_mix(tmp_path, MIXES[mix], 30)
    ids = tiny.random_ids("mix", 90, 100)
    logits = load(plain).session(128).feed(ids)
    assert len(list(mixed.iterdir())) > 2
    assert np.abs(load(mixed).session(128).feed(ids) - logits).max() < 1e-4

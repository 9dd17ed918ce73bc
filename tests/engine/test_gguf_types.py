"""A small model of experts in a GGUF file, in each of ggml's block types: all in memory, wide, and under a budget."""

import functools
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import gguf
import numpy as np
import pytest
from ggml_blocks import HALVES, add_blocks, random_blocks, reference

from numoe.engine import describe, load
from numoe.engine.experts.store import ExpertStore

PLAN = import_module("numoe.engine.plan")
HIDDEN, WIDTH, VOCAB, EXPERTS, HEAD = 256, 256, 96, 4, 64
LAYERS = 2
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_q": (2 * HEAD, HIDDEN), "attn_k": (HEAD, HIDDEN), "attn_v": (HEAD, HIDDEN),
        "attn_output": (HIDDEN, 2 * HEAD), "ffn_gate_inp": (EXPERTS, HIDDEN),
        "ffn_gate_exps": (EXPERTS, WIDTH, HIDDEN), "ffn_up_exps": (EXPERTS, WIDTH, HIDDEN),
        "ffn_down_exps": (EXPERTS, HIDDEN, WIDTH),
    }  # fmt: skip
    layers = {f"blk.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)} | layers


@functools.cache
def spread(dtype: str) -> float:
    """What makes weights of a type deviate by as much as those of models do."""
    return float(HIDDEN**-0.5 / reference(random_blocks(dtype, 64, 512), dtype).std())


def weights(types: Mapping[str, str]) -> dict[str, tuple[str, np.ndarray]]:
    """By the name of a tensor, its type, and what is stored: `types` has those of parts, and "" of all others."""
    made = {}
    for number, (name, shape) in enumerate(shapes().items()):
        dtype = types.get(name.rpartition(".")[2], types[""])
        if "gate_inp" in name or shape[-1] % 256 or name == "token_embd":
            values = np.random.default_rng(number).standard_normal(shape, np.float32)
            made[name] = ("F32", values if name == "token_embd" else values / 16)
        else:
            made[name] = (dtype, random_blocks(dtype, *shape, spread=spread(dtype), seed=number))
    return made


def write(path: Path, made: Mapping[str, tuple[str, np.ndarray]]) -> Path:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    numbers = {
        "vocab_size": VOCAB, "context_length": 64, "embedding_length": HIDDEN, "block_count": LAYERS,
        "feed_forward_length": WIDTH, "expert_feed_forward_length": WIDTH, "expert_count": EXPERTS,
        "expert_used_count": 2, "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.key_length": HEAD, "attention.value_length": HEAD,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN, "attn_q_norm": HEAD, "attn_k_norm": HEAD}
    for layer in range(LAYERS):
        for name, size in norms.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(size, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name, (dtype, values) in made.items():
        add_blocks(writer, f"{name}.weight", dtype, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path: Path, ram: int, experts: int = 0) -> tuple[np.ndarray, ExpertStore]:
    """Of a prompt, and then of tokens one by one. experts: bytes for them, where not all are in memory."""
    model = load(path, ram=ram, threads=1, ctx=16)
    assert model.experts
    if experts:
        model.experts.allow(experts)
    session = model.session(16)
    made = np.concatenate([session.feed(IDS), *(session.feed([token]) for token in IDS[:4])])
    return made, model.experts


MIXED = {"": "Q4_K", "ffn_down_exps": "Q6_K", "ffn_gate_exps": "IQ2_XXS", "output": "Q5_K"}


@pytest.mark.parametrize(
    "types", [*({"": dtype} for dtype in HALVES), MIXED], ids=lambda types: "-".join(types.values())
)
def test_logits_are_those_of_the_values_for_every_budget(
    types: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = weights(types)
    path = write(tmp_path / "blocks.gguf", made)
    floats = {n: ("F32", v if d == "F32" else reference(v, d)) for n, (d, v) in made.items()}
    planned = describe(path).plan(16)
    stored = sum(v.nbytes for n, (_, v) in made.items() if "_exps" in n)
    factors = sum(4 * v.shape[0] * v.shape[1] for n, (d, v) in made.items() if d == "NVFP4" and "_exps" in n)
    assert planned.expert_bytes == stored + factors

    wide, whole = logits(path, 1 << 30)
    tight, tightly = logits(path, planned.total_bytes)
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 0)
    few, streaming = logits(path, describe(path).plan(16).total_bytes - 1, planned.expert_bytes // LAYERS)
    np.testing.assert_array_equal(tight, wide)
    np.testing.assert_array_equal(few, wide)
    assert whole.complete and tightly.complete and not streaming.complete
    assert streaming.stats()["misses"] > LAYERS * EXPERTS
    assert tightly.stats()["resident_bytes"] == stored + factors
    assert streaming.held_bytes <= streaming.budget
    values = logits(write(tmp_path / "floats.gguf", floats), 1 << 30)[0]
    assert np.abs(values).max() > 1
    np.testing.assert_allclose(wide, values, rtol=0, atol=max(1e-4, 1e-6 * float(np.abs(values).max())))

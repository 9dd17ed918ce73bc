"""A real trained model from its GGUF file: answers, and agreement with transformers on the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from numoe.engine import Model, load

GOLDEN = np.load(Path(__file__).parent / "golden" / "smollm2.npz")
ENDS = np.cumsum(GOLDEN["lengths"])
PROMPTS = [GOLDEN["ids"][end - length : end] for end, length in zip(ENDS, GOLDEN["lengths"], strict=True)]


@pytest.mark.parametrize("number", range(10))
def test_logits_and_greedy_tokens_match_the_reference(smollm2: Model, number: int) -> None:
    """The prompt and the reference's 32 greedy tokens are read at once: each must be the best after those before."""
    ids, greedy = PROMPTS[number], GOLDEN["greedy"][number]
    logits = smollm2.session(1024).feed(np.concatenate([ids, greedy]))
    sampled = logits[GOLDEN["positions"][number]]  # (6, vocab)
    assert np.abs(sampled[:, GOLDEN["vocab_ids"]] - GOLDEN["logits"][number]).max() < 1e-3
    best = np.take_along_axis(sampled, GOLDEN["top_ids"][number], axis=1)
    assert np.abs(best - GOLDEN["top_logits"][number]).max() < 1e-3
    assert logits[len(ids) - 1 : -1].argmax(axis=1).tolist() == greedy.tolist()


@pytest.mark.parametrize("number", range(10))
def test_prompts_are_tokenized_as_by_the_reference(smollm2: Model, number: int) -> None:
    assert smollm2.tokenizer.encode(str(GOLDEN["texts"][number])) == PROMPTS[number].tolist()


@pytest.mark.parametrize(("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 2+2?", "4")])
def test_it_answers(smollm2: Model, question: str, answer: str) -> None:
    text = smollm2.description.chat_format.render([{"role": "user", "content": question}])
    generation = smollm2.session(512).generate(smollm2.tokenizer.encode(text), max_tokens=40)
    assert answer in "".join(generation)
    assert generation.finish_reason == "stop"


def test_cut_into_equal_experts_it_is_the_same_model(smollm2: Model, tmp_path: Path) -> None:
    """Every FFN in 8 slices that are all chosen with equal weight, `down` times 8: the sum is the dense FFN."""
    spec, source = smollm2.spec, smollm2.description
    layers, slices, width = 4, 8, 1536 // 8
    dense = source.config | {"num_hidden_layers": layers}
    config = dense | {
        "model_type": "mixtral",
        "num_local_experts": slices,
        "num_experts_per_tok": slices,
        "intermediate_size": width,
    }
    tensors: dict[str, np.ndarray] = {}
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    tensors["model.embed_tokens.weight"] = smollm2.decoder.embedding.dequantize()
    tensors["model.norm.weight"] = smollm2.decoder.norm
    mlps: dict[str, np.ndarray] = {}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for ours, theirs in names.items():
            stored = source.places[f"layers.{i}.attention.{ours}"].name
            tensors[f"{layer}.self_attn.{theirs}.weight"] = source.checkpoint.matrix(stored).dequantize()
        tensors[f"{layer}.input_layernorm.weight"] = smollm2.decoder.layers[i].attention_norm
        tensors[f"{layer}.post_attention_layernorm.weight"] = smollm2.decoder.layers[i].ffn_norm
        for part in ("gate", "up", "down"):
            stored = source.places[f"layers.{i}.ffn.{part}"].name
            mlps[f"{layer}.mlp.{part}_proj.weight"] = source.checkpoint.matrix(stored).dequantize()

    def write(folder: Path, config: dict, weights: dict[str, np.ndarray]) -> Model:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors")
        return load(folder)

    experts: dict[str, np.ndarray] = {}
    for i in range(layers):
        moe = f"model.layers.{i}.block_sparse_moe"
        gate, up, down = (mlps[f"model.layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        experts[f"{moe}.gate.weight"] = np.zeros((slices, spec.hidden), np.float32)
        for e in range(slices):
            rows = slice(e * width, (e + 1) * width)
            experts[f"{moe}.experts.{e}.w1.weight"] = gate[rows]
            experts[f"{moe}.experts.{e}.w3.weight"] = up[rows]
            experts[f"{moe}.experts.{e}.w2.weight"] = np.ascontiguousarray(down[:, rows] * slices)
    ids = PROMPTS[0][:200]
    as_dense = write(tmp_path / "dense", dense, tensors | mlps).session(256).feed(ids)
    as_experts = write(tmp_path / "experts", config, tensors | experts).session(256).feed(ids)
    assert np.abs(as_dense - as_experts).max() < 1e-3

"""A real trained model from its GGUF file: answers, and agreement with transformers on the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from numoe.engine import Model, load

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "smollm2.npz")
ENDS = np.cumsum(GOLDEN["lengths"])
PROMPTS = [GOLDEN["ids"][end - length : end] for end, length in zip(ENDS, GOLDEN["lengths"], strict=True)]

# Longer than a chunk, of several scripts, a chat; the others with `-m slow`.
NUMBERS = [0, 4, 6, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3, 5, 7, 8, 9))]


@pytest.mark.parametrize("number", NUMBERS)
def test_logits_and_greedy_tokens_match_the_reference(smollm2: Model, number: int) -> None:
    """The prompt and the reference's 32 greedy tokens are read at once: each must be the best after those before."""
    ids, greedy = PROMPTS[number], GOLDEN["greedy"][number]
    logits = smollm2.session(1024).feed(np.concatenate([ids, greedy]))
    sampled = logits[GOLDEN["positions"][number]]  # (6, vocab)
    assert np.abs(sampled[:, GOLDEN["vocab_ids"]] - GOLDEN["logits"][number]).max() < 1e-3
    best = np.take_along_axis(sampled, GOLDEN["top_ids"][number], axis=1)
    assert np.abs(best - GOLDEN["top_logits"][number]).max() < 1e-3
    assert logits[len(ids) - 1 : -1].argmax(axis=1).tolist() == greedy.tolist()


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_token_by_token_the_answers_are_the_same(smollm2: Model, number: int) -> None:
    greedy, session = GOLDEN["greedy"][number], smollm2.session(1024)
    best = [session.feed(PROMPTS[number], last=True)[0].argmax()]
    best.extend(session.feed([token], last=True)[0].argmax() for token in greedy[:8])
    assert best == greedy[:9].tolist()


@pytest.mark.parametrize("number", range(10))
def test_prompts_are_tokenized_as_by_the_reference(smollm2: Model, number: int) -> None:
    assert smollm2.tokenizer.encode(str(GOLDEN["texts"][number])) == PROMPTS[number].tolist()


@pytest.mark.parametrize(("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 2+2?", "4")])
def test_it_answers(smollm2: Model, question: str, answer: str) -> None:
    text = smollm2.description.chat_format.render([{"role": "user", "content": question}])
    generation = smollm2.session(512).generate(smollm2.tokenizer.encode(text), max_tokens=40, temperature=0)
    assert answer in "".join(generation)
    assert generation.finish_reason == "stop"


@pytest.mark.slow
def test_cut_into_equal_experts_it_is_the_same_model(smollm2: Model, tmp_path: Path) -> None:
    """Every FFN in 8 slices that are all chosen with equal weight, `down` times 8: the sum is the dense FFN."""
    source, slices = smollm2.description, 8
    width = source.config["intermediate_size"] // slices
    config = source.config | {
        "model_type": "mixtral",
        "num_local_experts": slices,
        "num_experts_per_tok": slices,
        "intermediate_size": width,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def weights(name: str) -> np.ndarray:
        return source.places[name].stored.matrix().dequantize()

    def halves(rows: np.ndarray, heads: int) -> np.ndarray:
        """GGUF's order of a head's rows, rotated channels side by side, back to llama's: first all first ones."""
        return np.ascontiguousarray(rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)

    tensors = {"model.embed_tokens.weight": weights("embed"), "model.norm.weight": smollm2.weights.arrays["norm"]}
    arrays = smollm2.weights.arrays
    for i in range(len(smollm2.spec.layers)):
        layer, moe = f"model.layers.{i}", f"model.layers.{i}.block_sparse_moe"
        q, k, v, o = (weights(f"layers.{i}.attention.{n}") for n in "qkvo")
        tensors[f"{layer}.self_attn.q_proj.weight"] = halves(q, config["num_attention_heads"])
        tensors[f"{layer}.self_attn.k_proj.weight"] = halves(k, config["num_key_value_heads"])
        tensors[f"{layer}.self_attn.v_proj.weight"] = v
        tensors[f"{layer}.self_attn.o_proj.weight"] = o
        tensors[f"{layer}.input_layernorm.weight"] = arrays[f"layers.{i}.attention_norm"]
        tensors[f"{layer}.post_attention_layernorm.weight"] = arrays[f"layers.{i}.ffn_norm"]
        tensors[f"{moe}.gate.weight"] = np.zeros((slices, config["hidden_size"]), np.float32)
        gate, up, down = (weights(f"layers.{i}.ffn.{n}") for n in ("gate", "up", "down"))
        for e in range(slices):
            rows = slice(e * width, (e + 1) * width)
            tensors[f"{moe}.experts.{e}.w1.weight"] = gate[rows]
            tensors[f"{moe}.experts.{e}.w3.weight"] = up[rows]
            tensors[f"{moe}.experts.{e}.w2.weight"] = np.ascontiguousarray(down[:, rows] * slices)
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors

    ids = PROMPTS[2]
    as_experts = load(tmp_path).session(256).feed(ids)
    assert np.abs(as_experts - smollm2.session(256).feed(ids)).max() < 1e-3


MEMORY = """
import json, sys
from numoe.engine import load
model = load(sys.argv[1])
loaded = model.stats()["peak_rss_bytes"]
session = model.session(1024)
for _ in session.generate("Once upon a time", max_tokens=16):
    pass
plan = model.plan(1024)
print(json.dumps([loaded, model.stats()["peak_rss_bytes"], plan.total_bytes + model.wide_bytes]))
"""


@pytest.mark.slow
def test_memory_is_that_of_the_file_and_of_the_plan(smollm2_file: Path) -> None:
    """Of loading: the file and 300 MB at most; of decoding: the plan and what Python itself takes."""

    def peaks(script: str, *arguments: str) -> list[int]:
        result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True)
        return list(json.loads(result.stdout))

    loading, decoding, planned = peaks(MEMORY, str(smollm2_file))
    (empty,) = peaks(
        "import json; import numpy, gguf, tokenizers, numoe.engine; from numoe.engine.budget import peak_rss;"
        "import numoe.engine.session, numoe.engine.text.tokenizer; print(json.dumps([peak_rss()]))"
    )
    assert loading < smollm2_file.stat().st_size + 300e6
    assert decoding < 1.05 * (planned + empty)

"""The model inside the package: it knows its world, and numoe computes it as its training code does."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from numoe.engine import Model, describe, load
from numoe.engine.chat.prompt import encode
from numoe.engine.measure.perplexity import perplexity
from numoe.engine.measure.replay import RouteTrace, belady, lfu, lru, read_trace
from numoe.engine.mtp import load_mtp
from numoe.quant.convert.convert import Folder, convert

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "reference" / "tiny"))
import corpus  # noqa: E402
import evaluate  # noqa: E402

MASTER = TESTS / "reference" / "tiny" / "master"
POLICIES = {"lru": lru, "lfu": lfu, "belady": belady}
HELD_OUT = TESTS / "golden" / "tiny_held_out.txt"
STORY = "<｜User｜>Tell me a story about a fox and a lamp.<｜Assistant｜></think>"


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load("tiny")


@pytest.fixture(scope="module")
def master() -> Model:
    """The weights as trained, before quantization."""
    return load(MASTER)


def test_logits_are_those_of_the_training_code(master: Model) -> None:
    golden = np.load(TESTS / "golden" / "tiny_model.npz")
    for ids, logits in zip(golden["ids"], golden["logits"], strict=True):
        ours = master.session(512).feed(ids.astype(np.int64))[golden["positions"]]
        assert np.abs(ours - logits).max() < 1e-3


def test_it_answers_what_it_was_never_asked_in_training(shipped: Model) -> None:
    """A part of its exam: nine of ten, less what so few questions may be off by."""
    questions = corpus.held_out_questions(12, seed=1)
    right = sum(corpus.check(question, evaluate.ask(shipped, question.user)) for question in questions)
    assert right >= 10


def test_it_tells_stories_on_pairs_it_never_met(shipped: Model) -> None:
    asked = corpus.held_out_story_prompts(2, seed=1)
    assert all(corpus.check_story(pair, evaluate.ask(shipped, request)) for request, pair in asked)


def test_its_head_guesses_several_tokens_in_a_row(shipped: Model) -> None:
    head = load_mtp(shipped)
    assert head is not None

    class Three:
        def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
            return head.propose(tokens, min(3, most))

    with shipped.session(256) as session:
        generation = session.generate(STORY, max_tokens=90, drafter=Three())
        for _ in generation:
            pass
    assert len(generation.tokens) > 2.5 * generation.passes


@pytest.mark.slow
def test_it_passes_its_whole_exam(shipped: Model) -> None:
    """The 200 questions and 50 stories of evaluate.py, in a minute and a half."""
    questions = corpus.held_out_questions(200, seed=1)
    right = sum(corpus.check(question, evaluate.ask(shipped, question.user)) for question in questions)
    asked = corpus.held_out_story_prompts(50, seed=1)
    told = sum(corpus.check_story(pair, evaluate.ask(shipped, request)) for request, pair in asked)
    print(f"{right} of 200 questions, {told} of 50 stories")
    assert right >= 180 and told == 50


@pytest.mark.parametrize("tokens", [2000, pytest.param(12000, marks=pytest.mark.slow)])
def test_quantized_it_predicts_as_well(master: Model, tmp_path: Path, tokens: int) -> None:
    described = describe(MASTER)
    ids = master.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[:tokens]
    exact = perplexity(master, ids, window=512).perplexity
    for quant, bound in (("int8", 1.005), ("int4", 1.04)):
        convert(described.checkpoint, described.weights(), tmp_path / quant, quant, Folder(MASTER, "master"))
        rounded = perplexity(load(tmp_path / quant), ids, window=512).perplexity
        print(f"{quant}: {rounded:.4f} against {exact:.4f}, {rounded / exact - 1:+.2%}")
        assert rounded < bound * exact


def test_the_package_holds_the_int8_form_of_the_trained_weights(tmp_path: Path) -> None:
    described = describe(MASTER)
    convert(described.checkpoint, described.weights(), tmp_path / "tiny", "int8", Folder(MASTER, "master"))
    shipped = describe("tiny").path
    assert (shipped / "model.safetensors").read_bytes() == (tmp_path / "tiny" / "model.safetensors").read_bytes()
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 6e6


def test_every_mechanism_of_v4_is_in_it() -> None:
    spec = describe("tiny").spec
    kinds = {block.kind.label for block in spec.blocks()}
    assert kinds == {"sliding", "HCA", "CSA", "hash-routed", "routed"}
    assert any(name.startswith("mtp.") for name in describe("tiny").checkpoint.tensors)


def test_a_story_goes_on_after_a_resume(shipped: Model, tmp_path: Path) -> None:
    """Text from trained weights: a saved and restored session continues as if nothing had happened."""
    messages = [{"role": "user", "content": "Tell me a story about a fox and a lamp."}]
    ids, _ = encode(shipped.description.chat_format, shipped.tokenizer, messages, thinking=False)
    session = shipped.session(512)
    whole = list(session.generate(ids, max_tokens=100))
    session = shipped.session(512)
    begun = session.generate(ids, max_tokens=40)
    pieces = list(begun)
    session.save(tmp_path / "story")
    restored = shipped.restore(tmp_path / "story")
    pieces += restored.generate([begun.tokens[-1].id], max_tokens=60)
    assert "".join(pieces) == "".join(whole)


def test_trained_routes_reward_a_cache(shipped: Model, tmp_path: Path) -> None:
    """The experts that trained routers choose are worth keeping: half of them in memory serve most requests."""
    with RouteTrace(tmp_path / "trace", shipped.spec.routed_experts) as trace:
        shipped.trace_routes(trace)
        evaluate.ask(shipped, "Tell me a story about a dog and a kite.")
        shipped.trace_routes(None)
    accesses = read_trace(tmp_path / "trace").accesses
    for share in (0.25, 0.5):
        capacity = int(share * shipped.spec.routed_experts)
        hits = {policy: rate(accesses, capacity) / len(accesses) for policy, rate in POLICIES.items()}
        assert hits["belady"] >= max(hits["lru"], hits["lfu"])
        assert hits["lru"] > share

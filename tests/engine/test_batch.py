"""Several sessions in one pass: what each gets, what a pass is made of, and what is left when one fails."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import sched_yield
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from helpers import of_company
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine import Model
from numoe.engine.batch import PROMPT_SHARE, Alone, Passes, counts
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.state import CHUNK
from numoe.engine.speculation import Pass

Models = Callable[[str], Model]
LENGTHS, ANSWERS = (3, 41, 700, 1), (6, 2, 4, 9)
"""Tokens of prompts, of which one takes several passes, and of their answers."""


@given(sizes=st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=CHUNK))
@settings(deadline=None)
def test_a_pass_has_a_token_of_each_and_as_many_as_there_is_room_for(sizes: list[int]) -> None:
    taken = counts(sizes)
    assert all(1 <= count <= size for count, size in zip(taken, sizes, strict=True))
    most = CHUNK if min(sizes) > 1 else max(PROMPT_SHARE, len(sizes))
    assert sum(taken) == min(sum(sizes), most)


def greedy(forward: Callable, decoder: Decoder, prompt: np.ndarray, count: int) -> tuple[list[int], np.ndarray]:
    cache = decoder.cache(1024)
    logits = [forward(prompt, cache, last=True)[0]]
    ids = [int(logits[0].argmax())]
    while len(ids) < count:
        logits.append(forward(np.array(ids[-1:]), cache, last=True)[0])
        ids.append(int(logits[-1].argmax()))
    assert cache.position == len(prompt) + count - 1
    return ids, np.stack(logits)


@pytest.mark.parametrize("case", ["llama_a", "v4_a", "qwen3_5_moe_a"])
def test_sessions_together_get_what_they_get_alone(case: str, model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model(case).decoder
    random = np.random.default_rng(1)
    prompts = [random.integers(0, decoder.spec.vocab, length) for length in LENGTHS]

    def alone(prompt: np.ndarray, cache: object, last: bool) -> np.ndarray:
        parts = [decoder.forward(prompt[at : at + CHUNK], cache, last=last) for at in range(0, len(prompt), CHUNK)]
        return parts[-1]

    wanted = [greedy(alone, decoder, prompt, count) for prompt, count in zip(prompts, ANSWERS, strict=True)]
    passes, begin, made = Passes(decoder), Barrier(len(prompts)), []
    original = decoder.forward_all

    def counted(parts: list, wanted: list) -> np.ndarray:
        made.append(sorted(len(ids) for ids, _ in parts))
        return original(parts, wanted)

    monkeypatch.setattr(decoder, "forward_all", counted)

    def one(number: int) -> tuple[list[int], np.ndarray]:
        with passes.member():
            begin.wait()
            return greedy(passes.forward, decoder, prompts[number], ANSWERS[number])

    with ThreadPoolExecutor(len(prompts)) as threads:
        got = list(threads.map(one, range(len(prompts))))
    for (ids, logits), (expected, reference) in zip(got, wanted, strict=True):
        assert ids == expected
        size = max(1, np.abs(reference).max())  # float32 rounds larger numbers by more
        assert np.abs(logits - reference).max() < size * of_company(1e-4 if case.startswith(tiny.RECURRENT) else 1e-5)
    # The long prompt goes beside the answers of the others; who has ended is not waited for.
    assert made[0] == [1, 3, 41, PROMPT_SHARE - 45]
    assert len(made) == max(ANSWERS) and made[-1] == [1]


def test_members_go_on_in_turn_and_rest_while_a_pass_is_made() -> None:
    """Nobody goes on beside another: of five, who are not of one length, one leaves early."""
    going, most, rests, begin = 0, 0, 0, Barrier(5)

    def rest() -> None:
        nonlocal rests
        rests += 1

    def forward_all(parts: list, wanted: list) -> np.ndarray:
        assert not going
        return np.zeros((len(parts), 1), np.float32)

    passes = Passes(SimpleNamespace(forward_all=forward_all), rest)  # type: ignore[arg-type]

    def one(number: int) -> None:
        nonlocal going, most
        with passes.member():
            begin.wait()
            for _ in range(4 + number):
                passes.forward(np.arange(1 + 300 * number), None, last=True)  # type: ignore[arg-type]
                going += 1
                most = max(most, going)
                sched_yield()
                going -= 1

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(one, range(5)))
    assert most == 1 and rests > 5 + 8


def test_a_drafter_guesses_for_a_session_that_is_alone(model: Models) -> None:
    """Beside others it is neither asked nor told of a pass."""
    passes, told = Passes(model("llama_a").decoder), []

    class Guess:
        def propose(self, tokens: list[int], most: int) -> list[int]:
            return tokens[:most]

        def told(self, one: Pass) -> None:
            told.append(one)

    guess = Alone(Guess(), passes)
    with passes.member():
        assert guess.propose([1, 2, 3], 2) == [1, 2]
        guess.told(Pass(2, 1, 0.1))
        with passes.member():
            guess.told(Pass(2, 2, 0.1))
            assert not guess.propose([1, 2, 3], 2)
        guess.told(Pass(0, 0, 0.1))
    assert told == [Pass(2, 1, 0.1)]


def test_all_tokens_logits_beside_the_last_ones(model: Models) -> None:
    decoder = model("llama_a").decoder
    ids = np.arange(7)
    caches = [decoder.cache(16) for _ in range(2)]
    given = decoder.forward_all([(ids, caches[0]), (ids, caches[1])], ["last", "all"])
    assert given.shape == (8, decoder.spec.vocab)
    np.testing.assert_allclose(given[0], given[7], atol=1e-5)


def test_a_pass_that_fails_is_nobodys(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are told, no cache has moved, and the next pass goes on from there."""
    decoder = model("llama_a").decoder
    passes, begin = Passes(decoder), Barrier(2)
    caches = [decoder.cache(16) for _ in range(2)]
    fails = [True]
    built = decoder.blocks[-1]

    def broken(state: np.ndarray, step: object) -> np.ndarray:
        if fails.pop() if fails else False:
            raise ArithmeticError("in the last block")
        return built(state, step)

    monkeypatch.setattr(decoder, "blocks", [*decoder.blocks[:-1], broken])

    def one(number: int) -> np.ndarray:
        with passes.member():
            begin.wait()
            with pytest.raises(ArithmeticError, match="in the last block"):
                passes.forward(np.arange(3), caches[number], last=True)
            assert caches[number].position == 0
            return passes.forward(np.arange(3), caches[number], last=True)

    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(one, range(2)))
    np.testing.assert_allclose(got[0], got[1], atol=1e-5)
    np.testing.assert_allclose(got[0], decoder.forward(np.arange(3), decoder.cache(16), last=True), atol=1e-5)

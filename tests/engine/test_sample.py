"""Sampling against brute-force definitions, seeds, log-probabilities and stop strings."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from numoe.engine.text import sample
from numoe.engine.text.sample import Sampler, Sampling, StopMatcher, logprob, logprobs
from numoe.quant.errors import InputError

Logits = NDArray[np.float32]


def random_logits(seed: int, size: int, spread: float = 3.0, decimals: int | None = None) -> Logits:
    values = np.random.default_rng(seed).normal(0, spread, size)
    return (values if decimals is None else values.round(decimals)).astype(np.float32)


def survivors(logits: Logits, sampling: Sampling) -> dict[int, float]:
    """Token id -> probability, each filter by its definition, one after the other on renormalized probabilities."""
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    best = float(logits[order[0]])
    weight = {i: math.exp((float(logits[i]) - best) / sampling.temperature) for i in order}
    kept = order[: sampling.top_k or None]
    total = math.fsum(weight[i] for i in kept)
    if sampling.top_p < 1:
        reached = [math.fsum(weight[i] for i in kept[:n]) >= sampling.top_p * total for n in range(1, len(kept))]
        count = 1 + [*reached, True].index(True)
        kept = kept[:count]
    kept = [i for i in kept if weight[i] >= sampling.min_p * weight[order[0]]]
    total = math.fsum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 7},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("first_sorted", [2, 1024])
def test_draws_follow_the_filtered_distribution(
    filters: dict[str, Any], first_sorted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_FIRST_SORTED", first_sorted)  # 2: nearly every draw must sort more
    logits = random_logits(0, 60, decimals=1)  # rounded: ties everywhere
    sampler = Sampler(Sampling(**filters, seed=5))
    expected = survivors(logits, sampler.sampling)
    draws = 2000
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=60)
    assert {int(i) for i in counts.nonzero()[0]} <= set(expected)
    for token_id, probability in expected.items():
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token_id] - draws * probability) <= 4.5 * deviation + 1


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 80),
    first_sorted=st.sampled_from([1, 3, 1024]),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.01, 0.7, 1.0, 3.0]),
        top_k=st.sampled_from([0, 1, 2, 10, 1000]),
        top_p=st.sampled_from([0.1, 0.5, 0.93, 1.0]),
        min_p=st.sampled_from([0.0, 0.013, 0.4, 1.0]),
        seed=st.integers(0, 100),
    ),
)
@settings(max_examples=300, deadline=None)
def test_how_much_is_sorted_changes_nothing(seed: int, size: int, first_sorted: int, sampling: Sampling) -> None:
    logits = random_logits(seed, size)
    before, usual = logits.copy(), sample._FIRST_SORTED
    expected = Sampler(sampling).choose(logits)
    assert expected in survivors(logits, sampling)
    try:
        sample._FIRST_SORTED = first_sorted
        assert Sampler(sampling).choose(logits) == expected
    finally:
        sample._FIRST_SORTED = usual
    assert (logits == before).all()


def test_a_seed_gives_the_same_tokens_everywhere() -> None:
    # logits that need no random generator: a fixed table would not notice a change in one
    logits = (np.arange(1000) * 7919 % 1000).astype(np.float32) / 100
    sampler = Sampler(Sampling(temperature=1.0, seed=42))
    assert [sampler.choose(logits) for _ in range(8)] == SEED_42
    narrow = Sampler(Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, seed=7))
    assert [narrow.choose(logits) for _ in range(8)] == SEED_7


SEED_42 = [829, 618, 916, 520, 210, 412, 224, 755]
SEED_7 = [667, 161, 235, 889, 852, 840, 321, 877]


def test_seeds_differ_and_are_told() -> None:
    logits = np.zeros(10_000, np.float32)
    samplers = [Sampler(Sampling(temperature=1.0)) for _ in range(2)]
    drawn = [[sampler.choose(logits) for _ in range(4)] for sampler in samplers]
    assert drawn[0] != drawn[1]
    again = Sampler(Sampling(temperature=1.0, seed=samplers[0].seed))
    assert [again.choose(logits) for _ in range(4)] == drawn[0]


@pytest.mark.filterwarnings("error")
def test_the_smallest_temperature_is_greedy() -> None:
    sampler = Sampler(Sampling(temperature=5e-324, seed=0))
    assert sampler.choose(np.array([-3e38, 1.0, 0.999, 3e38], np.float32)) == 3


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0, 2, 1, 2, -np.inf], np.float32)
    assert Sampler(Sampling()).choose(logits) == 1


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full(50, -np.inf, np.float32)
    logits[[3, 30]] = 1.0
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    assert {sampler.choose(logits) for _ in range(50)} == {3, 30}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = np.array([0, bad, 1], np.float32)
    with pytest.raises(InputError, match="not finite"):
        Sampler(Sampling(temperature=temperature, seed=0)).choose(logits)


def test_repetition_penalty_by_its_definition() -> None:
    logits = np.array([3.0, 2.9, -1.0, -1.1], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5, repeat_last_n=2))
    assert sampler.choose(logits, [0, 0]) == 1, "3 / 1.5 once, however often it occurred"
    assert sampler.choose(logits, [0, 2, 3]) == 0, "only the last two count"
    assert sampler.choose(logits, []) == 0
    negative = np.array([-1.0, -1.2], np.float32)
    assert sampler.choose(negative, [0]) == 1, "negative logits are multiplied"
    assert logits[0] == 3.0
    off = Sampler(Sampling(repetition_penalty=1.5, repeat_last_n=0))
    assert off.choose(logits, [0]) == 0


@pytest.mark.parametrize(
    ("penalties", "history", "made", "expected"),
    [
        ({"presence_penalty": 0.2}, [0, 0], 2, 1),  # 3.0 - 0.2
        ({"presence_penalty": 0.05}, [0, 0], 2, 0),  # however often it occurs
        ({"frequency_penalty": 0.06}, [0], 1, 0),
        ({"frequency_penalty": 0.06}, [0, 0], 2, 1),  # 3.0 - 2 * 0.06
        ({"frequency_penalty": 2.0, "presence_penalty": 2.0}, [0, 0], 0, 0),  # a prompt is not penalized
        ({"presence_penalty": -0.2}, [0, 1], 1, 1),  # 2.9 + 0.2
        ({"frequency_penalty": 0.06, "repetition_penalty": 1.01}, [0, 2], 1, 0),  # 3.0 / 1.01 before the answer's own
        ({"frequency_penalty": 0.06, "repetition_penalty": 1.01}, [1, 0], 1, 0 + 1 * (3 / 1.01 - 0.06 < 2.9 / 1.01)),
    ],
)
def test_presence_and_frequency_by_their_definitions(
    penalties: dict[str, float], history: list[int], made: int, expected: int
) -> None:
    logits = np.array([3.0, 2.9, -1.0], np.float32)
    assert Sampler(Sampling(**penalties)).choose(logits, history, made) == expected
    assert logits[0] == 3.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repeat_last_n", -1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^`{name}` is {value}; give a value"):
        Sampling(**{name: value})


@given(st.lists(st.floats(-745, 0), min_size=1, max_size=50))
def test_exp_is_exact_enough(values: list[float]) -> None:
    exact = np.exp(np.maximum(values, -700.0))
    np.testing.assert_allclose(sample._exp(np.array(values)), exact, rtol=1e-12)


def test_logprobs_are_the_log_of_the_softmax() -> None:
    logits = random_logits(1, 500)
    exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    best = logprobs(logits, 5)
    assert [i for i, _ in best] == np.argsort(-logits, kind="stable")[:5].tolist()
    np.testing.assert_allclose([value for _, value in best], exact[[i for i, _ in best]], atol=1e-9)
    assert logprob(logits, 123) == pytest.approx(exact[123], abs=1e-9)
    assert logprobs(logits, 0) == [] and len(logprobs(logits, 10_000)) == 500


# ------------------------------------------------------------------------------------------------------ stop strings

stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(text=st.text("abc", max_size=30), stops=stops, data=st.data())
@settings(max_examples=300, deadline=None)
def test_stop_strings_end_the_text_however_it_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    expected, expected_stop = naive_stop(text, stops)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stopped = matcher.push(text[start:end])
        shown += piece
        assert expected.startswith(shown)
    shown += matcher.flush()
    assert (shown, stopped) == (expected, expected_stop)


def test_text_that_cannot_be_a_stop_string_is_not_held_back() -> None:
    matcher = StopMatcher(["</s>"])
    assert matcher.push("a <") == ("a ", False)
    assert matcher.push("b>") == ("<b>", False)
    assert matcher.push("c</s>d") == ("c", True)
    assert matcher.push("e") == ("", True)
    with pytest.raises(InputError, match="empty"):
        StopMatcher([""])

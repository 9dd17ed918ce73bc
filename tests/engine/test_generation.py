"""Text as it is made: with a drafter it is what it is without, and what the session has read as well."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine import Generation, Model, PromptLookup, Session, load
from numoe.engine.speculation import Drafter
from numoe.engine.text.grammar import regex_grammar

CASES = {"llama_a": 1e-4, "gpt_oss_a": 1e-4, "v2_a": 1e-4, "v4_b": 1e-4, "qwen3_5_moe_a": 1e-3}
"""A model of every kind of state, and how far its logits may be off after passes of other widths."""
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.3, "seed": 1},
    {"temperature": 1.0, "top_p": 0.95, "min_p": 0.01, "seed": 2},
]
PROMPT = 137  # tokens: near where windows and V4's entries are closed
MADE = 40

Models = Callable[[str], Model]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A golden case with a tokenizer."""
    return cache(lambda case: load(tiny.write_model(case, tmp_path_factory.mktemp("models") / case)))


def prompt(model: Model) -> list[int]:
    return tiny.random_ids("generation", PROMPT, model.spec.vocab).tolist()


@dataclass
class Run:
    """What a generation left, and at every piece where the session stood."""

    session: Session
    generation: Generation
    pieces: list[tuple[str, int]] = field(default_factory=list)

    def outcome(self) -> Any:
        made = [(token.id, [i for i, _ in token.alternatives]) for token in self.generation.tokens]
        return made, self.pieces, self.generation.finish_reason, self.session.position, self.session.tokens


@dataclass
class Ask:
    """One way to ask for text; `leave`: so many pieces are taken; `force`: words come after so many."""

    sampling: int = 0
    context: int = PROMPT + MADE
    cancel: int | None = None
    leave: int | None = None
    force: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, model: Model, drafter: Drafter | None = None) -> Run:
        session = model.session(self.context)
        asked = iter(range(10**6))
        generation = session.generate(
            prompt(model),
            drafter=drafter,
            cancelled=lambda: next(asked) == self.cancel,
            **{"logprobs": 2, **SAMPLINGS[self.sampling], **self.options},
        )
        run = Run(session, generation)
        for piece in islice(generation, self.leave):
            run.pieces.append((piece, session.position))
            if len(run.pieces) == self.force:
                generation.force("so it is")
        return run


Script = Sequence[tuple[str, int]]


class Scripted:
    """Knows what comes, and says of it, call by call, what a script says."""

    def __init__(self, truth: Sequence[int], script: Script) -> None:
        self._truth = list(truth)
        self._script: Iterator[tuple[str, int]] = iter(script)

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        how, count = next(self._script, ("right", 4))
        right = self._truth[len(tokens) - PROMPT :][:count]
        wrong = [(token + 1) % 50 for token in self._truth[len(tokens) - PROMPT + len(right) :][:3]]
        return {
            "right": right,
            "wrong": [(token + 1) % 50 for token in right],
            "half": right + wrong,
            "long": [*self._truth[len(tokens) - PROMPT :], *[7] * 600],
            "foreign": [*right, 10**6, -1],
            "numpy": np.array(right, np.int64),
            "none": [],
        }[how]  # type: ignore[return-value]


def ids(run: Run) -> list[int]:
    return [token.id for token in run.generation.tokens]


@cache
def plain(talker: Models, case: str, sampling: int) -> list[int]:
    """The text without a drafter, for as long as the context is."""
    return ids(Ask(sampling).run(talker(case)))


def same(model: Model, ask: Ask, script: Script, truth: Sequence[int], bound: float) -> tuple[Run, Run]:
    """Run it without and with a drafter, and see that nothing tells them apart."""
    without, drafted = ask.run(model), ask.run(model, Scripted(truth, script))
    assert drafted.outcome() == without.outcome()
    for ours, theirs in zip(drafted.generation.tokens, without.generation.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=bound)
    assert drafted.generation.passes <= without.generation.passes
    assert drafted.generation.passes + drafted.generation.accepted == without.generation.passes
    if drafted.session.position < drafted.session.context:
        after = [run.session.feed([5], last=True) for run in (without, drafted)]
        assert np.abs(after[0] - after[1]).max() < bound
    return without, drafted


steps = st.tuples(st.sampled_from(["right", "wrong", "half", "long", "foreign", "numpy", "none"]), st.integers(0, 9))
some = st.none() | st.integers(1, MADE)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_drafter_changes_nothing_but_the_number_of_passes(talker: Models, case: str, data: st.DataObject) -> None:
    model, sampling = talker(case), data.draw(st.integers(0, 2))
    truth = plain(talker, case, sampling)
    ask = Ask(sampling, PROMPT + data.draw(st.integers(1, MADE)), cancel=data.draw(some), leave=data.draw(some))
    ask.force = data.draw(st.sampled_from([None, None, 2, 11]))  # few texts, in none of which two tokens are as likely
    ask.options["max_tokens"] = data.draw(st.none() | st.integers(0, MADE))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, MADE - 3))
        ask.options["stop"] = [model.tokenizer.decode(truth[at : at + 2])[:3] or "x"]
    same(model, ask, data.draw(st.lists(steps, max_size=12)), truth, CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampling", range(len(SAMPLINGS)))
def test_right_proposals_save_passes(talker: Models, case: str, sampling: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, truth = talker(case), plain(talker, case, sampling)
    assert len(truth) == MADE + 1
    widths, forward = [], model.decoder.forward

    def watched(token_ids: Any, *arguments: Any, **options: Any) -> Any:
        widths.append(len(token_ids))
        return forward(token_ids, *arguments, **options)

    monkeypatch.setattr(model.decoder, "forward", watched)
    drafted = Ask(sampling).run(model, Scripted(truth, [("right", 4)] * MADE))
    assert ids(drafted) == truth
    assert widths == [PROMPT, *[5] * (MADE // 5)]
    made = drafted.generation
    assert (made.passes, made.proposed, made.accepted) == (MADE // 5, MADE * 4 // 5, MADE * 4 // 5)
    short = Ask(sampling, options={"max_tokens": 4}).run(model, Scripted(truth, [("right", 9)]))
    assert ids(short) == truth[:4] and widths[-2:] == [PROMPT, 3]  # the last token is not read


def test_tokens_are_drawn_as_often_as_the_model_says_whatever_is_guessed(talker: Models) -> None:
    """Texts of three tokens, each one of two: the frequencies of all eight over many seeds."""
    model, asked = talker("llama_a"), [3, 1, 4, 1, 5]
    likely: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for text, share in likely.items():
            logits = model.session(16).feed([*asked, *text], last=True)[0]
            best = logits.argsort()[-2:]
            odds = np.exp((logits[best] - logits[best].max()) / 2)
            longer |= {(*text, int(token)): share * odd / odds.sum() for token, odd in zip(best, odds, strict=True)}
        likely = longer
    guess = max(likely, key=lambda text: likely[text])

    class Always:
        def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
            return guess[len(tokens) - len(asked) :][:most]

    drawn, accepted, session = dict.fromkeys(likely, 0), 0, model.session(16)
    for seed in range(200):
        session.rewind(session.position)
        made = session.generate(asked, max_tokens=3, temperature=2.0, top_k=2, seed=seed, drafter=Always())
        for _ in made:
            pass
        drawn[tuple(token.id for token in made.tokens)] += 1
        accepted += made.accepted
    off = sum((drawn[text] - 200 * share) ** 2 / (200 * share) for text, share in likely.items())
    assert accepted > 25 and off < 24.3  # chi-squared of seven degrees of freedom: one in a thousand


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["right", "half", "long"])
def test_an_end_in_the_midst_of_proposals_is_one(
    talker: Models, case: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, truth = talker(case), plain(talker, case, 1)
    at = next(i for i in range(6, MADE) if truth[i] not in truth[:i])
    monkeypatch.setattr(model.tokenizer, "eos_ids", frozenset({truth[at]}))
    without, _ = same(model, Ask(1), [(how, 4)] * 20, truth, CASES[case])
    assert without.generation.finish_reason == "stop" and ids(without) == truth[: at + 1]


@pytest.mark.parametrize("case", CASES)
def test_a_form_is_kept_at_every_proposal(talker: Models, case: str) -> None:
    model = talker(case)
    for sampling in range(len(SAMPLINGS)):
        ask = Ask(sampling, options={"grammar": regex_grammar("[a-f]{9}(x|y)[0-9A-E]{12}")})
        truth = ids(ask.run(model))
        script = [("right", 4), ("half", 3), ("wrong", 2), ("long", 1)] * 3
        without, drafted = same(model, ask, script, truth, CASES[case])
        assert without.generation.finish_reason == "stop" and len(truth) == 22
        assert drafted.generation.passes < without.generation.passes


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_pass_with_proposals_counts_none_of_them(
    talker: Models, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, truth = talker(case), plain(talker, case, 0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    runs = []
    for drafter in (None, Scripted(truth, [("half", 2)] * 9)):
        session = model.session(PROMPT + MADE)
        generation = session.generate(prompt(model), drafter=drafter, max_tokens=MADE)
        # Places before, in and behind what was read ahead.
        for count in (3, 1, 1, 1, 1):
            list(islice(generation, count))
        with monkeypatch.context() as patch:
            patch.setattr(model.decoder.blocks[-1], "compute", interrupt)
            with pytest.raises(KeyboardInterrupt):
                list(generation)
        made = [token.id for token in generation.tokens]
        assert session.tokens == prompt(model) + made[:-1] and made == truth[: len(made)]
        runs.append(session.feed(truth[len(made) - 1 : 20]))
    assert np.abs(runs[0][-1] - runs[1][-1]).max() < CASES[case]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("change", ["feed", "rewind", "snapshot", "align", "save"])
def test_a_session_that_has_read_ahead_does_what_it_does(talker: Models, case: str, change: str, tmp_path: Any) -> None:
    """Nobody but the generation sees what was read ahead, whatever is done with the session meanwhile."""
    model, truth = talker(case), plain(talker, case, 0)
    ends = []
    for drafter in (None, Scripted(truth, [("right", 9)] * 9)):
        session = model.session(PROMPT + MADE)
        generation = session.generate(prompt(model), drafter=drafter)
        list(islice(generation, 4))
        made = len(generation.tokens)
        assert session.position == PROMPT + made - 1
        if change == "feed":
            session.feed([3, 4])
        elif change == "rewind":
            session.rewind(2)
        elif change == "snapshot":
            snapshot = session.snapshot()
            session.feed([9] * 5)
            session.restore(snapshot)
        elif change == "align":
            session.feed(session.align([*session.tokens, 8, 9]))
        else:
            session.save(tmp_path / "kept")
            restored = model.restore(tmp_path / "kept")
            assert restored.tokens == session.tokens
            session = restored
        ends.append((session.tokens, session.feed([6, 7])[-1]))
    assert ends[0][0] == ends[1][0]
    assert np.abs(ends[0][1] - ends[1][1]).max() < CASES[case]


def test_the_end_of_the_prompt_can_be_gone_back_to_with_a_drafter(talker: Models) -> None:
    model, truth = talker("qwen3_5_moe_a"), plain(talker, "qwen3_5_moe_a", 0)
    session = model.session(PROMPT + MADE)
    list(session.generate(prompt(model), drafter=Scripted(truth, [("right", 3), ("wrong", 3), ("half", 2)] * 9)))
    assert session.align([*prompt(model), 1, 2]) == [1, 2]


# ------------------------------------------------------------------------------------------------ look-up


@pytest.mark.parametrize(
    ("tokens", "most", "proposed"),
    [
        ([1, 2, 3, 4, 5, 9, 2, 3], 9, [4, 5, 9, 2, 3, 4, 5, 9]),
        ([1, 2, 3, 4, 5, 9, 2, 3], 2, [4, 5]),
        ([5, 2, 3, 7, 6, 2, 3, 8, 5, 2, 3], 3, [7, 6, 2]),  # the longer run counts more than the later one
        ([5, 2, 3, 7, 6, 2, 3, 8, 4, 2, 3], 3, [8, 4, 2]),
        ([1, 1, 1, 1], 3, [1, 1, 1]),
        ([256, 1, 2, 1, 256], 3, []),  # bytes of neighbours are no token
        ([65536, 256, 9, 256, 1], 3, []),
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_what_followed_before_is_proposed(tokens: list[int], most: int, proposed: list[int]) -> None:
    assert PromptLookup().propose(tokens, most) == proposed


@given(st.lists(st.sampled_from([0, 1, 256, 65536, 2**24]), max_size=40), st.integers(1, 12))
def test_look_up_finds_the_longest_run_and_its_last_place(tokens: list[int], most: int) -> None:
    """By trying every one."""
    found = [
        (length, start)
        for length in range(2, 9)
        for start in range(len(tokens) - length)
        if tokens[start : start + length] == tokens[len(tokens) - length :]
    ]
    expected = list(tokens)
    if found:
        length, start = max(found)
        for i in range(min(most, 8)):
            expected.append(expected[start + length + i])
    assert PromptLookup().propose(tokens, most) == expected[len(tokens) :]


def test_look_up_reads_a_loop_in_few_passes(talker: Models) -> None:
    """Greedy text of a random model goes round after a while."""
    model = talker("llama_a")
    texts = []
    for drafter in (None, PromptLookup()):
        generation = model.session(512).generate(prompt(model), max_tokens=300, drafter=drafter)
        texts.append(("".join(generation), generation))
    assert texts[0][0] == texts[1][0]
    assert texts[1][1].passes < texts[0][1].passes / 2

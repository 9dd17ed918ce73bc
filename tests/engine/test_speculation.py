"""What guesses ahead, and when: by what passes take and how often guesses come. Times are told, not measured."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny

from numoe.engine import InputError, Model, describe, load, speculation
from numoe.engine.chat.prompt import encode
from numoe.engine.drafting import drafting
from numoe.engine.mtp import find_mtp, load_mtp
from numoe.engine.speculation import COUNTS, Drafting, Pass, Paying

Models = Callable[[str], Model]


@dataclass
class Guess:
    """Proposes as many as it may."""

    sort: int = 0
    free: bool = True
    at_once: int = 1

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        return [1] * most


def run(paying: Paying, come: Iterator[bool], dearer: float, passes: int, again: float = 0.0) -> tuple[int, float]:
    """Tokens and seconds of passes of which one more token makes each take so much more; `come`: of each guess."""
    tokens, seconds, unread = 0, 0.0, False
    for _ in range(passes):
        proposed = 0 if unread else len(paying.propose([1, 2, 3], 99))
        accepted = next((i for i in range(proposed) if not next(come)), proposed)
        taken = 1 + dearer * proposed + again * unread
        paying.told(Pass(proposed, accepted, taken, again=unread))
        unread = bool(again) and accepted < proposed
        tokens, seconds = tokens + 1 + accepted, seconds + taken
    return tokens, seconds


def draws(rate: float) -> Iterator[bool]:
    random = np.random.default_rng(1)
    while True:
        yield bool(random.random() < rate)


@pytest.mark.parametrize(
    ("rate", "dearer", "again", "least", "most"),
    [
        (1.0, 0.06, 0.0, 6.0, 20.0),  # copied text
        (0.9, 0.06, 0.0, 2.0, 8.0),
        (0.7, 0.1, 0.0, 1.4, 4.0),
        (0.02, 0.06, 0.0, 0.97, 1.03),  # free text costs next to nothing
        (0.3, 0.06, 1.5, 0.95, 1.3),  # states that cannot go back read tokens again
        (0.5, 0.9, 0.0, 0.97, 1.2),  # experts of every further token
        (0.9, 2.0, 0.0, 0.97, 1.0),
    ],
)
def test_what_pays_is_proposed(rate: float, dearer: float, again: float, least: float, most: float) -> None:
    tokens, seconds = run(Paying(Guess()), draws(rate), dearer, 600, again)
    assert least < tokens / seconds < most


def test_what_did_not_pay_is_tried_again_when_the_text_repeats() -> None:
    paying = Paying(Guess())
    run(paying, draws(0.0), 0.06, 300)
    tokens, seconds = run(paying, draws(1.0), 0.06, 300)
    assert tokens / seconds > 2


def test_one_bad_measurement_counts_for_nothing() -> None:
    paying = Paying(Guess())
    for one in (Pass(0, 0, 1.0), Pass(2, 2, 30.0)):
        paying.propose([1, 2, 3], 99)
        paying.told(one)
    tokens, seconds = run(paying, draws(1.0), 0.06, 100)
    assert tokens / seconds > 4


def test_a_slow_beginning_is_forgotten() -> None:
    """Passes of guesses that never come seem cheap beside a first one that took twice as long as all later ones."""
    paying = Paying(Guess())
    paying.told(Pass(0, 0, 2.0))
    run(paying, draws(0.0), 0.06, 200)
    tokens, seconds = run(paying, draws(0.0), 0.06, 200)
    assert tokens / seconds > 0.98


def test_reading_a_prompt_makes_no_drafter_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has its own states reads what is new to it first: a whole prompt, and then a few tokens each time."""
    clock = [0.0]
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: clock[0])

    @dataclass
    class Reads(Guess):
        read: int = 0

        def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
            clock[0] += 0.1 * max(0, len(tokens) - self.read - 9) + 0.05 * most
            self.read = len(tokens)
            return [1] * most

    paying = Paying(Reads(free=False))
    text, come, tokens, seconds = [1] * 500, draws(0.9), 0, 0.0
    for _ in range(100):
        begun = clock[0]
        proposed = len(paying.propose(text, 99))
        accepted = next((i for i in range(proposed) if not next(come)), proposed)
        paying.told(Pass(proposed, accepted, 1 + 0.06 * proposed))
        text += [1] * (1 + accepted)
        tokens, seconds = tokens + 1 + accepted, seconds + 1 + 0.06 * proposed + (clock[0] - begun)
    assert tokens / (seconds - 0.1 * 491) > 1.8


def test_tokens_that_a_form_forces_are_nobodys_guesses() -> None:
    paying = Paying(Guess())
    run(paying, draws(0.9), 0.06, 50)
    before = paying._shares[0, 0].expected(paying._now)
    for proposed in (3, 40):
        paying.told(Pass(proposed, 0, 1.5))
    assert paying._shares[0, 0].expected(paying._now)[0] > before[0] - 0.05


def test_of_several_drafters_the_one_that_pays_most_is_asked() -> None:
    often, seldom = draws(0.95), draws(0.4)
    for first, second in ((Guess(sort=1), Guess(free=False)), (Guess(free=False), Guess(sort=1))):
        paying, asked = Paying(first, second), []
        for _ in range(300):
            proposed = len(paying.propose([1, 2, 3], 99))
            good = paying._asked is not None and paying._asked[0] == 1
            accepted = next((i for i in range(proposed) if not next(often if good else seldom)), proposed)
            paying.told(Pass(proposed, accepted, 1 + 0.06 * proposed))
            asked.append(good)
        assert sum(asked[50:]) > 230


def test_what_guesses_a_block_at_once_is_asked_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that of the block. What it leaves out of one counts as what does not come."""
    clock = [0.0]
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: clock[0])

    @dataclass
    class Blocks(Guess):
        trusted: int = 5

        def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
            clock[0] += 0.4
            return [1] * min(most, self.trusted)

    for trusted, least, most in ((5, 2.2, 4.0), (1, 0.95, 1.35)):
        paying, come, tokens, seconds = Paying(Blocks(free=False, at_once=5, trusted=trusted)), draws(0.95), 0, 0.0
        for _ in range(300):
            begun = clock[0]
            proposed = len(paying.propose([1] * tokens, 99))
            accepted = next((i for i in range(proposed) if not next(come)), proposed)
            paying.told(Pass(proposed, accepted, 1 + 0.06 * proposed))
            tokens, seconds = tokens + 1 + accepted, seconds + 1 + 0.06 * proposed + (clock[0] - begun)
        assert least < tokens / seconds < most
        assert paying._shares[0, 0].expected(paying._now)[4] > 0.5 or trusted == 1


def test_sorts_are_told_apart() -> None:
    good, bad = Guess(sort=8), Guess(sort=2)
    for rate, which in ((draws(1.0), good), (draws(0.0), bad)):
        paying = Paying(which, Guess(free=False))
        run(paying, rate, 0.06, 200)
        assert len(paying._drafters[0].propose([1], 3)) == 3
        assert (paying._best(0, which.sort, paying._passes())[0] > 0) == (which is good)
        assert paying._best(0, 99, paying._passes())[0] > 0, "another sort is not known yet"
    assert Paying(good).propose([1, 2], 9) == [], "nothing is known of passes yet"
    assert COUNTS[-1] < 64, "caches with windows go back so far"


# -------------------------------------------------------------------------------------------- small models


def test_a_model_that_guesses_what_it_would_say_itself_saves_most_passes(model: Models) -> None:
    ids = tiny.load_golden("llama_a").ids[:40].tolist()
    session, made = model("llama_a").session(128), []
    logits = session.feed(ids, last=True)[0]
    for _ in range(30):
        made.append(int(logits.argmax()))
        logits = session.feed(made[-1:], last=True)[0]
    drafter = Drafting(model("llama_a").session(60))
    assert drafter.propose(ids, 5) == made[:5]
    assert drafter.propose([*ids, *made[:3]], 4) == made[3:7], "what came was read already"
    assert drafter.propose([*ids, *made[:3], 7], 2)[:0] == [], "another token came"
    assert drafter.propose([*ids, *made[:20]], 9) == made[20:21], "its own context ends"
    assert drafter.propose([*ids, *made[:21]], 9) == []


def test_a_small_model_has_the_same_vocabulary(tmp_path: Path) -> None:
    one = load(tiny.write_model("llama_a", tmp_path / "one"))
    with pytest.raises(InputError, match="the model of `draft` has another vocabulary"):
        drafting(one, load("tiny"))
    assert drafting(one, load(tmp_path / "one"), ctx=64) is not None


def test_nothing_guesses_where_experts_come_from_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["numoe.engine.plan"], "scratch_bytes", lambda spec: 1000)
    model = load("tiny", ram=describe("tiny").plan(512).total_bytes - 1, ctx=512)
    assert model.experts and not model.experts.complete and drafting(model) is None


# --------------------------------------------------------------------------------------- V4's own head


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load("tiny")


def test_the_head_guesses_the_token_after_the_next(shipped: Model) -> None:
    """Far more often than chance, from the second answer on too; the text is what it is without."""
    head, rates = load_mtp(shipped), []
    assert head is not None
    for question in ("Tell me a story about a fox and a lamp.", "Tell me a story about a dog and a kite."):
        messages = [{"role": "user", "content": question}]
        ids, _ = encode(shipped.description.chat_format, shipped.tokenizer, messages, thinking=False)
        session = shipped.session(256)
        whole = "".join(session.generate(ids, max_tokens=40))
        generation = shipped.session(256).generate(ids, max_tokens=40, drafter=head)
        assert "".join(generation) == whole
        rates.append(generation.passes)
        drafted = session.generate([5], max_tokens=9, drafter=head)
        assert len("".join(drafted)) > 0
    shipped.decoder.watch.clear()
    assert all(passes < 27 for passes in rates)


def test_only_checkpoints_that_have_the_head_give_it(shipped: Model, model: Models) -> None:
    found = find_mtp(shipped.description)
    assert found is not None and len(found[0].layers) == 1
    assert find_mtp(model("llama_a").description) is None
    assert load_mtp(model("v4_a")) is None

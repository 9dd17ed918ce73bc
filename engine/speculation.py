"""Speculation: tokens that may come next are guessed and read in one pass with the last one.

What a text is made of does not change by it: of each token the logits say what comes, and guesses save passes only
where they agree (Leviathan et al., 2023, arXiv 2211.17192; here the choice itself is what a guess must agree with).
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, takewhile
from statistics import median
from typing import Protocol

from numoe.engine.layers.ops import Floats
from numoe.engine.layers.state import CHUNK


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """Up to `most` tokens that may follow all `tokens` so far, the prompt's included; none where it has no idea.

        `tokens` is not to be changed. What was accepted is told by the next call's.
        """
        ...


class Sorted(Drafter, Protocol):
    """One that says how good its guesses are, for `Paying`."""

    @property
    def sort(self) -> int:
        """Of which sort its last proposal was: those of one sort are right about as often."""
        ...

    @property
    def free(self) -> bool:
        """Whether a proposal takes next to no time, and its sort is known only when it is there."""
        ...

    @property
    def at_once(self) -> int:
        """How many tokens it guesses in the time of one."""
        ...


@dataclass(frozen=True)
class Pass:
    """A pass of an answer, as drafters with a method `told` are told of it when all is known.

    proposed: tokens that were read beside the last one. accepted: those of them that came.
    again: tokens had to be read once more first, since states could not go back over what was not accepted.
    """

    proposed: int
    accepted: int
    seconds: float
    again: bool = False


def usable(proposed: Iterable[int], most: int, vocab: int, ends: Container[int]) -> list[int]:
    """What of a proposal is worth reading: at most so many, up to an end or to what is no token of the model."""
    most = min(most, CHUNK - 1)  # beside the token that they follow
    return list(takewhile(lambda token: 0 <= token < vocab and token not in ends, islice(proposed, max(0, most))))


@dataclass
class PromptLookup:
    """Proposes what followed when the last tokens occurred before: the longest run of them, where it was last.

    It costs nothing, and is right where a text repeats what was said: quotes, names, code that is edited (Saxena,
    2023, github.com/apoorvumang/prompt-lookup-decoding). Where experts come from disk a wrong proposal is dear, for its
    tokens take others.
    """

    shortest: int = 2
    longest: int = 8
    """Tokens of a run, from and to."""
    tokens: int = 8
    """Proposed at most."""
    sort: int = field(default=0, init=False)
    """Of the last proposal, how long a run it follows from, up to `_LONG`."""
    free = True
    at_once = 1

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        known = array("i", tokens)
        for length in range(min(self.longest, len(known) - 1), self.shortest - 1, -1):
            start = _last(known[-length:], known[:-1])
            if start is not None:
                self.sort = min(length, _LONG)
                follows = known[start + length :]
                # What it overlaps with goes round: after "ababa" comes "ba" and "ba" again.
                return [follows[i % len(follows)] for i in range(min(most, self.tokens))]
        return []


_LONG = 3
"""Tokens of a run; what follows longer ones is right as often."""


class Drafting:
    """A small model of the same vocabulary, which says what it would write."""

    sort = 0
    free = False
    at_once = 1

    def __init__(self, session: Guessing):
        """session: one of that model, which nobody else reads with."""
        self._session = session

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        session, proposed = self._session, list[int]()
        most = min(most, session.context - len(tokens) + 1)
        if most < 1:
            return []
        logits = session.feed(session.align(tokens), last=True)[0]
        while True:
            proposed.append(int(logits.argmax()))
            if len(proposed) == most:
                return proposed
            logits = session.feed(proposed[-1:], last=True)[0]


class Guessing(Protocol):
    """What a `Drafting` reads with: a session."""

    context: int

    def align(self, token_ids: Sequence[int]) -> list[int]: ...

    def feed(self, token_ids: Sequence[int], *, last: bool = False) -> Floats: ...


COUNTS = 0, 1, 2, 3, 4, 6, 8, 12, 16
"""Tokens that are proposed at once: few sizes, so that each is soon measured."""
_GAIN = 1.03
"""Below this gain nothing is proposed: measurements of passes are not more exact."""
_DEARER = 0.1
"""What a further token adds to a pass, in passes, before it is measured."""
_FADES = 0.98
"""What was learned counts by so much less with every pass."""
_LATEST, _OLD = 16, 1024
"""So many measurements of each size count, and those of so many passes ago no more."""
_ANEW = 64
"""Passes after which one of one token is measured anew, for all others are held against those."""


class _Share:
    """How often tokens of a sort come, the first of a proposal, the second where the first did, and so on.

    At first it is as if a few had been tried: of the first half came, and of those after as many as before them.
    """

    def __init__(self) -> None:
        self.came = [0.0] * COUNTS[-1]
        self.tried = [0.0] * COUNTS[-1]
        self._at = 0  # the pass that it was faded in last

    def learn(self, proposed: int, accepted: int, now: int) -> None:
        self._fade(now)
        for place in range(min(accepted + 1, proposed)):
            self.tried[place] += 1
            self.came[place] += place < accepted

    def _fade(self, now: int) -> None:
        left, self._at = _FADES ** (now - self._at), now
        self.came = [left * count for count in self.came]
        self.tried = [left * count for count in self.tried]

    def expected(self, now: int) -> list[float]:
        """How likely the first, the first two, ... of a proposal come."""
        self._fade(now)
        rate, both, likely = 0.5, 1.0, []
        for came, tried in zip(self.came, self.tried, strict=True):
            rate = (came + 2 * rate) / (tried + 2)
            both *= rate
            likely.append(both)
        return likely


class _Latest:
    """The latest measurements of something."""

    def __init__(self) -> None:
        self._values: deque[tuple[int, float]] = deque(maxlen=_LATEST)

    def add(self, value: float, now: int) -> None:
        self._values.append((now, value))

    def recent(self, now: int) -> list[float]:
        return [value for at, value in self._values if now - at < _OLD]

    def median(self, now: int) -> float:
        """Of the recent ones; of all where all are old."""
        return median(self.recent(now) or [value for _, value in self._values])

    def age(self, now: int) -> int:
        """Passes since the last one."""
        return now - self._values[-1][0]

    def __bool__(self) -> bool:
        return bool(self._values)


class Paying:
    """Proposes what that of several drafters does which pays most, as far as one does.

    Whether it does follows from what was measured: how often tokens of that sort came, how long passes of so many
    tokens take beside those of one, and how long the drafter does. What was learned fades, so that what did not pay is
    tried again.
    """

    def __init__(self, *drafters: Sorted):
        self._drafters = drafters
        self._shares: dict[tuple[int, int], _Share] = {}
        self._asked: tuple[int, int] | None = None
        self._wanted = 0  # tokens that it was asked for
        self._seconds = {count: _Latest() for count in COUNTS}  # of passes, by the tokens that they proposed
        self._again = _Latest()  # of passes that read tokens once more
        self._drafted = [_Latest() for _ in drafters]  # of as many tokens as each guesses at once
        self._read = [0 for _ in drafters]  # tokens that there were when each was asked last
        self._now = 0  # passes so far

    @property
    def single_seconds(self) -> float | None:
        """How long a pass of one token takes; None: none was yet."""
        return self._seconds[0].median(self._now) if self._seconds[0] else None

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        self._asked = None
        if not self._seconds[0] or self._seconds[0].age(self._now) >= _ANEW:
            return []
        offers = []
        passes = self._passes()
        for number, drafter in enumerate(self._drafters):
            known = drafter.propose(tokens, min(most, COUNTS[-1])) if drafter.free else None
            if known is None or known:
                count, gain = self._best(number, drafter.sort, passes)
                offers.append((gain, -number, min(most, count), known))
        for _, number, count, known in sorted(offers, reverse=True, key=lambda offer: offer[:2]):
            if proposed := self._offered(-number, count, known, tokens):
                self._asked, self._wanted = (-number, self._drafters[-number].sort), count
                return proposed
        return []

    def _offered(self, number: int, count: int, known: Sequence[int] | None, tokens: Sequence[int]) -> Sequence[int]:
        """So many tokens of a drafter, that it has said already or is asked for."""
        if known is not None or not count:
            return known[:count] if known else ()
        begun = time.perf_counter()
        proposed = self._drafters[number].propose(tokens, count)
        # One that has a prompt to read first is no slower at what comes after it.
        if proposed and 0 <= len(tokens) - self._read[number] <= COUNTS[-1] + 1:
            self._drafted[number].add((time.perf_counter() - begun) / self._turns(number, len(proposed)), self._now)
        self._read[number] = len(tokens)
        return proposed

    def told(self, one: Pass) -> None:
        """What came of a pass."""
        self._now += 1
        if one.again:
            self._again.add(one.seconds, self._now)
        elif one.proposed <= COUNTS[-1]:  # of a size between two it counts for the larger
            self._seconds[next(count for count in COUNTS if count >= one.proposed)].add(one.seconds, self._now)
        asked, self._asked = self._asked, None  # a form's own tokens are nobody's guesses
        if one.proposed and asked:
            # What a drafter leaves out, for it does not trust it, comes no more than what is wrong.
            wanted = max(one.proposed, self._wanted)
            self._shares.setdefault(asked, _Share()).learn(wanted, one.accepted, self._now)

    def _best(self, number: int, sort: int, passes: Sequence[float]) -> tuple[int, float]:
        """How many tokens of a sort are worth reading, and what that gains: tokens in the time of a pass of one."""
        likely, single = self._shares.get((number, sort), _Share()).expected(self._now), self.single_seconds
        assert single is not None
        each = self._drafted[number].median(self._now) / single if self._drafted[number] else 0.0
        again = max(0.0, self._again.median(self._now) / single - 1) if self._again else 0.0
        come = list(accumulate(likely, initial=1.0))
        best = 0, 1.0
        for count, taken in zip(COUNTS[1:], passes[1:], strict=True):
            drafted = self._turns(number, count) * each
            gain = come[count] / (taken + drafted + (1 - likely[count - 1]) * again)
            if gain > max(best[1], _GAIN):
                best = count, gain
        return best

    def _turns(self, number: int, count: int) -> int:
        """How often a drafter guesses for so many tokens."""
        return -(-count // self._drafters[number].at_once)

    def _passes(self) -> list[float]:
        """How many passes of one token one takes that proposes so many, of `COUNTS`: as measured, where it was more
        than once, else reckoned from what further tokens took in all."""
        single = self._seconds[0].median(self._now)
        recent = {count: [took / single for took in self._seconds[count].recent(self._now)] for count in COUNTS[1:]}
        # A guess counts twice, which keeps one bad measurement from counting.
        further = ((took - 1) / count for count, passes in recent.items() for took in passes)
        each = max(0.0, median([_DEARER, _DEARER, *further]))
        return [1.0, *(median([1 + each * count] * 2 + recent[count]) for count in COUNTS[1:])]


def _last(run: array[int], known: array[int]) -> int | None:
    """Where a run of tokens begins that occurs in others, the last time."""
    text, sought, size = known.tobytes(), run.tobytes(), run.itemsize
    found = text.rfind(sought)
    while found > 0 and found % size:  # between two tokens' bytes
        found = text.rfind(sought, 0, found + len(sought) - 1)
    return found // size if found >= 0 else None

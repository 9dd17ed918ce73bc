"""Several sessions at once: what they feed at the same time goes through the layers in one pass.

A weight that was read and made float32 serves every token of a pass, so that sixteen sessions together take a few
times as long as one alone, and experts that are on disk are read once for all.

    passes = Passes(model.decoder)
    with passes.member():  # on a thread of its own
        for piece in model.session(passes=passes).generate("Hello"): ...
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from numoe.engine.layers.cache import Cache
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.rows import RowForm
from numoe.engine.layers.state import CHUNK
from numoe.engine.speculation import Drafter, Pass
from numoe.quant.compute.memory import share_free_memory

PROMPT_SHARE = CHUNK // 2
"""Tokens of prompts in a pass, at most, that others wait for to go on with their answers."""


@dataclass(eq=False)
class _Part:
    """What a session feeds: tokens that are still to be read, and what it gets for those that were."""

    ids: Ids
    cache: Cache
    last: bool
    logits: list[Floats]
    turn: threading.Condition
    """Told when the thread is to go on, for its part is over, or is to make the next pass."""
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or not self.ids.size


class Passes:
    """A decoder for the sessions of several threads, which it lets go on together.

    A pass begins when every member waits for one. So what it is made of does not depend on the threads' speed, and no
    member gets ahead of another by more than the prompt that one of them reads. Between passes they go on one after
    the other: all at once they would take Python's lock from each other with every array.
    """

    def __init__(self, decoder: Decoder, rest: Callable[[], None] = lambda: None):
        """rest: called whenever a pass begins, and when a member leaves: nobody goes on with an answer for a while."""
        share_free_memory()  # for passes are made by whichever thread comes last
        self._decoder = decoder
        self._rest = rest
        self._change = threading.Lock()
        self.members = 0
        self._waiting: list[_Part] = []
        self._over: deque[_Part] = deque()  # whose threads have not gone on yet
        self._passing = False

    def cache(self, context: int, form: RowForm | None = None) -> Cache:
        """As `Decoder.cache`."""
        return self._decoder.cache(context, form)

    @contextmanager
    def member(self) -> Iterator[None]:
        """To be entered by a thread before it feeds, and left when it feeds no more: until then others wait for it."""
        with self._change:
            self.members += 1
        try:
            yield
        finally:
            with self._change:
                self.members -= 1
                self._next()
            self._rest()

    def forward(self, ids: Ids, cache: Cache, *, last: bool = False) -> Floats:
        """As `Decoder.forward`, in passes with what other members feed; only inside of `member`.

        Raises what the pass raises, which nobody's cache takes part in then.
        """
        with self._change:
            part = _Part(ids, cache, last, [], threading.Condition(self._change))
            self._waiting.append(part)
            try:
                while not part.over:
                    if self._ready:
                        self._pass(part)
                    else:
                        self._next()
                        part.turn.wait()
            except BaseException:
                for parts in (self._waiting, self._over):
                    if part in parts:
                        parts.remove(part)
                self._next()
                raise
        if part.error is not None:
            raise part.error
        return part.logits[0] if len(part.logits) == 1 else np.concatenate(part.logits)

    @property
    def _ready(self) -> bool:
        return len(self._waiting) == self.members and not self._passing

    def _next(self) -> None:
        """Have the next one go on: one whose part is over, or where nobody is missing, one that makes a pass."""
        if self._over:
            self._over.popleft().turn.notify()
        elif self._waiting and self._ready:
            self._waiting[0].turn.notify()

    def _pass(self, own: _Part) -> None:
        """Read some tokens of every part, of which the thread's own is one; the lock is held, but not meanwhile."""
        parts = self._waiting[:CHUNK]
        taken = counts([part.ids.size for part in parts])
        self._passing = True
        self._change.release()
        try:
            self._rest()
            logits = self._decoder.forward_all(
                [(part.ids[:count], part.cache) for part, count in zip(parts, taken, strict=True)],
                ["last" if part.last else "all" for part in parts],
            )
            error = None
        except BaseException as raised:
            error = raised
        finally:
            self._change.acquire()
            self._passing = False
        done = 0
        for part, count in zip(parts, taken, strict=True):
            if error is None:
                given = 1 if part.last else count
                if part.last:
                    part.logits.clear()
                part.logits.append(logits[done : done + given])
                done += given
                part.ids = part.ids[count:]
            part.error = error
            if part.over and part is not own:
                self._over.append(part)
        self._waiting = [part for part in self._waiting if not part.over]


class Alone:
    """The guesses of a drafter, for sessions while each is the only member: beside others, a pass has enough to do."""

    def __init__(self, drafter: Drafter, passes: Passes):
        self._drafter, self._passes = drafter, passes
        self._asked = False

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        self._asked = self._passes.members == 1
        return self._drafter.propose(tokens, most) if self._asked else ()

    def told(self, one: Pass) -> None:
        """What came of a pass, which tells nothing of one alone where others were in it."""
        told = getattr(self._drafter, "told", None)
        if told and self._asked and self._passes.members == 1:
            told(one)


def counts(sizes: Sequence[int]) -> list[int]:
    """How many tokens of each part are read in the next pass: one at least, and of long ones equal shares of the room.

    Where others wait to go on with their answers, prompts get half of a pass.
    """
    room = (CHUNK if min(sizes) > 1 else max(PROMPT_SHARE, len(sizes))) - len(sizes)
    taken = [1] * len(sizes)
    for before, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        more = min(sizes[index] - 1, room // (len(sizes) - before))
        room -= more
        taken[index] += more
    return taken

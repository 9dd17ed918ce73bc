"""The sessions of a model that is served: who gets which, so that as little as possible is read twice."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from numoe.cli.serve.shelf import Shelf
from numoe.engine.batch import Alone, Passes
from numoe.engine.layers.state import CHUNK
from numoe.engine.prompt_cache import known
from numoe.engine.session import shared_length
from numoe.quant.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from numoe.engine import Model, Session
    from numoe.engine.session import Snapshot

_KEPT_POINTS = 4  # snapshots, latest first: ends of prompts and some before, which caches with windows can go back to
_MARKED = (0, 1, 4)  # chunks before the end of a prompt where they are: another one may have the same instructions
_WORTH_SHARING = 8  # tokens; fewer are read beside the rest of a prompt at no cost
_PATIENCE = 0.1  # seconds after which who waits for a place looks whether it still has to


class Left(Exception):
    """Whoever asked is gone."""


class Place:
    """A session, and what it was asked last."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.points: deque[Snapshot] = deque(maxlen=_KEPT_POINTS)
        self.prompt = 0
        """Tokens of the last prompt: who begins with them goes on with the conversation."""
        self.used = 0

    def align(self, ids: Sequence[int]) -> list[int]:
        """Go back to where a prompt is gone on with, and return what is to be read of it."""
        unread = self.session.align(ids, self.points)
        position = self.session.position
        kept = [point for point in self.points if len(point.tokens) <= position]
        self.points = deque(kept, _KEPT_POINTS)
        self.prompt = len(ids)
        return unread

    def read(self, done: int, total: int) -> None:
        """So many tokens of a prompt have been read: remember some points that another prompt may go on from."""
        if -(-(total - done) // CHUNK) in _MARKED:
            self.points.appendleft(self.session.snapshot())


class Places:
    """The sessions of a model, which read together what is asked at the same time."""

    def __init__(
        self,
        model: Model,
        context: int | None,
        most: int,
        keeps: bool,
        prompt_cache: Path | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            context: tokens of each. most: as many of them; fewer where memory ends before.
            keeps: conversations that have no session any more are kept on the disk.
            prompt_cache: a file that conversations can begin with.
            rest: as in `Passes`.

        Raises:
            InputError: there is no memory for one, or the file is none that sessions of this model can begin with.
        """
        self.passes = Passes(model.decoder, rest)
        self.drafter = Alone(model.drafter, self.passes) if model.drafter else None
        self._model, self.context, self._most = model, context, most
        begun = {prompt_cache: known(prompt_cache, model, model.plan(context))} if prompt_cache else {}
        self._shelf = Shelf(model, keeps, begun)
        self._change = threading.Condition()
        self._clock = 0
        self._all = [Place(model.session(context, passes=self.passes))]
        self._idle = list(self._all)

    @contextmanager
    def taken(self, ids: Sequence[int], left: Callable[[], bool]) -> Iterator[Place]:
        """A session for a prompt: that of the conversation that it goes on with, or what has stood idle longest.

        left: asked while there is none; True ends the waiting.

        Raises:
            Left: see `left`.
        """
        with self._change:
            while (found := self._found(ids)) is None:
                if left():
                    raise Left
                self._change.wait(_PATIENCE)
            place, source = found
        try:
            if source is not place:
                try:
                    self._begin(place, source, ids)
                finally:
                    if source is not None:
                        self._give_back(source)
            yield place
        finally:
            with self._change:
                self._clock += 1
                place.used = self._clock
                self._give_back(place)

    def _give_back(self, place: Place) -> None:
        with self._change:
            self._idle.append(place)
            self._change.notify_all()

    def _found(self, ids: Sequence[int]) -> tuple[Place, Place | None] | None:
        """The place to take, and the one that has read most of the prompt, which may be it; both are idle no more."""
        shared = {place: shared_length(place.session.tokens, ids) for place in self._idle}
        best = max(self._idle, key=lambda place: (shared[place], place.used), default=None)
        goes_on = best is not None and 0 < min(best.prompt, len(ids) - 1) <= shared[best]
        if best is not None and goes_on:
            self._idle.remove(best)
            return best, best
        fresh = next((place for place in self._idle if not place.session.position), None) or self._fresh()
        fresh = fresh or min(self._idle, key=lambda place: place.used, default=None)
        if fresh is None:
            return None
        if fresh in self._idle:
            self._idle.remove(fresh)
        source = best if best is not None and best is not fresh and shared[best] >= _WORTH_SHARING else None
        if source is not None:
            self._idle.remove(source)
        return fresh, source

    def _fresh(self) -> Place | None:
        """One more place, as far as memory goes."""
        if len(self._all) == self._most:
            return None
        try:
            place = Place(self._model.session(self.context, passes=self.passes))
        except DoesNotFit:
            self._most = len(self._all)
            return None
        self._all.append(place)
        return place

    def _begin(self, place: Place, source: Place | None, ids: Sequence[int]) -> None:
        """Begin another conversation in a place, with what is known of it elsewhere."""
        session = place.session
        shared = shared_length(source.session.tokens, ids) if source else shared_length(session.tokens, ids)
        kept = self._shelf.find(ids, shared)
        if session.position:
            self._shelf.keep(session)
        if kept is not None:
            place.points.clear()
            try:
                session.resume(kept)
                return
            except InputError:
                self._shelf.forget(kept)
        if source is not None:
            with self.passes.member():
                session.fork(source.session)
            place.points = deque(source.points, _KEPT_POINTS)

    def close(self) -> None:
        """Give all sessions up, their conversations kept; nobody has one any more."""
        for place in sorted(self._all, key=lambda place: place.used):
            self._shelf.keep(place.session)
            place.session.close()

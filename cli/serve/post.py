"""What answers tell, from their threads to the event loop, which is woken for all that they tell in a while."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from numoe.cli.serve.fields import Refused
from numoe.cli.serve.question import Begun, Made, Piece

Told = Begun | Piece | Made | Refused

EVERY = 0.04
"""Seconds between two deliveries of what can wait: who reads sees no difference, and sending holds Python's lock, which
passes need."""


class Post:
    """Takes it there, whenever it is sent: an answer's beginning, first piece and end at once, the rest in a while."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: deque[tuple[Callable[[int, Told], None], int, Told]] = deque()
        self._at_once = False
        self._next: asyncio.TimerHandle | None = None  # delivers what is told until then

    def teller(self, put: Callable[[int, Told], None], number: int) -> Callable[[Told], None]:
        """What has put(number, what is told) called on the loop that runs here, once that is sent."""
        self._loop = asyncio.get_running_loop()
        first = True

        def tell(one: Told) -> None:
            nonlocal first
            self._told.append((put, number, one))
            if isinstance(one, Piece):
                self._at_once, first = self._at_once or first, False
            else:
                self._at_once = True

        return tell

    def send(self) -> None:
        """On any thread: send what was told."""
        if self._told and self._loop is not None and (self._at_once or self._next is None):
            self._at_once = False
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._told:
            put, number, one = self._told.popleft()
            put(number, one)
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(EVERY, self._again)

    def _again(self) -> None:
        self._next = None  # before it is looked whether there is something: whoever tells it now sends it
        if self._told:
            self._deliver()


class Inbox:
    """Where it arrives, of the answers to one request: in order, with their numbers."""

    def __init__(self) -> None:
        self._told: list[tuple[int, Told]] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, number: int, one: Told) -> None:
        self._told.append((number, one))
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def again(self, ones: Sequence[tuple[int, Told]]) -> None:
        """What was taken too early comes before all else."""
        self._told[:0] = ones

    async def take(self, seconds: float | None = None) -> list[tuple[int, Told]]:
        """All that there is, once there is some; nothing where there is none for so many seconds."""
        if not self._told:
            loop = asyncio.get_running_loop()
            self._waiting = loop.create_future()
            timer = None if seconds is None else loop.call_later(seconds, self._wake)
            try:
                await self._waiting
            finally:
                if timer is not None:
                    timer.cancel()
        told, self._told = self._told, []
        return told

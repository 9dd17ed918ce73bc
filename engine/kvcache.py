"""What layers keep of the tokens read so far.

Every kind of cache (full, sliding, latent, compressed) is a set of streams of rows: a stream keeps all of its rows
or only the latest, and has a row a token or a row every so many tokens. So one class of rows serves them all, and
rewinding, snapshots and files are written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from numoe.engine.ops import Floats
from numoe.engine.spec import Attention, Stream
from numoe.quant.memory import unshared

CHUNK = 512
"""Most tokens that go through the layers at once."""
SLACK = 64
"""Tokens that a stream of the latest rows can be rewound by."""


def capacity(stream: Stream, context: int) -> int:
    """Rows of memory that a stream takes for a context of so many tokens."""
    every = -(-context // stream.stride)
    return every if stream.keep is None else min(every, stream.keep + SLACK + CHUNK)


def nbytes(attention: Attention, context: int) -> int:
    """Bytes that one layer's cache takes; allocated at once when a session starts."""
    return sum(4 * s.groups * s.width * capacity(s, context) for s in attention.streams().values())


class Rows:
    """One stream's rows, (groups, rows, width) float32, contiguous in memory and addressed by their absolute index.

    A stream of the latest rows moves them to the front of its memory when it is full, so that a view is always a
    plain slice.
    """

    def __init__(self, stream: Stream, context: int):
        self.stream = stream
        shape = stream.groups, capacity(stream, context), stream.width
        self.data: Floats = unshared(4 * math.prod(shape)).view(np.float32).reshape(shape)
        self.first = 0
        """Absolute index of data[:, 0]."""
        self.end = 0
        """Absolute index after the last row."""

    def append(self, rows: Floats) -> None:
        """Add rows (groups, n, width), n at most CHUNK."""
        n = rows.shape[1]
        if self.end - self.first + n > self.data.shape[1]:
            assert self.stream.keep is not None, "a session never feeds past its context"
            kept = min(self.end - self.first, self.stream.keep + SLACK)
            self.data[:, :kept] = self.view(self.end - kept).copy()
            self.first = self.end - kept
        at = self.end - self.first
        self.data[:, at : at + n] = rows
        self.end += n

    def view(self, start: int, stop: int | None = None) -> Floats:
        """Rows start..stop (default: to the last) without copying, (groups, n, width)."""
        stop = self.end if stop is None else stop
        return self.data[:, start - self.first : stop - self.first]

    def can_end_at(self, end: int) -> bool:
        """Whether all rows that a token after row `end` may need are still here."""
        return end <= self.end and (self.stream.keep is None or self.first <= max(0, end - self.stream.keep))


@dataclass(frozen=True)
class Snapshot:
    """A cache's state at `position`: the rows that later tokens push out; the others stay where they are."""

    position: int
    rows: tuple[tuple[int, Floats] | None, ...]


class Cache:
    """All layers' streams, at one position. A failed or interrupted pass leaves the position where it was."""

    def __init__(self, attentions: Sequence[Attention], context: int):
        self.context = context
        self.position = 0
        self.layers = [{n: Rows(s, context) for n, s in a.streams().items()} for a in attentions]

    def streams(self) -> Iterable[Rows]:
        for layer in self.layers:
            yield from layer.values()

    @property
    def nbytes(self) -> int:
        return sum(rows.data.nbytes for rows in self.streams())

    def can_rewind(self, position: int) -> bool:
        """Whether every stream can go back to `position`."""
        return position <= self.position and all(r.can_end_at(position // r.stream.stride) for r in self.streams())

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on; only where `can_rewind` says so."""
        for rows in self.streams():
            rows.end = position // rows.stream.stride
        self.position = position

    def clear(self) -> None:
        """Forget everything."""
        for rows in self.streams():
            rows.first = rows.end = 0
        self.position = 0

    def snapshot(self) -> Snapshot:
        """Copies only the streams of latest rows; valid while the kept rows below its position are not rewritten."""

        def latest(rows: Rows) -> tuple[int, Floats] | None:
            if rows.stream.keep is None:
                return None
            # With the slack, so that one can go back a little from here too.
            first = max(rows.first, rows.end - rows.stream.keep - SLACK)
            return first, rows.view(first).copy()

        return Snapshot(self.position, tuple(map(latest, self.streams())))

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot's state."""
        for rows, saved in zip(self.streams(), snapshot.rows, strict=True):
            if saved is not None:
                rows.first, data = saved
                rows.data[:, : data.shape[1]] = data
            rows.end = snapshot.position // rows.stream.stride
        self.position = snapshot.position

    def arrays(self) -> dict[str, Floats]:
        """Every stream's needed rows by name, to be written to a file."""
        return {
            f"{i}.{name}": rows.view(
                rows.first if rows.stream.keep is None else max(rows.first, rows.end - rows.stream.keep)
            )
            for i, layer in enumerate(self.layers)
            for name, rows in layer.items()
        }

    def prepare(self, position: int) -> dict[str, Floats]:
        """What `arrays` gives at `position`, to be filled in: whatever was here is forgotten."""
        for rows in self.streams():
            rows.end = position // rows.stream.stride
            rows.first = 0 if rows.stream.keep is None else max(0, rows.end - rows.stream.keep)
        self.position = position
        return self.arrays()

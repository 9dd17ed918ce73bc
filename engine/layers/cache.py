"""All that is kept of one sequence, and the memory that sequences of one kind have side by side.

The position of a sequence, and which of its two buffers a recurrent state is in, are one value that a pass replaces
when all is computed (`Cache.step`). What a pass writes before lies behind the position, or in the other buffer: one
that is interrupted has changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers.rows import FLOAT32, Planes, RowForm
from numoe.engine.layers.state import SLACK, Passed, Place, State, StateSpec
from numoe.quant.compute.memory import ALIGNMENT, HUGE, Pieces
from numoe.quant.dtypes import UInt8

Specs = Sequence[Mapping[str, StateSpec]]
"""The states of each block by name."""

POOLED = 64
"""Sequences whose memory lies side by side."""
_MOST_RESERVED = 1 << 38
"""Bytes of addresses that a pool takes at most: memory is taken as it is written to."""


class _Placed(NamedTuple):
    """An array that lies so many bytes into a piece of memory, row-major."""

    offset: int
    dtype: type
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pool:
    """Memory for caches of one shape, evenly spaced, see `KeptTogether`."""

    def __init__(self, specs: Specs, context: int, form: RowForm, most: int = POOLED):
        """most: caches that there is room for, if their addresses are few enough."""
        self._placed: dict[tuple[int, str], list[_Placed]] = {}
        end, largest = 0, 0
        for number, block in enumerate(specs):
            for name, one in block.items():
                placed = self._placed[number, name] = []
                for dtype, shape in one.planes(context, form).values():
                    sizes = np.dtype(dtype).itemsize * np.cumprod((1, *shape[::-1]))
                    placed.append(_Placed(end, dtype, shape, tuple(sizes[-2::-1].tolist())))
                    nbytes = int(sizes[-1])
                    end += -(-nbytes // ALIGNMENT) * ALIGNMENT
                    largest = max(largest, nbytes)
        count = max(1, min(most, _MOST_RESERVED // max(1, end)))
        self._pieces = Pieces(end, count, huge=largest >= HUGE)

    def take(self) -> Slot | None:
        """Memory for one more cache, all zero; None: there is no more."""
        taken = self._pieces.take()
        return Slot(self, *taken) if taken else None

    def planes(self, block: int, name: str, memory: UInt8) -> Planes:
        """The arrays of a state in the memory of a cache."""
        return tuple(np.ndarray(p.shape, p.dtype, memory, p.offset) for p in self._placed[block, name])

    def across(self, first: int, stop: int, block: int, name: str) -> Planes:
        """Those of the caches first..stop in one, (stop - first, ...) each."""
        pieces = self._pieces
        return tuple(pieces.across(first, stop, *placed) for placed in self._placed[block, name])


class Slot(NamedTuple):
    """The memory of one cache, which is the pool's again when nothing refers to it."""

    pool: Pool
    number: int
    memory: UInt8

    def planes(self, block: int, name: str) -> Planes:
        """The arrays of a state."""
        return self.pool.planes(block, name, self.memory)


@dataclass(frozen=True)
class Snapshot:
    """A cache's state at `position`: what later tokens push out; the other rows stay where they are."""

    position: int
    passed: tuple[Passed, ...]


class Cache:
    """All states of one sequence, at one position; `blocks` has those of each block by name."""

    def __init__(self, specs: Specs, context: int, form: RowForm = FLOAT32, slot: Slot | None = None):
        """form: that of rows. slot: memory in a pool of caches like this one; None: its own."""
        self.context = context
        self.form = form
        slot = slot or Pool(specs, context, form, 1).take()
        assert slot is not None
        self.slot = slot
        self._place = Place()
        self.blocks = [
            {name: one.make(context, form, self._place, slot.planes(number, name)) for name, one in block.items()}
            for number, block in enumerate(specs)
        ]
        self._sets_point = any(one.only_now for block in specs for one in block.values())
        self._point: Snapshot | None = None
        self.prompted = False
        """Whether the last pass was of a prompt, which several tokens are; whoever reads others says so."""

    def _states(self) -> Iterator[State]:
        for block in self.blocks:
            yield from block.values()

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._place.at[0]

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._states())

    @contextmanager
    def step(self, count: int) -> Iterator[None]:
        """A pass over `count` more tokens: they count when it has ended, and not when it raises."""
        if count == 1:
            self.end_prompt()
        if self.position == 0:  # where one is, too, that was interrupted while it forgot or went back
            self._forget()
        self._place.before = None
        try:
            yield
        except BaseException:
            for state in self._states():
                state.clean(self.position, count)
            raise
        self.prompted = count > 1
        position, buffer = self._place.at
        self._place.at = position + count, 1 - buffer
        self._place.before = position

    def end_prompt(self) -> None:
        """Remember where a prompt ends, if one was read last: the next one goes on from there in another way."""
        if self._sets_point and self.prompted:
            self._point = self.snapshot()
        self.prompted = False

    def _reaches(self, position: int) -> bool:
        return position <= self.position and all(state.reaches(position) for state in self._states())

    def reach(self, position: int) -> int:
        """The latest position up to `position` that `rewind` can go to; 0 is always one."""
        if self._reaches(position):
            return position
        before = self._place.before
        if before is not None and before <= position and self._reaches(before):
            return before
        return self._point.position if self._point and self._point.position <= position else 0

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on; only where `reach` says so."""
        if position == 0:
            self.clear()
        elif self._reaches(position):
            now, buffer = self._place.at
            if position != now:  # of recurrent states, then, the other buffer has it
                self._place.before = None
                self._place.at = position, 1 - buffer
        else:
            assert self._point and self._point.position == position
            self.restore(self._point)

    def clear(self) -> None:
        """Forget everything."""
        self._place.at, self._place.before = (0, 0), None
        self._point = None
        self.prompted = False
        self._forget()

    def _forget(self) -> None:
        for state in self._states():
            state.forget()

    def snapshot(self) -> Snapshot:
        """Copies only what later tokens push out; valid while the kept rows below its position are not rewritten."""
        return Snapshot(self.position, tuple(state.passing(self.position) for state in self._states()))

    def restore(self, snapshot: Snapshot) -> None:
        """Back to a snapshot's state."""
        self._place.at, self._place.before = (0, 0), None  # while some states are back and some are not
        for state, passed in zip(self._states(), snapshot.passed, strict=True):
            state.put_back(passed)
        self._place.at = snapshot.position, 0
        if self._point and self._point.position > snapshot.position:
            self._point = None  # what follows is read anew, below it

    @property
    def back(self) -> int:
        """How many tokens, up to the slack, it can go back by wherever it is."""
        return next(back for back in range(min(SLACK, self.position), -1, -1) if self._reaches(self.position - back))

    def arrays(self, back: int = 0) -> dict[str, NDArray[Any]]:
        """Of every state by name what a next token may need, and one so many tokens back, to be written to a file."""
        return {
            f"{i}.{name}{suffix}": values
            for i, block in enumerate(self.blocks)
            for name, state in block.items()
            for suffix, values in state.needed(self.position, back).items()
        }

    def prepare(self, position: int, back: int = 0) -> dict[str, NDArray[Any]]:
        """What `arrays` gives at `position`, to be filled in: whatever was here is forgotten."""
        self.clear()
        for state in self._states():
            state.prepare(position, back)
        self._place.at = position, 0
        return self.arrays(back)

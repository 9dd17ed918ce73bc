"""What layers keep of the tokens read so far.

A kind declares its states by name. Rows are for attention of every kind (full, sliding, latent, compressed): a row a
token, or a row every so many tokens, of which all are kept or only the latest. A recurrent state is one array that
every token changes.

The position of a sequence, and which of its two buffers a recurrent state is in, are one value that a pass replaces
when all is computed (`Cache.step`). What a pass writes before lies behind the position, or in the other buffer: one
that is interrupted has changed nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers.ops import Floats
from numoe.engine.layers.rows import FLOAT32, Planes, RowForm, RowShape, Stretch
from numoe.quant.compute.memory import unshared

CHUNK = 512
"""Most tokens that go through the layers at once."""
SLACK = 64
"""Tokens that rows of which only the latest are kept can go back by."""


@dataclass
class _Place:
    """Where a sequence stands: tokens read, and the buffer that recurrent states are in, replaced as one."""

    at: tuple[int, int] = (0, 0)
    before: int | None = None
    """The position that the other buffer has the state of, where the last pass began; None: it has none."""


Passed = tuple[int, Planes] | None
"""What later tokens push out: from which index on, and the arrays."""


class State(Protocol):
    """The memory of one state of one sequence."""

    @property
    def nbytes(self) -> int: ...

    def reaches(self, position: int) -> bool:
        """Whether all that a token at `position` needs is still here, though later tokens were read."""
        ...

    def forget(self) -> None:
        """What is there of earlier tokens is of no sequence any more."""
        ...

    def passing(self, position: int) -> Passed:
        """A copy of what later tokens push out, for `put_back`; None where nothing is pushed out."""
        ...

    def put_back(self, passed: Passed) -> None: ...

    def needed(self, position: int, back: int) -> Mapping[str, NDArray[Any]]:
        """What a token at `position` may need, and one so many tokens back, to be written to a file: arrays by what
        their names end with."""
        ...

    def prepare(self, position: int, back: int) -> None:
        """Whatever was here is forgotten, and what `needed` gives is to be filled in."""
        ...


class StateSpec(Protocol):
    """What a kind declares of a state."""

    @property
    def only_now(self) -> bool:
        """Whether it can be had at the current position alone."""
        ...

    def nbytes(self, context: int, form: RowForm = FLOAT32) -> int:
        """Bytes for a context of so many tokens; allocated at once when a session starts. form: that of rows."""
        ...

    def make(self, context: int, form: RowForm, place: _Place) -> State: ...


# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows(RowShape):
    """One row every `stride` tokens."""

    keep: int | None = None
    """How many of the latest rows a later token can need; None: all of them."""
    stride: int = 1
    exact: bool = False
    """Always float32: they are to be computed with further."""

    @property
    def only_now(self) -> bool:
        return False

    def capacity(self, context: int) -> int:
        """Rows of memory for a context of so many tokens."""
        every = -(-context // self.stride)
        return every if self.keep is None else min(every, self.keep + SLACK + CHUNK)

    def held(self, form: RowForm) -> RowForm:
        """The form that they have where others have this one."""
        return FLOAT32 if self.exact else form

    def nbytes(self, context: int, form: RowForm = FLOAT32) -> int:
        return self.held(form).nbytes(self, self.capacity(context))

    def make(self, context: int, form: RowForm, place: _Place) -> KeptRows:
        return KeptRows(self, context, self.held(form))


class KeptRows:
    """(groups, rows, width) in some form, contiguous in memory and addressed by their absolute index.

    Where only the latest are kept they move to the front of the memory when it is full, so that a view is always a
    plain slice.
    """

    def __init__(self, spec: Rows, context: int, form: RowForm = FLOAT32):
        self.spec = spec
        self.form = form
        self._capacity = spec.capacity(context)
        planes = form.planes(spec, self._capacity)
        self._suffixes = tuple(planes)
        self._planes: Planes = tuple(
            unshared(np.dtype(dtype).itemsize * math.prod(shape)).view(dtype).reshape(shape)
            for dtype, shape in planes.values()
        )
        self._first = 0
        """Absolute index of the first row of each plane."""

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self._planes)

    def write(self, rows: Floats, start: int) -> None:
        """Put rows (groups, n, width), n at most CHUNK, at index `start`; those from there on are of no sequence."""
        n = rows.shape[1]
        if start - self._first + n > self._capacity:
            assert self.spec.keep is not None, "a session never feeds past its context"
            kept = min(start - self._first, self.spec.keep + SLACK)
            self._put(0, self._copy(start - kept, start))
            self._first = start - kept
        self._put(start - self._first, self.form.encode(rows, self.spec))

    def _put(self, at: int, parts: Planes) -> None:
        stop = at + parts[0].shape[1]
        for plane, part in zip(self._planes, parts, strict=True):
            plane[:, at:stop] = part

    def _views(self, start: int, stop: int) -> Planes:
        return tuple(plane[:, start - self._first : stop - self._first] for plane in self._planes)

    def _copy(self, start: int, stop: int) -> Planes:
        return tuple(view.copy() for view in self._views(start, stop))

    def view(self, start: int, stop: int) -> Stretch:
        """Rows start..stop without copying."""
        return Stretch(self.form, self._views(start, stop), self.spec)

    def floats(self, start: int, stop: int) -> Floats:
        """The same as float32 (groups, n, width), without copying where they are."""
        if self.form.is_float32:  # of many sequences, whose calls are short: no more than is needed
            rows: Floats = self._planes[0][:, start - self._first : stop - self._first]
            return rows
        return self.view(start, stop).floats()

    def reaches(self, position: int) -> bool:
        return self._first <= self._needs(position)

    def forget(self) -> None:
        self._first = 0

    def passing(self, position: int) -> Passed:
        if self.spec.keep is None:
            return None
        end = position // self.spec.stride
        # With the slack, so that one can go back a little from here too.
        first = max(self._first, end - self.spec.keep - SLACK)
        return first, self._copy(first, end)

    def put_back(self, passed: Passed) -> None:
        if passed is not None:
            self._first, rows = passed
            self._put(0, rows)

    def needed(self, position: int, back: int) -> Mapping[str, NDArray[Any]]:
        views = self._views(self._needs(position - back), position // self.spec.stride)
        return dict(zip(self._suffixes, views, strict=True))

    def prepare(self, position: int, back: int) -> None:
        self._first = self._needs(position - back)

    def _needs(self, position: int) -> int:
        """The first row that a token at `position` may need."""
        return 0 if self.spec.keep is None else max(0, position // self.spec.stride - self.spec.keep)


# ----------------------------------------------------------------------------------------- recurrent


@dataclass(frozen=True)
class Recurrent:
    """One float32 array of this shape, zero before the first token, that every token changes."""

    shape: tuple[int, ...]

    @property
    def only_now(self) -> bool:
        return True

    def nbytes(self, context: int, form: RowForm = FLOAT32) -> int:
        return 2 * 4 * math.prod(self.shape)

    def make(self, context: int, form: RowForm, place: _Place) -> RecurrentState:
        return RecurrentState(self, place)


class RecurrentState:
    """Two buffers: what is, and what a pass makes of it, which counts when the pass has ended."""

    def __init__(self, spec: Recurrent, place: _Place):
        self.spec = spec
        self._place = place
        size = math.prod(spec.shape)
        self._buffers: Floats = unshared(2 * 4 * size).view(np.float32).reshape(2, *spec.shape)
        self.forget()

    @property
    def nbytes(self) -> int:
        return self._buffers.nbytes

    @property
    def now(self) -> Floats:
        """The state before the pass; not to be written to."""
        values: Floats = self._buffers[self._place.at[1]]
        return values

    @property
    def following(self) -> Floats:
        """Where the pass writes the state after it."""
        values: Floats = self._buffers[1 - self._place.at[1]]
        return values

    def reaches(self, position: int) -> bool:
        return position in (self._place.at[0], self._place.before)

    def forget(self) -> None:
        self._buffers[:] = 0

    def passing(self, position: int) -> Passed:
        return position, (self.now.copy(),)

    def put_back(self, passed: Passed) -> None:
        assert passed is not None
        self._buffers[:] = passed[1][0]

    def needed(self, position: int, back: int) -> Mapping[str, NDArray[Any]]:
        return {"": self.now}

    def prepare(self, position: int, back: int) -> None:
        self.forget()


# --------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class Snapshot:
    """A cache's state at `position`: what later tokens push out; the other rows stay where they are."""

    position: int
    passed: tuple[Passed, ...]


class Cache:
    """All states of one sequence, at one position; `blocks` has those of each block by name."""

    def __init__(self, specs: Sequence[Mapping[str, StateSpec]], context: int, form: RowForm = FLOAT32):
        """form: that of rows."""
        self.context = context
        self.form = form
        self._place = _Place()
        self.blocks = [{name: one.make(context, form, self._place) for name, one in block.items()} for block in specs]
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
        yield
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

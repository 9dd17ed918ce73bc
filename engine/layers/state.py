"""What layers keep of the tokens read so far.

A kind declares its states by name. Rows are for attention of every kind (full, sliding, latent, compressed): a row a
token, or a row every so many tokens, of which all are kept or only the latest. A recurrent state is one array that
every token changes, in the one of two buffers that the sequence's place says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.rows import FLOAT32, Planes, PlaneShape, RowForm, RowShape, Stretch

CHUNK = 512
"""Most tokens that go through the layers at once."""
SLACK = 64
"""Tokens that rows of which only the latest are kept can go back by."""
_SPREAD = 2
"""Rows of several sequences are copied to lie at one place of the memory of each where more than so many times as many
would be multiplied."""


@dataclass
class Place:
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

    def clean(self, position: int, count: int) -> None:
        """A pass over so many tokens from `position` on has failed: what it left holds nothing but numbers."""
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

    def planes(self, context: int, form: RowForm) -> Mapping[str, PlaneShape]:
        """The arrays that it is held in, by what their names end with."""
        ...

    def make(self, context: int, form: RowForm, place: Place, planes: Planes) -> State:
        """It, in these arrays, which are all zero."""
        ...


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

    def planes(self, context: int, form: RowForm) -> Mapping[str, PlaneShape]:
        return self.held(form).planes(self, self.capacity(context))

    def make(self, context: int, form: RowForm, place: Place, planes: Planes) -> KeptRows:
        return KeptRows(self, context, self.held(form), planes)


class KeptRows:
    """(groups, rows, width) in some form, contiguous in memory and addressed by their absolute index.

    Where only the latest are kept they move to the front of the memory when it is full, so that a view is always a
    plain slice.
    """

    def __init__(self, spec: Rows, context: int, form: RowForm, planes: Planes):
        self.spec = spec
        self.form = form
        self.capacity = spec.capacity(context)
        self._suffixes = tuple(form.planes(spec, self.capacity))
        self._planes = planes
        self.first = 0
        """Absolute index of the first row of each plane."""

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self._planes)

    def write(self, rows: Floats, start: int) -> None:
        """Put rows (groups, n, width), n at most CHUNK, at index `start`; those from there on are of no sequence."""
        self.make_room(start, rows.shape[1])
        self._put(start - self.first, self.form.encode(rows, self.spec))

    def make_room(self, start: int, count: int) -> None:
        """Have the memory hold so many rows from index `start` on, and the latest before."""
        if start - self.first + count > self.capacity:
            assert self.spec.keep is not None, "a session never feeds past its context"
            kept = min(start - self.first, self.spec.keep + SLACK)
            self._put(0, self._copy(start - kept, start))
            self.first = start - kept

    def _put(self, at: int, parts: Planes) -> None:
        stop = at + parts[0].shape[1]
        for plane, part in zip(self._planes, parts, strict=True):
            plane[:, at:stop] = part

    def _views(self, start: int, stop: int) -> Planes:
        return tuple([plane[:, start - self.first : stop - self.first] for plane in self._planes])

    def _copy(self, start: int, stop: int) -> Planes:
        return tuple(view.copy() for view in self._views(start, stop))

    def view(self, start: int, stop: int) -> Stretch:
        """Rows start..stop without copying."""
        return Stretch(self.form, self._views(start, stop), self.spec)

    def reaches(self, position: int) -> bool:
        return self.first <= self._needs(position)

    def forget(self) -> None:
        self.first = 0

    def clean(self, position: int, count: int) -> None:
        """Of rows that lie beside those of other sequences, NumPy multiplies more than are looked at, and zero times
        what is no number is none."""
        start, stop = position // self.spec.stride, -(-(position + count) // self.spec.stride)
        for plane in self._planes:
            plane[:, max(0, start - self.first) : max(0, stop - self.first)] = 0

    def passing(self, position: int) -> Passed:
        if self.spec.keep is None:
            return None
        end = position // self.spec.stride
        # With the slack, so that one can go back a little from here too.
        first = max(self.first, end - self.spec.keep - SLACK)
        return first, self._copy(first, end)

    def put_back(self, passed: Passed) -> None:
        if passed is not None:
            self.first, rows = passed
            self._put(0, rows)

    def needed(self, position: int, back: int) -> Mapping[str, NDArray[Any]]:
        views = self._views(self._needs(position - back), position // self.spec.stride)
        return dict(zip(self._suffixes, views, strict=True))

    def prepare(self, position: int, back: int) -> None:
        self.first = self._needs(position - back)

    def _needs(self, position: int) -> int:
        """The first row that a token at `position` may need."""
        return 0 if self.spec.keep is None else max(0, position // self.spec.stride - self.spec.keep)


class Span:
    """Rows starts..stops (B,) of several sequences, by their places in the memory of each."""

    def __init__(self, starts: Ids, stops: Ids):
        self.starts, self.stops = starts, stops
        self.low, self.high = int(starts.min()), int(stops.max())
        self.longest = int((stops - starts).max())

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Span:
        starts, stops = np.array([*pairs]).T
        return cls(starts, stops)

    @cached_property
    def others(self) -> NDArray[np.bool_] | None:
        """Which of the rows low..high of each are none of its own, (B, S); None: there are no others."""
        if self.starts.max() == self.low and self.stops.min() == self.high:
            return None
        place = np.arange(self.low, self.high)
        return (place < self.starts[:, None]) | (place >= self.stops[:, None])


class KeptTogether:
    """The rows of several sequences, whose memory is evenly spaced: a NumPy call reaches those of all of them."""

    def __init__(self, kept: Sequence[KeptRows], planes: Planes):
        """planes: those of all, (B, groups, rows, ...)."""
        self._kept = kept
        self._planes = planes
        self._spec, self._form = kept[0].spec, kept[0].form

    def _places(self, rows: Ids) -> Ids:
        """Of rows by their indices, (B,)."""
        if self._spec.keep is None:
            return rows
        firsts = [one.first for one in self._kept]
        return rows - np.array(firsts) if any(firsts) else rows

    def write(self, rows: Floats, starts: Ids) -> None:
        """As `KeptRows.write` does, a row of each, (B, groups, width), at the indices `starts` (B,)."""
        places = self._places(starts)
        if self._spec.keep is not None and places.max() >= self._kept[0].capacity:
            for one, start in zip(self._kept, starts.tolist(), strict=True):
                one.make_room(start, 1)
            places = self._places(starts)
        numbers = np.arange(len(rows))
        for plane, part in zip(self._planes, self._form.encode(rows[:, :, None], self._spec), strict=True):
            plane[numbers, :, places] = part[:, :, 0]

    def floats(self, span: Span) -> tuple[Floats, NDArray[np.bool_] | None]:
        """Rows that hold those of a span, as float32 (B, groups, S, width), and which of them are others, as in `Span`.

        They are not copied where they are held so, and not far apart in the memory of each.
        """
        starts = self._places(span.starts)
        if starts is not span.starts:
            span = Span(starts, self._places(span.stops))
        if span.high - span.low <= _SPREAD * span.longest:
            planes = tuple(plane[:, :, span.low : span.high] for plane in self._planes)
        else:
            places = np.minimum(span.starts[:, None] + np.arange(span.longest), self._kept[0].capacity - 1)  # (B, S)
            gathered = (plane[np.arange(len(places))[:, None], :, places] for plane in self._planes)
            planes = tuple(np.moveaxis(plane, 1, 2) for plane in gathered)  # (B, S, groups, ...) -> (B, groups, S, ...)
            span = Span(np.zeros_like(span.starts), span.stops - span.starts)
        values, factors = self._form.decode(planes, self._spec)
        if not self._form.is_float32:  # they are this thread's scratch
            values = values * (1 if factors is None else factors[..., None])
        return values, span.others


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

    def planes(self, context: int, form: RowForm) -> Mapping[str, PlaneShape]:
        return {"": (np.float32, (2, *self.shape))}

    def make(self, context: int, form: RowForm, place: Place, planes: Planes) -> RecurrentState:
        return RecurrentState(self, place, planes[0])


class RecurrentState:
    """Two buffers: what is, and what a pass makes of it, which counts when the pass has ended."""

    def __init__(self, spec: Recurrent, place: Place, buffers: Floats):
        """buffers: (2, *shape)."""
        self.spec = spec
        self._place = place
        self._buffers = buffers

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

    def clean(self, position: int, count: int) -> None:
        """What it left is in the buffer that the next pass overwrites."""

    def passing(self, position: int) -> Passed:
        return position, (self.now.copy(),)

    def put_back(self, passed: Passed) -> None:
        assert passed is not None
        self._buffers[:] = passed[1][0]

    def needed(self, position: int, back: int) -> Mapping[str, NDArray[Any]]:
        return {"": self.now}

    def prepare(self, position: int, back: int) -> None:
        self.forget()

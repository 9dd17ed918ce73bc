"""One pass through the layers, of one sequence or of several together.

Attention and recurrent states are of a sequence each, so their kinds go from segment to segment; every other product
takes the rows of all sequences at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from numoe.engine.layers.cache import Cache, Slot
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.state import KeptTogether, State

TOGETHER = 16
"""So many sequences attend in one call, or more of fewer rows, which bounds their scores and copies."""
_WASTE = 1.5
"""They do where no more than so many times the rows that they see are multiplied, and"""
_ROWS_A_CALL = 64
"""so many more for each, which take about as long as calls of its own."""

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence in a pass: rows first..stop of it, from position `start` of the sequence on."""

    first: int
    stop: int
    start: int
    blocks: Sequence[Mapping[str, State]]
    """The sequence's states, those of each block by name."""
    slot: Slot
    """Their memory."""

    def states(self, block: int) -> Mapping[str, State]:
        return self.blocks[block]

    @cached_property
    def rows(self) -> slice:
        return slice(self.first, self.stop)

    @cached_property
    def count(self) -> int:
        return self.stop - self.first

    @cached_property
    def stop_position(self) -> int:
        return self.start + self.count


class Company:
    """Sequences with a token each in a pass, whose memory lies side by side: NumPy reaches their rows in one call."""

    def __init__(self, segments: Sequence[Segment]):
        self.segments = segments
        firsts = [segment.first for segment in segments]
        together = range(firsts[0], firsts[0] + len(firsts))
        self.rows: slice | Ids = slice(together.start, together.stop) if firsts == [*together] else np.array(firsts)
        """Of the pass."""
        self.starts: Ids = np.array([segment.start for segment in segments])
        self._states: dict[int, _States] = {}

    def states(self, block: int) -> _States:
        """The rows that they keep in a block, by name."""
        if block not in self._states:
            self._states[block] = _States(self.segments, block)
        return self._states[block]

    def runs(self, counts: Sequence[int], most: int) -> list[Company]:
        """Those that attend together, by how many rows each sees: of several in a run none more than `most`."""
        runs, first, longest, total = [], 0, 0, 0
        for number, rows in enumerate(counts):
            longest, total, size = max(longest, rows), total + rows, number + 1 - first
            too_many = longest > most or size * longest > TOGETHER * most
            if size > 1 and (too_many or size * longest > _WASTE * total + size * _ROWS_A_CALL):
                runs.append(self.segments[first:number])
                first, longest, total = number, rows, rows
        runs.append(self.segments[first:])
        return [Company(run) for run in runs] if len(runs) > 1 else [self]


class _States(dict[str, KeptTogether]):
    """Made as they are asked for."""

    def __init__(self, segments: Sequence[Segment], block: int):
        self._segments, self._block = segments, block

    def __missing__(self, name: str) -> KeptTogether:
        slot, stop = self._segments[0].slot, self._segments[-1].slot.number + 1
        kept: Any = [segment.blocks[self._block][name] for segment in self._segments]
        made = self[name] = KeptTogether(kept, slot.pool.across(slot.number, stop, self._block, name))
        return made


class Step:
    """Token ids (T,) of all segments, one after the other."""

    def __init__(self, ids: Ids, segments: Sequence[Segment]):
        self.ids = ids
        self.segments = segments
        self.chosen: dict[int, Ids | None] = {}
        """The tokens that each segment's attend to, by its first row, as the last indexer chose; None: to all."""
        self._made: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, parts: Sequence[tuple[Ids, Cache]]) -> Step:
        """The next tokens (T,) of each sequence."""
        segments, first = [], 0
        for ids, cache in parts:
            segments.append(Segment(first, first + len(ids), cache.position, cache.blocks, cache.slot))
            first += len(ids)
        return cls(parts[0][0] if len(parts) == 1 else np.concatenate([ids for ids, _ in parts]), segments)

    @cached_property
    def positions(self) -> Floats:
        """Of each token in its sequence, (T,)."""
        spans = [np.arange(s.start, s.start + s.count, dtype=np.float32) for s in self.segments]
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    @cached_property
    def last_rows(self) -> list[int]:
        """The row of each sequence's last token."""
        return [segment.stop - 1 for segment in self.segments]

    @cached_property
    def companies(self) -> list[Company]:
        """Sequences with one token whose memory lies side by side, two or more in each."""
        return [Company(run) for run in self._runs if len(run) > 1]

    @cached_property
    def alone(self) -> list[Segment]:
        """All other sequences."""
        long = [segment for segment in self.segments if segment.count > 1]
        return long + [run[0] for run in self._runs if len(run) == 1]

    @cached_property
    def _runs(self) -> list[list[Segment]]:
        """Those with one token, in runs of neighbours."""
        runs: list[list[Segment]] = []
        single = [segment for segment in self.segments if segment.count == 1]
        for segment in sorted(single, key=lambda one: (id(one.slot.pool), one.slot.number)):
            pool, number, _ = segment.slot
            before = runs[-1][-1].slot if runs else None
            if before is not None and before.pool is pool and before.number == number - 1:
                runs[-1].append(segment)
            else:
                runs.append([segment])
        return runs

    def keep(self, states: Callable[[Segment | Company], Mapping[str, Any]], name: str, rows: Floats) -> None:
        """Write the tokens' rows (T, groups, width) to the state of this name of their sequences."""
        for segment in self.alone:
            states(segment)[name].write(rows[segment.rows].transpose(1, 0, 2), segment.start)  # (groups, n, width)
        for company in self.companies:
            states(company)[name].write(rows[company.rows], company.starts)

    def last(self) -> Step:
        """A pass of the last token of each sequence."""
        segments = [Segment(n, n + 1, s.stop_position - 1, s.blocks, s.slot) for n, s in enumerate(self.segments)]
        return Step(self.ids[self.last_rows], segments)

    def once(self, key: Hashable, make: Callable[..., _Made], *given: Any) -> _Made:
        """What `make` gives of what is given, made once in a pass for all layers that ask with this key."""
        made: _Made | None = self._made.get(key)
        if made is None:
            made = self._made[key] = make(*given)
        return made

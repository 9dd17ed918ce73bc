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

from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.state import Cache, State

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence in a pass: rows first..stop of it, from position `start` of the sequence on."""

    first: int
    stop: int
    start: int
    blocks: Sequence[Mapping[str, State]]
    """The sequence's states, those of each block by name."""

    @cached_property
    def rows(self) -> slice:
        return slice(self.first, self.stop)

    @cached_property
    def count(self) -> int:
        return self.stop - self.first

    @cached_property
    def stop_position(self) -> int:
        return self.start + self.count


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
            segments.append(Segment(first, first + len(ids), cache.position, cache.blocks))
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

    def last(self) -> Step:
        """A pass of the last token of each sequence."""
        segments = [Segment(n, n + 1, s.stop_position - 1, s.blocks) for n, s in enumerate(self.segments)]
        return Step(self.ids[self.last_rows], segments)

    def once(self, key: Hashable, make: Callable[..., _Made], *given: Any) -> _Made:
        """What `make` gives of what is given, made once in a pass for all layers that ask with this key."""
        made: _Made | None = self._made.get(key)
        if made is None:
            made = self._made[key] = make(*given)
        return made

"""Which units are in memory: up to a limit of bytes, the least used making room for others."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from numoe.engine.experts.unit import Buffer, Key, Unit
from numoe.engine.experts.uses import DecayedCounts
from numoe.quant.compute.memory import lasting
from numoe.quant.compute.slots import Slots
from numoe.quant.formats.qtensor import QTensor


@dataclass(eq=False)
class Entry:
    """A unit that is queued, being read, or resident. It stays while it has users or is expected."""

    key: Key
    unit: Unit
    users: set[Any] = field(default_factory=set)
    """Who asked for it, and has not let go of it."""
    expected: bool = False
    buffer: Buffer | None = None
    matrices: dict[str, QTensor] = field(default_factory=dict)
    error: Exception | None = None


class Residents:
    """Units in memory, and buffers for those to come. Who calls it from several threads holds a lock meanwhile."""

    def __init__(self, capacity: int, region: int):
        """capacity: how many units there will be. region: bytes of addresses that are taken at once for them."""
        self.entries: dict[Key, Entry] = {}
        self.counts = DecayedCounts(capacity)
        self.limit = 0
        self.held = 0
        """Bytes of the units, of those being read, and of spare buffers."""
        self.stay = False
        """Whether nothing is ever evicted."""
        # Heap of (worth, number, key) of resident units, and of worths they had before.
        self._order: list[tuple[float, int, Key]] = []
        self._numbers = itertools.count()
        self._slots = Slots(region)
        self._spare: dict[int, list[Buffer]] = {}  # without a unit, by size

    def use(self, key: Key) -> Entry | None:
        """Count a use of a unit; it, if it is resident."""
        self.counts.use(key)
        if entry := self.entries.get(key):
            self._rank(key)
        return entry

    def hottest(self, known: Collection[Key]) -> list[Key]:
        """Of these the units that are worth keeping, the best first: as many as there are in memory now."""
        keys = sorted(known, key=self.counts.worth, reverse=True)[: len(self.entries)]
        return [key for key in keys if self.counts.worth(key) > -math.inf]

    def reserve(self, entry: Entry) -> bool:
        """Get memory for a unit, from others if need be; False if all of it is in use."""
        unit = entry.unit
        while True:
            spare = self._spare.get(unit.buffer_bytes)
            more = unit.decoded_bytes + (0 if spare else unit.buffer_bytes)
            if self.held + more <= self.limit:
                break
            if not self.drop_spare(unit.buffer_bytes, 1) and not self._evict():
                return False
        if spare:
            entry.buffer = spare.pop()
        elif unit.keeps_buffer and self.stay:  # what is never written to again can lie in memory of this process alone
            entry.buffer = Buffer(lasting(unit.buffer_bytes))
        else:
            entry.buffer = Buffer(self._slots.take(unit.buffer_bytes), self._slots)
        self.held += more
        return True

    def add(self, entry: Entry) -> None:
        """Have a unit, which was read, be resident; of one with an error the memory is free again."""
        if entry.error:
            self.held -= entry.unit.decoded_bytes
            self._set_spare(entry)
            return
        self.entries[entry.key] = entry
        self._rank(entry.key)
        if not entry.unit.keeps_buffer:
            self._set_spare(entry)

    def keep_limit(self) -> bool:
        """Evict what is above the limit; False if it is in use."""
        while self.held > self.limit:
            if not self.drop_spare() and not self._evict():
                return False
        return True

    def drop_spare(self, size: int = 0, keep: int = 0) -> bool:
        """Give back the buffers without a unit, all but `keep` of a size; False if there are none."""
        dropped = False
        for one, spare in self._spare.items():
            kept = keep if one == size else 0
            dropped |= len(spare) > kept
            self.held -= one * max(0, len(spare) - kept)
            for buffer in spare[kept:]:
                self._slots.give_back(buffer.memory)
            del spare[kept:]
        return dropped

    def _rank(self, key: Key) -> None:
        """Put a resident unit among the others by its worth."""
        if self.stay:
            return
        if len(self._order) > 4 * len(self.entries) + 64:
            self._order = [(self.counts.worth(one), next(self._numbers), one) for one in self.entries]
            heapq.heapify(self._order)
        heapq.heappush(self._order, (self.counts.worth(key), next(self._numbers), key))

    def _evict(self) -> bool:
        """Make the memory of the unit that is worth least spare; False if all are in use."""
        victim = None
        in_use = []
        while self._order and victim is None:
            ranked = heapq.heappop(self._order)
            worth, _, key = ranked
            entry = self.entries.get(key)
            if entry is None or self.counts.worth(key) != worth:
                continue
            if entry.users or entry.expected:
                in_use.append(ranked)
            else:
                victim = entry
        for ranked in in_use:
            heapq.heappush(self._order, ranked)
        if victim is None:
            return False
        del self.entries[victim.key]
        victim.matrices.clear()  # who had them may hold on to the dict
        self.held -= victim.unit.decoded_bytes
        if victim.unit.keeps_buffer:
            self._set_spare(victim)
        return True

    def _set_spare(self, entry: Entry) -> None:
        assert entry.buffer is not None
        self._spare.setdefault(entry.unit.buffer_bytes, []).append(entry.buffer)
        entry.buffer = None

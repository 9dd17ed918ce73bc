"""The routed experts of a model: in memory up to a budget of bytes, on disk beyond it.

One expert of one layer is a unit: its gate, up and down with their scales, read together into one buffer. Units that
are asked for arrive in any order, those in memory first, while threads read the others; the least often used make
room, where uses of long ago count for less. What comes out is the same bytes wherever they came from, so the budget
changes no digit of a result.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from numoe.engine.experts.guesses import Guesses
from numoe.engine.experts.residents import Entry, Residents
from numoe.engine.experts.unit import Key, lay_out
from numoe.quant.files import Files
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import fastest, settled
from numoe.quant.stored.handle import Stored

READERS = 4
"""Threads that read: a disk gives its full speed only to several reads at a time."""

_BUSY = 1 << 24
"""Bytes that are asked of a disk at a time, in two reads at least. More keep it no busier, but come all at once instead
of one after the other, each while the one before is computed, and what is asked for next waits for them."""

# Bytes of addresses for units that come and go, taken at once.
_REGION = 1 << 30
_PATIENCE = 0.5  # seconds from one look at what is free to the next, which takes up to some milliseconds


@dataclass(eq=False)
class _Request:
    """Somebody who asked for units, and those that arrived for him."""

    arrived: deque[Entry] = field(default_factory=deque)


class ExpertStore:
    """Routed experts by (layer, expert). Safe to use from several threads.

    ahead: whether `expect` fetches anything. It changes speed alone.
    """

    def __init__(self, files: Files, experts: Mapping[Key, Mapping[str, Stored]]):
        """Lay out the units, which `files` reads, without reading them; `allow` says how much memory there is.

        Raises:
            InputError: a matrix is missing or of a type that cannot be multiplied with.
        """
        self.budget = 0
        self.ahead = True
        self._free: Callable[[], int] | None = None
        self._left_alone = 0
        self._shed = False
        self._asked = -math.inf  # when it was asked what is free
        self._files = files
        self._units = {key: lay_out(stored) for key, stored in experts.items()}
        self.largest: dict[int, int] = {}
        """For each layer, the most bytes that one of its units takes."""
        for (layer, _), unit in self._units.items():
            self.largest[layer] = max(self.largest.get(layer, 0), unit.needed)
        self._largest = max(self.largest.values())
        views = all(unit.keeps_buffer for unit in self._units.values())
        self.total_bytes = sum(unit.kept for unit in self._units.values()) + (0 if views else READERS * self._largest)
        """The budget at which every unit is resident."""
        self._change = Condition()
        self._queue: dict[Key, Entry] = {}
        self._reading: dict[Key, Entry] = {}
        self._residents = Residents(0, 0)
        self._expected: dict[int, list[Entry]] = {}
        self._warming: deque[Key] = deque()
        self._guesses = Guesses()
        self._expected_held = 0  # bytes of those that are kept for a layer to come
        self._checked: set[Key] = set()  # units without NaN
        self._readers = ThreadPoolExecutor(READERS, "numoe-read")
        self._reset()

    def _reset(self) -> None:
        self._hits = self._misses = self._bytes_read = 0
        self._wait_seconds = 0.0

    # ------------------------------------------------------------------------------------------ sizes

    @property
    def held_bytes(self) -> int:
        """Memory taken now; never more than the budget."""
        return self._residents.held

    @property
    def complete(self) -> bool:
        """Whether every unit is resident."""
        return len(self._residents.entries) == len(self._units)

    def sizes(self) -> dict[Key, int]:
        """The bytes that each unit takes in memory."""
        return {key: unit.kept for key, unit in self._units.items()}

    def matrices(self) -> list[QTensor]:
        """Those of all resident units."""
        with self._change:
            return [matrix for entry in self._residents.entries.values() for matrix in entry.matrices.values()]

    def allow(self, budget: int, tell: Callable[[int], None] | None = None) -> None:
        """Take at most `budget` bytes from now on. What fits as a whole is read at once, and stays.

        Less than before: returns when what is too much is free, which passes of other threads may still compute with.
        More: waits for nothing.

        tell: told the bytes so far where all are read.

        Raises:
            ValueError: the largest unit takes more, or everything was allowed before.
            InputError: a file cannot be read or holds NaN.
        """
        if budget < self._largest:
            raise ValueError(f"a budget of {budget} bytes does not hold an expert of {self._largest}")
        budget = min(budget, self.total_bytes)
        before = self.budget
        if not before:
            capacity = budget * len(self._units) // self.total_bytes
            self._residents = Residents(capacity, min(budget, _REGION))
        elif budget < before:
            self._shrink(budget)
            return
        self.budget = self._residents.limit = budget
        self._residents.stay = budget == self.total_bytes
        if self._residents.stay and before < budget:
            self._read_all(tell)

    def _read_all(self, tell: Callable[[int], None] | None) -> None:
        for layer in sorted({layer for layer, _ in self._units}):
            with self.stream(layer, [e for one, e in self._units if one == layer]) as units:
                deque(units, maxlen=0)
            if tell:
                tell(self.held_bytes)
        with self._change:
            self._residents.drop_spare()
        self._reset()

    def _shrink(self, budget: int) -> None:
        if self._residents.stay:
            raise ValueError("experts that are all in memory stay there")
        with self._change:
            self.budget = budget
            self._residents.limit = min(self._residents.limit, budget)
            self._end_expectations()
            self._change.wait_for(self._residents.keep_limit)

    def share(self, free: Callable[[], int], reserve: int) -> None:
        """From now on take less than the budget while other processes need the memory, so that nothing is swapped.

        Experts that are all in memory stay there. free: tells how many bytes are. reserve: so many of them stay so.
        """
        self._free, self._left_alone = free, reserve

    def _make_room(self) -> None:
        """Keep to what is free. The lock is held."""
        now = time.monotonic()
        residents = self._residents
        if self._free is None or residents.stay or now < self._asked + _PATIENCE:
            return
        self._asked = now
        room = residents.held + self._free() - self._left_alone
        residents.limit = max(self._largest, min(self.budget, room))
        if residents.held > residents.limit:
            self._shed = True
            self._end_expectations()
            residents.keep_limit()

    def widen(self) -> None:
        """Put the units in the form that takes more memory and less time, once all are resident."""
        with self._change:
            grown = 0
            for entry in self._residents.entries.values():
                for part, matrix in entry.matrices.items():
                    wide = fastest(matrix, wide=True)
                    if wide is not matrix:
                        entry.matrices[part] = settled(wide)
                        grown += wide.nbytes - matrix.nbytes
                entry.buffer = None  # what is still a view of it keeps its memory
            self._residents.held += grown
            self.budget = self._residents.limit = self.budget + grown
            self.total_bytes += grown

    def hottest(self) -> list[Key]:
        """The units that are worth keeping, the best first: as many as there are in memory now."""
        with self._change:
            return self._residents.hottest(self._units)

    def warm(self, keys: Sequence[Key]) -> None:
        """Read units, the first ones first, while nothing is asked for, as far as there is free memory."""
        with self._change:
            known = [key for key in keys if key in self._units]
            self._residents.counts.assume(known)
            self._warming = deque(known)
            self._schedule()

    def stats(self) -> dict[str, Any]:
        """Counts since loading, and the bytes of the weights that are in memory now.

        hits are units that were there when asked for, ahead_fetched those read because they were expected, of which
        ahead_used were asked for; wait_s is the time that computing stood still for reads; shed: whether
        units were dropped because other processes needed the memory.
        """
        with self._change:
            asked = self._hits + self._misses
            resident = sum(m.nbytes for entry in self._residents.entries.values() for m in entry.matrices.values())
            return {
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate": self._hits / asked if asked else 1.0,
                "bytes_read": self._bytes_read,
                "wait_s": self._wait_seconds,
                "resident_bytes": resident,
                "ahead_fetched": self._guesses.fetched,
                "ahead_used": self._guesses.used,
                "shed": self._shed,
            }

    # ---------------------------------------------------------------------------------------- fetching

    @contextmanager
    def stream(self, layer: int, experts: Iterable[int]) -> Iterator[Iterator[list[tuple[int, dict[str, QTensor]]]]]:
        """Ask for experts of a layer, each once. Entering starts the reads, and gives an iterator over lists of
        (expert, its gate, up and down): all that have arrived each time. They are valid until the next list is taken.

        More experts than the budget holds come in turns: those that were passed on make room.

        Raises:
            InputError: from the iterator, when a file cannot be read, ends too soon or holds NaN.
        """
        request = _Request()
        keys = [(layer, int(expert)) for expert in experts]
        try:
            with self._change:
                self._make_room()
                self._end_expectation(layer, set(keys))
                for key in keys:
                    self._ask(key, request)
                self._schedule()
            yield self._arrivals(request, len(keys))
        finally:
            with self._change:
                for key in keys:
                    self._release(key, request)
                self._schedule()

    def expects(self, layer: int) -> bool:
        """Whether it pays to say beforehand what a layer will ask for."""
        return self.ahead and not self.complete and self._guesses.pay(layer)

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        """Fetch experts ahead, into half of the budget at most and after all that is asked for already.

        They are kept until the layer asks, or until another expectation takes this one's place.
        """
        if not self.expects(layer):
            return
        with self._change:
            self._end_expectation(layer)
            expected = self._expected[layer] = []
            for expert in experts:
                key = layer, int(expert)
                if self._find(key) is None:
                    entry = self._queue[key] = Entry(key, self._units[key], expected=True)
                    expected.append(entry)
            self._schedule()

    def _ask(self, key: Key, request: _Request) -> None:
        entry = self._residents.use(key)
        if entry:
            self._hits += 1
            request.arrived.append(entry)
        else:
            self._misses += 1
            entry = self._reading.get(key) or self._queue.setdefault(key, Entry(key, self._units[key]))
        entry.users.add(request)

    def _arrivals(self, request: _Request, count: int) -> Iterator[list[tuple[int, dict[str, QTensor]]]]:
        while count:
            with self._change:
                begun = time.perf_counter()
                while not request.arrived:
                    self._change.wait()
                self._wait_seconds += time.perf_counter() - begun
                entries = list(request.arrived)
                request.arrived.clear()
            for entry in entries:
                if entry.error:
                    raise entry.error
            count -= len(entries)
            yield [(entry.key[1], entry.matrices) for entry in entries]
            with self._change:
                for entry in entries:
                    self._release(entry.key, request)
                self._schedule()

    def _release(self, key: Key, request: _Request) -> None:
        entry = self._find(key)
        if entry:
            entry.users.discard(request)
            self._drop_unwanted(entry)

    def _find(self, key: Key) -> Entry | None:
        return self._residents.entries.get(key) or self._reading.get(key) or self._queue.get(key)

    def _end_expectations(self) -> None:
        """Else guesses could hold all that there is."""
        for layer in list(self._expected):
            self._end_expectation(layer)

    def _end_expectation(self, layer: int, taken: set[Key] | None = None) -> None:
        """`taken`: what the layer asks for now, by which the guess is judged."""
        for entry in self._expected.pop(layer, ()):
            entry.expected = False
            if self._queue.get(entry.key) is entry:
                self._drop_unwanted(entry)
            elif not entry.error:
                self._expected_held -= entry.unit.needed
                if taken is not None:
                    self._guesses.count(layer, entry.key in taken)

    def _drop_unwanted(self, entry: Entry) -> None:
        if not entry.users and not entry.expected and entry.key in self._queue:
            del self._queue[entry.key]

    # -------------------------------------------------------------- reading; the lock is held but in _fetch

    def _schedule(self) -> None:
        """Start every read that can start now. To be called after every change."""
        if self._residents.held > self._residents.limit:
            self._change.notify_all()  # somebody waits for what is let go of
        while len(self._reading) < READERS and (len(self._reading) < 2 or self._asked_of_disk() < _BUSY):
            entry = self._next()
            if entry is None or not self._residents.reserve(entry):
                return
            if entry.expected:
                self._expected_held += entry.unit.needed
            # In this order Ctrl-C between two lines loses a buffer at worst; nobody waits for what is never read.
            del self._queue[entry.key]
            self._readers.submit(self._fetch, entry)
            self._reading[entry.key] = entry

    def _asked_of_disk(self) -> int:
        return sum(entry.unit.buffer_bytes for entry in self._reading.values())

    def _next(self) -> Entry | None:
        """What was asked for comes first; what is expected must leave room for it."""
        for entry in self._queue.values():
            if entry.users:
                return entry
        limit = self._residents.limit
        room = min(limit // 2, limit - self._largest) - self._expected_held
        expected = next((entry for entry in self._queue.values() if entry.unit.needed <= room), None)
        return expected or self._warm_one()

    def _warm_one(self) -> Entry | None:
        """The next of those to be warm that is not there; None where there are no more, or no free memory."""
        while self._warming:
            key = self._warming[0]
            if self.held_bytes + self._units[key].needed > self._residents.limit - self._largest:
                self._warming.clear()
                break
            self._warming.popleft()
            if self._find(key) is None:
                entry = self._queue[key] = Entry(key, self._units[key])
                return entry
        return None

    def _fetch(self, entry: Entry) -> None:
        """Read a unit, on a thread of its own and without the lock, then hand it to those who asked."""
        try:
            assert entry.buffer is not None
            check, stay = entry.key not in self._checked, self._residents.stay
            entry.matrices = entry.buffer.read(entry.unit, self._files, check=check, stay=stay)
        except Exception as error:
            entry.error = error
        with self._change:
            self._reading.pop(entry.key, None)
            self._residents.add(entry)
            if not entry.error:
                self._checked.add(entry.key)
                self._bytes_read += sum(extent.nbytes for extent, _ in entry.unit.runs)
            elif entry.expected:
                self._expected_held -= entry.unit.needed
            for request in entry.users:
                request.arrived.append(entry)
            self._schedule()
            self._change.notify_all()

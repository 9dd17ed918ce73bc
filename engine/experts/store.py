"""The routed experts of a model: in memory up to a budget of bytes, on disk beyond it.

One expert of one layer is a unit: its gate, up and down with their scales, read together into one buffer. Units that
are asked for arrive in any order, those in memory first, while threads read the others; the least often used make
room, where uses of long ago count for less. What comes out is the same bytes wherever they came from, so the budget
changes no digit of a result.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

from numoe.engine.experts.unit import Key, Unit, lay_out, read_once
from numoe.engine.experts.uses import DecayedCounts
from numoe.quant.compute import workers
from numoe.quant.compute.memory import lasting
from numoe.quant.compute.slots import Slots
from numoe.quant.dtypes import UInt8
from numoe.quant.files import Files
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import apart, fastest, settled
from numoe.quant.stored.handle import Stored

READERS = 4
"""Threads that read: a disk gives its full speed only to several reads at a time."""

# Bytes of addresses for units that come and go, taken at once.
_REGION = 1 << 30
# A guess is tried on so many units before it is judged, and must be right this often.
_GUESS_TRIALS = 32
_GUESS_PAYS = 0.5
_PATIENCE = 0.5  # seconds from one look at what is free to the next, which takes up to some milliseconds


@dataclass(eq=False)
class _Request:
    """Somebody who asked for units, and those that arrived for him."""

    arrived: deque[_Entry] = field(default_factory=deque)


@dataclass(eq=False)
class _Entry:
    """A unit that is queued, being read, or resident. It stays while it has users or is expected."""

    key: Key
    unit: Unit
    users: set[_Request] = field(default_factory=set)
    expected: bool = False
    buffer: UInt8 | None = None
    matrices: dict[str, QTensor] = field(default_factory=dict)
    error: Exception | None = None


@dataclass
class _Guess:
    """How many units were fetched ahead for a layer, and how many of them it then took."""

    fetched: int = 0
    used: int = 0

    def pays(self) -> bool:
        return self.fetched < _GUESS_TRIALS or self.used >= _GUESS_PAYS * self.fetched

    def count(self, used: bool) -> None:
        self.fetched += 1
        self.used += used
        if self.fetched == 8 * _GUESS_TRIALS:  # what was long ago counts for less
            self.fetched //= 2
            self.used //= 2


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
        self._limit = 0  # the budget, or less where other processes need the memory
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
        self._queue: dict[Key, _Entry] = {}
        self._reading: dict[Key, _Entry] = {}
        self._resident: dict[Key, _Entry] = {}
        self._counts = DecayedCounts(0)
        # Heap of (worth, number, key) of resident units, and of worths they had before.
        self._order: list[tuple[float, int, Key]] = []
        self._numbers = itertools.count()
        self._expected: dict[int, list[_Entry]] = {}
        self._warming: deque[Key] = deque()
        self._guesses: dict[int, _Guess] = {}
        self._slots = Slots(0)
        self._spare: dict[int, list[UInt8]] = {}  # slots without a unit, by size
        self._held = 0  # bytes of resident units, of those being read, and of spare buffers
        self._expected_held = 0  # those of them that are kept for a layer to come
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
        return self._held

    @property
    def complete(self) -> bool:
        """Whether every unit is resident."""
        return len(self._resident) == len(self._units)

    def sizes(self) -> dict[Key, int]:
        """The bytes that each unit takes in memory."""
        return {key: unit.kept for key, unit in self._units.items()}

    def matrices(self) -> list[QTensor]:
        """Those of all resident units."""
        with self._change:
            return [matrix for entry in self._resident.values() for matrix in entry.matrices.values()]

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
            self._counts = DecayedCounts(budget * len(self._units) // self.total_bytes)
            self._slots = Slots(min(budget, _REGION))
        elif budget < before:
            self._shrink(budget)
            return
        self.budget = self._limit = budget
        if budget == self.total_bytes > before:
            self._read_all(tell)

    def _read_all(self, tell: Callable[[int], None] | None) -> None:
        for layer in sorted({layer for layer, _ in self._units}):
            with self.stream(layer, [e for one, e in self._units if one == layer]) as units:
                deque(units, maxlen=0)
            if tell:
                tell(self._held)
        with self._change:
            self._drop_spare()
        self._reset()

    def _shrink(self, budget: int) -> None:
        if self.budget == self.total_bytes:
            raise ValueError("experts that are all in memory stay there")
        with self._change:
            self.budget = budget
            self._limit = min(self._limit, budget)
            self._end_expectations()
            self._change.wait_for(self._keeps_limit)

    def _keeps_limit(self) -> bool:
        """Evict what is above the limit; False if it is in use."""
        while self._held > self._limit:
            if not self._drop_spare() and not self._evict():
                return False
        return True

    def share(self, free: Callable[[], int], reserve: int) -> None:
        """From now on take less than the budget while other processes need the memory, so that nothing is swapped.

        Experts that are all in memory stay there. free: tells how many bytes are. reserve: so many of them stay so.
        """
        self._free, self._left_alone = free, reserve

    def _make_room(self) -> None:
        """Keep to what is free. The lock is held."""
        now = time.monotonic()
        if self._free is None or self.budget == self.total_bytes or now < self._asked + _PATIENCE:
            return
        self._asked = now
        room = self._held + self._free() - self._left_alone
        self._limit = max(self._largest, min(self.budget, room))
        if self._held > self._limit:
            self._shed = True
            self._end_expectations()
            self._keeps_limit()

    def widen(self) -> None:
        """Put the units in the form that takes more memory and less time, once all are resident."""
        with self._change:
            grown = 0
            for entry in self._resident.values():
                for part, matrix in entry.matrices.items():
                    wide = fastest(matrix, wide=True)
                    if wide is not matrix:
                        entry.matrices[part] = settled(wide)
                        grown += wide.nbytes - matrix.nbytes
                entry.buffer = None  # what is still a view of it keeps its memory
            self._held += grown
            self.budget = self._limit = self.budget + grown
            self.total_bytes += grown

    def hottest(self) -> list[Key]:
        """The units that are worth keeping, the best first: as many as there are in memory now."""
        with self._change:
            keys = sorted(self._units, key=self._counts.worth, reverse=True)[: len(self._resident)]
            return [key for key in keys if self._counts.worth(key) > -math.inf]

    def warm(self, keys: Sequence[Key]) -> None:
        """Read units, the first ones first, while nothing is asked for, as far as there is free memory."""
        with self._change:
            known = [key for key in keys if key in self._units]
            self._counts.assume(known)
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
            resident = sum(m.nbytes for entry in self._resident.values() for m in entry.matrices.values())
            return {
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate": self._hits / asked if asked else 1.0,
                "bytes_read": self._bytes_read,
                "wait_s": self._wait_seconds,
                "resident_bytes": resident,
                "ahead_fetched": sum(guess.fetched for guess in self._guesses.values()),
                "ahead_used": sum(guess.used for guess in self._guesses.values()),
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
        guess = self._guesses.get(layer)
        return self.ahead and not self.complete and (guess is None or guess.pays())

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
                if key not in self._resident and key not in self._reading and key not in self._queue:
                    entry = self._queue[key] = _Entry(key, self._units[key], expected=True)
                    expected.append(entry)
            self._schedule()

    def _ask(self, key: Key, request: _Request) -> None:
        self._counts.use(key)
        entry = self._resident.get(key)
        if entry:
            self._hits += 1
            self._rank(key)
            request.arrived.append(entry)
        else:
            self._misses += 1
            entry = self._reading.get(key) or self._queue.setdefault(key, _Entry(key, self._units[key]))
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
        entry = self._resident.get(key) or self._reading.get(key) or self._queue.get(key)
        if entry:
            entry.users.discard(request)
            self._drop_unwanted(entry)

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
                    self._guesses.setdefault(layer, _Guess()).count(entry.key in taken)

    def _drop_unwanted(self, entry: _Entry) -> None:
        if not entry.users and not entry.expected and entry.key in self._queue:
            del self._queue[entry.key]

    # -------------------------------------------------------------- reading; the lock is held but in _fetch

    def _schedule(self) -> None:
        """Start every read that can start now. To be called after every change."""
        if self._held > self._limit:
            self._change.notify_all()  # somebody waits for what is let go of
        while len(self._reading) < READERS:
            entry = self._next()
            if entry is None or not self._reserve(entry):
                return
            # In this order Ctrl-C between two lines loses a buffer at worst; nobody waits for what is never read.
            del self._queue[entry.key]
            self._readers.submit(self._fetch, entry)
            self._reading[entry.key] = entry

    def _next(self) -> _Entry | None:
        """What was asked for comes first; what is expected must leave room for it."""
        for entry in self._queue.values():
            if entry.users:
                return entry
        room = min(self._limit // 2, self._limit - self._largest) - self._expected_held
        expected = next((entry for entry in self._queue.values() if entry.unit.needed <= room), None)
        return expected or self._warm_one()

    def _warm_one(self) -> _Entry | None:
        """The next of those to be warm that is not there; None where there are no more, or no free memory."""
        while self._warming:
            key = self._warming[0]
            if self._held + self._units[key].needed > self._limit - self._largest:
                self._warming.clear()
                break
            self._warming.popleft()
            if key not in self._resident and key not in self._reading and key not in self._queue:
                entry = self._queue[key] = _Entry(key, self._units[key])
                return entry
        return None

    def _reserve(self, entry: _Entry) -> bool:
        """Get memory for a unit, from others if need be; False if all of it is in use."""
        unit = entry.unit
        while True:
            spare = self._spare.get(unit.buffer_bytes)
            more = unit.decoded_bytes + (0 if spare else unit.buffer_bytes)
            if self._held + more <= self._limit:
                break
            if not self._drop_spare(unit.buffer_bytes, 1) and not self._evict():
                return False
        stays = unit.keeps_buffer and self.budget == self.total_bytes
        # What is never written to again can lie in huge pages, which slots cannot.
        entry.buffer = (lasting if stays else self._slots.take)(unit.buffer_bytes) if not spare else spare.pop()
        self._held += more
        if entry.expected:
            self._expected_held += unit.needed
        return True

    def _drop_spare(self, size: int = 0, keep: int = 0) -> bool:
        """Give back the buffers without a unit, all but `keep` of a size; False if there are none."""
        dropped = False
        for one, spare in self._spare.items():
            kept = keep if one == size else 0
            dropped |= len(spare) > kept
            self._held -= one * max(0, len(spare) - kept)
            for slot in spare[kept:]:
                self._slots.give_back(slot)
            del spare[kept:]
        return dropped

    def _rank(self, key: Key) -> None:
        """Put a resident unit among the others by its worth."""
        if self.budget == self.total_bytes:
            return  # nothing is ever evicted
        if len(self._order) > 4 * len(self._units):
            self._order = [(self._counts.worth(one), next(self._numbers), one) for one in self._resident]
            heapq.heapify(self._order)
        heapq.heappush(self._order, (self._counts.worth(key), next(self._numbers), key))

    def _evict(self) -> bool:
        """Make the memory of the unit that is worth least spare; False if all are in use."""
        victim = None
        in_use = []
        while self._order and victim is None:
            ranked = heapq.heappop(self._order)
            worth, _, key = ranked
            entry = self._resident.get(key)
            if entry is None or self._counts.worth(key) != worth:
                continue
            if entry.users or entry.expected:
                in_use.append(ranked)
            else:
                victim = entry
        for ranked in in_use:
            heapq.heappush(self._order, ranked)
        if victim is None:
            return False
        del self._resident[victim.key]
        victim.matrices.clear()  # who had them may hold on to the dict
        self._held -= victim.unit.decoded_bytes
        if victim.unit.keeps_buffer:
            self._set_spare(victim)
        return True

    def _set_spare(self, entry: _Entry) -> None:
        assert entry.buffer is not None
        self._spare.setdefault(entry.unit.buffer_bytes, []).append(entry.buffer)
        entry.buffer = None

    def _fetch(self, entry: _Entry) -> None:
        """Read a unit, on a thread of its own and without the lock, then hand it to those who asked."""
        try:
            entry.matrices = self._read(entry)
        except Exception as error:
            entry.error = error
        with self._change:
            self._reading.pop(entry.key, None)
            if entry.error:
                self._held -= entry.unit.decoded_bytes
                self._set_spare(entry)
                if entry.expected:
                    self._expected_held -= entry.unit.needed
            else:
                self._checked.add(entry.key)
                self._bytes_read += sum(extent.nbytes for extent, _ in entry.unit.runs)
                self._resident[entry.key] = entry
                self._rank(entry.key)
                if not entry.unit.keeps_buffer:
                    self._set_spare(entry)
            for request in entry.users:
                request.arrived.append(entry)
            self._schedule()
            self._change.notify_all()

    def _read(self, entry: _Entry) -> dict[str, QTensor]:
        buffer = entry.buffer
        assert buffer is not None
        for extent, at in entry.unit.runs:
            if self.budget < self.total_bytes:
                read_once(self._files, extent, buffer, at)
            else:  # nothing is read again, but perhaps by another start
                self._files.read_range(*extent, out=buffer[at : at + extent.nbytes])
        check = entry.key not in self._checked
        matrices = {
            part: stored.assemble([buffer[p] for p in places], check=check)
            for part, (stored, places) in entry.unit.matrices.items()
        }
        used = {part: fastest(matrix) for part, matrix in matrices.items()}
        if entry.unit.keeps_buffer:
            if self.budget < self.total_bytes:
                workers.know_placed(used.values())
            return used
        if self.budget == self.total_bytes:
            return {part: settled(matrix) for part, matrix in used.items()}
        return apart(used)

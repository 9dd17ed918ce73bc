"""How much memory there is, and who has it: one amount that weights, experts, sessions and passes reserve from.

A reservation is given back when it is released, or when the object that stands for it is collected. One may be
elastic: it yields, down to a least, to what is reserved after it, and grows again when that is given back.
"""

from __future__ import annotations

import gc
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import finalize

from numoe.engine.plan import format_bytes, parse_bytes
from numoe.quant.compute.groups import memory_limits
from numoe.quant.errors import DoesNotFit, InputError

_PROC = Path("/proc/self/stat")


@dataclass(eq=False)
class _Claim:
    """What a budget knows of a reservation. `least` and `most` differ where it is elastic."""

    nbytes: int
    least: int
    most: int
    within: _Claim | None
    resize: Callable[[int], None] | None


class Reservation:
    """A share of a budget, until it is released or this object is collected."""

    def __init__(self, budget: Budget, claim: _Claim):
        self.budget = budget
        self._claim = claim
        self._end = finalize(self, budget._give_back, claim)
        self._end.atexit = False

    @property
    def nbytes(self) -> int:
        """As many as it has now."""
        return self._claim.nbytes

    @property
    def parts_bytes(self) -> int:
        """What is reserved within it."""
        return self.budget._within(self._claim)

    def reserve(self, what: str, nbytes: int, *, enough: int = 0) -> Reservation:
        """A part of it, which takes more of the budget only where all parts together are more than it has.

        A part of a part is one of the whole. See `Budget.reserve`.

        Args:
            enough: the budget that a refusal names, where what is missing now is not all that it would take.
        """
        within = self._claim.within or self._claim
        return self.budget._reserve(what, _Claim(nbytes, nbytes, nbytes, within, None), enough)

    def release(self) -> None:
        """Give it back now. To be called when the memory is free; a second time it does nothing."""
        self._end()


class Budget:
    """The memory that one or several models and their sessions may take together. Safe to use from several threads."""

    def __init__(self, ram: str | int | None = None, process_bytes: int = 0):
        """ram: bytes, or an amount such as "8GiB"; None: nine tenths of what is free, for which the machine is asked
        here and never again.
        process_bytes: what of a given `ram` the process takes for itself.

        Raises:
            InputError: see `parse_bytes` and `free_memory`.
        """
        _require_proc()
        self.given = ram is not None
        self.allowed = available_memory() if ram is None else parse_bytes(ram)
        """With what the process takes for itself, where that is known."""
        self._process_bytes = process_bytes if self.given else 0
        self.total = max(0, self.allowed - self._process_bytes)
        self._changing = Lock()
        self._claims: dict[_Claim, None] = {}
        self._returned: deque[_Claim] = deque()

    @property
    def reserved(self) -> int:
        """What is reserved now; never more than `total`."""
        with self._changes():
            return self._taken(lambda claim: claim.nbytes)

    @property
    def room(self) -> int:
        """What can be reserved, elastic reservations yielding."""
        with self._changes():
            return self.total - self._taken(lambda claim: claim.least)

    def require(self, what: str, nbytes: int) -> None:
        """Refuse what cannot be reserved.

        Raises:
            DoesNotFit: says how much is needed, how much there is, and what helps.
        """
        if nbytes > self.room:
            gc.collect()
        short = nbytes - self.room
        if short > 0:
            raise self._refusal(what, nbytes, short)

    def reserve(
        self, what: str, nbytes: int, *, least: int | None = None, resize: Callable[[int], None] | None = None
    ) -> Reservation:
        """Take a share of the budget; who holds what is returned has it.

        Others that are elastic have given their memory back when this returns.

        Args:
            what: the subject of the sentence of a refusal.
            nbytes: as many; of an elastic reservation at most as many, as far as there is room.
            least: an elastic reservation has so many at least.
            resize: called with how many an elastic reservation has, now and when that changes. For fewer it returns
                when the others are free. For more it waits for nothing: it may be called wherever an object is
                collected.

        Raises:
            DoesNotFit: there is less, though all that is elastic yields.
        """
        least = nbytes if least is None else least
        return self._reserve(what, _Claim(0, least, nbytes, None, resize))

    def _reserve(self, what: str, claim: _Claim, enough: int = 0) -> Reservation:
        made = Reservation(self, claim)  # first: what is interrupted from here on is given back
        short = self._take(claim)
        if short > 0:
            gc.collect()  # an answer that was not read to its end keeps its session until then
            short = self._take(claim)
        if short > 0:
            raise self._refusal(what, claim.least, short, enough)
        return made

    def _refusal(self, what: str, nbytes: int, short: int, enough: int = 0) -> DoesNotFit:
        needed, room = nbytes, max(0, nbytes - short)
        source = "are free now; close other programs"
        if self.given:
            needed, room = self._process_bytes + max(enough, self.total + short), self.allowed
            source = f"are allowed; raise `ram` to {-(-needed // 10**6)}MB"
        return DoesNotFit(
            f"{what} needs {format_bytes(needed)} of memory and {format_bytes(room)} {source} or take a smaller model"
        )

    # ------------------------------------------------------- shares; the lock is held but in _changes and _give_back

    @contextmanager
    def _changes(self) -> Iterator[None]:
        try:
            with self._changing:
                self._drop_returned()
                yield
        finally:
            self._settle()

    def _take(self, claim: _Claim) -> int:
        """Let a claim in, and the others yield to it. Otherwise how many bytes are missing, above 0."""
        with self._changes():
            self._claims[claim] = None
            short = self._taken(lambda one: one.least) - self.total
            try:
                if short <= 0:
                    self._share_out()
                    return 0
            except BaseException:  # Ctrl-C while others yield
                del self._claims[claim]
                self._share_out()
                raise
            del self._claims[claim]
            return short

    def _taken(self, share: Callable[[_Claim], int]) -> int:
        """What all claims have together, parts of others counted where they are more than those."""
        parts = Counter[_Claim | None]()
        for claim in self._claims:
            if claim.within in self._claims:
                parts[claim.within] += share(claim)
        return sum(max(share(claim), parts[claim]) for claim in self._claims if claim.within not in self._claims)

    def _within(self, claim: _Claim) -> int:
        with self._changes():
            return sum(one.nbytes for one in self._claims if one.within is claim)

    def _share_out(self) -> None:
        """Give elastic claims what is left, in proportion to what each could take."""
        span = sum(claim.most - claim.least for claim in self._claims)
        left = min(span, self.total - self._taken(lambda claim: claim.least))
        wanted = {claim: claim.least + left * (claim.most - claim.least) // max(span, 1) for claim in self._claims}
        for claim in sorted(wanted, key=lambda claim: wanted[claim] - claim.nbytes):  # those that yield come first
            if wanted[claim] != claim.nbytes:
                claim.nbytes = wanted[claim]
                if claim.resize:
                    claim.resize(claim.nbytes)

    def _give_back(self, claim: _Claim) -> None:
        """Runs where an owner is collected, which may be in the middle of what holds the lock: it waits for nobody."""
        self._returned.append(claim)
        self._settle()

    def _settle(self) -> None:
        """Take back what was returned. Where another has the lock, that one does when it lets go."""
        while self._returned and self._changing.acquire(blocking=False):
            try:
                self._drop_returned()
            finally:
                self._changing.release()

    def _drop_returned(self) -> None:
        if self._returned:
            while self._returned:
                self._claims.pop(self._returned.popleft(), None)
            self._share_out()


# --------------------------------------------------------------------------------------------------- the machine


def peak_rss() -> int:
    """The most memory this process has held, in bytes."""
    if sys.platform == "linux":  # whose getrusage counts the memory of the process that started this one too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows keeps count elsewhere
        import psutil

        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take now without anything being swapped out; a tenth is left to others.

    The least of what the machine has free, what the control groups that it is in leave it (those of a container or a
    service), and what its own limits do. `root` is where proc and sys are.
    """
    return max(0, free_memory(root)) * 9 // 10


def free_memory(root: Path = Path("/")) -> int:
    """As `available_memory`, and nothing is left to others; below zero where a limit is passed already.

    Raises:
        InputError: the system does not tell.
    """
    import psutil

    _require_proc()
    left = [left for _, left in (*memory_limits(root), *_limits())]
    return int(min([psutil.virtual_memory().available, *left]))


def machine_memory(root: Path = Path("/")) -> tuple[int, int | None]:
    """Bytes of memory that the machine has, and what control groups or limits of the process allow of them, if less.

    Raises:
        InputError: the system does not tell.
    """
    import psutil

    _require_proc()
    total = int(psutil.virtual_memory().total)
    allowed = min((limit for limit, _ in (*memory_limits(root), *_limits())), default=total)
    return total, allowed if allowed < total else None


def _require_proc() -> None:
    if sys.platform == "linux" and not _PROC.exists():
        raise InputError("/proc is not there, by which Linux tells of memory and cores; mount proc there")


def _limits() -> Iterator[tuple[int, int]]:
    """What the limits of this process allow and leave to it (`ulimit -v`, `ulimit -d`)."""
    if sys.platform != "linux":
        return  # macOS does not keep to them
    import resource

    import psutil

    memory = psutil.Process().memory_info()
    for kind, taken in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit, limit - taken

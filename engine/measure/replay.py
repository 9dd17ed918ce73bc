"""Which experts tokens took, written to a file, and what a cache of experts would have made of it.

A trace has the line "# E routed experts", then a line a token and layer, in the order of computing:

    position layer expert expert ...

Passes through the layers are set apart by empty lines. The tokens of a pass ask a layer together, as in
`ExpertStore.stream`: each of their experts counts once.
"""

from __future__ import annotations

import heapq
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from numoe.engine.experts.unit import Key
from numoe.engine.experts.uses import DecayedCounts
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import require_folder

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Parts of all experts that caches of the table hold."""


class RouteTrace:
    """Writes a trace; what `Model.trace_routes` takes. A context manager.

    Raises:
        InputError: there are no experts, or the file cannot be made or is there already.
    """

    def __init__(self, path: Path, experts: int):
        """`experts`: routed experts of all layers together."""
        if experts == 0:
            raise WrongUsage("the model has no routed experts to trace; leave out `trace`")
        require_folder(path)
        try:
            # Nobody else reads it, for it tells of what was asked.
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            kind = WrongUsage if isinstance(error, FileExistsError) else InputError
            raise kind(f"the trace {path} cannot be made ({error.strerror}); choose another name") from None
        self._file = os.fdopen(handle, "w", encoding="ascii")
        self._file.write(f"# {experts} routed experts\n")
        self._layer = -1

    def __call__(self, start: int, layer: int, chosen: NDArray[np.int64]) -> None:
        """The choice (T, K) of tokens from position `start` on."""
        if layer <= self._layer:
            self._file.write("\n")
        self._layer = layer
        for position, experts in enumerate(chosen.tolist(), start):
            self._file.write(f"{position} {layer} {' '.join(map(str, experts))}\n")

    def __enter__(self) -> RouteTrace:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class Trace:
    """experts: how many there are. accesses: each request for one, in order."""

    experts: int
    accesses: tuple[Key, ...]


def read_trace(path: Path) -> Trace:
    """Read what `RouteTrace` wrote.

    Raises:
        InputError: the file cannot be read or is something else.
    """
    try:
        if path.exists() and not path.is_file():
            raise WrongUsage(f"{path} is not a file; make a trace with `numoe run trace=FILE`")
        head, *lines = path.read_text(encoding="ascii").splitlines() or [""]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        refusal = WrongUsage if isinstance(error, FileNotFoundError) else InputError
        raise refusal(f"{path} cannot be read as a trace ({why}); make one with `numoe run trace=FILE`") from None
    count = re.fullmatch(r"# ([1-9]\d{0,8}) routed experts", head)
    if not count:
        raise InputError(f"{path} does not begin as a trace does; make one with `numoe run trace=FILE`")
    accesses: list[Key] = []
    taken: dict[Key, None] = {}  # of one request, in order
    before = None
    for number, line in enumerate([*lines, ""], 2):
        if line and not re.fullmatch(r"\d{1,9} \d{1,9}( \d{1,9})+", line):
            raise InputError(f"{path}: line {number} is not position, layer and experts; make the trace again")
        layer = int(line.split()[1]) if line else None
        if layer != before:
            accesses += taken
            taken.clear()
        before = layer
        if layer is not None:
            taken |= {(layer, int(expert)): None for expert in line.split()[2:]}
    if not accesses:
        raise InputError(f"{path} has no choices in it; make a longer trace")
    return Trace(int(count[1]), tuple(accesses))


def lru(accesses: Sequence[Key], capacity: int) -> int:
    """Hits of a cache that evicts what was used longest ago."""
    cache: OrderedDict[Key, None] = OrderedDict()
    hits = 0
    for key in accesses:
        if key in cache:
            hits += 1
            cache.move_to_end(key)
            continue
        if len(cache) == capacity:
            cache.popitem(last=False)
        cache[key] = None
    return hits


def lfu(accesses: Sequence[Key], capacity: int) -> int:
    """Hits of a cache that evicts what was used least often lately, as `ExpertStore` does."""
    counts = DecayedCounts(capacity)
    return _evicting_least(accesses, capacity, lambda time, key: counts.use(key))


def belady(accesses: Sequence[Key], capacity: int) -> int:
    """Hits of a cache that knows the future and evicts what is used again last (L. A. Belady, 1966): the most."""
    following = [math.inf] * len(accesses)
    last: dict[Key, int] = {}
    for time in range(len(accesses) - 1, -1, -1):
        following[time] = last.get(accesses[time], math.inf)
        last[accesses[time]] = time
    return _evicting_least(accesses, capacity, lambda time, key: -following[time])


def _evicting_least(accesses: Sequence[Key], capacity: int, worth: Callable[[int, Key], float]) -> int:
    """Hits of a cache that evicts what is worth least; worth(time, key) is asked at every access."""
    cache: dict[Key, float] = {}
    order: list[tuple[float, int, Key]] = []  # a heap that also holds earlier worths
    hits = 0
    for time, key in enumerate(accesses):
        value = worth(time, key)
        if key in cache:
            hits += 1
        elif len(cache) == capacity:
            while True:
                lowest, _, victim = heapq.heappop(order)
                if cache.get(victim) == lowest:
                    del cache[victim]
                    break
        cache[key] = value
        heapq.heappush(order, (value, time, key))
    return hits


def heat(trace: Trace) -> dict[int, list[int]]:
    """How often each expert was asked for, by layer; those after the last that was taken in any are left out."""
    counts = Counter(trace.accesses)
    most = max(expert for _, expert in counts)
    return {layer: [counts[layer, e] for e in range(most + 1)] for layer in sorted({layer for layer, _ in counts})}


POLICIES: dict[str, Callable[[Sequence[Key], int], int]] = {"lru": lru, "lfu": lfu, "belady": belady}


def replay(trace: Trace, shares: Sequence[float] = SHARES) -> list[dict[str, float]]:
    """For each share of the experts in memory, {"share", "experts", and each policy's hit rate}."""
    table: list[dict[str, float]] = []
    for share in shares:
        capacity = max(1, round(share * trace.experts))
        row: dict[str, float] = {"share": share, "experts": capacity}
        row |= {name: hits(trace.accesses, capacity) / len(trace.accesses) for name, hits in POLICIES.items()}
        table.append(row)
    return table

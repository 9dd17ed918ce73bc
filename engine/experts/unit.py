"""What is read for one expert of one layer, where it goes in a buffer, and the matrices that are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from numoe.quant.compute import workers
from numoe.quant.compute.memory import ALIGNMENT
from numoe.quant.compute.slots import Slots
from numoe.quant.dtypes import UInt8
from numoe.quant.files import PAGE, Extent, Files, joined
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import apart, fastest, settled
from numoe.quant.stored.handle import Stored

Key = tuple[int, int]
"""(layer, expert)."""

# Ranges of so many bytes have whole pages of the buffer, to be read past the system's cache.
_PAGED = 1 << 20
# Bytes between two ranges that are read through instead of starting another read, as a share of the unit.
_GAP_SHARE = 1 / 128


@dataclass(frozen=True)
class Unit:
    """What to read for an expert, and where it goes in a buffer of `buffer_bytes`."""

    runs: tuple[tuple[Extent, int], ...]
    """Ranges to read, and the place of each in the buffer."""
    matrices: Mapping[str, tuple[Stored, tuple[slice, ...]]]
    """gate, up and down: codes, scales and minimums in the buffer."""
    buffer_bytes: int
    decoded_bytes: int
    """Memory of the matrices that are made anew, from GGUF's block types for one."""
    keeps_buffer: bool
    """Whether some matrix is a view of the buffer."""
    by_columns: bool
    """Whether all are stored by columns: views of the buffer, which hold nothing of the values beside it."""

    def is_like(self, other: Unit) -> bool:
        """Whether the matrices that were made of the other in a buffer are this one's when it is read there."""
        if not (self.by_columns and other.by_columns and self.matrices.keys() == other.matrices.keys()):
            return False
        pairs = ((one, other.matrices[part]) for part, one in self.matrices.items())
        return all(places == at and _as_made(stored) == _as_made(like) for (stored, places), (like, at) in pairs)

    @property
    def needed(self) -> int:
        """Most memory it takes, which is while it is read."""
        return self.buffer_bytes + self.decoded_bytes

    @property
    def kept(self) -> int:
        """Memory it takes afterwards."""
        return self.decoded_bytes + (self.buffer_bytes if self.keeps_buffer else 0)


def _as_made(stored: Stored) -> tuple[object, ...]:
    """What a matrix by columns is made by, beside its bytes."""
    return type(stored), stored.format, stored.whole, [info.dtype for info in stored.parts]


@dataclass(eq=False)
class Buffer:
    """Memory that holds one unit after the other."""

    memory: UInt8
    empty_of: Slots | None = None
    """Whose slot it is, while that may have no memory yet."""
    _unit: Unit | None = None
    """The one whose matrices these are; what they hold may be another's, like it, by now."""
    _matrices: dict[str, QTensor] = field(default_factory=dict)

    def read(self, unit: Unit, files: Files, *, check: bool, stay: bool) -> dict[str, QTensor]:
        """A unit's matrices by part, read to here or made of what was.

        Args:
            check: whether NaN and infinite weights are looked for.
            stay: whether they are never evicted.

        Raises InputError when a file cannot be read, ends too soon or holds NaN.
        """
        if self.empty_of:
            self.empty_of.populate(self.memory)
            self.empty_of = None
        for extent, at in unit.runs:
            if stay:  # nothing is read again, but perhaps by another start
                files.read_range(*extent, out=self.memory[at : at + extent.nbytes])
            else:
                read_once(files, extent, self.memory, at)
        if not check and self._unit and unit.is_like(self._unit):
            return dict(self._matrices)  # made anew they take Python 0.2 ms, for which what computes has to wait
        read = {
            part: stored.assemble([self.memory[place] for place in places], check=check)
            for part, (stored, places) in unit.matrices.items()
        }
        matrices = {part: fastest(matrix) for part, matrix in read.items()}
        if not unit.keeps_buffer:
            return {part: settled(matrix) for part, matrix in matrices.items()} if stay else apart(matrices)
        if not stay:
            workers.know_placed(matrices.values())
            self._unit, self._matrices = unit, matrices
        return dict(matrices)


def read_once(files: Files, extent: Extent, buffer: UInt8, at: int) -> None:
    """Read a range to its place in a buffer, as `lay_out` gave it one; the system keeps no copy where it listens."""
    if extent.nbytes >= _PAGED:
        files.read_once(*extent, buffer[at - at % PAGE : _page_end(at + extent.nbytes)])
    else:
        files.read_range(*extent, out=buffer[at : at + extent.nbytes])
        files.drop_cached(*extent)


def _page_end(at: int) -> int:
    return -(-at // PAGE) * PAGE


def lay_out(stored: Mapping[str, Stored]) -> Unit:
    """Where the matrices of an expert lie in one buffer.

    Raises:
        InputError: a matrix is of a type that cannot be multiplied with.
    """
    extents = {part: one.extents() for part, one in stored.items()}
    flat = {extent for parts in extents.values() for extent in parts}
    gap = int(_GAP_SHARE * sum(extent.nbytes for extent in flat))
    runs, used = [], 0
    for run in joined(flat, gap):
        if run.nbytes < _PAGED:
            used += (run.offset - used) % ALIGNMENT  # as aligned as in the file
            runs.append((run, used))
            used += run.nbytes
        else:
            runs.append((run, _page_end(used) + run.offset % PAGE))
            used = _page_end(runs[-1][1] + run.nbytes)

    def place(extent: Extent) -> slice:
        for run, at in runs:
            first = at + extent.offset - run.offset
            if run.path == extent.path and at <= first < at + run.nbytes:
                return slice(first, first + extent.nbytes)
        raise AssertionError("every range is part of a run")

    matrices = {part: (stored[part], tuple(map(place, parts))) for part, parts in extents.items()}
    decoded = sum(one.read_nbytes for one in stored.values() if not one.stays_as_read)
    keeps = any(one.stays_as_read for one in stored.values())
    by_columns = all(one.laid_out and one.picked is None for one in stored.values())
    return Unit(tuple(runs), matrices, used, decoded, keeps, by_columns)

"""Memory that workers see as it is now, and how a matrix that lies in it is told to them."""

from __future__ import annotations

import ctypes
import io
import itertools
import math
import mmap
import os
import pickle
import sys
import weakref
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numoe.quant.compute.memory import ALIGNMENT, aligned
from numoe.quant.dtypes import UInt8

_HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25  # of Linux's mman.h, since 6.1: make huge pages of a range now, whatever the default is
_WHOLE_PAGES = 16 * mmap.PAGESIZE  # slots of so many bytes begin with a page; the rest of the last is little of them


class Slots:
    """Memory for what comes and goes, in slots that workers see as they are now, if they were born after its region.

    A slot that was given back has no memory until it is taken again.
    """

    def __init__(self, region: int):
        """region: bytes of addresses that are taken at once; workers have to be born again for each."""
        self._region = region
        self._addresses: UInt8 = np.empty(0, np.uint8)
        self._taken = 0
        self._free: dict[int, list[UInt8]] = {}
        self._given_back: set[int] = set()  # addresses of slots, of which some may be taken again

    def take(self, nbytes: int) -> UInt8:
        """A slot, uninitialised."""
        if free := self._free.get(nbytes):
            return free.pop()
        if sys.platform != "linux":  # there are no workers
            return aligned(nbytes)
        step = mmap.PAGESIZE if nbytes >= _WHOLE_PAGES else ALIGNMENT
        before = -self._taken % step
        if self._taken + before + nbytes > len(self._addresses):
            self._addresses = _new_region(max(nbytes, self._region))
            self._taken = before = 0
        slot = self._addresses[self._taken + before :][:nbytes]
        self._taken += before + nbytes
        return slot

    def give_back(self, slot: UInt8) -> None:
        """Have the system take the memory of a slot that nobody uses any more."""
        if place := Place.of(slot):
            self._given_back.add(_regions[place.region].start + place.offset)
            first = -(-place.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (place.offset + len(slot) - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if whole > 0:
                _memory(place).madvise(mmap.MADV_REMOVE, first, whole)
            self._free.setdefault(len(slot), []).append(slot)

    def populate(self, slot: UInt8) -> None:
        """Give a slot that was taken its memory: in huge pages, where the system can, into which disks read and of
        which products read in fewer pieces. Else it gets it when it is written to. Other threads go on meanwhile.
        """
        place = Place.of(slot)
        if place is None:
            return
        region = _regions[place.region]
        first = place.offset + -(region.start + place.offset) % _HUGE_PAGE
        # The last page is the next slot's as well, which has all of its own then. But that may have been given back.
        again = region.start + place.offset in self._given_back
        end = place.offset + len(slot) if again else region.nbytes
        pages = range(first, min(place.offset + len(slot), end - _HUGE_PAGE + 1), _HUGE_PAGE)
        for page in pages:
            _memory(place)[page] = 0  # a page must have some memory to be made a huge one
        if pages:
            start, nbytes = ctypes.c_void_p(region.start + first), ctypes.c_size_t(len(pages) * _HUGE_PAGE)
            ctypes.CDLL(None).madvise(start, nbytes, _MADV_COLLAPSE)  # mmap's own would have Python stand still


class _Region(NamedTuple):
    memory: weakref.ref[mmap.mmap]
    start: int
    nbytes: int


class Place(NamedTuple):
    """Where an array lies in a region, the same in this process and in those born after the region."""

    region: int
    """Its number: regions are numbered as they are taken."""
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, values: NDArray[Any]) -> Place | None:
        """None for what lies elsewhere, or not row after row."""
        start = values.__array_interface__["data"][0]
        for number, region in _regions.items():
            if 0 <= start - region.start < region.nbytes and values.flags.c_contiguous:
                return cls(number, start - region.start, values.shape, values.dtype.str)
        return None

    def array(self) -> NDArray[Any]:
        """What lies there."""
        count = math.prod(self.shape)
        return np.frombuffer(_memory(self), self.dtype, count, self.offset).reshape(self.shape)


def _array(*place: Any) -> NDArray[Any]:
    return Place(*place).array()


_regions: dict[int, _Region] = {}
_numbers = itertools.count()


def regions() -> int:
    """The number of the next region: those before it are seen by workers that are born now."""
    return max(_regions, default=-1) + 1


def _memory(place: Place) -> mmap.mmap:
    memory = _regions[place.region].memory()
    assert memory is not None, "who has an array of a region keeps it"
    return memory


def _new_region(nbytes: int) -> UInt8:
    memory = _mapped(nbytes)
    region = np.frombuffer(memory, np.uint8)
    number = next(_numbers)
    _regions[number] = _Region(weakref.ref(memory), _start(memory), nbytes)
    weakref.finalize(memory, _regions.pop, number)
    return region


def _mapped(nbytes: int) -> mmap.mmap:
    """Memory that is shared with processes born later, and may lie in huge pages where the system can."""
    if nbytes < 2 * _HUGE_PAGE:
        return mmap.mmap(-1, nbytes)
    with suppress(OSError, AttributeError):  # a limit on the size of files, a sandbox, no such call
        file = os.memfd_create("numoe-slots")
        try:
            os.ftruncate(file, nbytes + _HUGE_PAGE)
            offset = 0
            for _ in range(4):
                memory = mmap.mmap(file, nbytes, offset=offset)
                # Huge pages begin with a multiple of their size both in memory and in the file.
                if (found := _start(memory) % _HUGE_PAGE) == offset:
                    return memory
                memory.close()  # the next one will begin at the same address, if no thread takes it meanwhile
                offset = found
        finally:
            os.close(file)
    return mmap.mmap(-1, nbytes)


def _start(memory: mmap.mmap) -> int:
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address


_told = itertools.count()


def told(matrix: Any) -> tuple[int, bytes] | None:
    """How many regions a worker must have been born with to see a matrix, a dataclass, and what `found` makes it of.

    None where an array of it lies in this process's own memory.
    """
    file = io.BytesIO()
    teller = _Teller(file)
    try:
        # The number tells it from what will lie there later, which a worker must not think to be this.
        teller.dump((next(_told), type(matrix), {one.name: getattr(matrix, one.name) for one in fields(matrix)}))
    except _Elsewhere:
        return None
    return teller.regions, file.getvalue()


def found(description: bytes) -> Any:
    """The matrix that `told` has described."""
    _, kind, values = pickle.loads(description)
    return kind(**values)


class _Teller(pickle.Pickler):
    """A matrix, with the places of its arrays instead of what they hold."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.regions = 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        place = Place.of(value)
        if place is None:
            raise _Elsewhere
        self.regions = max(self.regions, place.region + 1)
        return _array, tuple(place)


class _Elsewhere(Exception):
    """An array of a matrix lies in this process's own memory."""

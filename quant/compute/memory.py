"""Memory for what is read often, aligned: weights that stay, what changes unseen by workers, and scratch."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.dtypes import UInt8

ALIGNMENT = 64
"""Bytes of a cache line. What does not begin with one, BLAS multiplies up to a fifth more slowly."""

HUGE = 1 << 22
"""Arrays of so many bytes NumPy asks the system to hold in huge pages. Reading weights is a tenth faster then: the
processor fetches ahead within a page only, and looks up fewer of them."""

_PIECE = 1 << 25
_M_ARENA_MAX = -8  # of glibc's malloc.h
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's flag for memory that counts once it is written to, which older Pythons do not name."""
_taking = threading.Lock()
_rest: UInt8 = np.empty(0, np.uint8)


def lasting(nbytes: int) -> UInt8:
    """Uninitialised memory for weights, in huge pages also where it is little.

    It comes out of pieces that are free again when all that was taken from them is.
    """
    global _rest
    if nbytes >= HUGE:
        return aligned(nbytes)
    with _taking:
        if len(_rest) < nbytes:
            _rest = aligned(_PIECE)
        taken, _rest = _rest[:nbytes], _rest[-(-nbytes // ALIGNMENT) * ALIGNMENT :]
        return taken


def share_free_memory() -> None:
    """Have threads that begin from now on take free memory from each other, where the C library is glibc: each would
    keep as much as it ever needed at a time, though but one of them needs it."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # of other C libraries, which do so anyway
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def unshared(nbytes: int) -> UInt8:
    """Uninitialised memory for what changes, which workers do not see.

    Otherwise the first change of every page would copy it, for a worker to keep what there was at its birth.
    """
    if sys.platform != "linux":
        return aligned(nbytes)
    return np.frombuffer(_unshared(nbytes, nbytes >= HUGE), np.uint8)[:nbytes]


def _unshared(nbytes: int, huge: bool, flags: int = 0) -> mmap.mmap:
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    memory.madvise(mmap.MADV_DONTFORK)
    if huge:
        with suppress(OSError):  # of kernels without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Pieces:
    """Equal pieces of unshared memory, evenly spaced, so that NumPy reaches the same place of several in one call.

    Pages are there once they are written to, zero at first; the system has them back when nothing refers to a piece.
    """

    def __init__(self, nbytes: int, count: int, huge: bool):
        """Room for `count` pieces of so many bytes, or for one where the system has no addresses to spare, or takes no
        pages back. huge: in huge pages."""
        pages = -(-nbytes // mmap.PAGESIZE)
        self._spacing = (pages + 1 - pages % 2) * mmap.PAGESIZE  # odd: places alike fall on other lines of the cache
        self._memory: Any
        if sys.platform != "linux":
            count, self._memory = 1, aligned(self._spacing)
            self._memory[:] = 0
        else:
            try:
                self._memory = _unshared(count * self._spacing, huge, _NORESERVE)
            except OSError:  # under a limit on addresses
                count, self._memory = 1, _unshared(self._spacing, huge)
        self._free = list(range(count))
        self._taking = threading.Lock()

    def take(self) -> tuple[int, UInt8] | None:
        """The first piece that is free, after its number. It is taken as long as the array or a view of it is there."""
        with self._taking:
            if not self._free:
                return None
            number = min(self._free)
            self._free.remove(number)
        piece: UInt8 = np.ndarray(self._spacing, np.uint8, self._memory, number * self._spacing)
        weakref.finalize(piece, self._give_back, number).atexit = False
        return number, piece

    def _give_back(self, number: int) -> None:
        if isinstance(self._memory, mmap.mmap):
            self._memory.madvise(mmap.MADV_DONTNEED, number * self._spacing, self._spacing)
        self._free.append(number)

    def across(
        self, first: int, stop: int, offset: int, dtype: type, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> NDArray[Any]:
        """What lies so many bytes into each of the pieces first..stop: (stop - first, *shape)."""
        place, spaced = first * self._spacing + offset, (self._spacing, *strides)
        return np.ndarray((stop - first, *shape), dtype, self._memory, place, spaced)


class _Scratch(threading.local):
    """Buffers of one thread by use, and the views of them that were asked for."""

    def __init__(self) -> None:
        self.buffers: dict[str, NDArray[Any]] = {}
        self.views: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}


_scratch = _Scratch()


def scratch(use: str, shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
    """Uninitialised memory for one use at a time on this thread, kept for the next; a use has one dtype."""
    view = _scratch.views.get((use, shape))
    if view is None:
        size = math.prod(shape)
        held = _scratch.buffers.get(use)
        if held is None or held.size < size:
            nbytes = size * np.dtype(dtype).itemsize
            held = _scratch.buffers[use] = aligned(nbytes).view(dtype)
            _scratch.views = {key: old for key, old in _scratch.views.items() if key[0] != use}
        view = _scratch.views[use, shape] = held[:size].reshape(shape)
    return view


def aligned(nbytes: int) -> UInt8:
    """Uninitialised memory that begins with a cache line."""
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % ALIGNMENT :][:nbytes]

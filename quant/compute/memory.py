"""Memory for what is read often, aligned: weights that stay, what changes unseen by workers, and scratch."""

from __future__ import annotations

import math
import mmap
import sys
import threading
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


def unshared(nbytes: int) -> UInt8:
    """Uninitialised memory for what changes, which workers do not see.

    Otherwise the first change of every page would copy it, for a worker to keep what there was at its birth.
    """
    if sys.platform != "linux":
        return aligned(nbytes)
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    if nbytes >= HUGE:
        with suppress(OSError):  # of kernels without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:nbytes]


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

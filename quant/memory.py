"""Memory for what is read often: weights that stay where they are, and what changes under the eyes of no worker."""

from __future__ import annotations

import mmap
import sys
import threading
from contextlib import suppress
from dataclasses import fields, replace

import numpy as np

from numoe.quant.dtypes import UInt8
from numoe.quant.qtensor import QTensor

HUGE = 1 << 22
"""Arrays of so many bytes NumPy asks the system to hold in huge pages. Reading weights is a tenth faster then: the
processor fetches ahead within a page only, and looks up fewer of them."""

_ALIGNMENT = 64
_PIECE = 1 << 25
_taking = threading.Lock()
_rest: UInt8 = np.empty(0, np.uint8)


def lasting(nbytes: int) -> UInt8:
    """Uninitialised memory for weights, in huge pages also where it is little.

    It comes out of pieces that are free again when all that was taken from them is.
    """
    global _rest
    if nbytes >= HUGE:
        return np.empty(nbytes, np.uint8)
    with _taking:
        if len(_rest) < nbytes:
            piece = np.empty(_PIECE, np.uint8)
            _rest = piece[-piece.ctypes.data % _ALIGNMENT :]
        taken, _rest = _rest[:nbytes], _rest[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
        return taken


def unshared(nbytes: int) -> UInt8:
    """Uninitialised memory for what changes, which workers do not see.

    Otherwise the first change of every page would copy it, for a worker to keep what there was at its birth.
    """
    if sys.platform != "linux":
        return np.empty(nbytes, np.uint8)
    memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    if nbytes >= HUGE:
        with suppress(OSError):  # of kernels without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:nbytes]


def settled(matrix: QTensor) -> QTensor:
    """The same matrix, which is to stay, in memory where it is read fastest."""
    copies = {}
    for one in fields(matrix):  # type: ignore[arg-type]
        values = getattr(matrix, one.name)
        if isinstance(values, np.ndarray) and values.nbytes < HUGE:
            copies[one.name] = lasting(values.nbytes).view(values.dtype).reshape(values.shape)
            np.copyto(copies[one.name], values)
    return replace(matrix, **copies)  # type: ignore[type-var]

"""Threads of our own over parts of a matmul; NumPy's BLAS keeps to one.

BLAS libraries spin at a barrier in every call, which on a machine with other work to do costs many times what the
second core gains. Here a matrix is cut into parts that do not depend on the number of threads, each part is
computed by one thread, and so is every digit of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_count = 1
_pool: ThreadPoolExecutor | None = None


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use(count: int) -> None:
    """Compute with so many threads from now on, in this process; BLAS calls get one each."""
    from threadpoolctl import threadpool_limits

    global _count, _pool
    threadpool_limits(1, user_api="blas")
    if count != _count:
        if _pool:
            _pool.shutdown()
        _pool = ThreadPoolExecutor(count - 1, "numoe") if count > 1 else None
        _count = count


def in_use() -> int:
    """How many threads compute."""
    return _count


def share(parts: int, work: Callable[[int], None]) -> None:
    """Call work(0) ... work(parts - 1), spread over the threads; raises what they raise."""
    pool, count = _pool, min(_count, parts)
    if pool is None or count <= 1:
        for part in range(parts):
            work(part)
        return

    def turn(first: int) -> None:
        for part in range(first, parts, count):
            work(part)

    others = [pool.submit(turn, first) for first in range(1, count)]
    try:
        turn(0)
    finally:
        # Even when this thread fails: the others still write to the caller's memory.
        failed = [error for other in others if (error := other.exception())]
    if failed:
        raise failed[0]

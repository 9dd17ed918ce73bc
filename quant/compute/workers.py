"""Processes that share products of few tokens with this one.

Such a product is a row of short NumPy calls, and threads would hand Python's lock to each other at every one of them,
which takes longer than the second core gains. A worker is a fork of this process: it sees the matrices that were there
at its birth without a copy of them, and what is multiplied and what comes out through memory that both share.

All build the same list of tasks, and each does those that nobody has begun. So no digit depends on the number of
workers, and one that the system lets wait holds up no more than the task it has begun.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import marshal
import mmap
import os
import re
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from numoe.quant.compute import threads
from numoe.quant.compute.activations import Activations, Rows
from numoe.quant.compute.kernels import block_elements
from numoe.quant.compute.slots import found, regions, told
from numoe.quant.compute.threads import Task
from numoe.quant.dtypes import Float32
from numoe.quant.errors import InputError


class Multiplied(Protocol):
    """A matrix as its product needs it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def products(self, x: Activations, out: Float32) -> list[Task]: ...


Product = tuple[Multiplied, Activations, Float32]
"""A matrix, x, and where x @ W.T goes."""

# Shared memory: numbers (the job's, of each worker whether it is in it and whether it sleeps, the message's length, and
# whether all are to sleep), a byte a task for begun and for done, the message itself, then the values.
_JOB, _IN, _ASLEEP, _LENGTH, _REST = 0, 1, 65, 129, 130
_MOST_WORKERS, _MOST_TASKS = 64, 1 << 12
_MOST_PLACED = 1 << 10  # matrices of slots that a worker does not look for anew
_BEGUN = 8 * 131
_DONE = _BEGUN + _MOST_TASKS
_MESSAGE = _DONE + _MOST_TASKS
_VALUES = 1 << 20
_NBYTES = 1 << 26  # of addresses; memory is taken as it is written to

_AWAKE_SECONDS = 0.002  # a worker looks for the next job so long before it sleeps; to wake it takes some 50 us
_fences = threading.Lock(), threading.Lock()


def _fence() -> None:
    """What was written before is seen before what is written from now on, and nothing is read ahead of it."""
    for lock in _fences:
        lock.acquire()
        lock.release()


class _Shared:
    """The memory, and both sides' view of a job."""

    def __init__(self) -> None:
        from multiprocessing import get_context  # takes its time, and most commands never come here

        self._claims = get_context("fork").Lock()
        self.bytes = mmap.mmap(-1, _NBYTES)
        self.numbers = memoryview(self.bytes)[:_BEGUN].cast("q")
        self.values = np.frombuffer(self.bytes, np.float32)

    def at(self, place: int, rows: int, columns: int) -> Float32:
        return self.values[place : place + rows * columns].reshape(rows, columns)

    def work(self, tasks: Sequence[Task], first: int, check: Callable[[], None]) -> None:
        """Do those of a job's tasks, which are numbered from `first` on, that nobody has begun. `check` raises if
        another process is gone."""
        shared = self.bytes
        for index, task in enumerate(tasks, first):
            if not shared[_BEGUN + index] and self._claim(index, check):
                task()
                _fence()
                shared[_DONE + index] = 1

    def all_set(self, flags: int, first: int, stop: int) -> bool:
        """Whether all tasks first..stop are begun, or done."""
        return self.bytes.find(b"\0", flags + first, flags + stop) < 0

    def _claim(self, index: int, check: Callable[[], None]) -> bool:
        """Whether nobody has begun a task before."""
        while not self._claims.acquire(timeout=0.1):  # somebody holds it, for a moment if alive
            check()
        free = not self.bytes[_BEGUN + index]
        self.bytes[_BEGUN + index] = 1
        self._claims.release()
        return free


class _Pool:
    """Workers that know some matrices."""

    def __init__(self, count: int, matrices: dict[int, weakref.ref[Multiplied]]):
        self.members = matrices
        self.regions = regions()
        self.block = block_elements()
        """What its tasks go by, as this process's do."""
        self._shared = _Shared()
        self._job = 0
        self.pids: list[int] = []
        self._bells: list[int] = []
        gc.collect()
        with suppress(AttributeError):  # of C libraries other than glibc
            ctypes.CDLL(None).malloc_trim(0)  # free memory would be kept for the workers once it is written to
        try:
            for index in range(count):
                self._start(index)
        except BaseException:
            self.close()
            raise

    def _start(self, index: int) -> None:
        read, write = os.pipe()
        self._bells.append(write)
        with warnings.catch_warnings():
            # Newer Pythons warn that other threads may hold locks; a worker takes none that they know.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            self._serve(index, read)
        self.pids.append(pid)
        os.close(read)

    def __len__(self) -> int:
        return len(self.pids)

    def agrees(self, count: int, products: Sequence[Product]) -> bool:
        """Whether it has so many workers, which know these matrices and make the same tasks of them as this process."""
        same = len(self) == count and self.block == block_elements()
        return same and _all_in(self.members, products, self.regions)

    def rest(self) -> None:
        """Have the workers sleep until there is a job."""
        self._shared.numbers[_REST] = 1

    def close(self) -> None:
        """End the workers, at once."""
        for bell in self._bells:
            os.close(bell)
        for pid in self.pids:
            with suppress(ProcessLookupError, ChildProcessError):  # some may have been ended from outside
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def multiply(self, products: Sequence[Product]) -> bool:
        """Do all products; False, and nothing, if that is but one task, or more than the memory holds."""
        shared, numbers = self._shared, self._shared.numbers
        place = _VALUES // 4
        bases: dict[int, int] = {}
        described = []
        given: list[tuple[int, int, int]] = []
        values = []
        tasks: list[list[Task]] = []
        results = []
        # The largest come first, so that no long task is left when all others are done.
        for matrix, x, out in sorted(products, key=_multiplications, reverse=True):
            whole = x.whole
            if id(whole) not in bases:
                bases[id(whole)] = len(given)
                given.append((place, *whole.x.shape))
                values.append(whole.x)
                place += whole.x.size
            if place + out.size > shared.values.size:
                return False
            which = id(matrix) if _is_member(matrix, self.members) else _placed[id(matrix)].told
            result = shared.at(place, *out.shape)
            tasks.append(matrix.products(x, result))
            described.append((which, bases[id(whole)], _told(x.rows), place, len(out), len(tasks[-1])))
            results.append((result, out))
            place += out.size
        message = marshal.dumps((given, described))
        spans = list(pairwise(accumulate(map(len, tasks), initial=0)))
        count = spans[-1][1]
        if not 2 <= count <= _MOST_TASKS or len(message) > _VALUES - _MESSAGE:
            return False
        for base, given_values in zip(given, values, strict=True):
            np.copyto(shared.at(*base), given_values)
        shared.bytes[_BEGUN : _BEGUN + count] = bytes(count)
        shared.bytes[_DONE : _DONE + count] = bytes(count)
        shared.bytes[_MESSAGE : _MESSAGE + len(message)] = message
        numbers[_LENGTH] = len(message)
        self._job += 1
        numbers[_REST] = 0
        _fence()
        numbers[_JOB] = self._job
        _fence()
        for index, bell in enumerate(self._bells):
            if numbers[_ASLEEP + index]:
                with suppress(BrokenPipeError):  # of a worker that was ended, which the next check finds
                    os.write(bell, b"!")
        for own, (first, _) in zip(tasks, spans, strict=True):
            shared.work(own, first, self._check)
        for (result, out), span in zip(results, spans, strict=True):
            self._wait(partial(shared.all_set, _DONE, *span))
            _fence()
            np.copyto(out, result)
        numbers[_JOB] = 0
        _fence()
        self._wait(lambda: not any(numbers[_IN : _IN + len(self.pids)]))
        return True

    def _wait(self, over: Callable[[], bool]) -> None:
        for _ in range(1000):
            if over():
                return
            os.sched_yield()
        looked = time.monotonic()
        while not over():
            time.sleep(0)  # takes longer, and lets other threads of this process go on
            if time.monotonic() > looked + 0.1:
                looked = time.monotonic()
                self._check()

    def _check(self) -> None:
        for pid in self.pids:
            # Left for `close` to collect: until then no other process can get its number.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise InputError(
                    "a process that computes for numoe was ended from outside; start again, with a smaller `ram` if "
                    "memory was short"
                )

    # ---------------------------------------------------------------------------------------- in the worker

    def _serve(self, index: int, bell: int) -> NoReturn:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            gc.disable()  # it would touch, and so copy, what is shared
            _close_all_but(bell)
            self._matrices = {key: matrix for key, ref in self.members.items() if (matrix := ref()) is not None}
            self._understood = lru_cache(_MOST_PLACED)(found)
            self._loop(index, bell)
            code = 0
        finally:
            os._exit(code)

    def _loop(self, index: int, bell: int) -> None:
        numbers = self._shared.numbers
        parent = os.getppid()

        def check() -> None:
            if os.getppid() != parent:
                os._exit(1)

        last = 0
        awake = time.perf_counter() + _AWAKE_SECONDS
        while True:
            for _ in range(50):
                job = numbers[_JOB]
                if job and job != last:
                    break
            else:
                if time.perf_counter() < awake and not numbers[_REST]:
                    continue
                numbers[_ASLEEP + index] = 1
                _fence()
                if numbers[_JOB] in (0, last) and not os.read(bell, 1):
                    return  # the other process is gone
                numbers[_ASLEEP + index] = 0
                awake = time.perf_counter() + _AWAKE_SECONDS
                continue
            numbers[_IN + index] = 1
            _fence()
            if numbers[_JOB] == job:
                self._work(check)
                last = job
            numbers[_IN + index] = 0
            awake = time.perf_counter() + _AWAKE_SECONDS

    def _work(self, check: Callable[[], None]) -> None:
        """Do what is left of the job, product after product: the first is begun before the others are looked at."""
        shared = self._shared
        length = shared.numbers[_LENGTH]
        given, described = marshal.loads(shared.bytes[_MESSAGE : _MESSAGE + length])
        bases = [Activations(shared.at(*base)) for base in given]
        first = 0
        for which, base, rows, place, tokens, tasks in described:
            if not shared.all_set(_BEGUN, first, first + tasks):
                matrix = self._matrices[which] if isinstance(which, int) else self._understood(which)
                x = bases[base] if rows is None else bases[base].take(_understood(rows))
                shared.work(matrix.products(x, shared.at(place, tokens, matrix.shape[0])), first, check)
            first += tasks


def _multiplications(product: Product) -> int:
    matrix, x, _ = product
    return len(x) * matrix.shape[0] * matrix.shape[1]


def _told(rows: Rows | None) -> tuple[int, int] | bytes | None:
    """Which rows were taken, as a message holds it."""
    if rows is None:
        return None
    return (rows.start, rows.stop) if isinstance(rows, slice) else np.asarray(rows, np.int64).tobytes()


def _understood(told: tuple[int, int] | bytes) -> Rows:
    return slice(*told) if isinstance(told, tuple) else np.frombuffer(told, np.int64)


def _close_all_but(kept: int) -> None:
    """A worker keeps no file, lock or terminal open that this process closes."""
    os.closerange(0, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


class _Placed(NamedTuple):
    """A matrix whose arrays lie in regions that workers may share: it needs no worker that was born after it."""

    ref: weakref.ref[Multiplied]
    regions: int
    """Workers see it if they were born when there were so many."""
    told: bytes


_placed: dict[int, _Placed] = {}
_known: dict[int, weakref.ref[Multiplied]] = {}
_pool: _Pool | None = None
_possible = sys.platform == "linux"
_one_at_a_time = threading.Lock()


def know(matrices: Iterable[Multiplied]) -> None:
    """Have products with these matrices shared, which must not change any more. They are not kept alive."""
    for matrix in matrices:
        key = id(matrix)
        _known[key] = weakref.ref(matrix, lambda ref, key=key: _forget(key, ref))  # type: ignore[misc]


def know_placed(matrices: Iterable[Multiplied]) -> None:
    """The same for matrices in `Slots`, which may come and go while workers live; others stay unknown."""
    for matrix in matrices:
        if description := told(matrix):
            key = id(matrix)
            ref = weakref.ref(matrix, lambda ref, key=key: _forget(key, ref))  # type: ignore[misc]
            _placed[key] = _Placed(ref, *description)


def _forget(key: int, ref: weakref.ref[Multiplied]) -> None:
    if (placed := _placed.get(key)) and placed.ref is ref:
        del _placed[key]
    if _known.get(key) is ref:
        del _known[key]
    # Workers that hold on to the memory of a matrix end with it, if not in the middle of a product with others.
    if _pool and _pool.members.get(key) is ref and _one_at_a_time.acquire(blocking=False):
        try:
            _end()
        finally:
            _one_at_a_time.release()


def multiply(products: Sequence[Product]) -> bool:
    """Do all products together with the workers, as many as `threads.use` was told less this process.

    False, and nothing is done, where there are none: with one thread, on systems without fork or that refuse one, for
    matrices that are not `know`n, and when another thread is at it.
    """
    global _pool, _possible
    count = min(threads.in_use() - 1, _MOST_WORKERS)
    if count < 1 or not _possible or not _one_at_a_time.acquire(blocking=False):
        return False
    try:
        if not (_pool and _pool.agrees(count, products)):
            if not _all_in(_known, products, regions()):
                return False
            _end()
            try:
                _pool = _Pool(count, dict(_known))
            except OSError:  # no more processes, or no shared memory: threads do the same more slowly
                _possible = False
                return False
        return _pool.multiply(products)
    except BaseException:
        _end()  # what it left half done goes with it
        raise
    finally:
        _one_at_a_time.release()


@threads.before_sharing
def _rest() -> None:
    """Leave the cores to threads."""
    if pool := _pool:
        pool.rest()


def _is_member(matrix: Multiplied, members: dict[int, weakref.ref[Multiplied]]) -> bool:
    """Whether it is there itself, and not one before it that had the same id."""
    ref = members.get(id(matrix))
    return ref is not None and ref() is matrix


def _all_in(members: dict[int, weakref.ref[Multiplied]], products: Sequence[Product], regions_seen: int) -> bool:
    def known(matrix: Multiplied) -> bool:
        if _is_member(matrix, members):
            return True
        placed = _placed.get(id(matrix))
        return placed is not None and placed.ref() is matrix and placed.regions <= regions_seen

    return all(known(matrix) for matrix, _, _ in products)


def private_bytes() -> int:
    """Memory of the workers that they do not share with this process."""
    total = 0
    for pid in _pool.pids if _pool else ():
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            total += sum(1024 * int(kb) for kb in re.findall(r"^Private_\w+:\s*(\d+) kB$", rollup, re.MULTILINE))
    return total


@atexit.register
def _end() -> None:
    global _pool
    if _pool:
        pool, _pool = _pool, None
        pool.close()


def _after_fork() -> None:
    global _pool
    _pool = None  # its workers belong to the process that was copied


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

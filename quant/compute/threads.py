"""Threads of our own over parts of the work; NumPy's BLAS keeps to one.

BLAS libraries spin at a barrier in every call, which on a machine with other work to do costs many times what the
second core gains. Here work is cut into parts that do not depend on the number of threads, each part is computed by
one thread, and so is every digit of the result.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue

from numoe.quant.compute import groups

Task = Callable[[], None]


class _Job:
    """Tasks that several threads take from one end, and the errors of those that failed."""

    def __init__(self, tasks: Iterable[Task]):
        self.waiting = deque(tasks)
        self.errors: list[BaseException] = []
        self.entered: list[None] = []  # one for each helper that may take tasks
        self.left: SimpleQueue[None] = SimpleQueue()  # one for each that has ended

    def work(self) -> None:
        while True:
            try:
                task = self.waiting.popleft()
            except IndexError:
                return
            try:
                task()
            except BaseException as error:
                self.errors.append(error)

    def help(self) -> None:
        self.entered.append(None)  # before the first task is taken: who sees none waiting knows all who took some
        self.work()
        self.left.put(None)


_AVX512 = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS' names for them, whoever made the processor
_WORTH = 1 << 21  # multiplications; for fewer, having others help takes longer than it gains
_count = 1
_small_products = False
_jobs: SimpleQueue[_Job | None] = SimpleQueue()
_before_sharing: list[Task] = []
_helper = threading.local()


def usable_cores(root: Path = groups.ROOT) -> int:
    """Cores that this process may run on, as many as its control groups give it time for.

    `root` is where proc and sys are.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([there, *(round(cores) for cores in groups.cores_left(root))]))


def use(count: int) -> None:
    """Compute with so many threads from now on, in this process; BLAS calls get one each."""
    from threadpoolctl import ThreadpoolController

    global _count, _small_products
    libraries = ThreadpoolController()
    libraries.limit(limits=1, user_api="blas")
    # Looked up here, not at the first product: that may be a worker's, which takes no lock it was born with.
    _small_products = any(library.get("architecture") in _AVX512 for library in libraries.info())
    for _ in range(count - _count):
        threading.Thread(target=_help, name="numoe", daemon=True).start()
    for _ in range(_count - count):
        _jobs.put(None)
    _count = count


def blas_has_small_products() -> bool:
    """Whether NumPy's BLAS leaves the operands of small products as they are, which is several times as fast as
    rearranging them: OpenBLAS where it uses AVX-512 (kernel/x86_64/sgemm_small_kernel_permit_skylakex.c there).

    False until `use` has looked.
    """
    return _small_products


def _help() -> None:
    _helper.busy = True
    while (job := _jobs.get()) is not None:
        job.help()
        del job  # holds on to arrays


def in_use() -> int:
    """How many threads compute."""
    return _count


def before_sharing(leave: Task) -> Task:
    """Have this called before threads share tasks: who else is awake on their cores then leaves these to them."""
    _before_sharing.append(leave)
    return leave


def run(tasks: list[Task]) -> None:
    """Do the tasks, spread over the threads; raises what they raise, after all have ended.

    Tasks that are themselves part of shared work do theirs alone.
    """
    if _count == 1 or len(tasks) < 2 or getattr(_helper, "busy", False):
        for task in tasks:
            task()
        return
    for leave in _before_sharing:
        leave()
    job = _Job(tasks)
    _helper.busy = True
    try:
        for _ in range(min(_count, len(tasks)) - 1):
            _jobs.put(job)
        job.work()
    finally:
        # Whatever interrupted this thread, the helpers still write to the caller's memory.
        _helper.busy = False
        job.waiting.clear()
        ended = 0
        while ended < len(job.entered):
            try:
                job.left.get()
                ended += 1
            except KeyboardInterrupt as interrupt:
                job.errors.append(interrupt)
    if job.errors:
        raise job.errors[0]


def run_worth(tasks: list[Task], multiplications: int) -> None:
    """`run`, or where that takes longer than it gains, for there is so little to do, one after the other here."""
    if multiplications < _WORTH:
        for task in tasks:
            task()
    else:
        run(tasks)


def share(parts: int, work: Callable[[int], None]) -> None:
    """Call work(0) ... work(parts - 1), spread over the threads as `run` does."""
    run([lambda part=part: work(part) for part in range(parts)])  # type: ignore[misc]

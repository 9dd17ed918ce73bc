"""Workers compute the same digits, see what they must, and end with the process that started them."""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.quant.compute import kernels, threads, workers
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.memory import unshared
from numoe.quant.compute.slots import Slots
from numoe.quant.errors import InputError
from numoe.quant.formats import qtensor
from numoe.quant.formats.columns import laid_out, widened
from numoe.quant.formats.pack import pack_bf16, pack_fp8, pack_int4, pack_int8, pack_mxfp4
from numoe.quant.formats.plain import F32
from numoe.quant.formats.qtensor import QTensor, matmul_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forks, on Linux alone")

PACKS: list[Callable[[np.ndarray], QTensor]] = [
    F32, pack_bf16, pack_fp8, lambda w: laid_out(pack_mxfp4(w)), lambda w: laid_out(pack_int8(w)),
    lambda w: laid_out(pack_int4(w)), lambda w: widened(laid_out(pack_int4(w))),
]  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(qtensor, "_WORTH_WORKERS", 0)
    before = threads.in_use()
    yield
    threads.use(before)
    workers._end()


def matrices(shapes: list[tuple[int, int]], kind: int = 0) -> list[QTensor]:
    random = np.random.default_rng(0)
    return [PACKS[(kind + n) % len(PACKS)](random.standard_normal(s, np.float32)) for n, s in enumerate(shapes)]


def alone(products: list[tuple[QTensor, Activations, None]]) -> list[np.ndarray]:
    before = threads.in_use()
    threads.use(1)
    results = matmul_all(products)
    threads.use(before)
    return results


def known(several: list[QTensor]) -> tuple[list[tuple[QTensor, Activations, None]], np.ndarray]:
    """Products of matrices with 64 columns that workers know, and all their results."""
    workers.know(several)
    x = Activations(np.ones((1, 64), np.float32))
    products: list[tuple[QTensor, Activations, None]] = [(matrix, x, None) for matrix in several]
    return products, np.concatenate(alone(products))


def pids() -> list[int]:
    return workers._pool.pids if workers._pool else []


def ends(pid: int) -> bool:
    """Whether a process ends by itself; one that does not is waited for a minute."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([process], [], [], 60)
    os.close(process)
    return bool(ended)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 4),
    kind=st.integers(0, len(PACKS) - 1),
    rows=st.lists(st.integers(1, 300).map(lambda n: 4 * n), min_size=1, max_size=6),
    tokens=st.integers(1, 8),
    data=st.data(),
)
def test_products_have_the_digits_of_one_process(
    count: int, kind: int, rows: list[int], tokens: int, data: st.DataObject
) -> None:
    """Of all formats, several at once, with some of the tokens each."""
    given_ones = matrices([(n, 128) for n in rows], kind)
    whole = Activations(np.random.default_rng(1).standard_normal((tokens, 128), np.float32))
    some = st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens).map(np.array)
    taken = [data.draw(st.none() | st.just(slice(0, 1)) | some) for _ in rows]
    products = [
        (matrix, whole if which is None else whole.take(which), None)
        for matrix, which in zip(given_ones, taken, strict=True)
    ]
    workers.know(given_ones)
    threads.use(count)
    shared = matmul_all(products)
    assert len(pids()) == count - 1
    for one, other in zip(shared, alone(products), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_task_is_done_once() -> None:
    """Many short ones, so that several processes often want the same: products add to what they have written."""
    random = [np.random.default_rng(n) for n in range(40)]
    products, expected = known([laid_out(pack_int4(one.standard_normal((64, 64), np.float32))) for one in random])
    threads.use(3)
    for _ in range(150):
        np.testing.assert_array_equal(np.concatenate(matmul_all(products)), expected)


def test_workers_leave_the_cores_to_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """They sleep when threads share work, though a job was just done, and wake for the next one."""
    monkeypatch.setattr(workers, "_AWAKE_SECONDS", 3600)
    products, expected = known(matrices([(64, 64)] * 3))
    threads.use(3)
    for _ in range(3):
        np.testing.assert_array_equal(np.concatenate(matmul_all(products)), expected)
        threads.run([lambda: None, lambda: None])
        assert workers._pool
        numbers = workers._pool._shared.numbers
        give_up = time.monotonic() + 60
        while not all(numbers[workers._ASLEEP : workers._ASLEEP + 2]) and time.monotonic() < give_up:
            os.sched_yield()
        assert all(numbers[workers._ASLEEP : workers._ASLEEP + 2])


def test_the_workers_do_some_of_the_work() -> None:
    """Of two tasks, each of which waits until the other has begun, a worker does one."""
    begun = [get_context("fork").Semaphore(0) for _ in range(2)]

    class Meeting:
        shape = 2, 64

        def products(self, x: Activations, out: np.ndarray) -> list[Callable[[], None]]:
            return [partial(self.meet, out, number) for number in range(2)]

        def meet(self, out: np.ndarray, number: int) -> None:
            begun[number].release()
            begun[1 - number].acquire(timeout=60)
            out[0, number] = os.getpid()

    meeting = Meeting()
    workers.know([meeting])
    threads.use(2)
    out = np.zeros((1, 2), np.float32)
    assert workers.multiply([(meeting, Activations(np.ones((1, 64), np.float32)), out)])
    assert set(out[0]) == {os.getpid(), *pids()}


def test_matrices_that_are_not_known_are_multiplied_here() -> None:
    known, other = matrices([(64, 64), (64, 64)])
    workers.know([known])
    threads.use(2)
    x = Activations(np.ones((1, 64), np.float32))
    out = np.empty((1, 64), np.float32)
    assert workers.multiply([(known, x, out), (known, x, out)])
    assert not workers.multiply([(known, x, out), (other, x, out)])
    assert not workers.multiply([(known, x, out)])  # and one task cannot be shared
    np.testing.assert_array_equal(matmul_all([(other, x, None)])[0], alone([(other, x, None)])[0])


def test_a_matrix_that_is_known_later_is_known_to_new_workers() -> None:
    first, second = matrices([(64, 64), (32, 64)])
    x = Activations(np.ones((1, 64), np.float32))
    threads.use(2)
    workers.know([first])
    matmul_all([(first, x, None)])
    (before,) = pids()
    workers.know([second])
    for matrix in (second, first):
        np.testing.assert_array_equal(matmul_all([(matrix, x, None)])[0], alone([(matrix, x, None)])[0])
    (after,) = pids()
    assert after != before
    assert ends(before)


def test_workers_make_the_tasks_that_this_process_does() -> None:
    """How many slabs one token is multiplied with at once goes by the block, which may be told after their birth."""
    matrix = widened(laid_out(pack_int4(np.random.default_rng(0).standard_normal((4000, 160), np.float32))))
    x = Activations(np.random.default_rng(1).standard_normal((1, 160), np.float32))
    workers.know([matrix])
    before, tasks, results = kernels.block_elements(), [], []
    try:
        for block in kernels.BLOCKS[::-1]:
            kernels.use_block(block)
            results.append(alone([(matrix, x, None)])[0])
            threads.use(2)
            tasks.append(len(matrix.products(x, np.empty((1, 4000), np.float32))))
            results += matmul_all([(matrix, x, None)])
    finally:
        kernels.use_block(before)
    assert tasks == [2, 2, 4]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_workers_do_not_keep_a_dropped_matrix() -> None:
    several = matrices([(64, 64), (64, 64)])
    workers.know(several)
    threads.use(2)
    matmul_all([(several[0], Activations(np.ones((1, 64), np.float32)), None)])
    (pid,) = pids()
    del several[0]
    gc.collect()
    assert ends(pid)


@pytest.mark.parametrize("pack", PACKS)
def test_matrices_of_slots_come_and_go(pack: Callable[[np.ndarray], QTensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker computes with what lies in a slot now, though it was born before that was written there."""
    random = np.random.default_rng(0)
    slots = Slots(1 << 20)
    threads.use(2)
    (anchor,) = matrices([(64, 128)])
    workers.know([anchor])
    x = Activations(np.ones((2, 128), np.float32))

    def placed(matrix: QTensor) -> QTensor:
        copies = {}
        for name, values in matrix.arrays().items():
            copies[name] = slots.take(values.nbytes).view(values.dtype).reshape(values.shape)
            np.copyto(copies[name], values)
        return replace(matrix, **copies)

    born: list[list[int]] = []
    shared: list[bool] = []
    multiply = workers.multiply
    monkeypatch.setattr(workers, "multiply", lambda products: shared.append(multiply(products)) or shared[-1])
    for _ in range(4):
        plain = pack(random.standard_normal((256, 128), np.float32) * np.float32(random.uniform(1, 9)))
        here = placed(plain)
        workers.know_placed([here])
        if workers._pool:  # a known one with its id was gone in the middle of a product
            workers._pool.members[id(here)] = weakref.ref(plain)
        products = [(here, x, None), (anchor, x, None)]
        got = matmul_all(products)[0]
        born.append(pids())
        np.testing.assert_array_equal(got, alone([(plain, x, None)])[0])
        for values in here.arrays().values():
            slots.give_back(values.reshape(-1).view(np.uint8))
        del here, products
    assert born[0] and all(each == born[0] for each in born) and all(shared[::2])  # the others are `alone`
    assert not workers._placed


def test_slots_have_the_memory_of_what_was_taken_and_no_more() -> None:
    """A huge page that two of them share is not made again for one of them alone."""

    def held() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
        return 1024 * int(line.split()[1])

    nbytes, huge, slack = 5 << 19, 1 << 21, 1 << 18  # the system counts in batches
    slots = Slots(10 * nbytes)
    before = held()
    taken = [slots.take(nbytes) for _ in range(9)]
    for number, slot in enumerate(taken):
        slots.populate(slot)
        slot[:] = number
    assert abs(held() - before - 9 * nbytes) <= huge + slack
    for number in (0, 2, 4, 6, 7, 5, 3, 1):
        slots.give_back(taken[number])
    before = held()
    for _ in range(4):  # no two of them neighbours
        slot = slots.take(nbytes)
        slots.populate(slot)
        slot[:] = 9
    assert abs(held() - before - 4 * nbytes) <= slack
    assert all((taken[number] == (9 if number % 2 else 8 * (number == 8))).all() for number in range(9))


def test_workers_do_not_see_memory_that_changes() -> None:
    """Else what it held at their birth would be kept beside what it holds."""
    (matrix,) = matrices([(8192, 64)])
    changing, constant = unshared(1 << 20), np.ones(1 << 20, np.uint8)
    changing[:] = 1
    workers.know([matrix])
    threads.use(2)
    matmul_all([(matrix, Activations(np.ones((1, 64), np.float32)), None)])
    lines = Path(f"/proc/{pids()[0]}/maps").read_text(encoding="utf-8").splitlines()
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]

    def seen(memory: np.ndarray) -> bool:
        return any(start <= memory.ctypes.data + len(memory) // 2 < end for start, end in spans)

    assert seen(constant)
    assert not seen(changing)


def test_results_that_the_shared_memory_does_not_hold_are_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    (matrix,) = matrices([(64, 64)])
    workers.know([matrix])
    threads.use(2)
    x = Activations(np.ones((1, 64), np.float32))
    monkeypatch.setattr(workers, "_NBYTES", workers._VALUES + 4 * 191)
    out = np.empty((1, 64), np.float32)
    assert not workers.multiply([(matrix, x, out), (matrix, x, out)])
    np.testing.assert_array_equal(matmul_all([(matrix, x, None)])[0], alone([(matrix, x, None)])[0])


def test_where_no_process_can_be_started_threads_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refused)
    monkeypatch.setattr(workers, "_possible", True)
    (matrix,) = matrices([(8192, 64)])
    workers.know([matrix])
    threads.use(2)
    x = Activations(np.ones((1, 64), np.float32))
    np.testing.assert_array_equal(matmul_all([(matrix, x, None)])[0], alone([(matrix, x, None)])[0])
    assert not workers._possible  # and it is not tried again at every product


def test_the_death_of_a_worker_is_told() -> None:
    several = matrices([(512, 64)] * 4)
    workers.know(several)
    threads.use(2)
    products = [(matrix, Activations(np.ones((1, 64), np.float32)), None) for matrix in several]
    matmul_all(products)
    (pid,) = pids()
    os.kill(pid, signal.SIGKILL)
    workers._pool._shared.numbers[workers._IN] = 1  # type: ignore[union-attr]  # as if in the middle of a task
    with pytest.raises(InputError, match="a process that computes for numoe"):
        matmul_all(products)
    for one, other in zip(matmul_all(products), alone(products), strict=True):  # and others take its place
        np.testing.assert_array_equal(one, other)


def test_after_an_interrupt_the_next_product_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: in a task, between two, or while one holds what the others wait for."""
    several = matrices([(512, 64)] * 6)
    workers.know(several)
    threads.use(3)
    x, other_x = (Activations(np.full((1, 64), n, np.float32)) for n in (1, 2))
    products: list[tuple[QTensor, Activations, None]] = [(matrix, other_x, None) for matrix in several]

    def interrupted(shared: workers._Shared, tasks: list[Callable[[], None]], *_: object) -> None:
        tasks[0]()
        raise KeyboardInterrupt

    def holding(shared: workers._Shared, *_: object) -> None:
        shared._claims.acquire()
        raise KeyboardInterrupt

    for where in 5 * [interrupted, holding]:
        matmul_all(products)
        with monkeypatch.context() as patch:
            patch.setattr(workers._Shared, "work", where)
            with pytest.raises(KeyboardInterrupt):
                matmul_all([(matrix, x, None) for matrix in several])
        for one, other in zip(matmul_all(products), alone(products), strict=True):
            np.testing.assert_array_equal(one, other)


PARENT = """
import json, os, signal, sys
import numpy as np
from numoe.quant.compute import threads
from numoe.quant.compute import workers
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.plain import F32
matrix = F32(np.ones((64, 64), np.float32))
workers.know([matrix])
threads.use(3)
product = matrix, Activations(np.ones((1, 64), np.float32)), np.empty((1, 64), np.float32)
assert workers.multiply([product, product])
print(json.dumps(workers._pool.pids), flush=True)
signal.pause() if sys.argv[1] == "wait" else None
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, None])
def test_workers_end_with_their_process(how: signal.Signals | None) -> None:
    """However it ends; the memory they share has no name, so that nothing else is left."""
    shared_before = set(Path("/dev/shm").iterdir())
    command = [sys.executable, "-c", PARENT, "wait" if how else "end"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        started = json.loads(process.stdout.readline())
        assert len(started) == 2
        if how:
            process.send_signal(how)
        assert process.stdout.read() == b""  # no worker holds on to the pipe
    assert all(map(ends, started))
    assert set(Path("/dev/shm").iterdir()) <= shared_before


def test_a_fork_of_this_process_leaves_the_workers_alone() -> None:
    (matrix,) = matrices([(64, 64)])
    workers.know([matrix])
    threads.use(2)
    x = Activations(np.ones((1, 64), np.float32))
    expected = matmul_all([(matrix, x, None)])[0]
    before = pids()
    pid = os.fork()
    if not pid:
        os._exit(0 if workers._pool is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    np.testing.assert_array_equal(matmul_all([(matrix, x, None)])[0], expected)
    assert pids() == before

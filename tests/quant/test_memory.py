"""Memory for weights: what it holds stays apart and aligned, and goes when the weights do."""

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from numoe.quant.compute import memory
from numoe.quant.compute.memory import lasting, scratch
from numoe.quant.formats.columns import laid_out
from numoe.quant.formats.pack import pack_fp8, pack_int4
from numoe.quant.formats.resident import settled


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_rest", np.empty(0, np.uint8))


def test_ranges_are_aligned_and_do_not_overlap() -> None:
    sizes = [1, 63, 64, 65, 3 << 20, 100, memory.HUGE - 1, memory.HUGE, 5 << 20, 7, *[3 << 20] * 12]
    ranges = [lasting(size) for size in sizes]
    for number, one in enumerate(ranges):
        one[:] = number
    for number, (one, size) in enumerate(zip(ranges, sizes, strict=True)):
        assert len(one) == size
        assert one.ctypes.data % memory.ALIGNMENT == 0
        assert (one == number).all()


def test_a_piece_goes_with_the_last_of_its_weights() -> None:
    first, second = lasting(100), lasting(100)
    assert np.shares_memory(first.base, second.base) or first.base is second.base
    piece = weakref.ref(first.base)
    memory._rest = np.empty(0, np.uint8)
    del first
    gc.collect()
    assert piece() is not None
    del second
    gc.collect()
    assert piece() is None


def test_scratch_of_a_use_is_one_memory_as_large_as_was_asked_for() -> None:
    first = scratch("test", (3, 5))
    first[:] = 7
    assert first.ctypes.data % memory.ALIGNMENT == 0
    assert np.shares_memory(scratch("test", (15,)), first) and (scratch("test", (15,)) == 7).all()
    assert not np.shares_memory(scratch("another", (15,)), first)
    larger = scratch("test", (100, 100))
    assert larger.shape == (100, 100) and larger.ctypes.data % memory.ALIGNMENT == 0
    assert np.shares_memory(scratch("test", (3, 5)), larger)


def test_scratch_is_a_threads_own() -> None:
    ours = scratch("test", (8,))
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(scratch, "test", (8,)).result()
    assert not np.shares_memory(ours, theirs)


def test_a_settled_matrix_is_the_same() -> None:
    weights = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    for matrix in (laid_out(pack_int4(weights)), pack_fp8(weights)):
        there = settled(matrix)
        assert (there.format, there.shape, there.nbytes) == (matrix.format, matrix.shape, matrix.nbytes)
        np.testing.assert_array_equal(there.dequantize(), matrix.dequantize())
        assert not np.shares_memory(there.codes, matrix.codes)  # type: ignore[attr-defined]


def test_what_is_large_enough_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HUGE", 1 << 15)
    matrix = laid_out(pack_int4(np.ones((256, 256), np.float32)))
    there = settled(matrix)
    assert there.codes is matrix.codes  # type: ignore[attr-defined]
    assert there.scales is not matrix.scales  # type: ignore[attr-defined]


ARENAS = """
import ctypes, sys, threading
from numoe.quant.compute.memory import share_free_memory
if "share" in sys.argv: share_free_memory()
libc, taken = ctypes.CDLL(None), threading.Barrier(5)
def take():
    kept = bytes(100_000), taken.wait()
threads = [threading.Thread(target=take) for _ in range(4)]
for one in threads: one.start()
taken.wait()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""


def test_threads_share_free_memory() -> None:
    """glibc counts its arenas: one, where each thread would have its own."""

    own = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}

    def arenas(*how: str) -> int:
        done = subprocess.run([sys.executable, "-c", ARENAS, *how], env=own, capture_output=True, text=True, check=True)
        return done.stdout.count("<heap nr=")

    assert arenas("share") == 1 < arenas()

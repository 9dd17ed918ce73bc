"""Shared work is done once, errors come through, and no digit depends on the number of threads."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from numoe.engine import Model
from numoe.quant.compute import kernels, threads
from numoe.quant.formats.pack import pack_bf16, pack_fp8, pack_int4, pack_int8, pack_mxfp4
from numoe.quant.formats.plain import F32
from numoe.quant.formats.qtensor import QTensor
from numoe.quant.formats.resident import fastest


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = threads.in_use()
    yield
    threads.use(before)


@settings(max_examples=30, deadline=None)
@given(parts=st.integers(0, 40), count=st.integers(1, 5))
def test_every_part_is_done_once(parts: int, count: int) -> None:
    threads.use(count)
    done = np.zeros(parts, int)

    def work(part: int) -> None:
        done[part] += 1

    threads.share(parts, work)
    assert done.tolist() == [1] * parts


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_errors_of_any_thread_are_raised_after_all_have_ended(failing: int) -> None:
    threads.use(3)
    ended: set[int] = set()

    def work(part: int) -> None:
        if part == failing:
            raise RuntimeError(f"part {part}")
        ended.add(part)

    with pytest.raises(RuntimeError, match=f"part {failing}"):
        threads.share(9, work)
    assert {part for part in range(9) if part % 3 != failing % 3} <= ended


def test_an_interrupt_between_two_tasks_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come where no task is at work; then too the helpers are waited for, and nobody for what never ran."""
    threads.use(3)
    work = threads._Job.work

    def interrupted(job: threads._Job) -> None:
        if threading.current_thread() is threading.main_thread():
            job.waiting.popleft()
            raise KeyboardInterrupt
        work(job)

    monkeypatch.setattr(threads._Job, "work", interrupted)
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            threads.run([lambda: None] * 9)


def test_blas_keeps_to_one_thread() -> None:
    threads.use(2)
    assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} <= {1}


@pytest.mark.parametrize("pack", [F32, pack_bf16, pack_fp8, pack_mxfp4, pack_int8, pack_int4])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_products_have_the_same_bits_with_any_number_of_threads(
    pack: Callable[..., object], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SCRATCH_ELEMENTS", 4096)
    rng = np.random.default_rng(1)
    tensor = pack(rng.standard_normal((301, 256), np.float32))
    x = rng.standard_normal((tokens, 256), np.float32)
    results = []
    for count in (1, 2, 4):
        threads.use(count)
        results.append(tensor.matmul(x))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.fixture
def all_blocks() -> Iterator[tuple[int, ...]]:
    before = kernels.block_elements()
    yield kernels.BLOCKS
    kernels.use_block(before)


@pytest.mark.parametrize("pack", [pack_mxfp4, pack_int8, pack_int4])
@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize("wide", [False, True])
def test_products_of_few_tokens_have_the_same_bits_with_any_block(
    pack: Callable[..., QTensor], tokens: int, wide: bool, all_blocks: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(1)
    tensor = fastest(pack(rng.standard_normal((1032, 2048), np.float32)), wide=wide)
    x = rng.standard_normal((tokens, 2048), np.float32)
    spans, results = set(), []
    for block in all_blocks:
        kernels.use_block(block)
        spans.add(len(kernels.equal_spans(2048, 516, kernels.block_elements())))
        results.append(tensor.matmul(x))
    assert len(spans) == len(all_blocks)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)
    np.testing.assert_allclose(results[0], x @ tensor.dequantize().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["v4_released", "qwen3_moe_a"])
def test_logits_have_the_same_bits_with_any_number_of_threads(model: Callable[[str], Model], case: str) -> None:
    ids = tiny.load_golden(case).ids[:150]
    results = []
    for count in (1, 2):
        threads.use(count)
        results.append(model(case).session(256).feed(ids))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/a/b", {}, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "250000 100000", "a/cpu.max": "150000 50000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "10000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "10000 0", "a/cpu.max": "-1 5 6", "cpu.max": ""}, 8),
        ("0::/../x", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/d/e\n0::/", {"cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_are_those_that_groups_give_time_for(
    group: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    there = {"proc/self/cgroup": group} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.usable_cores(tmp_path) == cores

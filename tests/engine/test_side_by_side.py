"""Sequences whose memory lies side by side: what they attend to together is what each attends to alone."""

from __future__ import annotations

import gc
import resource

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kinds import EPS, HIDDEN, random, weights_of

from numoe.engine.layers.attention import softmax
from numoe.engine.layers.attention.compressed import CompressedAttention
from numoe.engine.layers.attention.grouped import GroupedQueryAttention
from numoe.engine.layers.attention.indexer import Compressor, EntryIndexer
from numoe.engine.layers.attention.latent import MultiHeadLatentAttention
from numoe.engine.layers.attention.softmax import attend_together
from numoe.engine.layers.block import Kind, Shared
from numoe.engine.layers.cache import Cache, Pool
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.rows import BF16, FLOAT32, INT8, RowForm
from numoe.engine.layers.state import CHUNK, SLACK, Rows
from numoe.engine.layers.step import TOGETHER, Step
from numoe.quant.compute import threads
from numoe.quant.compute.memory import Pieces

ROPE = Rope(4, 50.0, interleaved=True)
COMPRESSED = {"heads": 3, "head_dim": 8, "q_rank": 6, "window": 5, "out_groups": 1, "out_rank": 7, "rope": ROPE}
KINDS: dict[str, Kind] = {
    "full": GroupedQueryAttention(4, 2, 8, Rope(8, 100.0)),
    "window and sinks": GroupedQueryAttention(4, 2, 8, Rope(8, 100.0), window=6, sinks=True),
    "chunks": GroupedQueryAttention(4, 1, 8, None, chunk=7, value_dim=5),
    "latent": MultiHeadLatentAttention(3, 10, 12, 6, 4, 5, ROPE, scale=0.3),
    "sliding": CompressedAttention(**COMPRESSED),
    "HCA": CompressedAttention(**COMPRESSED, compressor=Compressor(4, 8, overlap=False)),
    "CSA": CompressedAttention(
        **COMPRESSED,
        compressor=Compressor(2, 8, overlap=True),
        indexer=EntryIndexer(2, 6, 3, Compressor(2, 6, overlap=True)),
    ),
}
CONTEXT = 2 * CHUNK


def one_pass(compute: object, caches: list[Cache], rows: list[np.ndarray]) -> np.ndarray:
    step = Step.of([(np.zeros(len(x), np.int64), cache) for x, cache in zip(rows, caches, strict=True)])
    out = compute(np.concatenate(rows), step)  # type: ignore[operator]
    for x, cache in zip(rows, caches, strict=True):
        with cache.step(len(x)):
            pass
    return out


@pytest.mark.parametrize("form", [FLOAT32, BF16, INT8], ids=lambda form: form.name)
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=8, deadline=None)
@given(
    read=st.lists(st.sampled_from([1, 2, 5, 9, 30, 200]), min_size=2, max_size=5),
    missing=st.integers(0, 4),
    order=st.randoms(),
)
def test_each_gets_what_it_gets_alone(name: str, form: RowForm, read: list[int], missing: int, order: object) -> None:
    """Whatever each has read, in whatever order they come, and where one of them is not there."""
    kind = KINDS[name]
    compute, pool = kind.build(weights_of(kind), Shared(EPS)), Pool([kind.state()], CONTEXT, form)
    together, alone = ([Cache([kind.state()], CONTEXT, form, slot) for slot in slots]
                       for slots in ([pool.take() for _ in read], [None] * len(read)))  # fmt: skip
    texts = [random(count + 6, HIDDEN, seed=i) for i, count in enumerate(read)]
    for caches in (together, alone):
        for cache, text, count in zip(caches, texts, read, strict=True):
            one_pass(compute, [cache], [text[:count].copy()])
    members = [i for i in range(len(read)) if i != missing]
    order.shuffle(members)  # type: ignore[attr-defined]
    for at in range(6):
        rows = [texts[i][None, read[i] + at] for i in members]
        got = one_pass(compute, [together[i] for i in members], [x.copy() for x in rows])
        for i, row, one in zip(members, got, rows, strict=True):
            wanted = one_pass(compute, [alone[i]], [one.copy()])
            np.testing.assert_allclose(row, wanted[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["window and sinks", "sliding"])
def test_they_stay_together_when_the_rows_of_one_move(name: str) -> None:
    """The memory of who has read more is full before that of the other, and its latest rows move to the front."""
    kind = KINDS[name]
    compute, pool = kind.build(weights_of(kind), Shared(EPS)), Pool([kind.state()], CONTEXT, FLOAT32)
    together, alone = ([Cache([kind.state()], CONTEXT, FLOAT32, slot) for slot in slots]
                       for slots in ([pool.take(), pool.take()], [None, None]))  # fmt: skip
    ahead = CHUNK + SLACK
    text = random(ahead + 20, HIDDEN)
    for caches in (together, alone):
        for start in range(0, ahead, 64):
            one_pass(compute, caches[:1], [text[start : start + 64].copy()])
    for at in range(20):
        rows = [text[None, ahead + at], text[None, at]]
        got = one_pass(compute, together, [x.copy() for x in rows])
        wanted = [one_pass(compute, [cache], [x.copy()])[0] for cache, x in zip(alone, rows, strict=True)]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_many_share_threads_to_the_digits_of_one(sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that they are several tasks, over the keys of two parts, of which some are others'."""
    drawn = np.random.default_rng(0)
    q = drawn.standard_normal((39, 2, 3, 8), np.float32)
    sink = drawn.standard_normal((2, 1, 3), np.float32) if sinks else None
    parts = []
    for keys in (21, 7):
        rows, hidden = drawn.standard_normal((2, 39, 2, keys, 8), np.float32), drawn.random((39, keys)) < 0.5
        parts.append((rows[0], rows[1], hidden))
    alone = [
        attend_together(q[n : n + 1], [(k[n : n + 1], v[n : n + 1], h[n : n + 1]) for k, v, h in parts], 0.3, sink)
        for n in range(39)
    ]
    monkeypatch.setattr(threads, "_WORTH", 0)
    before = threads.in_use()
    try:
        for count in (1, 3):
            threads.use(count)
            np.testing.assert_array_equal(attend_together(q, parts, 0.3, sink), np.concatenate(alone))
    finally:
        threads.use(before)


@pytest.mark.parametrize("form", [FLOAT32, BF16, INT8], ids=lambda form: form.name)
@pytest.mark.parametrize("sinks", [False, True])
def test_the_heads_of_a_query_share_threads_to_the_digits_of_one(
    sinks: bool, form: RowForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = GroupedQueryAttention(10, 5, 8, Rope(8, 100.0), sinks=sinks)
    weights, text = weights_of(kind), random(30, HIDDEN)

    def last() -> np.ndarray:
        compute, cache = kind.build(weights, Shared(EPS)), Cache([kind.state()], 64, form)
        one_pass(compute, [cache], [text[:-1].copy()])
        return one_pass(compute, [cache], [text[-1:].copy()])

    expected = last()
    monkeypatch.setattr(softmax, "_WORTH", 0)
    monkeypatch.setattr(softmax, "_WORTH_A_TASK", 0)
    monkeypatch.setattr(threads, "_WORTH", 0)
    assert softmax.head_parts(1, 5, 1) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    before = threads.in_use()
    try:
        for count in (1, 3):
            threads.use(count)
            np.testing.assert_array_equal(last(), expected)
    finally:
        threads.use(before)


def test_what_a_failed_pass_left_spoils_nobody() -> None:
    """NaN beyond the end of one sequence lies beside what another one sees."""
    kind = KINDS["full"]
    compute, pool = kind.build(weights_of(kind), Shared(EPS)), Pool([kind.state()], 64, FLOAT32)
    caches = [Cache([kind.state()], 64, FLOAT32, pool.take()) for _ in range(2)]
    for cache, count in zip(caches, (3, 20), strict=True):
        one_pass(compute, [cache], [random(count, HIDDEN)])
    with pytest.raises(ArithmeticError), caches[0].step(8):
        caches[0].blocks[0]["v"].write(np.full((2, 8, 8), np.nan, np.float32), 3)
        raise ArithmeticError
    assert np.isfinite(one_pass(compute, caches, [random(1, HIDDEN), random(1, HIDDEN)])).all()


def test_runs_of_neighbours() -> None:
    """Those with one token whose memory is side by side; others are alone."""
    kind = KINDS["full"]
    pool = Pool([kind.state()], 8, FLOAT32, 9)
    caches = [Cache([kind.state()], 8, FLOAT32, pool.take()) for _ in range(9)]
    parts = [(np.zeros(2 if i == 3 else 1, np.int64), cache) for i, cache in enumerate(caches)]
    step = Step.of([*parts[::-1], (np.zeros(1, np.int64), Cache([kind.state()], 8))])
    runs = [[segment.slot.number for segment in company.segments] for company in step.companies]
    assert sorted(runs) == [[0, 1, 2], [4, 5, 6, 7, 8]]
    assert [segment.count for segment in step.alone] == [2, 1]


def test_a_company_is_cut_where_one_sees_much_more_than_others() -> None:
    """And where a call would have more rows than TOGETHER sequences of the most that attend so."""
    kind, count = KINDS["full"], 2 * TOGETHER + 8
    pool = Pool([kind.state()], 8, FLOAT32, count)
    caches = [Cache([kind.state()], 8, FLOAT32, pool.take()) for _ in range(count)]

    def sizes(counts: list[int], most: int = 1000) -> list[int]:
        step = Step.of([(np.zeros(1, np.int64), cache) for cache in caches[: len(counts)]])
        return [len(run.segments) for run in step.companies[0].runs(counts, most)]

    assert sizes([10, 70, 10, 10, 60, 10]) == [6]
    assert sizes([10, 10, 900, 10, 10, 10]) == [2, 1, 3]
    assert sizes([800, 900, 700, 800, 900, 1000]) == [6]
    assert sizes([800, 2000, 700, 3000, 3000, 10]) == [1, 1, 1, 1, 1, 1]
    assert sizes([100] * count, most=100) == [TOGETHER, TOGETHER, 8]
    assert sizes([50] * count, most=100) == [2 * TOGETHER, 8]


def test_memory_is_taken_again_when_nobody_has_it() -> None:
    pool = Pool([{"rows": Rows(1, 8)}], 100, FLOAT32, 3)
    slots = [pool.take() for _ in range(3)]
    assert [slot.number for slot in slots if slot] == [0, 1, 2] and pool.take() is None
    cache = Cache([{"rows": Rows(1, 8)}], 100, FLOAT32, slots[1])
    cache.blocks[0]["rows"].write(np.ones((1, 4, 8), np.float32), 0)
    seen = cache.blocks[0]["rows"].view(0, 4).floats()
    slots.clear()
    del cache
    gc.collect()
    taken = pool.take(), pool.take()
    assert [slot.number for slot in taken if slot] == [0, 2] and pool.take() is None  # somebody looks at the other one
    assert (seen == 1).all()
    del seen
    gc.collect()
    again = pool.take()
    assert again and again.number == 1 and not again.memory.any()


def test_one_piece_where_there_are_no_addresses_for_more() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28), before[1]))
    try:
        pieces = Pieces(1 << 20, 1 << 12, huge=False)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert pieces.take() and not pieces.take()

"""Route traces: what is written, and what caches make of it."""

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_checkpoint

from numoe.cli.main import main
from numoe.engine import InputError, Model
from numoe.engine.measure.replay import POLICIES, SHARES, RouteTrace, Trace, belady, lfu, lru, read_trace, replay
from numoe.quant.compute import threads

Accesses = list[tuple[int, int]]
ACCESSES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=60)


def most_hits(accesses: Accesses, capacity: int) -> int:
    """Hits of the best of all caches that take in what they miss, by trying every choice."""

    @cache
    def best(at: int, held: frozenset[tuple[int, int]]) -> int:
        if at == len(accesses):
            return 0
        key = accesses[at]
        if key in held:
            return 1 + best(at + 1, held)
        if len(held) < capacity:
            return best(at + 1, held | {key})
        return max(best(at + 1, held - {victim} | {key}) for victim in held)

    return best(0, frozenset())


@given(accesses=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), max_size=14), capacity=st.integers(1, 4))
def test_belady_is_the_best_of_all(accesses: Accesses, capacity: int) -> None:
    assert belady(accesses, capacity) == most_hits(accesses, capacity)


@given(accesses=ACCESSES, capacity=st.integers(1, 9))
def test_hits_lie_between_none_and_beladys(accesses: Accesses, capacity: int) -> None:
    best = belady(accesses, capacity)
    assert 0 <= lru(accesses, capacity) <= best
    assert 0 <= lfu(accesses, capacity) <= best
    assert best <= len(accesses) - len(set(accesses))
    if capacity >= len(set(accesses)):
        assert lru(accesses, capacity) == lfu(accesses, capacity) == best == len(accesses) - len(set(accesses))


@given(accesses=ACCESSES, capacity=st.integers(1, 8))
def test_lru_hits_what_was_among_the_last_few(accesses: Accesses, capacity: int) -> None:
    hits = 0
    for at, key in enumerate(accesses):
        before = [i for i in range(at) if accesses[i] == key]
        hits += bool(before) and len(set(accesses[before[-1] + 1 : at])) < capacity
    assert lru(accesses, capacity) == hits


def test_lfu_keeps_what_is_used_often_and_forgets_it_in_time() -> None:
    often, others = (0, 0), [(0, e) for e in range(1, 200)]
    scan = [often] * 10 + others[:10] + [often]
    assert lfu(scan, 2) == 10
    assert lru(scan, 2) == 9
    # Used twice each, so much later that ten early uses count for less.
    late = [often] * 10 + [key for key in others for _ in range(2)] + [often]
    assert lfu(late, 2) == 9 + len(others)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    with RouteTrace(tmp_path / "trace", 16) as trace:
        assert os.name == "nt" or (tmp_path / "trace").stat().st_mode & 0o777 == 0o600
        trace(0, 1, np.array([[3, 5], [5, 6]]))
        trace(0, 2, np.array([[1, 0], [1, 7]]))
        trace(2, 1, np.array([[5, 3]]))
        trace(2, 2, np.array([[0, 1]]))
        trace(3, 1, np.array([[5, 2]]))
    lines = ["# 16 routed experts", "0 1 3 5", "1 1 5 6", "0 2 1 0", "1 2 1 7", "", "2 1 5 3", "2 2 0 1", "", "3 1 5 2"]
    assert (tmp_path / "trace").read_text().splitlines() == lines
    expected = [(1, 3), (1, 5), (1, 6), (2, 1), (2, 0), (2, 7), (1, 5), (1, 3), (2, 0), (2, 1), (1, 5), (1, 2)]
    assert read_trace(tmp_path / "trace") == Trace(16, tuple(expected))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not begin as a trace does"),
        ("hello\n0 0 1\n", "does not begin as a trace does"),
        ("# 4 routed experts\n", "has no choices"),
        ("# 4 routed experts\n0 0 1\nnot this\n", "line 3 is not position, layer and experts"),
        ("# 4 routed experts\n0 0\n", "line 2 is not"),
        (f"# {'9' * 5000} routed experts\n0 0 1\n", "does not begin as a trace does"),
        ("# 0 routed experts\n0 0 1\n", "does not begin as a trace does"),
        (f"# 4 routed experts\n0 0 1\n0 {'9' * 5000} 1\n", "line 3 is not"),
        (f"# 4 routed experts\n0 0 1 {'9' * 5000}\n", "line 2 is not"),
        ("\x00\xff", "cannot be read as a trace"),
    ],
)
def test_files_that_are_no_traces_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "trace").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=reason):
        read_trace(tmp_path / "trace")


def test_traces_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no routed experts"):
        RouteTrace(tmp_path / "trace", 0)
    (tmp_path / "trace").write_text("mine")
    with pytest.raises(InputError, match="File exists"):
        RouteTrace(tmp_path / "trace", 4)
    with pytest.raises(InputError, match="cannot be read as a trace"):
        read_trace(tmp_path / "none")
    with pytest.raises(InputError, match="is not a file"):
        read_trace(tmp_path)


def test_a_model_tells_every_choice(model: Callable[[str], Model], tmp_path: Path) -> None:
    loaded = model("v2_a")
    loaded.experts.ahead = True
    session = loaded.session(64)
    mixtures = loaded.spec.routed
    try:
        with RouteTrace(tmp_path / "trace", loaded.spec.routed_experts) as trace:
            loaded.trace_routes(trace)
            session.feed(range(5))
            session.feed([7])
    finally:
        loaded.trace_routes(None)
    session.feed([8])
    head, *lines = (tmp_path / "trace").read_text().splitlines()
    assert head == f"# {sum(experts for experts, _ in mixtures.values())} routed experts"
    rows = [tuple(map(int, line.split())) for line in lines if line]
    passes = [[(t, layer) for layer in mixtures for t in tokens] for tokens in (range(5), [5])]
    assert [row[:2] for row in rows] == passes[0] + passes[1]
    for _, layer, *chosen in rows:
        assert len(set(chosen)) == mixtures[layer][1]
        assert max(chosen) < mixtures[layer][0]


# ---------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def numoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """numoe(*arguments) -> stdout."""
    monkeypatch.setattr("sys.stdin", None)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        assert not left.value.code
        return capsys.readouterr().out

    before = threads.in_use()
    yield run
    threads.use(before)


def test_a_run_is_traced_and_replayed(numoe: Callable[..., str], tmp_path: Path) -> None:
    folder, trace = write_checkpoint("v4_a", tmp_path / "model"), tmp_path / "trace"
    tiny_tokenizer(folder, 96)
    numoe("run", str(folder), "hi", "-n", "12", "-q", "--trace", str(trace))
    read = read_trace(trace)
    assert read.experts == 70
    document = json.loads(numoe("bench", "--replay", str(trace), "--json"))
    assert document == {"replay": str(trace), "accesses": len(read.accesses), "budgets": replay(read)}
    assert [row["share"] for row in document["budgets"]] == list(SHARES)
    rates = [row["belady"] for row in document["budgets"]]
    assert rates == sorted(rates) and 0 < rates[-1] < 1
    head, *rows = numoe("bench", "--replay", str(trace)).splitlines()
    assert head.split()[-3:] == list(POLICIES)
    assert rows[0].split()[:2] == ["5%,", "4"]
    assert len(rows) == len(SHARES)

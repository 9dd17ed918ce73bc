"""The benchmark: what it feeds, what it reports. No figure is compared with a clock."""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numoe.engine import InputError, Model, Session
from numoe.engine.bench import bench
from numoe.quant import threads

Models = Callable[[str], Model]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """(position, tokens) of every feed."""
    seen: list[tuple[int, list[int]]] = []
    feed = Session.feed

    def record(self: Session, token_ids: Any, **options: Any) -> Any:
        seen.append((self.position, np.asarray(token_ids).tolist()))
        return feed(self, token_ids, **options)

    monkeypatch.setattr(Session, "feed", record)
    return seen


@pytest.mark.parametrize("case", ["llama_a", "v4_a"])
def test_every_repetition_reads_a_prompt_and_decodes_after_it(
    model: Models, fed: list[tuple[int, list[int]]], case: str
) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"prompt_tokens": 150, "decode_tokens": 5, "repetitions": 2}
    options |= {"load_seconds": 0.5, "progress": lambda *counts: told.append(counts)}
    bench(model(case), **options)
    one = [(0, 150), (150, 1), (151, 1), (152, 1), (153, 1), (154, 1)]
    assert [(position, len(ids)) for position, ids in fed] == one * 2
    assert told == [(1, 2), (2, 2)]

    first, second = ([token for _, ids in fed[a : a + 6] for token in ids] for a in (0, 6))
    assert first != second
    assert len(set(first)) > 20
    again = len(fed)
    bench(model(case), **options)
    assert fed[:again] == fed[again:]


def test_figures_follow_from_each_other(model: Models) -> None:
    result = bench(model("llama_a"), load_seconds=0.25, prompt_tokens=20, decode_tokens=4, repetitions=1)
    assert list(result) == [
        "threads", "prefill", "decode", "load_s", "first_token_s", "peak_rss_bytes", "experts",
    ]  # fmt: skip
    assert (result["threads"], result["load_s"], result["experts"]) == (threads.in_use(), 0.25, {})
    assert (result["prefill"]["tokens"], result["decode"]["tokens"]) == (20, 4)
    assert result["decode"]["tokens_per_s"] > 0
    # Of one repetition: the first token takes the prompt and a choice.
    assert result["first_token_s"] > 20 / result["prefill"]["tokens_per_s"] > 0
    assert result["peak_rss_bytes"] > model("llama_a").stats()["weight_bytes"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1"),
        ({"decode_tokens": 0}, "-n must be at least 1"),
        ({"repetitions": 0}, "--repetitions must be at least 1"),
        ({"prompt_tokens": 1000, "decode_tokens": 25}, "do not fit into this model's context of 1024"),
    ],
)
def test_what_is_out_of_range_is_refused(model: Models, options: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        bench(model("llama_a"), load_seconds=0.0, **options)


# ---------------------------------------------------------------------------------------------------- the command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def numoe(command: Run) -> Run:
    """numoe(*arguments) -> (exit code, stdout, stderr) of this command."""
    return partial(command, "bench")


SHORT = ["-n", "3", "--prompt-tokens", "10", "--repetitions", "2"]


def test_the_document_is_as_scripts_expect_it(numoe: Run, checkpoint: Callable[[str], Path]) -> None:
    folder = str(checkpoint("mixtral_a"))
    code, out, err = numoe(folder, *SHORT, "--threads", "1", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {
        "model", "threads", "prefill", "decode", "load_s", "first_token_s", "peak_rss_bytes", "experts",
    }  # fmt: skip
    assert (document["model"], document["threads"]) == (folder, 1)
    # All of them are in memory: whatever is asked for is there.
    assert document["experts"]["hits"] > 0 and document["experts"]["misses"] == 0
    assert threads.in_use() == 1
    for kind, tokens in [("prefill", 10), ("decode", 3)]:
        assert set(document[kind]) == {"tokens", "tokens_per_s"}
        assert document[kind]["tokens"] == tokens and document[kind]["tokens_per_s"] > 0
    assert document["load_s"] > 0 and document["first_token_s"] > 0
    assert isinstance(document["peak_rss_bytes"], int)


def test_people_get_a_table(numoe: Run, checkpoint: Callable[[str], Path]) -> None:
    code, out, err = numoe(str(checkpoint("llama_a")), *SHORT)
    assert (code, err) == (0, "")
    rows = {line[:11].strip(): line[11:].split() for line in out.splitlines()}
    assert rows["threads"] == [str(threads.usable_cores())]
    assert rows["prefill"][1:] == ["tok/s", "(10", "tokens)"]
    assert rows["decode"][1:] == ["tok/s", "(3", "tokens)"]
    assert {"load", "first token", "peak memory"} <= set(rows)


def test_reads_from_disk_are_told(
    numoe: Run, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = sys.modules["numoe.engine.load"]
    monkeypatch.setattr(loading, "_expert_room", lambda _, experts, *others: 3 * max(experts.largest.values()))
    code, out, _ = numoe(str(checkpoint("mixtral_a")), *SHORT)
    rows = {line[:11].strip(): line[11:].strip() for line in out.splitlines()}
    assert code == 0
    assert re.fullmatch(r"\d+\.\d% found in memory, [\d.]+ kB there now", rows["experts"])
    assert re.fullmatch(r"[\d.]+ [kM]B, [\de.-]+ s of waiting", rows["read"])


def test_errors_are_one_sentence(numoe: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, err = numoe(str(checkpoint("llama_a")), "--prompt-tokens", "2000")
    assert (code, out) == (1, "")
    assert "lower --prompt-tokens" in err and err.count("\n") == 1
    code, out, err = numoe(str(tmp_path / "nowhere"))
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert numoe(str(checkpoint("llama_a")), "-n", "0")[0] == 2

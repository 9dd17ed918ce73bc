"""The benchmark: what it feeds, what it reports. No figure is compared with a clock."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numoe.engine import InputError, Model, Session, describe
from numoe.engine.measure import bench as engine_bench
from numoe.engine.measure.bench import PACKS, bench, bench_kernels, copies, per_second, plain_products, products
from numoe.engine.measure.machine import process_bytes
from numoe.quant.compute import threads
from numoe.quant.convert.recipe import Target
from numoe.quant.formats import qtensor
from numoe.quant.formats.columns import laid_out
from numoe.quant.formats.ggml_types import TYPES
from numoe.quant.formats.qtensor import QTensor

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
        ({"prompt_tokens": 0}, "`prompt_tokens` must be at least 1"),
        ({"decode_tokens": 0}, "`decode_tokens` must be at least 1"),
        ({"repetitions": 0}, "`repetitions` must be at least 1"),
        ({"prompt_tokens": 1000, "decode_tokens": 25}, "do not fit into this model's context of 1024"),
    ],
)
def test_what_is_out_of_range_is_refused(model: Models, options: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        bench(model("llama_a"), load_seconds=0.0, **options)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of a size that takes no time, each sample one product."""
    monkeypatch.setattr(engine_bench, "SHAPES", ((64, 256), (32, 512)))
    monkeypatch.setattr(engine_bench, "TOKENS", (1, 12))
    monkeypatch.setattr(engine_bench, "BLOCK_KINDS", BLOCK_KINDS)
    monkeypatch.setattr(engine_bench, "working_set_bytes", lambda: 1 << 16)
    monkeypatch.setattr(engine_bench, "_SECONDS", 0.0)
    before = threads.in_use()
    yield
    threads.use(before)


BLOCK_KINDS = ("q4_k", "iq2_xxs")
FORMATS = ["f32", "bf16", "fp8 128x128", "mxfp4", "int8 g32", "int4 g32", "int4 g64", "int4 g128", *BLOCK_KINDS]


def test_kernels_of_every_format_shape_and_batch_are_measured(small: None) -> None:
    told: list[tuple[int, int]] = []
    result = bench_kernels(threads=3, repetitions=1, progress=lambda *counts: told.append(counts))
    assert list(result) == ["threads", "working_set_bytes", "read_bytes_per_s", "kernels"]
    assert (result["threads"], threads.in_use(), result["working_set_bytes"]) == (3, 3, 1 << 16)
    measured = [(row["format"], row["shape"], row["tokens"]) for row in result["kernels"]]
    assert measured == [(kind, shape, t) for shape in ([64, 256], [32, 512]) for kind in FORMATS for t in (1, 12)]
    count = 2 * len(FORMATS)
    assert told == [(done, count) for done in range(1, count + 1)]
    bits = {"f32": 32, "bf16": 16, "fp8 128x128": None, "mxfp4": 4.25, "int8 g32": Target("int8", 32).format.bits_each}
    bits |= {f"int4 g{group}": Target("int4", group).format.bits_each for group in (32, 64, 128)}
    bits |= {name: TYPES[name].format.bits_each for name in BLOCK_KINDS}
    for row in result["kernels"]:
        assert row["times_plain"] > 0 and row["scaling"] > 0
        wanted = bits[row["format"]]
        if wanted:  # a matrix so small has a share of an fp8 block
            assert row["bytes_per_s"] == pytest.approx(row["weights_per_s"] * wanted / 8)
        assert row["of_read_speed"] == pytest.approx(row["bytes_per_s"] / result["read_bytes_per_s"])


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("tokens", [1, 12])
def test_what_is_compared_is_the_same_product(
    pack: Callable[..., QTensor], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs: list[np.ndarray] = []

    def kept(call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            outs.append(call(*arguments))
            return outs[-1]

        return record

    matrix = pack(np.random.default_rng(0).standard_normal((64, 256), np.float32))
    x = np.random.default_rng(1).standard_normal((tokens, 256), np.float32)
    monkeypatch.setattr(engine_bench, "matmul_all", kept(qtensor.matmul_all))
    assert next(products(cycle([laid_out(matrix)]), x)) == 64 * 256 * len(outs[0])
    monkeypatch.setattr(np, "matmul", kept(np.matmul))
    assert next(plain_products(cycle([matrix]), x)) == 64 * 256
    ours, plain = outs[0][0], outs[-1]
    assert np.abs(ours - plain).max() < 1e-3 * np.abs(plain).max()


def test_matrices_take_their_turns_across_samples() -> None:
    class Matrix:
        shape = 2, 3

        def __init__(self, name: str) -> None:
            self.name = name

        def products(self, x: Any, out: np.ndarray) -> list[Callable[[], None]]:
            seen.append(self.name)
            return []

    seen: list[str] = []
    turns: Any = cycle(map(Matrix, "abcdefghij"))
    few, many = (products(turns, np.zeros((tokens, 3), np.float32)) for tokens in (1, 20))
    assert list(islice(many, 2)) == [6, 6]
    assert next(few) == 48  # the eight experts of a token
    assert next(many) == 6
    assert "".join(seen) == "abcdefghija"


@pytest.mark.parametrize("pack", PACKS)
def test_copies_share_no_memory_and_fill_the_working_set(pack: Callable[..., QTensor]) -> None:
    matrix = laid_out(pack(np.ones((32, 128), np.float32)))
    size = matrix.nbytes
    for wanted, count in [(1, 2), (3 * size, 3), (3 * size + 1, 4)]:
        made = copies(matrix, wanted)
        assert [one.nbytes for one in made] == [size] * count
        arrays = [value for one in made for value in vars(one).values() if isinstance(value, np.ndarray)]
        assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def test_a_speed_is_of_all_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.0, 10.01, 10.02, 10.04])
    monkeypatch.setattr(engine_bench, "_SECONDS", 0.03)
    monkeypatch.setattr(engine_bench.time, "perf_counter", lambda: next(now))
    work = iter([5, 10, 20, 40])
    assert per_second(work) == pytest.approx(35 / 0.04)
    assert next(work) == 40


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
    monkeypatch.setattr(sys.modules["numoe.engine.plan"], "scratch_bytes", lambda spec: 0)
    least = describe(checkpoint("mixtral_a")).plan(13).least_bytes + process_bytes()
    code, out, _ = numoe(str(checkpoint("mixtral_a")), *SHORT, "--ram", f"{least}B")
    rows = {line[:11].strip(): line[11:].strip() for line in out.splitlines()}
    assert code == 0
    assert re.fullmatch(r"\d+\.\d% found in memory, [\d.]+ kB there now", rows["experts"])
    assert re.fullmatch(r"[\d.]+ [kM]B, [\de.-]+ s of waiting", rows["read"])


def test_errors_are_one_sentence(numoe: Run, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    code, out, err = numoe(str(checkpoint("llama_a")), "--prompt-tokens", "2000")
    assert (code, out) == (1, "")
    assert "lower --prompt-tokens" in err and err.count("\n") == 1
    code, out, err = numoe(str(tmp_path / "nowhere"))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert numoe(str(checkpoint("llama_a")), "-n", "0")[0] == 2


def test_kernels_are_a_document_or_a_table(numoe: Run, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # small figures of a busy machine are long, and would fold the heading
    code, out, err = numoe("kernels", "--threads", "2", "--repetitions", "1", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["threads"] == 2 and len(document["kernels"]) == 4 * len(FORMATS)
    code, out, err = numoe("kernels", "--threads", "1", "--repetitions", "1")
    assert (code, err) == (0, "")
    told, heads, *rows = out.splitlines()
    assert told.startswith("threads: 1; memory is read at ")
    heading = ["format", "shape", "tokens", "Gw/s", "GB/s", "of read", "x plain NumPy", "x 1 thread"]
    assert re.split("  +", heads) == heading
    assert [row[:12].strip() for row in rows[::2]] == FORMATS * 2
    assert rows[0].split()[1:3] == ["64x256", "1"]


@pytest.mark.parametrize("option", [("-n", "4"), ("--prompt-tokens", "4"), ("--ram", "1GB")])
def test_kernels_refuse_options_about_models(numoe: Run, option: tuple[str, str]) -> None:
    code, out, err = numoe("kernels", *option)
    assert (code, out) == (2, "")
    assert "it takes --threads, --repetitions and --json" in " ".join(err.split())

"""Perplexity: every token once and with the right context, and divergence, against plain computations."""

import io
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from numoe.engine import InputError, Model
from numoe.engine.measure.perplexity import perplexity, windows

Models = Callable[[str], Model]
# Two models with 64 tokens.
ONE, OTHER = "qwen3_b", "mixtral_b"


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


def contexts(ids: list[int], window: int, stride: int, bos: int | None) -> list[tuple[list[int], int]]:
    """(what is read before it, token) of every token that is scored, by the definition."""
    prefix = [] if bos is None else [bos]
    length = window - len(prefix)
    found = []
    for i in range(1 - len(prefix), len(ids)):
        start = next(start for start in range(0, len(ids), stride) if i < start + length)
        found.append((prefix + ids[start:i], ids[i]))
    return found


@pytest.mark.parametrize("case", ["llama_a", "v2_a", "v4_a"])
def test_one_window_is_the_reference_likelihood(model: Models, case: str) -> None:
    golden = tiny.load_golden(case)
    ids = golden.ids[:600]
    expected = -log_softmax(golden.logits[: len(ids) - 1])[np.arange(len(ids) - 1), ids[1:]].mean()
    result = perplexity(model(case), ids.tolist(), window=len(ids), stride=1)
    assert abs(result.nll - expected) < 1e-4
    assert abs(result.perplexity - np.exp(expected)) < 1e-3 * np.exp(expected)
    assert (result.tokens, result.window, result.stride) == (len(ids) - 1, len(ids), 1)
    assert result.kl_mean is None and result.top1_agreement is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_agree_with_the_definition(model: Models, data: st.DataObject) -> None:
    tested, reference = model(ONE), model(OTHER)
    ids = tiny.random_ids("windows", data.draw(st.integers(2, 24)), 64).tolist()
    window = data.draw(st.integers(2, 30))
    stride = data.draw(st.integers(1, window - 1))
    bos = data.draw(st.sampled_from([None, 5]))
    told: list[tuple[int, int]] = []
    result = perplexity(
        tested,
        ids,
        window=window,
        stride=stride,
        bos=bos,
        against=reference,
        progress=lambda done, total: told.append((done, total)),
    )

    scored = contexts(ids, window, stride, bos)
    p = [log_softmax(tested.session(64).feed(before, last=True)[0]) for before, _ in scored]
    q = [log_softmax(reference.session(64).feed(before, last=True)[0]) for before, _ in scored]
    nll = -np.mean([row[token] for row, (_, token) in zip(p, scored, strict=True)])
    kl = np.mean([np.sum(np.exp(b) * (b - a)) for a, b in zip(p, q, strict=True)])
    agreed = np.mean([a.argmax() == b.argmax() for a, b in zip(p, q, strict=True)])
    assert result.tokens == len(scored)
    assert result.nll == pytest.approx(nll, abs=1e-4)
    assert result.kl_mean == pytest.approx(kl, abs=1e-4)
    assert result.top1_agreement == pytest.approx(agreed)
    assert told[-1] == (len(scored), len(scored))
    assert all(a < b for (a, _), (b, _) in pairwise(told))


@given(data=st.data())
def test_windows_score_every_token_once_with_enough_before_it(data: st.DataObject) -> None:
    first = data.draw(st.integers(0, 1))
    count = data.draw(st.integers(1 + first, 400))
    length = data.draw(st.integers(1 + first, 120))
    stride = data.draw(st.integers(1, length - first))
    scored: list[int] = []
    for number, (start, begin, stop) in enumerate(windows(count, first, length, stride)):
        assert stop - start <= length
        assert number == 0 or begin - start == length - stride
        scored += range(begin, stop)
    assert scored == list(range(first, count))


def test_a_text_of_several_chunks_is_read_whole(model: Models) -> None:
    ids = tiny.random_ids("chunks", 1000, 64).tolist()
    logits = model(ONE).session(1000).feed(ids)
    expected = -log_softmax(logits[:-1])[np.arange(999), ids[1:]].mean()
    assert perplexity(model(ONE), ids, window=1000).nll == pytest.approx(expected, abs=1e-5)


def test_a_model_does_not_differ_from_itself(model: Models) -> None:
    ids = tiny.random_ids("self", 100, 64).tolist()
    result = perplexity(model(ONE), ids, window=32, against=model(ONE))
    assert result.kl_mean == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1
    assert result.nll == pytest.approx(perplexity(model(ONE), ids, window=32).nll)


def test_divergence_is_taken_from_the_reference(model: Models) -> None:
    ids = tiny.random_ids("direction", 50, 64).tolist()
    there = perplexity(model(ONE), ids, against=model(OTHER))
    back = perplexity(model(OTHER), ids, against=model(ONE))
    p, q = (log_softmax(model(case).session(50).feed(ids[:-1])) for case in (ONE, OTHER))
    assert there.kl_mean == pytest.approx((np.exp(q) * (q - p)).sum(axis=1).mean(), rel=1e-4)
    assert back.kl_mean == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-4)
    assert there.top1_agreement == back.top1_agreement
    assert there.top1_agreement is not None and there.top1_agreement < 1


@pytest.mark.parametrize(
    ("ids", "options", "reason"),
    [
        ([1, 2, 3], {"window": 1}, "`window` 1 is not possible"),
        ([1, 2, 3], {"window": 1025}, "give 2 to 1024 tokens"),
        ([1, 2, 3], {"window": 8, "stride": 0}, "`stride` 0 is not possible"),
        ([1, 2, 3], {"window": 8, "stride": 8}, "moves by 1 to 7"),
        ([1], {}, "too short"),
        ([], {"bos": 1}, "too short"),
        ([1, 64], {}, "outside 0..63"),
        ([-1, 1], {}, "outside 0..63"),
    ],
)
def test_what_is_out_of_range_is_refused(model: Models, ids: list[int], options: dict[str, int], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        perplexity(model(ONE), ids, **options)


def test_models_of_other_vocabularies_are_not_compared(model: Models) -> None:
    with pytest.raises(InputError, match="vocabularies of 64 and 90 tokens"):
        perplexity(model(ONE), [1, 2, 3], against=model("llama_a"))


def test_logits_that_are_not_finite_are_refused(model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.full((2, 64), np.nan, np.float32)
    monkeypatch.setattr(model(ONE).decoder, "forward", lambda *_, **__: nothing)
    with pytest.raises(InputError, match="not finite"):
        perplexity(model(ONE), [1, 2, 3])


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models with the same tokenizer, and the first one again with a BOS before each text."""
    found = {}
    for name, case, tokenizer in [("one", ONE, {}), ("other", OTHER, {}), ("bos", ONE, {"add_bos_token": True})]:
        folder = tiny.write_checkpoint(case, tmp_path_factory.mktemp("models") / name)
        tiny_tokenizer(folder, 64)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | tokenizer))
        found[name] = str(folder)
    return found


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def numoe(command: Run) -> Run:
    """numoe(*arguments) -> (exit code, stdout, stderr) of this command."""
    return partial(command, "perplexity")


TEXT = "the quick brown fox jumps over the lazy dog. what does the fox say?\n" * 3


def test_the_document_is_the_engines_result(folders: dict[str, str], model: Models, tmp_path: Path, numoe: Run) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    options = ["--against", folders["other"], "--window", "64", "--stride", "48", "--limit", "150", "--json"]
    code, out, err = numoe(folders["one"], str(file), *options)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document.pop("seconds") >= 0
    ids = model_ids(folders["one"])[:150]
    expected = perplexity(model(ONE), ids, window=64, stride=48, against=model(OTHER))
    assert document == pytest.approx(
        {
            "model": folders["one"],
            "file": str(file),
            "tokens": 149,
            "window": 64,
            "stride": 48,
            "perplexity": expected.perplexity,
            "nll": expected.nll,
            "against": folders["other"],
            "kl": expected.kl_mean,
            "top1_agreement": expected.top1_agreement,
        }
    )


def model_ids(folder: str) -> list[int]:
    from numoe.engine import describe

    return describe(folder).tokenizer.encode(TEXT, special=False)


def test_piped_text_is_read_with_a_bos_where_the_model_has_one(
    folders: dict[str, str], model: Models, monkeypatch: pytest.MonkeyPatch, numoe: Run
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    code, out, _ = numoe(folders["bos"], "-", "--json")
    ids = model_ids(folders["bos"])
    document = json.loads(out)
    assert (code, document["tokens"], document["file"]) == (0, len(ids), "-")
    assert document["nll"] == pytest.approx(perplexity(model(ONE), ids, bos=1).nll)
    assert document["against"] is document["kl"] is document["top1_agreement"] is None


def test_people_get_a_few_lines(folders: dict[str, str], tmp_path: Path, numoe: Run) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    code, out, err = numoe(folders["one"], str(file))
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["perplexity", "tokens"]
    code, out, _ = numoe(folders["one"], str(file), "--against", folders["one"])
    assert code == 0
    assert all(words in " ".join(out.split()) for words in ("KL divergence", "top-1 agreement 100.00%"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"caf\xe9", "is not UTF-8 (byte 3)"),
        (b"a", "too short"),
    ],
)
def test_a_bad_text_is_one_sentence(
    folders: dict[str, str], tmp_path: Path, numoe: Run, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    code, out, err = numoe(folders["one"], str(file))
    assert (code, out) == (2 if content is None else 1, "")
    assert err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_models_that_split_the_text_otherwise_are_not_compared(
    folders: dict[str, str], tmp_path: Path, numoe: Run
) -> None:
    file = tmp_path / "text"
    file.write_text(TEXT)
    stranger = tiny.write_checkpoint(ONE, tmp_path / "stranger")
    tiny_tokenizer(stranger, 64)
    path = stranger / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(spec))
    code, out, err = numoe(folders["one"], str(file), "--against", str(stranger))
    assert (code, out) == (1, "")
    assert "the same tokenizer" in err and err.count("\n") == 1

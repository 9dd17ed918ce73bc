"""The forms that rows are held in: how exact they are, what they take, and attention over them in bounded memory."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import write_safetensors
from test_kinds import random

from numoe.engine import InputError, Model, load
from numoe.engine.families import family
from numoe.engine.layers.attention import softmax
from numoe.engine.layers.attention.indexer import Indexer, LightningIndexer
from numoe.engine.layers.block import Shared
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.rows import BF16, FLOAT32, INT8, ROW_FORMS, RowForm, RowShape, row_form, stretch
from numoe.engine.layers.state import Rows
from numoe.engine.layers.weights import Weights
from numoe.engine.plan import kv_bytes
from numoe.engine.session_file import proof
from numoe.quant.stored.safetensors import read_header

Checkpoints = Callable[[str], Path]
SHAPES = (
    RowShape(3, 8),
    RowShape(2, 8, apart=8, fine=True),
    RowShape(1, 12, apart=4),
    RowShape(1, 12, apart=4, fine=True),
    RowShape(1, 5),
)


def decoded(form: RowForm, rows: np.ndarray, shape: RowShape) -> np.ndarray:
    cache = Cache([{"rows": Rows(shape.groups, shape.width, apart=shape.apart, fine=shape.fine)}], rows.shape[1], form)
    cache.blocks[0]["rows"].write(rows, 0)
    assert cache.nbytes == form.nbytes(shape, rows.shape[1])
    return cache.blocks[0]["rows"].view(0, rows.shape[1]).floats()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ROW_FORMS.values(), ids=lambda form: form.name)
def test_rows_come_back_as_exact_as_their_form(form: RowForm, shape: RowShape) -> None:
    """Channels apart are many times the others, and rows of zeros stay such."""
    rows = random(shape.groups, 9, shape.width)
    split = shape.width - shape.apart
    rows[..., split:] *= 1000
    rows[:, 4] = 0
    rows[:, 5, :split] = 0
    off = np.abs(decoded(form, rows.copy(), shape) - rows)
    for part, fine in ((slice(0, split), False), (slice(split, None), shape.fine)):
        most = np.abs(rows[..., part]).max(axis=-1, keepdims=True, initial=0)
        step = {FLOAT32: 0.0, BF16: 2**-8, INT8: 1 / 65534 if fine else 1 / 254}[form]
        assert (off[..., part] <= step * 1.01 * most).all()


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0xC0490FDB], np.uint32)
    made = BF16.encode(bits.view(np.float32).reshape(1, 1, -1), RowShape(1, 5))[0]
    assert made.ravel().tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xC049]


def test_there_is_no_other_form() -> None:
    with pytest.raises(InputError, match='`kv` is float32, bf16, int8, not "q8"'):
        row_form("q8")


@pytest.mark.parametrize("form", [BF16, INT8], ids=lambda form: form.name)
@pytest.mark.parametrize(("groups", "count"), [(2, 1), (2, 40), (1, 3)])
@pytest.mark.parametrize("turns", [False, True])
def test_attention_over_rows_of_a_form_is_that_over_their_values(
    form: RowForm, groups: int, count: int, turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, at once and in turn; values may be the first channels of keys."""
    keys, values = random(groups, 50, 12), random(groups, 50, 7)
    cache = Cache([{"k": Rows(groups, 12, apart=4, fine=True), "v": Rows(groups, 7)}], 50, form)
    kept = cache.blocks[0]
    kept["k"].write(keys, 0)
    kept["v"].write(values, 0)
    monkeypatch.setattr("numoe.engine.layers.rows.BLOCK_BYTES", 4 * groups * 12 * 16)
    if turns:
        monkeypatch.setattr(softmax, "SCORE_BYTES", 4 * groups * count * 2 * 20)
    q, hidden = random(groups, count, 2, 12), random(count, 50) > 1
    k, v = kept["k"].view(0, 50), kept["v"].view(0, 50)
    plain = stretch(k.floats()), stretch(v.floats())
    for made, exact in (((k, v), plain), ((k, k.first(5)), (plain[0], plain[0].first(5)))):
        right = softmax.attend(q, [(*exact, hidden)], 0.5)
        np.testing.assert_allclose(softmax.attend(q, [(*made, hidden)], 0.5), right, atol=2e-5)
    chosen = np.array([[3, 7, 49], [0, 1, 2]])
    np.testing.assert_allclose(k.pick(chosen), k.floats()[0][chosen], rtol=1e-6)


@pytest.mark.parametrize("form", ROW_FORMS.values(), ids=lambda form: form.name)
def test_the_indexer_chooses_of_many_keys_in_bounded_memory(form: RowForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for any length: only what is known of each key grows, which the bound is for too."""
    indexer = LightningIndexer(Indexer(4, 8, 5), Rope(8, 1e4), Weights(), Shared(1e-6))
    cache = Cache([{"rows": Rows(1, 8)}], 6000, form)
    kept = cache.blocks[0]["rows"]
    for a in range(0, 6000, 500):
        kept.write(random(1, 500, 8, seed=a), a)
    q, weights = random(6, 4, 8), np.abs(random(6, 4, seed=3))
    visible = np.array([3, 10, 700, 701, 5999, 6000])
    keys = kept.view(0, 6000).floats()[0]
    scores = (np.maximum(np.einsum("thc,wc->thw", q, keys), 0) * weights[..., None]).sum(axis=1)
    monkeypatch.setattr("numoe.engine.layers.attention.indexer.SCORE_BYTES", 1 << 14)
    monkeypatch.setattr("numoe.engine.layers.rows.BLOCK_BYTES", 1 << 10)
    tracemalloc.start()
    chosen = indexer.choose(q, weights, kept, visible)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for t, seen in enumerate(visible):
        best = set(np.argsort(-scores[t, :seen], kind="stable")[:5].tolist())
        assert best == {one for one in chosen[t].tolist() if one < seen}
    assert peak < 300_000  # of which 6000 keys' scores, a few times over, are two thirds


@pytest.mark.parametrize("case", ["v4_a", "v2_a", "deepseek_v32_a", "mixtral_b", "gpt_oss_a", "qwen3_5_moe_a"])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_every_attention_runs_in_every_form(case: str, kv: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Near the exact logits, however tokens are fed; saved, restored and forked to the bit."""
    ids = tiny.load_golden(case).ids[:90].tolist()
    exact, small = load(checkpoint(case)), load(checkpoint(case), kv=kv)
    assert small.plan(300).kv_bytes == small.decoder.cache(300).nbytes < exact.plan(300).kv_bytes
    right = exact.session(300).feed(ids)
    session, other = small.session(300), small.session(200)
    made = np.concatenate([session.feed(ids[:60]), session.feed(ids[60:61]), session.feed(ids[61:])])
    assert 0 < np.abs(made - right).mean() < 0.15 * right.std()  # an indexer may choose others
    session.rewind(5)
    session.save(tmp_path / "kept")
    restored = small.restore(tmp_path / "kept")
    other.fork(session)
    assert restored.kv == kv
    expected = session.feed([1, 2, 3])
    np.testing.assert_array_equal(restored.feed([1, 2, 3]), expected)
    np.testing.assert_array_equal(other.feed([1, 2, 3]), expected)
    with pytest.raises(InputError, match=f"a session of float32 rows cannot go on from one of {kv}"):
        exact.session(300).fork(session)


def earlier_file(model: Model, ids: list[int], path: Path) -> None:
    """A session's file as it was written before rows had a form."""
    session = model.session(128)
    session.feed(ids)
    session._cache._place.before = None
    arrays, back = session._cache.arrays(), session._cache.back
    assert back == 0 or arrays
    session.save(path)
    _, header = read_header(path)
    for name in ("kv", "back", "header"):
        del header[name]
    from numoe.engine.session_file import _digest
    from numoe.quant.stored.arrays import pieces

    header |= {"numoe": "session 2", "rows": _digest(pieces(arrays))}
    raw = {name: ("F32", values.shape, np.ascontiguousarray(values).tobytes()) for name, values in arrays.items()}
    write_safetensors(path, raw, header | proof(header))


@pytest.mark.parametrize("case", ["v4_a", "gpt_oss_a", "llama_a"])
def test_files_of_earlier_versions_still_load(case: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Also where the model is to hold others: the session keeps the form it had."""
    ids = tiny.load_golden(case).ids[:60].tolist()
    exact = load(checkpoint(case))
    earlier_file(exact, ids, tmp_path / "kept")
    right = exact.session(128)
    right.feed(ids)
    for model in (exact, load(checkpoint(case), kv="int8")):
        restored = model.restore(tmp_path / "kept")
        assert restored.kv == "float32" and restored.tokens == ids
        np.testing.assert_array_equal(restored.feed([5]), right.feed([5]))
        right.rewind(1)


@pytest.mark.parametrize("length", [4096, 65536])
def test_scratch_of_attention_does_not_grow_with_the_context(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "SCORE_BYTES", 1 << 17)
    cache = Cache([{"k": Rows(2, 8, apart=8, fine=True), "v": Rows(2, 8)}], length, INT8)
    kept = cache.blocks[0]
    for a in range(0, length, 512):
        kept["k"].write(random(2, 512, 8), a)
        kept["v"].write(random(2, 512, 8), a)
    tracemalloc.start()
    softmax.attend(random(2, 4, 3, 8), [(kept["k"].view(0, length), kept["v"].view(0, length), None)], 1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 20) + (1 << 18)


def test_a_million_tokens_of_v4_flash_are_planned_in_less_than_four_gigabytes() -> None:
    config = json.loads((Path(__file__).parents[1] / "configs" / "deepseek-ai__DeepSeek-V4-Flash.json").read_text())
    spec = family("deepseek_v4").spec(config)
    assert kv_bytes(spec, 1 << 20, INT8) == 3_873_468_928
    assert kv_bytes(spec, 1 << 20, FLOAT32) > 3.7 * kv_bytes(spec, 1 << 20, INT8)

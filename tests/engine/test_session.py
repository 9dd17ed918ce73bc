"""Sessions: what they refuse, aligning to a prompt, interruption, files."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tiny
from helpers import write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from numoe.engine import InputError, Model, describe, load
from numoe.engine.layers.state import KeptRows, RecurrentState
from numoe.engine.measure.calibrate import calibrate
from numoe.engine.session_file import proof
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.stored.manifest import sealed
from numoe.quant.stored.safetensors import read_header

Checkpoints = Callable[[str], Path]
Models = Callable[[str], Model]


RECURRENT = "qwen3_5_moe_a"
"""Its states are to be had at the current position and where the last prompt ended."""


@pytest.fixture(params=["v4_a", "v2_a", "mixtral_b", "llama_a", "gpt_oss_a", RECURRENT])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_fork_goes_on_as_the_session_does(model: Models, case: str) -> None:
    ids = tiny.load_golden(case).ids[:50].tolist()
    one, other = model(case).session(64), model(case).session(56)
    one.feed(ids[:30])
    one.feed(ids[30:40])
    one.rewind(3)
    other.feed(ids[5:9])
    other.fork(one)
    assert other.tokens == one.tokens == ids[:37]
    np.testing.assert_array_equal(other.feed(ids[37:45]), one.feed(ids[37:45]))
    np.testing.assert_array_equal(other.feed(ids[45:46]), one.feed(ids[45:46]))
    with pytest.raises(InputError, match="46 tokens do not fit into the context of 40"):
        model(case).session(40).fork(one)


def test_feed_refuses_what_it_cannot_read(model: Models) -> None:
    session = model("llama_a").session(32)
    for tokens, reason in [
        ([], "the prompt is empty"),
        ([model("llama_a").spec.vocab], "outside 0.."),
        ([-1], "outside 0.."),
        ([0.5], "outside 0.."),
        ([1] * 33, "33 tokens do not fit into the context of 32"),
    ]:
        with pytest.raises(InputError, match=reason):
            session.feed(tokens)
    assert session.position == 0
    session.feed([1] * 32)
    with pytest.raises(InputError, match="33 tokens do not fit"):
        session.feed([1])


def test_context_is_bounded_by_the_model(model: Models) -> None:
    limit = model("llama_a").spec.context
    with pytest.raises(InputError, match=f"`ctx` {limit + 1} is not possible"):
        model("llama_a").session(limit + 1)
    with pytest.raises(InputError, match="`ctx` 0 is not possible"):
        model("llama_a").session(0)


def test_feed_with_last_gives_the_last_logits_only(model: Models, case: str) -> None:
    ids = tiny.load_golden(case).ids[:50]
    full = model(case).session(64).feed(ids)
    last = model(case).session(64).feed(ids, last=True)
    assert last.shape == (1, model(case).spec.vocab)
    np.testing.assert_allclose(last[0], full[-1], atol=1e-3 if case == RECURRENT else 1e-4)


def test_align_keeps_the_common_beginning(model: Models, case: str) -> None:
    ids = tiny.load_golden(case).ids.tolist()[:120]
    session = model(case).session(256)
    session.feed(ids)
    for wanted, left in (([*ids[:90], 3 if ids[90] != 3 else 5, 4], 2), ([*ids, 5], 31), ([*ids, 5], 1), ([7], 1)):
        rest = session.align(wanted)
        assert session.tokens + rest == wanted
        assert len(rest) == (len(wanted) if case == RECURRENT else left)
        session.feed(rest)


def test_recurrent_states_go_back_to_the_end_of_the_prompt(model: Models) -> None:
    ids = tiny.load_golden(RECURRENT).ids.tolist()
    fresh = model(RECURRENT).session(256).feed(ids[:60])
    session = model(RECURRENT).session(256)
    session.feed(ids[:50])
    for token in (1, 2, 3):
        session.feed([token])
    snapshot = session.snapshot()
    assert session.align(ids[:60]) == ids[50:60]
    assert np.abs(session.feed(ids[50:60]) - fresh[50:]).max() < 1e-3
    with pytest.raises(InputError, match="other tokens were read over its own"):
        session.restore(snapshot)
    session.rewind(10)
    assert np.abs(session.feed(ids[50:60]) - fresh[50:]).max() < 1e-3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_walk_of_feeds_and_rewinds_ends_at_the_fresh_logits(model: Models, data: st.DataObject) -> None:
    loaded = model(data.draw(st.sampled_from(["v4_b", "v3_b", "mixtral_b", RECURRENT])))
    ids = tiny.random_ids("walk", 300, loaded.spec.vocab).tolist()
    fresh = loaded.session(300).feed(ids)
    session = loaded.session(300)
    for _ in range(data.draw(st.integers(1, 6))):
        forward = data.draw(st.integers(1, max(1, 300 - session.position)))
        part = ids[session.position : session.position + forward]
        if part:
            got = session.feed(part)
            difference = np.abs(got - fresh[session.position - len(part) : session.position]).max()
            assert difference < (1e-3 if loaded.spec.family.startswith(tiny.RECURRENT) else 1e-4)
        session.rewind(data.draw(st.integers(0, session.position)))


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("block", [0, -1], ids=["first block", "last block"])
def test_an_interrupted_feed_leaves_the_session_where_it_was(
    model: Models, case: str, block: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, bound = model(case), 1e-3 if case == RECURRENT else 1e-4
    ids = tiny.load_golden(case).ids.tolist()[:140]
    fresh = loaded.session(256).feed(ids)
    session = loaded.session(256)
    session.feed(ids[:90])
    snapshot = session.snapshot()
    session.feed(ids[90:100])
    with interrupted(monkeypatch, loaded, block):
        session.feed([(token + 1) % 60 for token in ids[100 : 100 + count]])
    assert session.position == 100 and session.tokens == ids[:100]
    later = session.snapshot()
    assert np.abs(session.feed(ids[100:]) - fresh[100:]).max() < bound
    for point, at in ((later, 100), (snapshot, 90)):
        session.restore(point)
        assert session.tokens == ids[:at]
        assert np.abs(session.feed(ids[at:]) - fresh[at:]).max() < bound


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, model: Model, block: int = -1) -> Iterator[None]:
    """What is within ends with a KeyboardInterrupt, in its first pass and when a block has changed its states."""
    compute = model.decoder.blocks[block].compute

    def interrupt(*arguments: Any) -> None:
        compute(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.decoder.blocks[block], "compute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("case", ["v4_b", RECURRENT])
def test_going_back_that_is_interrupted_is_done_when_it_matters(
    model: Models, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tokens are read again, and where states are put back one after the other."""
    loaded, bound = model(case), 1e-3 if case == RECURRENT else 1e-4
    ids = tiny.random_ids("back", 700, loaded.spec.vocab).tolist()
    fresh = loaded.session(700).feed(ids)
    session = loaded.session(700)
    session.feed(ids[:500])
    snapshot = session.snapshot()
    session.feed(ids[500:600])
    session.feed(ids[600:])
    with interrupted(monkeypatch, loaded):
        session.rewind(300)
    assert session.tokens == ids[:400]
    with interrupted(monkeypatch, loaded):
        session.feed(ids[400:])
    assert session.tokens == ids[:400]
    assert np.abs(session.feed(ids[400:]) - fresh[400:]).max() < bound
    real = {kind: kind.put_back for kind in (KeptRows, RecurrentState)}
    back = []

    def put_back(state: Any, passed: Any) -> None:
        real[type(state)](state, passed)
        back.append(state)
        if len(back) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for kind in real:
            patch.setattr(kind, "put_back", put_back)
        with pytest.raises(KeyboardInterrupt):
            session.restore(snapshot)
    assert session.tokens == ids
    session.rewind(100)
    assert np.abs(session.feed(ids[600:]) - fresh[600:]).max() < bound
    session.restore(snapshot)
    assert np.abs(session.feed(ids[500:]) - fresh[500:]).max() < bound


def test_restoring_an_overwritten_snapshot_is_refused(model: Models, case: str) -> None:
    session = model(case).session(256)
    session.feed(range(50))
    snapshot = session.snapshot()
    session.rewind(20)
    session.feed([9] * 5)
    with pytest.raises(InputError, match="other tokens were read over its own"):
        session.restore(snapshot)


def test_a_saved_session_goes_on_where_it_was(model: Models, case: str, tmp_path: Path) -> None:
    loaded = model(case)
    ids = tiny.load_golden(case).ids.tolist()[:140]
    fresh = loaded.session(256).feed(ids)
    session = loaded.session(256)
    session.feed(ids[:97])
    session.save(tmp_path / "chat")
    assert [p.name for p in tmp_path.iterdir()] == ["chat"]
    restored = loaded.restore(tmp_path / "chat")
    assert restored.tokens == ids[:97]
    bound = 1e-3 if case == RECURRENT else 1e-4
    assert np.abs(restored.feed(ids[97:]) - fresh[97:]).max() < bound
    restored.rewind(60)
    assert np.abs(restored.feed(ids[80:]) - fresh[80:]).max() < bound


def test_files_that_are_not_sessions_of_this_model_are_refused(model: Models, tmp_path: Path) -> None:
    session = model("llama_a").session(64)
    session.feed([1, 2, 3])
    session.save(tmp_path / "chat")
    with pytest.raises(InputError, match="session of another model"):
        model("llama_c").restore(tmp_path / "chat")
    with pytest.raises(InputError, match="there is no session file"):
        model("llama_a").restore(tmp_path / "none")
    damaged = (tmp_path / "chat").read_bytes()
    (tmp_path / "chat").write_bytes(damaged[:-7])
    with pytest.raises(InputError, match="is not a session file"):
        model("llama_a").restore(tmp_path / "chat")


def test_any_flipped_bit_is_found(model: Models, case: str, tmp_path: Path) -> None:
    loaded = model(case)
    session = loaded.session(64)
    session.feed(tiny.load_golden(case).ids[:20])
    session.save(tmp_path / "chat")
    assert (tmp_path / "chat").stat().st_mode & 0o777 == 0o600
    whole = (tmp_path / "chat").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    random = Random(0)
    places = [*range(8), *random.sample(range(8, 8 + header), 60), *random.sample(range(8 + header, len(whole)), 40)]
    for place in [*places, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.randrange(8)
        (tmp_path / "chat").write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            loaded.restore(tmp_path / "chat")
    for other in (whole[:-1], whole + b"\0", whole[: 8 + header], b"", whole[:8]):
        (tmp_path / "chat").write_bytes(other)
        with pytest.raises(InputError, match="damaged"):
            loaded.restore(tmp_path / "chat")


@pytest.mark.parametrize(
    "change",
    [
        *({key: None} for key in ("context", "tokens", "rows")),
        *({"context": context} for context in ("0", "2", "64.0", "true", "1,2", "", "9" * 5000, "-64", "1000000")),
        *({"tokens": tokens} for tokens in ("", "{}", "3", "[1,2]", "[1,2,true]", "[1,2,-1]", '[1,2,"3"]', "[" * 9999)),
        {"tokens": f"[1,2,{'9' * 5000}]"},
        {"tokens": "[1,2,4096]"},
        {"rows": "0"},
    ],
)
def test_headers_that_nobody_writes_are_refused(change: dict[str, str | None], model: Models, tmp_path: Path) -> None:
    """Their own hash is right."""
    loaded = model("llama_a")
    session = loaded.session(64)
    session.feed([1, 2, 3])
    session.save(tmp_path / "chat")
    tensors, header = read_header(tmp_path / "chat")
    del header["header"]
    header = {key: value for key, value in (header | change).items() if value is not None}
    data = (tmp_path / "chat").read_bytes()
    raw = {i.name: (i.dtype, i.shape, data[i.offset : i.offset + i.nbytes]) for i in tensors.values()}
    write_safetensors(tmp_path / "chat", raw, header | proof(header))
    with pytest.raises(InputError, match="is damaged; start a new session"):
        loaded.restore(tmp_path / "chat")
    write_safetensors(tmp_path / "chat", raw, {"numoe": "session 1", "model": loaded.identity})
    with pytest.raises(InputError, match="not a session file of this version of numoe"):
        loaded.restore(tmp_path / "chat")


def test_sessions_of_models_that_differ_in_large_tensors_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A merge into few matrices, roundings by other texts; and a model that was copied or moved is the same."""
    source = checkpoint("mixtral_a")
    merged = Path(shutil.copytree(source, tmp_path / "merged"))
    tensors = load_file(merged / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name] + np.float32(1e-3) * np.outer(tensors[name][:, 0], tensors[name][0])
    save_file(tensors, merged / "model.safetensors")
    description = describe(source)
    inputs = calibrate(load(source), [5, 6, 7, 8] * 40, bos=None).inputs
    for number, moments in enumerate((None, inputs)):
        folder = tmp_path / str(number)
        convert(description.checkpoint, description.weights(moments), folder, "int4", Folder(source, "x"))
    folders = [source, merged, tmp_path / "0", tmp_path / "1"]
    copied = Path(shutil.copytree(tmp_path / "0", tmp_path / "copied"))
    for file in copied.iterdir():
        file.touch()
    identities = [load(folder).identity for folder in folders]
    assert len(set(identities)) == len(folders)
    assert load(copied).identity == identities[2]
    session = load(folders[2]).session(64)
    session.feed([1, 2, 3])
    session.save(tmp_path / "chat")
    with pytest.raises(InputError, match="session of another model"):
        load(folders[3]).restore(tmp_path / "chat")
    assert load(copied).restore(tmp_path / "chat").tokens == [1, 2, 3]
    manifest = json.loads((copied / "numoe.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    (copied / "numoe.json").write_text(json.dumps(sealed(manifest)))
    assert load(copied).identity != identities[2]


def test_a_session_that_cannot_be_written_leaves_nothing(model: Models, tmp_path: Path) -> None:
    session = model("llama_a").session(64)
    with pytest.raises(InputError, match="cannot be written"):
        session.save(tmp_path / "missing" / "chat")
    assert list(tmp_path.iterdir()) == []


def test_cache_bytes_are_those_of_the_plan(model: Models, case: str) -> None:
    loaded = model(case)
    for ctx in (64, 1000):
        assert loaded.decoder.cache(ctx).nbytes == loaded.plan(ctx).kv_bytes

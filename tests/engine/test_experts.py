"""The expert store: no budget changes a digit or is exceeded, nothing is read twice, errors are sentences."""

import errno
import gc
import json
import os
import shutil
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from itertools import chain, product
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from cases import spec
from gguf.constants import GGMLQuantizationType
from gguf_files import write_gguf
from helpers import dequantized, stack_experts, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from numoe.engine import Description, InputError, Model, describe, load
from numoe.engine.experts import guesses, heat, residents, unit
from numoe.engine.experts import store as experts
from numoe.engine.experts.store import ExpertStore
from numoe.engine.experts.uses import HALF_LIFE
from numoe.engine.measure.machine import process_bytes
from numoe.quant.compute import threads
from numoe.quant.convert.convert import Folder, convert
from numoe.quant.files import Files
from numoe.quant.stored.checkpoint import open_checkpoint

Checkpoints = Callable[[str], Path]
BUDGET, LOAD, PLAN = (import_module(f"numoe.engine.{name}") for name in ("budget", "load", "plan"))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = threads.in_use()
    yield
    threads.use(before)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int, int]]:
    """(path, offset, nbytes) of every read into a buffer of the store."""
    seen: list[tuple[Path, int, int]] = []
    read_range = Files.read_range

    def record(self: Files, path: Path, offset: int, nbytes: int, out: np.ndarray | None = None) -> np.ndarray:
        if out is not None:
            seen.append((path, offset, nbytes))
        return read_range(self, path, offset, nbytes, out)

    monkeypatch.setattr(Files, "read_range", record)
    return seen


# ------------------------------------------------------------------------------------------------------ whole models


def least_bytes(store: ExpertStore) -> int:
    return max(store.largest.values())


def chosen_bytes(model: Description) -> Callable[[ExpertStore], int]:
    top_k = max(top_k for _, top_k in model.spec.routed.values())
    return lambda store: top_k * least_bytes(store)


def load_with(
    monkeypatch: pytest.MonkeyPatch,
    path: Path | Description,
    budget: Callable[[ExpertStore], int],
    ahead: bool = True,
) -> Model:
    """A model whose experts may take so many bytes."""
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 0)
    described = describe(path) if isinstance(path, Path) else path
    model = load(described, ram=described.plan().total_bytes - 1)
    assert model.experts is not None
    wanted = budget(model.experts)
    if wanted == model.experts.total_bytes:
        model = load(described)
    else:
        model.experts.allow(min(wanted, model.experts.budget))
    assert model.experts is not None
    model.experts.ahead = ahead
    return model


def stacked(folder: Path) -> Path:
    """The experts of a layer in one tensor, gate and up fused."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    count = json.loads((folder / "config.json").read_text())["num_local_experts"]
    stack_experts(tensors, count)
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def variant(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A golden case, as it is ("v4_a") or rewritten: "CASE int4", "mixtral_a stacked", "mixtral_a gguf"."""

    @cache
    def write(name: str) -> Path:
        case, _, form = name.partition(" ")
        if not form:
            return checkpoint(case)
        folder = tmp_path_factory.mktemp("variants") / "model"
        if form == "stacked":
            return stacked(Path(shutil.copytree(checkpoint(case), folder)))
        if form == "transposed":
            return dequantized(checkpoint(case), folder, "BF16")
        if form == "gguf":
            return write_gguf(checkpoint(case), tiny.load_golden(case).config, folder.with_suffix(".gguf"), "llama")
        described = describe(checkpoint(case))
        convert(described.checkpoint, described.weights(), folder, form, Folder(described.path, case))
        return folder

    return write


VARIANTS = [
    "gpt_oss_a", "gpt_oss_a transposed", "gpt_oss_b native", "qwen3_5_moe_a",
    "v4_a", "v4_a int4", "v4_released", "v4_released int8",
    "v4_released int4", "v4_released native", "v3_fp8",
    "mixtral_a", "mixtral_a stacked", "mixtral_a gguf", "nemotron_h_b", "nemotron_h_a int4", "granitemoe_b native",
]  # fmt: skip


ROUTED = [c for c in tiny.cases() if spec(c).routed and "quantization_config" not in tiny.load_golden(c).config]
CONVERSIONS = [
    pytest.param(f"{case} {quant}", marks=() if quant == "int4" and case.endswith("_a") else pytest.mark.slow)
    for case in ROUTED
    for quant in ("int8", "int4")
]
"""Of every family one set of sizes in int4; slowly each in both."""


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_of_every_family_run_in_the_room_of_one_layer(
    variant: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    described, ids = describe(variant(name)), tiny.load_golden(name.split()[0]).ids[:30]
    whole, chosen = load(described), chosen_bytes(described)
    model = load_with(
        monkeypatch, described, lambda store: max(store.total_bytes // len(whole.spec.routed), chosen(store))
    )
    np.testing.assert_array_equal(model.session(64).feed(ids), whole.session(64).feed(ids))
    if len(whole.spec.routed) > 1:
        assert model.stats()["experts"]["resident_bytes"] < whole.plan(64).expert_bytes


# (budget, whether experts are read ahead, threads): each budget once by default, and each pair of the others once.
USUAL = [("least", False, 2), ("chosen", True, 1), ("half", True, 2), ("all", False, 1)]
ALL = list(product(("least", "chosen", "half", "all"), (False, True), (1, 2)))


@pytest.mark.parametrize("ways", [USUAL, pytest.param(ALL, marks=pytest.mark.slow)], ids=["usual", "all"])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_digit_depends_on_the_budget(
    variant: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, ways: list[tuple[str, bool, int]]
) -> None:
    described = describe(variant(name))
    ids = tiny.load_golden(name.split()[0]).ids.tolist()[:44]

    def logits(model: Model) -> np.ndarray:
        session = model.session(64)
        return np.concatenate([session.feed(ids[:40]), *(session.feed([token]) for token in ids[40:])])

    expected = logits(load(described, threads=1))
    budgets: dict[str, Callable[[ExpertStore], int]] = {
        "least": least_bytes, "chosen": chosen_bytes(described), "half": lambda store: store.total_bytes // 2,
        "all": lambda store: store.total_bytes,
    }  # fmt: skip
    for budget, ahead, count in ways:
        model = load_with(monkeypatch, described, budgets[budget], ahead)
        threads.use(count)
        np.testing.assert_array_equal(logits(model), expected)
        assert model.experts is not None
        assert model.experts.held_bytes <= model.experts.budget


@pytest.mark.parametrize("name", ["v4_released", "qwen3_moe_a"])
def test_no_digit_depends_on_reads_past_the_cache(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """These experts are too small for them otherwise."""
    ids = tiny.load_golden(name).ids.tolist()[:44]
    expected = load(checkpoint(name)).session(64).feed(ids)
    monkeypatch.setattr(unit, "_PAGED", 1)
    model = load_with(monkeypatch, checkpoint(name), lambda store: store.total_bytes // 2)
    np.testing.assert_array_equal(model.session(64).feed(ids), expected)


def test_everything_that_fits_is_read_when_loading(checkpoint: Checkpoints, reads: list[tuple[Path, int, int]]) -> None:
    model = load(checkpoint("v4_released"))
    assert model.experts is not None and model.experts.complete
    assert len(reads) == len(set(reads)) > 0
    reads.clear()
    model.session(64).feed(range(40))
    stats = model.stats()["experts"]
    assert reads == []
    assert (stats["misses"], stats["bytes_read"], stats["hit_rate"], stats["ahead_fetched"]) == (0, 0, 1.0, 0)
    assert stats["hits"] > 0
    assert stats["resident_bytes"] == model.plan().expert_bytes + model.wide_bytes


def test_the_wide_form_replaces_what_was_read(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory that experts were read to goes, where they are no views of it any more."""
    source = describe(checkpoint("qwen3_moe_a"))
    convert(source.checkpoint, source.weights(), tmp_path / "int4", "int4", Folder(source.path, "source"))
    read: list[weakref.ref[np.ndarray]] = []

    def lasting(nbytes: int) -> np.ndarray:
        memory = np.empty(nbytes + 1, np.uint8)  # of which matrices are views
        read.append(weakref.ref(memory))
        return memory[:nbytes]

    monkeypatch.setattr(residents, "lasting", lasting)
    model = load(tmp_path / "int4", ram="1GB", ctx=64)
    assert model.wide_bytes and model.experts is not None and model.experts.complete
    gc.collect()
    assert read and not any(memory() is not None for memory in read)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [least_bytes, lambda store: store.total_bytes // 3])
def test_a_pass_reads_an_expert_at_most_once(
    checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
    reads: list[tuple[Path, int, int]],
    budget: Callable[[ExpertStore], int],
    ahead: bool,
) -> None:
    model = load_with(monkeypatch, checkpoint("v4_released"), budget, ahead)
    model.session(512).feed(tiny.load_golden("v4_released").ids)
    assert model.experts is not None
    model.experts._readers.shutdown(wait=True)
    assert max(Counter(reads).values()) == 1
    if ahead and budget is not least_bytes:
        assert model.stats()["experts"]["ahead_fetched"] > 0


def test_other_processes_get_memory_that_they_need(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes out is the same; what they give back is taken again."""
    monkeypatch.setattr(experts, "_PATIENCE", 0)
    path = checkpoint("v4_released")
    model = load_with(monkeypatch, path, lambda store: store.total_bytes - 1)
    store, session, ids = model.experts, model.session(512), tiny.load_golden("v4_released").ids
    assert store is not None
    memory = 1 << 40
    store.share(lambda: memory - store.held_bytes, 1000)
    expected = load(path).session(512)

    def same(*ids: int) -> int:
        """What is held after a pass over these tokens, whose logits are the same as ever."""
        np.testing.assert_array_equal(session.feed(ids), expected.feed(ids))
        settle(model)
        return store.held_bytes

    full = same(*ids[:50])
    assert full > store.total_bytes // 2 and not store.stats()["shed"]
    memory = 1000 + full // 2
    assert full // 2 - 2 * least_bytes(store) < same(*ids[50:60]) <= full // 2
    assert store.stats()["shed"]
    memory = 0
    assert same(*ids[60:62]) <= least_bytes(store)
    memory = 1 << 40
    assert same(*ids[62:130]) > full // 2


def test_that_memory_was_needed_elsewhere_is_said_once(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 1000)
    monkeypatch.setattr(experts, "_PATIENCE", 0)
    ram = f"{describe('tiny').plan(256).total_bytes + process_bytes() - 100}B"
    asked = ("run", "tiny", "--ctx", "256", "--ram", ram, "What colour is a frog?")
    code, out, err = command(*asked)
    assert code == 0 and "other programs" not in err
    monkeypatch.setattr(sys.modules["numoe.engine.load"], "free_memory", lambda: -(1 << 40))
    assert command(*asked)[1] == out
    assert command(*asked)[2].count("other programs need the memory, so fewer experts stay in it") == 1


def test_statistics_add_up(
    variant: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, reads: list[tuple[Path, int, int]]
) -> None:
    """And an expert of a converted folder is one range of bytes."""
    path = variant("v4_a int4")
    model = load_with(monkeypatch, path, lambda store: store.total_bytes // 2, ahead=False)
    asked = Counter[int]()
    model.trace_routes(lambda start, layer, chosen: asked.update([layer] * len(np.unique(chosen))))
    session = model.session(64)
    for token in range(20):
        session.feed([token])
    stats = model.stats()["experts"]
    assert stats["hits"] + stats["misses"] == asked.total()
    assert stats["hit_rate"] == stats["hits"] / asked.total()
    assert stats["hits"] > 0 and stats["misses"] == len(reads)
    assert stats["bytes_read"] == sum(nbytes for *_, nbytes in reads)
    assert 0 < stats["resident_bytes"] <= model.experts.budget  # type: ignore[union-attr]
    assert stats["wait_s"] > 0
    assert model.stats()["weight_bytes"] == model.plan().resident_bytes + stats["resident_bytes"]


# ------------------------------------------------------------------------------------------------------------- memory


def test_what_is_left_of_the_memory_allowed_is_for_experts(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 1000)
    path = checkpoint("v4_a")
    planned = describe(path).plan(256)
    others = planned.resident_bytes + planned.kv_bytes + 1000
    least = planned.least_bytes - others
    assert 3 * least_bytes(LOAD.experts_on_disk(describe(path))) == pytest.approx(least, abs=3 * 64)
    model = load(path, ram=others + least, ctx=256)
    assert model.experts is not None
    assert model.experts.budget == least < model.experts.total_bytes
    model.session(256).feed([1, 2, 3])
    with pytest.raises(InputError, match=r"a context of 512 tokens needs .* raise `ram` to \d+MB"):
        model.session(512)
    with pytest.raises(InputError, match=r"raise `ram` to (\d+)MB") as caught:
        load(path, ram=others + least - 1, ctx=256)
    named = str(caught.value).split("raise `ram` to ")[1].split()[0]
    assert load(path, ram=named, ctx=256).session(256).feed([1]).shape == (1, model.spec.vocab)


def test_all_memory_but_a_tenth_is_taken_by_default(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint("mixtral_a")
    asked = []
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 0)
    planned = describe(path).plan()
    monkeypatch.setattr(BUDGET, "available_memory", lambda: asked.append(1) or planned.total_bytes - 1)
    model = load(path)
    assert model.experts is not None
    assert model.experts.budget == planned.expert_bytes - 1 < model.experts.total_bytes
    # What there was then is theirs, and no more, whatever other programs have taken or given since.
    sessions = [model.session()]
    sessions[0].feed([1])
    with pytest.raises(InputError, match=r"a context of \d+ tokens needs .* are free now"):
        sessions += [model.session() for _ in range(planned.expert_bytes // planned.kv_bytes + 1)]
    assert asked == [1]


# ----------------------------------------------------------------------------------------------------------- one store

LAYERS, EXPERTS, WIDTH, HIDDEN = 2, 6, 8, 16


def write_experts(folder: Path, width: Callable[[int], int] = lambda expert: WIDTH, by_part: bool = False) -> Path:
    """A file of float32 experts; `width` may differ from one to another.

    by_part: all gates come first, then all ups, then all downs.
    """
    tensors = {}
    for layer in range(LAYERS):
        for e in range(EXPERTS):
            for part in ("gate", "up", "down"):
                shape = (HIDDEN, width(e)) if part == "down" else (width(e), HIDDEN)
                values = np.full(shape, layer * EXPERTS + e, "<f4")
                tensors[f"{layer}.{e}.{part}"] = ("F32", shape, values.tobytes())
    if by_part:
        tensors = dict(sorted(tensors.items(), key=lambda item: ("gate", "up", "down").index(item[0].split(".")[2])))
    return write_safetensors(folder / "experts.safetensors", tensors)


def store_of(path: Path, units: float) -> ExpertStore:
    """Over such a file, with room for so many of the largest units."""
    parts = ("gate", "up", "down")
    keys = [(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
    checkpoint = open_checkpoint(path)
    stored = {(i, e): {part: checkpoint[f"{i}.{e}.{part}"] for part in parts} for i, e in keys}
    store = ExpertStore(checkpoint.files, stored)
    store.allow(int(units * least_bytes(store)))
    return store


def take(store: ExpertStore, layer: int, wanted: list[int]) -> None:
    """Ask, and see that everything arrives once and whole."""
    with store.stream(layer, wanted) as units:
        got = []
        for e, matrices in chain.from_iterable(units):
            got.append(e)
            assert set(matrices) == {"gate", "up", "down"}
            assert all((m.dequantize() == layer * EXPERTS + e).all() for m in matrices.values())
            assert store.held_bytes <= store.budget
    assert sorted(got) == sorted(wanted)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("equal"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("mixed"), lambda e: 4 + 4 * (e % 3))


WANTED = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(1, LAYERS * EXPERTS - 1),
    requests=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=40),
)
def test_what_was_used_least_lately_goes_first(equal: Path, capacity: int, requests: list[tuple[int, int]]) -> None:
    store = store_of(equal, capacity)
    uses: dict[tuple[int, int], float] = {}  # each at time t counts 2^(t / half-life)
    cache: set[tuple[int, int]] = set()
    hits = 0
    for time, key in enumerate(requests):
        take(store, key[0], [key[1]])
        uses[key] = uses.get(key, 0) + 2 ** (time / (HALF_LIFE * capacity))
        hits += key in cache
        if key not in cache and len(cache) == capacity:
            cache.remove(min(cache, key=uses.__getitem__))
        cache.add(key)
        assert store.stats()["hits"] == hits


@settings(max_examples=40, deadline=None)
@given(
    units=st.floats(1, LAYERS * EXPERTS),
    requests=st.lists(st.tuples(st.booleans(), st.integers(0, LAYERS - 1), WANTED), max_size=12),
)
def test_buffers_never_exceed_the_budget(
    mixed: Path, units: float, requests: list[tuple[bool, int, list[int]]]
) -> None:
    """Counted where they are made; units of several sizes, any mixture of asking and expecting."""
    live, most = [0], [0]

    class Counted(residents.Slots):
        def take(self, nbytes: int) -> np.ndarray:
            live[0] += nbytes
            most[0] = max(most[0], live[0])
            return super().take(nbytes)

        def give_back(self, slot: np.ndarray) -> None:
            live[0] -= len(slot)
            super().give_back(slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residents, "Slots", Counted)
        patch.setattr(residents, "lasting", Counted(1 << 20).take)
        store = store_of(mixed, units)
        for expecting, layer, wanted in requests:
            if expecting:
                store.expect(layer, wanted)
            else:
                take(store, layer, wanted)
        store._readers.shutdown(wait=True)
    assert most[0] <= store.budget
    assert live[0] == store.held_bytes


@pytest.mark.parametrize(("busy", "at_once"), [(1 << 24, experts.READERS), (1, 2)])
def test_as_much_is_asked_of_a_disk_as_keeps_it_busy(
    equal: Path, monkeypatch: pytest.MonkeyPatch, busy: int, at_once: int
) -> None:
    monkeypatch.setattr(experts, "_BUSY", busy)
    store = store_of(equal, 5)
    most = 0
    schedule = store._schedule

    def count() -> None:  # the lock is held
        nonlocal most
        schedule()
        most = max(most, len(store._reading))

    monkeypatch.setattr(store, "_schedule", count)
    take(store, 0, [0, 1, 2, 3, 4])
    assert most == at_once


@pytest.mark.parametrize(("by_part", "count"), [(False, 1), (True, 3)])
def test_neighbours_are_read_together(
    tmp_path: Path, reads: list[tuple[Path, int, int]], by_part: bool, count: int
) -> None:
    """And what lies far apart is not read through."""
    store = store_of(write_experts(tmp_path, by_part=by_part), 2)
    take(store, 1, [4])
    assert len(reads) == count
    assert store.stats()["bytes_read"] == 3 * 4 * WIDTH * HIDDEN


def test_units_in_use_stay(equal: Path) -> None:
    store = store_of(equal, 2)
    with store.stream(0, [3]) as units:
        ((e, matrices),) = next(units)
        take(store, 1, [0, 1, 2, 3, 4, 5])
        assert e == 3 and (matrices["gate"].dequantize() == 3).all()
    take(store, 0, [3])
    assert store.stats()["hits"] == 1


def test_less_is_held_when_what_is_in_use_is_let_go_of(equal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And guesses never hold what is left."""
    store = store_of(equal, 8)
    store.expect(1, [0, 1, 2])
    begun = threading.Event()
    keeps = store._residents.keep_limit
    monkeypatch.setattr(store._residents, "keep_limit", lambda: keeps() or begun.set())
    with ThreadPoolExecutor(1) as pool:
        with store.stream(0, range(4)) as units:
            deque(units, maxlen=0)
        with store.stream(0, range(4)) as units:  # all at once: they are there
            assert len(next(units)) == 4
            shrinking = pool.submit(store.allow, least_bytes(store))
            assert begun.wait(30) and not shrinking.done()
        shrinking.result(30)
    assert store.held_bytes <= store.budget == least_bytes(store)
    take(store, 1, list(range(EXPERTS)))
    store.allow(4 * least_bytes(store))
    take(store, 0, [0, 1])
    take(store, 1, [4, 5])
    before = store.stats()["misses"]
    take(store, 0, [0, 1])
    assert store.stats()["misses"] == before


def test_what_is_all_in_memory_stays(equal: Path) -> None:
    store = store_of(equal, LAYERS * EXPERTS)
    with pytest.raises(ValueError, match="stay there"):
        store.allow(least_bytes(store))


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 7), st.booleans(), st.integers(0, LAYERS - 1), WANTED), max_size=12))
def test_no_digit_depends_on_changes_of_the_budget(mixed: Path, steps: list[tuple[int, bool, int, list[int]]]) -> None:
    store = store_of(mixed, 5)
    for units, expecting, layer, wanted in steps:
        store.allow(units * least_bytes(store))
        assert store.held_bytes <= store.budget
        if expecting:
            store.expect(layer, wanted)
        take(store, layer, wanted)


def test_sessions_of_several_threads_share_a_store(equal: Path) -> None:
    store = store_of(equal, 3)

    def walk(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            store.expect(int(random.integers(LAYERS)), random.permutation(EXPERTS)[:2])
            layer, wanted = int(random.integers(LAYERS)), random.permutation(EXPERTS)[: random.integers(1, 6)]
            with store.stream(layer, wanted) as units:
                for e, matrices in chain.from_iterable(units):
                    assert (matrices["down"].dequantize() == layer * EXPERTS + e).all()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(walk, range(3)))


def test_a_pass_that_is_interrupted_gives_back_what_it_asked_for(equal: Path) -> None:
    store = store_of(equal, 1)
    with pytest.raises(KeyboardInterrupt), store.stream(0, range(EXPERTS)) as units:
        next(units)
        raise KeyboardInterrupt
    take(store, 0, list(range(EXPERTS)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16", "F32"])
def test_stacks_of_a_gguf_file(tmp_path: Path, kind: str) -> None:
    """A slice of a stacked tensor is what is read, and block types become what `Checkpoint.matrix` makes of them."""
    path, quantization = tmp_path / "stack.gguf", GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for part in ("gate", "up", "down"):
        values = np.random.default_rng(0).standard_normal((EXPERTS, 64, 64)).astype(np.float32)
        writer.add_tensor(part, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    for count in (1, 2.5, EXPERTS + experts.READERS):
        parts = ("gate", "up", "down")
        stored = {(0, e): {part: checkpoint[part].expert(e) for part in parts} for e in range(EXPERTS)}
        store = ExpertStore(checkpoint.files, stored)
        store.allow(int(count * least_bytes(store)))
        assert store.complete == (count > EXPERTS)
        for _ in range(2):
            with store.stream(0, range(EXPERTS)) as units:
                for e, matrices in chain.from_iterable(units):
                    assert store.held_bytes <= store.budget
                    for part, matrix in matrices.items():
                        expected = checkpoint[part].expert(e).matrix()
                        assert matrix.format == expected.format
                        np.testing.assert_array_equal(matrix.dequantize(), expected.dequantize())
        if store.complete:
            wanted = sum(checkpoint[part].read_nbytes for part in parts)
            assert store.stats()["resident_bytes"] == wanted
            assert store.stats()["misses"] == 0


# -------------------------------------------------------------------------------------------------------- fetch-ahead


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, reads: list[tuple[Path, int, int]]) -> Iterator[threading.Event]:
    """Reads wait until it is set."""
    event = threading.Event()
    read_range = Files.read_range

    def wait(self: Files, path: Path, offset: int, nbytes: int, out: np.ndarray | None = None) -> np.ndarray:
        if out is not None:
            event.wait(30)
        return read_range(self, path, offset, nbytes, out)

    monkeypatch.setattr(Files, "read_range", wait)
    yield event
    event.set()


def test_what_is_expected_is_read_once_and_counted(equal: Path, reads: list[tuple[Path, int, int]]) -> None:
    store = store_of(equal, 10)
    store.expect(1, [0, 1, 2, 3])
    take(store, 1, [2, 3, 4])
    store._readers.shutdown(wait=True)
    stats = store.stats()
    assert (stats["ahead_fetched"], stats["ahead_used"]) == (4, 2)
    assert len(reads) == len(set(reads)) == 5


def test_expectations_leave_half_of_the_room(equal: Path, reads: list[tuple[Path, int, int]]) -> None:
    store = store_of(equal, 5)
    store.expect(1, range(EXPERTS))
    store._readers.shutdown(wait=True)
    assert len(reads) == 2
    lonely = store_of(equal, 1)
    lonely.expect(1, range(EXPERTS))
    assert lonely.held_bytes == 0


def test_what_is_wanted_comes_before_what_is_expected_and_the_unwanted_is_dropped(
    equal: Path,
    monkeypatch: pytest.MonkeyPatch,
    reads: list[tuple[Path, int, int]],
    gate: threading.Event,
) -> None:
    monkeypatch.setattr(experts, "READERS", 1)
    store = store_of(equal, 10)
    store.expect(1, [0, 1, 2])
    with store.stream(0, [5]) as units:
        store.expect(1, [0, 3])
        gate.set()
        assert [e for e, _ in chain.from_iterable(units)] == [5]
    take(store, 1, [4])
    store._readers.shutdown(wait=True)
    offsets = {offset: number for number, offset in enumerate(sorted({offset for _, offset, _ in reads}))}
    order = [offsets[offset] for _, offset, _ in reads]
    # 1.0 had begun; then the wanted 0.5 (the lowest in the file), and 1.3 at most before 1.4 is asked for.
    assert order[:2] == [1, 0]
    assert len(reads) <= 4


def test_guesses_that_do_not_pay_end(equal: Path) -> None:
    store = store_of(equal, 8)
    for _ in range(guesses._TRIALS):
        store.expect(0, [0, 1, 2])
        take(store, 0, [3, 4, 5])
        take(store, 1, [0, 1, 2, 3, 4])
    assert not store.expects(0)
    assert store.expects(1)
    before = store.stats()["ahead_fetched"]
    store.expect(0, [0, 1, 2])
    take(store, 0, [3])
    assert store.stats()["ahead_fetched"] == before


def test_tables_tell_experts_exactly(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layers that choose by token id, everything fetched ahead is used."""
    model = load_with(monkeypatch, checkpoint("v4_a"), lambda store: store.total_bytes // 2)
    assert model.experts is not None
    session = model.session(64)
    for token in range(30):
        session.feed([token])
    layers = enumerate(model.spec.layers)
    hashed = [number for number, blocks in layers if any(block.kind.label == "hash-routed" for block in blocks)]
    assert len(hashed) == 2
    for layer in hashed:
        fetched, used = model.experts._guesses.recent[layer]
        assert fetched == used > 0


# ------------------------------------------------------------------------------------------------------------- errors


def settle(model: Model) -> None:
    """Wait for reads that nobody waits for any more."""
    store = model.experts
    assert store is not None
    with store._change:
        assert store._change.wait_for(lambda: not store._reading, 30)


def test_a_file_that_is_cut_short_ends_the_answer_and_not_the_session(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("mixtral_a"), tmp_path / "model"))
    model = load_with(monkeypatch, folder, chosen_bytes(describe(folder)))
    session = model.session(64)
    first = session.feed(range(10))
    file = folder / "model.safetensors"
    whole, was = file.read_bytes(), file.stat()
    os.truncate(file, 5000)
    with pytest.raises(InputError, match=r"model\.safetensors ends at byte \d+, inside its tensor data"):
        session.feed(range(40))
    settle(model)
    assert session.position == 10
    session.save(tmp_path / "chat")
    with file.open("r+b") as handle:
        handle.write(whole)
    with pytest.raises(InputError, match="has changed since it was first read"):
        session.feed(range(40))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    np.testing.assert_array_equal(model.restore(tmp_path / "chat").feed([5]), session.feed([5]))
    session.rewind(11)
    np.testing.assert_array_equal(session.feed(range(10)), first)


def test_a_missing_file_and_a_failing_disk_are_one_sentence(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("mixtral_a"), tmp_path / "model"))
    model = load_with(monkeypatch, folder, chosen_bytes(describe(folder)))
    session = model.session(64)

    def fail(self: Files, *_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Files, "_read_into", fail)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(.*\); check its disk"):
            session.feed([1, 2])
        settle(model)
    model.description.checkpoint.files.close()
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read \(.*\); check that it is there"):
        session.feed([1, 2])
    assert session.position == 0


def test_nan_is_found_when_an_expert_is_first_read(tmp_path: Path) -> None:
    path = write_experts(tmp_path)
    data = bytearray(path.read_bytes())
    data[-4:] = np.array([np.nan], "<f4").tobytes()
    path.write_bytes(data)
    store = store_of(path, 2)
    take(store, 1, [0, 1, 2, 3, 4])
    with pytest.raises(InputError, match="NaN"):
        take(store, 1, [5])
    take(store, 1, [0, 1])
    with pytest.raises(InputError, match="NaN"):
        store_of(path, LAYERS * EXPERTS)


# ------------------------------------------------------------------------------------------------------------ heat


def settled(store: ExpertStore) -> None:
    """Wait until nothing is read any more."""
    with store._change:
        store._change.wait_for(lambda: not store._reading and not store._warming)


@pytest.fixture
def streaming(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Model]:
    """What loads a model with room for a third of its experts or so; what is kept of it is in a folder of its own."""
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 1000)
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    planned = describe(checkpoint("qwen3_moe_a")).plan(64)
    room = planned.least_bytes + (planned.expert_bytes - planned.least_experts) // 3
    return lambda: load(checkpoint("qwen3_moe_a"), ram=room, ctx=64)


def test_a_new_start_reads_first_what_was_used_most(streaming: Callable[[], Model]) -> None:
    first = streaming()
    assert first.experts
    ids = tiny.load_golden("qwen3_moe_a").ids[:12].tolist()
    for _ in range(3):
        session = first.session(64)
        logits = session.feed(ids)
        session.close()
    settled(first.experts)
    hottest = first.experts.hottest()
    heat.keep(first)
    second = streaming()
    assert second.experts and heat.kept(second.identity) == hottest
    settled(second.experts)
    there = set(second.experts._residents.entries)
    assert there and there == set(hottest[: len(there)]) and second.experts.held_bytes <= second.experts.budget
    np.testing.assert_array_equal(second.session(64).feed(ids), logits)


@pytest.mark.parametrize(
    "text", ["", "{}", "[[1]]", '[["a", 2], [1, true], [99999, 1]]', "[" * 9999, "\xff", "[[0, -1]]"]
)
def test_a_damaged_note_is_none(streaming: Callable[[], Model], text: str) -> None:
    expected = streaming().session(64).feed([1, 2, 3])
    folder = heat._folder()
    folder.mkdir(parents=True)
    (folder / f"{streaming().identity}.json").write_text(text, encoding="latin-1")
    np.testing.assert_array_equal(streaming().session(64).feed([1, 2, 3]), expected)


def test_notes_are_for_their_user_and_are_bounded(
    streaming: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heat, "MOST_FILES", 2)
    model = streaming()
    model.session(64).feed([1, 2, 3])
    for age, name in enumerate("abc"):
        heat._folder().mkdir(parents=True, exist_ok=True)
        (heat._folder() / f"{name}.json").write_text("[]")
        os.utime(heat._folder() / f"{name}.json", (age, age))
    heat.keep(model)
    assert {file.stem for file in heat._folder().iterdir()} == {"c", model.identity}
    if os.name == "posix":
        assert (heat._folder() / f"{model.identity}.json").stat().st_mode & 0o077 == 0

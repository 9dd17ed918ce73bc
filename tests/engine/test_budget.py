"""One amount of memory for all: what is reserved is bounded, given back, and refused before it is taken."""

import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.engine import InputError, Model, Session, describe, load
from numoe.engine.budget import Budget, Reservation, available_memory, machine_memory
from numoe.engine.layers.decoder import Decoder
from numoe.engine.plan import Plan
from numoe.quant.errors import DoesNotFit

Checkpoints = Callable[[str], Path]
BUDGET, PLAN = import_module("numoe.engine.budget"), import_module("numoe.engine.plan")

# -------------------------------------------------------------------------------------------------------- arithmetic


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["take", "elastic", "part", "release", "drop"]), st.integers(0, 60), st.integers(0, 9)
        ),
        max_size=30,
    )
)
def test_what_is_reserved_never_exceeds_the_budget(steps: list[tuple[str, int, int]]) -> None:
    """And all that was reserved is there again in the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BUDGET, "gc", SimpleNamespace(collect=lambda: None))  # which takes its time in a large process
        reserve_and_give_back(steps)


def reserve_and_give_back(steps: list[tuple[str, int, int]]) -> None:
    budget, held, sizes = Budget(100), list[Reservation](), dict[int, int]()
    for number, (step, nbytes, which) in enumerate(steps):
        room = budget.room
        one = held[which % len(held)] if held else None
        try:
            if step == "take":
                held.append(budget.reserve("it", nbytes))
            elif step == "elastic":
                resize = lambda now, number=number: sizes.__setitem__(number, now)  # noqa: E731
                held.append(budget.reserve("it", nbytes, least=nbytes // 3, resize=resize))
                assert sizes.get(number, 0) == held[-1].nbytes
            elif step == "part" and one:
                held.append(one.reserve("it", nbytes))
        except DoesNotFit:
            assert budget.room == room < nbytes
        if step == "release" and one:
            one.release()
        if step == "drop" and one:
            held.remove(one)
        del one
        assert 0 <= budget.reserved <= 100
    held.clear()
    assert (budget.reserved, budget.room) == (0, 100)


def test_parts_take_what_was_set_aside_first() -> None:
    budget = Budget(100)
    aside = budget.reserve("sessions", 30)
    one, other = aside.reserve("a session", 20), aside.reserve("a session", 25)
    assert (budget.reserved, aside.parts_bytes) == (45, 45)
    with pytest.raises(DoesNotFit, match=r"^a session needs 101 B of memory and 100 B are allowed; raise `ram` to 1MB"):
        aside.reserve("a session", 56)
    one.release()
    one.release()
    assert budget.reserved == 30
    aside.release()  # while a part of it is still there
    assert budget.reserved == 25
    del other
    assert budget.reserved == 0


def test_the_machine_is_asked_once_and_told_as_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUDGET, "available_memory", iter([100]).__next__)
    budget = Budget()
    kept = budget.reserve("a model", 60)
    with pytest.raises(DoesNotFit, match=r"^it needs 41 B of memory and 40 B are free now; close other programs or"):
        budget.reserve("it", 41)
    assert kept.nbytes == 60


@pytest.mark.skipif(sys.platform != "linux", reason="others tell in other ways")
def test_a_system_that_does_not_tell_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.engine.budget._PROC", Path("/nowhere/stat"))
    for ask in (Budget, lambda: Budget("1GB"), machine_memory, available_memory):
        with pytest.raises(InputError, match="/proc is not there"):
            ask()


def test_elastic_reservations_yield_and_grow_again() -> None:
    budget, sizes = Budget(100), dict[str, int]()
    large = budget.reserve("large", 80, least=20, resize=lambda nbytes: sizes.update(large=nbytes))
    small = budget.reserve("small", 40, least=10, resize=lambda nbytes: sizes.update(small=nbytes))
    assert sizes == {"large": 66, "small": 33} == {"large": large.nbytes, "small": small.nbytes}
    fixed = budget.reserve("it", 61)
    assert sizes == {"large": 26, "small": 13}
    with pytest.raises(DoesNotFit):
        budget.reserve("more", 10)
    del fixed
    assert sizes == {"large": 66, "small": 33}


def test_what_is_given_back_while_others_yield_is_not_lost() -> None:
    """An owner may be collected anywhere, also where the budget is being changed."""
    budget = Budget(100)
    garbage = [budget.reserve("garbage", 30)]
    elastic = budget.reserve("elastic", 100, least=10, resize=lambda nbytes: garbage.clear())
    assert (elastic.nbytes, budget.reserved) == (100, 100)


def test_who_is_interrupted_while_others_yield_has_taken_nothing() -> None:
    budget = Budget(100)

    def resize(nbytes: int) -> None:
        if nbytes < 50:
            raise KeyboardInterrupt

    elastic = budget.reserve("elastic", 80, least=10, resize=resize)
    with pytest.raises(KeyboardInterrupt):
        budget.reserve("it", 60)
    gc.collect()
    assert (elastic.nbytes, budget.reserved, budget.room) == (80, 80, 90)


# ----------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these models it is many times as large as all their experts, which would never stay on disk."""
    monkeypatch.setattr(PLAN, "scratch_bytes", lambda spec: 1000)


def streaming(checkpoint: Checkpoints, case: str, ctx: int = 24, sessions: int = 0) -> Model:
    """A model with room for so many more sessions of `ctx` tokens than it was loaded for, and a little."""
    planned = describe(checkpoint(case)).plan(ctx)
    room = planned.least_bytes + sessions * planned.kv_bytes + 100
    assert planned.verdict(room) == "RUNS FROM DISK"
    return load(checkpoint(case), ram=room, ctx=ctx)


def holds(model: Model) -> None:
    """What the model and its sessions have is what is reserved, and that no more than there is."""
    store, memory = model.experts, model.memory
    assert store and memory.experts
    assert store.held_bytes <= store.budget
    assert store.budget == max(memory.experts.nbytes, *store.largest.values())
    budget = memory.sessions.budget
    stats = model.stats()  # once: what is read ahead may arrive meanwhile
    resident = stats["weight_bytes"] - stats["experts"]["resident_bytes"]
    assert resident == memory.weights.nbytes
    taken = max(memory.sessions.nbytes, memory.sessions.parts_bytes)
    assert resident + taken + memory.experts.nbytes + 1000 == budget.reserved <= budget.total


DOINGS = st.sampled_from(["open", "close", "drop", "feed", "feed"])


@pytest.mark.parametrize(
    "case",
    ["v4_released", "qwen3_5_moe_a", *(pytest.param(c, marks=pytest.mark.slow) for c in ("qwen3_moe_a", "v4_a"))],
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["open", "close", "drop", "feed", "feed"]), st.integers(0, 9)), max_size=15
    )
)
def test_sessions_share_one_memory_and_no_digit_changes(
    case: str, steps: list[tuple[str, int]], checkpoint: Checkpoints, model: Callable[[str], Model]
) -> None:
    ids = tiny.load_golden(case).ids[:20].tolist()
    reference = model(case).session(64)
    expected = [reference.feed([token])[0] for token in ids]
    tested = streaming(checkpoint, case, sessions=2)
    sessions: list[Session] = []
    for step, which in steps:
        one = sessions[which % len(sessions)] if sessions else None
        if step == "open" and len(sessions) < 3:
            sessions.append(tested.session(24))
        elif step == "open":
            with pytest.raises(DoesNotFit, match=r"^a context of 24 tokens needs .* are allowed; raise `ram` to \d+MB"):
                tested.session(24)
        elif step == "feed" and one and one.position < len(ids):
            np.testing.assert_array_equal(one.feed([ids[one.position]])[0], expected[one.position - 1])
        elif step == "close" and one:
            one.close()
        if step in ("close", "drop") and one:
            sessions.remove(one)
        del one
        holds(tested)
        kv = tested.plan(24).kv_bytes
        assert tested.memory.sessions.parts_bytes == kv * len(sessions)


def test_experts_in_memory_make_room_and_come_back(checkpoint: Checkpoints) -> None:
    model = streaming(checkpoint, "qwen3_moe_a", sessions=1)
    store = model.experts
    assert store
    before = store.budget
    first = model.session(24)
    assert store.budget == before  # which was set aside
    for token in range(20):
        first.feed([token])
    assert store.held_bytes > model.plan(24).least_experts
    with model.session(24) as second:
        assert store.held_bytes <= store.budget < before
        second.feed([1])
    assert store.budget == before
    with pytest.raises(InputError, match="this session is closed; start a new one"):
        second.feed([1])
    second.close()
    del model, store
    first.feed([1])


def test_a_session_that_does_not_fit_is_refused_before_anything_is_allocated(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (streaming(checkpoint, "v4_a"), load(checkpoint("llama_a"), ram="1MB", ctx=64)):
        reserved = model.memory.sessions.budget.reserved
        budget = model.experts.budget if model.experts else 0
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "cache", lambda *_: pytest.fail("allocated"))
            with pytest.raises(DoesNotFit, match=r"^a context of \d+ tokens needs"):
                sessions = [model.session(1000) for _ in range(99)]  # noqa: F841
        gc.collect()
        assert model.memory.sessions.budget.reserved == reserved
        assert (model.experts.budget if model.experts else 0) == budget


@pytest.mark.parametrize("case", ["llama_a", "qwen3_moe_a", "v4_a"])
@pytest.mark.parametrize("form", ["least_bytes", "total_bytes", "all"])
def test_the_amount_that_a_refusal_names_is_enough(case: str, form: str, checkpoint: Checkpoints) -> None:
    """For the same sessions again, and whatever it makes of the weights."""
    planned = describe(checkpoint(case)).plan(64)
    ram: str | int = planned.total_bytes + planned.wide_bytes if form == "all" else getattr(planned, form)
    for _ in range(3):  # of the three sessions the first has its place
        model = load(checkpoint(case), ram=ram, ctx=64)
        sessions = []
        try:
            sessions += [model.session(ctx) for ctx in (64, 100, 1000)]
            break
        except DoesNotFit as error:
            ram = str(error).split("raise `ram` to ")[1].split()[0]
    model.session(1).close()
    assert len(sessions) == 3


@pytest.mark.parametrize("case", ["llama_a", "qwen3_moe_a", "v4_a"])
def test_the_context_that_a_refusal_names_is_the_longest_that_fits(case: str, checkpoint: Checkpoints) -> None:
    planned = describe(checkpoint(case)).plan(64)
    ram = planned.least_bytes + 1000
    with pytest.raises(DoesNotFit, match=r"or take a smaller model; `ctx` \d+ fits$") as refused:
        load(checkpoint(case), ram=ram, ctx=planned_limit(checkpoint(case)))
    fits = int(str(refused.value).split("`ctx` ")[1].split()[0])
    model = load(checkpoint(case), ram=ram, ctx=fits)
    session = model.session(fits)
    with pytest.raises(DoesNotFit, match=r"a context of \d+ tokens needs"):
        load(checkpoint(case), ram=ram, ctx=fits).session(planned_limit(checkpoint(case)))
    session.close()
    with pytest.raises(DoesNotFit, match=r"`ctx` \d+ fits$") as refused:
        model.session(planned_limit(checkpoint(case)))
    model.session(int(str(refused.value).split("`ctx` ")[1].split()[0]))


def planned_limit(folder: Path) -> int:
    return describe(folder).spec.context


def test_answers_that_are_not_read_to_their_end_give_back_their_memory(tmp_path: Path) -> None:
    """Though their session is part of a cycle that was not collected yet."""
    folder = tiny.write_model("qwen3_moe_a", tmp_path / "model")
    planned = describe(folder).plan(64)
    model = load(folder, ram=planned.total_bytes, ctx=64)
    gc.disable()
    try:
        for _ in range(3):
            next(model.session(64).generate([1, 2, 3], temperature=0))
    finally:
        gc.enable()


def test_sessions_are_made_while_another_thread_decodes(checkpoint: Checkpoints, model: Callable[[str], Model]) -> None:
    ids = tiny.load_golden("qwen3_moe_a").ids[:40].tolist()
    whole = model("qwen3_moe_a").session(64)
    expected = np.concatenate([whole.feed(ids[start : start + 10]) for start in range(0, 40, 10)])
    tested = streaming(checkpoint, "qwen3_moe_a", 40, sessions=2)
    assert tested.experts
    reader, end = tested.session(40), threading.Event()

    def decode() -> int:
        passes = 0
        while not end.is_set() or not passes:
            reader.rewind(reader.position)
            for start in range(0, 40, 10):
                np.testing.assert_array_equal(reader.feed(ids[start : start + 10]), expected[start : start + 10])
            passes += 1
        return passes

    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(decode)
        try:
            for _ in range(40):
                with tested.session(40) as one, tested.session(40):
                    one.feed(ids[:3])
        finally:
            end.set()
        assert decoding.result(60)
    holds(tested)


def test_several_models_share_a_budget(checkpoint: Checkpoints, model: Callable[[str], Model]) -> None:
    plans = {case: describe(checkpoint(case)).plan(64) for case in ("v4_a", "qwen3_5_moe_a", "llama_a")}
    budget = Budget(sum(plan.least_bytes for plan in plans.values()) + 5000)
    models = {case: load(checkpoint(case), ram=budget, ctx=64) for case in plans}
    for case, one in models.items():
        ids = tiny.load_golden(case).ids[:20]
        np.testing.assert_array_equal(one.session(64).feed(ids), model(case).session(64).feed(ids))
        assert budget.reserved <= budget.total
    with pytest.raises(DoesNotFit, match=r"^llama_a needs .* are allowed; raise `ram` to"):
        load(checkpoint("llama_a"), ram=budget, ctx=64)
    store = models["v4_a"].experts
    assert store
    before = store.budget
    del models["llama_a"], one
    assert budget.room >= plans["llama_a"].total_bytes and store.budget > before
    load(checkpoint("llama_a"), ram=budget, ctx=64)


def test_a_model_without_experts_is_loaded_where_its_default_context_has_no_room(checkpoint: Checkpoints) -> None:
    planned: Plan = describe(checkpoint("llama_a")).plan(64)
    loaded = load(checkpoint("llama_a"), ram=planned.total_bytes)
    loaded.session(64)
    with pytest.raises(DoesNotFit, match=r"a context of \d+ tokens"):
        loaded.session()
    with pytest.raises(DoesNotFit, match="llama_a needs"):
        load(checkpoint("llama_a"), ram=planned.total_bytes - 1, ctx=64)


# ------------------------------------------------------------------------------------------------------- free memory

V2, V1 = "0::/a/b\n", "12:cpu,cpuacct:/x\n4:memory:/docker/1f\n0::/\n"
STAT = "anon 7\ninactive_file 250\ntotal_inactive_file 100\nactive_file 3\n"
OLD = "memory/docker/1f/memory"


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        (None, {}, 10_000),
        (V2, {}, 10_000),
        (V2, {"a/b/memory.max": "max\n", "a/b/memory.current": "9999999\n"}, 10_000),
        (V2, {"a/b/memory.max": "2000\n"}, 2000),
        (V2, {"a/b/memory.max": "2000\n", "a/b/memory.current": "500\n"}, 1500),
        (V2, {"a/b/memory.max": "2000\n", "a/b/memory.current": "500\n", "a/b/memory.stat": STAT}, 1750),
        (V2, {"a/b/memory.max": "2000\n", "a/b/memory.current": "100\n", "a/b/memory.stat": STAT}, 2000),
        (V2, {"a/b/memory.max": "3000\n", "a/memory.high": "2500", "memory.max": "2800"}, 2500),
        (V2, {"a/b/memory.max": "100", "a/b/memory.current": "900"}, 0),
        (V2, {"a/b/memory.max": "0"}, 0),
        (V2, {"a/b/memory.max": ""}, 10_000),
        (V2, {"a/b/memory.max": "9" * 5000, "a/memory.max": "-5", "memory.max": "x"}, 10_000),
        ("0::/\n", {"memory.max": "2000"}, 2000),
        ("0::/../../b\n", {"memory.max": "2000", "b/memory.max": "5"}, 2000),
        ("0::/with space:and colon\n", {"with space:and colon/memory.max": "2000"}, 2000),
        (V1, {}, 10_000),
        (V1, {f"{OLD}.limit_in_bytes": "9223372036854771712"}, 10_000),
        (V1, {f"{OLD}.limit_in_bytes": "2000", f"{OLD}.usage_in_bytes": "50"}, 1950),
        (V1, {"memory/memory.limit_in_bytes": "2000", "memory/memory.usage_in_bytes": "900"}, 1100),
        (V1, {f"{OLD}.limit_in_bytes": "999", f"{OLD}.usage_in_bytes": "900", f"{OLD}.stat": STAT}, 199),
        ("4:cpu,memory,pids:/a\n", {"memory/a/memory.limit_in_bytes": "2000"}, 2000),
        ("\n0\n::\nmemory\n\0", {"memory/memory.limit_in_bytes": "1"}, 10_000),
    ],
)
def test_memory_is_that_of_the_least_group(
    group: str | None, files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000, total=20_000))
    there = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (there if group is None else there | {"proc/self/cgroup": group}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert BUDGET.available_memory(tmp_path) == free * 9 // 10
    total, allowed = BUDGET.machine_memory(tmp_path)
    assert total == 20_000 and (allowed is None) == (free == 10_000) and (allowed is None or free <= allowed < total)


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_is_that_of_the_processs_limits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 50))
    limits = resource.getrlimit(getattr(resource, kind))
    for limit in (1 << 40, 1 << 39):
        resource.setrlimit(getattr(resource, kind), (limit, limits[1]))
        try:
            assert 0 < limit - BUDGET.available_memory(tmp_path) * 10 // 9 < 1 << 38
        finally:
            resource.setrlimit(getattr(resource, kind), limits)

"""Batches by replicas: order, replicas that are lost or silent, prompts that end them. Ray is played by a few lines."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.cli.replicas import MOST_LOSSES, Replicas
from numoe.engine.experts.cluster import OPENING, SILENT, STARTING, answered
from numoe.engine.experts.remote import Lost
from numoe.quant.errors import InputError

ERRORS = SimpleNamespace(
    RayError=type("RayError", (Exception,), {}),
    RayTaskError=type("RayTaskError", (Exception,), {}),
)
ERRORS.GetTimeoutError = type("GetTimeoutError", (ERRORS.RayError,), {})


class Method:
    def __init__(self, call: Any):
        self.call = call

    def options(self, **_: Any) -> "Method":
        return self

    def remote(self, *given: Any) -> Any:
        return self.call(*given)


class Cluster:
    """Replicas a, b, ...; which of the calls that are not back comes next is drawn. `deadly`: requests that end who is
    asked them; `silent`: replicas that do not answer."""

    exceptions = ERRORS

    def __init__(self, names: str, draw: Any, deadly: Any = (), silent: Any = ()):
        self.draw, self.deadly, self.silent = draw, set(deadly), set(silent)
        self.dead: set[str] = set()
        self.told: list[str] = []
        self.replicas = Replicas(self, [], self.told.append)
        for name in names:
            self.replicas._actors[name] = SimpleNamespace(
                name=name,
                answer=Method(lambda request, name=name: ("answer", name, request, object())),
                alive=Method(lambda name=name: ("alive", name, None, object())),
            )
            self.replicas._places[name] = 2

    def wait(self, calls: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        back = [call for call in calls if call[1] not in self.silent]
        if num_returns == 1 and back:
            back = [back[self.draw(len(back))]]
        return back, [call for call in calls if call not in back]

    def get(self, call: Any, timeout: float = 0) -> Any:
        _, name, request, _ = call
        if name in self.silent:
            raise ERRORS.GetTimeoutError("late")
        if name in self.dead or request in self.deadly:
            self.dead.add(name)
            raise ERRORS.RayError("The actor died\nand more")
        return {"text": request}

    def kill(self, actor: Any) -> None:
        self.dead.add(actor.name)


@given(data=st.data(), count=st.integers(1, 20), names=st.sampled_from(["a", "ab", "abcd"]))
def test_answers_come_in_order_whoever_is_first(data: st.DataObject, count: int, names: str) -> None:
    cluster = Cluster(names, lambda n: data.draw(st.integers(0, n - 1)))
    requests: Any = [f"say {n}" for n in range(count)]
    assert [line["text"] for line in cluster.replicas.lines(requests)] == requests
    assert cluster.told == []


@given(data=st.data(), deadly=st.integers(0, 9))
def test_a_prompt_that_ends_replicas_ends_some_alone(data: st.DataObject, deadly: int) -> None:
    cluster = Cluster("abcdef", lambda n: data.draw(st.integers(0, n - 1)), [f"say {deadly}"])
    requests: Any = [f"say {n}" for n in range(10)]
    lines = list(cluster.replicas.lines(requests))
    failed = [number for number, line in enumerate(lines) if "error" in line]
    assert deadly in failed and len(cluster.told) >= MOST_LOSSES
    assert all(line == {"text": f"say {n}"} for n, line in enumerate(lines) if n not in failed)
    assert all("is lost (The actor died)" in told for told in cluster.told)


def test_what_silent_replicas_were_asked_is_asked_of_others() -> None:
    cluster = Cluster("abc", lambda n: 0, silent="ac")
    requests: Any = [f"say {n}" for n in range(9)]
    assert [line["text"] for line in cluster.replicas.lines(requests)] == requests
    assert len(cluster.told) == 2 and all("no sign of life for 10 s" in told for told in cluster.told)
    assert cluster.replicas.count == 1


@pytest.mark.parametrize(
    ("loads", "alive", "lost"),
    [
        (3, True, None),
        (10**6, False, "no sign of life for 125 s"),
        (10**6, True, "it takes more than 600 s"),
    ],
)
def test_a_replica_is_waited_for_while_it_shows_signs_of_life(
    loads: int, alive: bool, lost: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("numoe.engine.experts.cluster.time.monotonic", lambda: clock[0])

    def get(asked: str, timeout: float) -> str:
        clock[0] += timeout
        if (asked == "sign" and not alive) or (asked == "load" and clock[0] < loads * SILENT):
            raise ERRORS.GetTimeoutError("late")
        return f"{asked} done"

    ray = SimpleNamespace(exceptions=ERRORS, get=get)
    with pytest.raises(Lost, match=lost) if lost else nullcontext():
        assert answered(ray, "load", lambda: "sign", OPENING, STARTING) == "load done"


def test_nobody_left_keeps_what_there_is() -> None:
    cluster = Cluster("ab", lambda n: 0, ["say 1"])
    requests: Any = ["say 0", "say 1", "say 2"]
    lines = cluster.replicas.lines(requests)
    assert next(lines) == {"text": "say 0"}
    with pytest.raises(InputError, match="no node is left to answer; start some, and the same command goes on"):
        next(lines)

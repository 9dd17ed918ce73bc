"""`run --batch --ray` of a model that a node holds whole: each has one of its own, and all answer prompts.

A replica is an actor. It answers as many prompts at once as it has sessions, which go through the layers together, and
gets the next one when one is answered. What a replica was asked that is lost is asked of the others; when a prompt
outlives several, it is the prompt that ends them, and is answered with an error.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from numoe.cli.answers import Lines
from numoe.cli.batch import Answering, open_sessions
from numoe.cli.request import Request, load_drafted
from numoe.cli.settings import Options
from numoe.engine.experts.cluster import OPENING, SILENT, STARTING, actor, answered, sentence
from numoe.engine.experts.remote import Lost
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Description

MOST_LOSSES = 3
"""Replicas that may be lost while they answer a prompt."""
SLOWEST = 10_000_000
"""Bytes a second at which a node reads its model at least, from a shared folder if need be."""
_SETTINGS = "ram", "threads", "ctx", "kv", "draft", "check", "parallel"
_IN_FLIGHT = 64  # calls that an actor takes at once: as many as there are sessions at most


class Replica:
    """A model on a node, and the sessions that answer. Its methods are called from afar, on several threads."""

    def open(self, model: str, values: Mapping[str, Any], sharers: int, most: int) -> tuple[str, int]:
        """Load the model; gives its identity, and how many prompts it answers at once.

        values: of `_SETTINGS`. sharers: replicas on this machine, which share what is free where no ram is given.
        most: prompts that there are.

        Raises:
            InputError: it is not here, is damaged or does not fit.
        """
        from numoe.engine import describe
        from numoe.engine.budget import available_memory

        options = Options({**values, "ray": None, "quiet": True})
        if options["ram"] is None and sharers > 1:
            options["ram"] = available_memory() // sharers
        description = describe(model, check=options["check"])
        context = description.plan(options["ctx"], kv=options["kv"]).context
        loaded = load_drafted(description, context, options)
        sessions, self._passes = open_sessions(loaded, options["ctx"], options["parallel"], most)
        self._free: SimpleQueue[Answering] = SimpleQueue()
        for session in sessions:
            self._free.put(Answering(session, lambda: False))
        return description.identity, len(sessions)

    def alive(self) -> None:
        """Be there."""

    def answer(self, request: Request) -> dict[str, Any]:
        """What a line says of the answer."""
        answering = self._free.get()
        try:
            with self._passes.member() if self._passes else contextlib.nullcontext():
                return answering.line(request)
        finally:
            self._free.put(answering)


def fits_each(nodes: Sequence[Mapping[str, Any]], description: Description, options: Options) -> bool:
    """Whether every node has room for the whole model: as much as --ram says, or as Ray has found there.

    nodes: as Ray lists them.
    """
    from numoe.engine.budget import Budget
    from numoe.engine.measure.machine import process_bytes
    from numoe.engine.plan import Verdict

    plan = description.plan(options["ctx"], kv=options["kv"])
    if options["ram"] is not None:
        return plan.verdict(Budget(options["ram"], process_bytes()).total) is Verdict.IN_MEMORY
    of_host = Counter(node["NodeManagerAddress"] for node in nodes)
    rooms = (node["Resources"].get("memory", 0) / of_host[node["NodeManagerAddress"]] for node in nodes)
    return all(plan.verdict(int(room) - process_bytes()) is Verdict.IN_MEMORY for room in rooms)


class Replicas:
    """Replicas on all nodes of a cluster, one each. A context manager; who leaves ends them.

    Entering raises InputError where a node has not this model, or has no room for it.
    """

    def __init__(self, ray: Any, nodes: Sequence[Mapping[str, Any]], tell: Callable[[str], None]):
        """nodes: as Ray lists them. tell: told in a sentence when a replica is lost."""
        self._ray, self._nodes, self._tell = ray, nodes, tell
        self._actors: dict[str, Any] = {}  # by the node's name
        self._places: dict[str, int] = {}
        self._asked: dict[Any, tuple[str, int]] = {}  # calls that are not back: of whom, and which request

    def open(self, model: str, description: Description, options: Options, most: int) -> None:
        """Load a model everywhere; `most` prompts are asked at once.

        Raises:
            InputError: see above.
        """
        path = str(Path(model).resolve()) if Path(model).exists() else model
        values = {name: options[name] for name in _SETTINGS}
        sharers = Counter(node["NodeManagerAddress"] for node in self._nodes)
        opened = {}
        for node in self._nodes:
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"
            at = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            made = actor(self._ray, Replica, max_concurrency=_IN_FLIGHT, scheduling_strategy=at)
            self._actors[name] = made
            opened[name] = made.open.remote(path, values, sharers[node["NodeManagerAddress"]], most)
        limit = OPENING + description.plan(options["ctx"], kv=options["kv"]).weight_bytes / SLOWEST
        for name, asked in opened.items():
            try:
                identity, self._places[name] = answered(
                    self._ray, asked, self._actors[name].alive.remote, limit, STARTING
                )
            except self._ray.exceptions.RayTaskError as error:
                raise InputError(f"node {name}: {error.cause}") from None
            except Lost as lost:
                self._lose(name, str(lost))
                continue
            if identity != description.identity:
                raise InputError(
                    f"node {name} has another model under the name {model}; copy the same one to all nodes"
                )

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._actors.values():
            self._ray.kill(one)

    @property
    def count(self) -> int:
        """How many there are now."""
        return len(self._actors)

    def lines(self, requests: Sequence[Request]) -> Lines:
        """The answers in order.

        Raises:
            InputError: no replica is left.
        """
        waiting, losses = list(range(len(requests))), Counter[int]()
        ready: dict[int, dict[str, Any]] = {}
        for number in range(len(requests)):
            while number not in ready:
                self._ask(waiting, requests)
                for name, which, answer in self._answered():
                    if answer is not None:
                        ready[which] = answer
                    elif losses[which] + 1 < MOST_LOSSES:
                        losses[which] += 1
                        heappush(waiting, which)
                    else:
                        ready[which] = {"error": f"{MOST_LOSSES} nodes were lost while they answered it, {name} last"}
            yield ready.pop(number)

    def _ask(self, waiting: list[int], requests: Sequence[Request]) -> None:
        """Give those who have room the prompts that wait, the earliest first."""
        if not self._actors:
            raise InputError("no node is left to answer; start some, and the same command goes on from here")
        busy = Counter(name for name, _ in self._asked.values())
        while waiting:
            name = min(self._actors, key=lambda one: busy[one] / self._places[one])
            if busy[name] >= self._places[name]:
                return
            busy[name] += 1
            number = heappop(waiting)
            self._asked[self._actors[name].answer.remote(requests[number])] = name, number

    def _answered(self) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
        """Some answers when they are there: who made one, to which request, and None of a replica that is lost."""
        errors = self._ray.exceptions
        done, _ = self._ray.wait(list(self._asked), timeout=SILENT)
        for one in done or self._look():
            name, number = self._asked.pop(one)
            try:
                yield name, number, self._ray.get(one, timeout=0 if done else 1e-3)
            except errors.RayTaskError as error:
                raise InputError(f"node {name}: {error.cause}") from error
            except errors.GetTimeoutError:
                self._lose(name, f"no sign of life for {2 * SILENT:.0f} s")
                yield name, number, None
            except errors.RayError as error:
                self._lose(name, sentence(error))
                yield name, number, None

    def _look(self) -> list[Any]:
        """What replicas are asked that give no sign of life, after a while in which nothing was answered."""
        signs = {one.alive.remote(): name for name, one in self._actors.items()}
        _, silent = self._ray.wait(list(signs), num_returns=len(signs), timeout=SILENT)
        lost = {signs[sign] for sign in silent}
        return [asked for asked, (name, _) in self._asked.items() if name in lost]

    def _lose(self, name: str, why: str) -> None:
        lost = self._actors.pop(name, None)
        if lost is not None:
            self._ray.kill(lost)
            self._tell(f"node {name} is lost ({why}); what it was asked is asked of the others")

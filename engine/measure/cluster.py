"""What a model does on several machines that share its routed experts: the forecast of one of them, and a link.

A token goes through the layers on the first node. In each layer with routed experts its rows go to the nodes that have
those it takes, one call a node and all in flight together, and a row comes back for each expert. Which experts tokens
take, and how long each call lasts of those that were measured, is drawn, from the same seed each time.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from numoe.engine.experts.place import place, uses
from numoe.engine.experts.unit import Key
from numoe.engine.layers.ops import Ids
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.engine.measure.forecast import USUAL_CALLS, Calls, Machine
from numoe.engine.plan import Plan, Verdict, parse_bytes, parse_rate
from numoe.quant.errors import WrongUsage
from numoe.quant.formats.format import Format

MOST_NODES = 256
SIMULATED = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64
"""Machines, where it is asked how speed grows with them."""
HERE, EXPERTS, READING = "computing on node 1", "computing experts", "reading experts"
CALLS, ROWS = "calls", "rows on the link"
"""What a token's time is spent on."""
_TOKENS = 48  # that are drawn
_WIRE_S = 2e-4  # there and back through a switch, beside what a call takes on one machine
_ROW_VALUE = 4  # bytes of a float32
_RAY_BYTES = 500_000_000  # its daemons, 240 MB, and what a process that it starts takes more than one of numoe's alone


@dataclass(frozen=True)
class Link:
    """The network between nodes, as it was asked for and in bytes a second, and what calls take."""

    name: str
    bytes_per_s: float
    calls: Calls
    wire_s: float = _WIRE_S


def linked(machine: Machine, name: str) -> Link:
    """A network of this speed, with calls as they were measured here, or as they usually are.

    Raises:
        WrongUsage: see `parse_rate`.
    """
    return Link(name, parse_rate(name), machine.calls or USUAL_CALLS)


@dataclass(frozen=True)
class Share:
    """What one node has of a model, in bytes."""

    ram: int
    always: int
    """Weights for every token, caches and work space, on the first one; what programs themselves take, on all."""
    experts: int
    """Routed experts that are its own."""
    held: int
    """Of them those in memory; the others are on its disk."""
    taken: float
    """Share of all choices of experts that are its own."""
    missing: float
    """Share of these that it has to read."""


@dataclass(frozen=True)
class ClusterForecast:
    """What a model does on several machines. Speeds are as in `Forecast`."""

    verdict: Verdict
    nodes: tuple[Share, ...]
    decode: tuple[float, float]
    prefill: tuple[float, float]
    seconds: Mapping[str, float]
    """Of a token that is written, by what it is spent on where that is waited for; with experts taken at random."""
    slowest: int
    """The node that others wait for most often."""
    row_bytes: float
    """What a token sends over the link of the first node, there and back."""

    @property
    def expert_share(self) -> float:
        """Share of the routed experts that is in memory somewhere."""
        every = sum(node.experts for node in self.nodes)
        return sum(node.held for node in self.nodes) / every if every else 1.0

    @property
    def decides(self) -> str:
        """What takes most of a token's time, a key of `seconds`; "" where it does not run."""
        return max(self.seconds, key=lambda part: self.seconds[part], default="")


def parse_nodes(text: str) -> tuple[int, ...]:
    """Bytes of memory of each machine: "4x64GB", "2x64GB,1x128GB" or "64GB", the one that runs the command first.

    Raises:
        WrongUsage: it is something else, or there are too many.
    """
    rams: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)\s*[xX×]\s*)?(\S.*?)\s*", part)
        if not match:
            raise WrongUsage(f'"{text}" says no machines; write them like 4x64GB or 2x64GB,1x128GB')
        count = int(match[1] or 1) if len(match[1] or "") < 9 else 10**9
        if not 1 <= count + len(rams) <= MOST_NODES or not count:
            raise WrongUsage(
                f'"{text}" is not from 1 to {MOST_NODES} machines; write them like 4x64GB or 2x64GB,1x128GB'
            )
        try:
            rams += [parse_bytes(match[2])] * count
        except WrongUsage as error:
            raise WrongUsage(f"{error}; machines are written like 4x64GB or 2x64GB,1x128GB") from None
    return tuple(rams)


@dataclass(frozen=True)
class Cluster:
    """Machines that are alike but for their memory, and what is between them. The first one runs numoe."""

    machine: Machine
    rams: tuple[int, ...]
    link: Link
    ray_bytes: int = _RAY_BYTES
    """What Ray takes on each, beside a process of numoe."""

    def rooms(self, plan: Plan) -> list[int]:
        """Bytes that each has for routed experts; negative where it has none."""
        rooms = [ram - self.machine.process_bytes - self.ray_bytes for ram in self.rams]
        return [rooms[0] - plan.beside_experts, *rooms[1:]]

    def forecast(self, spec: ModelSpec, plan: Plan, hottest: Sequence[Key] = ()) -> ClusterForecast:
        """What a model does here.

        hottest: the experts that it is known to use most, see `heat`.

        Raises:
            KeyError: experts are read from disk, and how fast that goes at their size was not measured.
        """
        experts, rooms = _Experts(spec, plan, self.machine, hottest), self.rooms(plan)
        owners, nodes = self._shares(experts, rooms)
        verdict, none = _verdict(plan, rooms), (0.0, 0.0)
        if verdict is Verdict.TOO_LARGE:
            return ClusterForecast(verdict, nodes, none, none, {}, 0, 0)
        slow = self._token(experts, plan, owners, nodes, best=False)
        fast = self._token(experts, plan, owners, nodes, best=True)
        chunks = (self._chunk(experts, plan, nodes, best) for best in (False, True))
        decode, prefill = self._range(plan, 1, slow.seconds, fast.seconds), self._range(plan, CHUNK, *chunks)
        return ClusterForecast(verdict, nodes, decode, prefill, slow.parts, slow.slowest, slow.row_bytes)

    def _range(self, plan: Plan, tokens: int, slow: float, fast: float) -> tuple[float, float]:
        """Tokens a second, with what runs of models of about this size have shown."""
        alike = self.machine.about(plan)
        corrected = tokens * alike.correction
        return corrected / slow / alike.margin, corrected / fast * alike.margin

    def _shares(self, experts: _Experts, rooms: Sequence[int]) -> tuple[list[Ids], tuple[Share, ...]]:
        """The node of every expert, by layer, and what each has then: in memory those that are used most."""
        placed = place(experts.sizes, rooms, experts.used) if experts.sizes else {}
        owned, held, choices, misses = ([0.0] * len(rooms) for _ in range(4))
        for key in sorted(placed, key=lambda key: (-experts.used[key], key)):
            node, nbytes, taken = placed[key], experts.sizes[key], experts.taken[key]
            owned[node] += nbytes
            choices[node] += taken
            if owned[node] <= max(0, rooms[node]):
                held[node] += nbytes
            else:
                misses[node] += taken
        owners = [np.array([placed[layer, e] for e in range(count)]) for layer, (count, _) in experts.layers.items()]
        every = max(sum(choices), 1e-9)
        return owners, tuple(
            Share(ram, ram - room, round(own), round(here), part / every, lost / part if part else 0.0)
            for ram, room, own, here, part, lost in zip(self.rams, rooms, owned, held, choices, misses, strict=True)
        )

    def _token(
        self, experts: _Experts, plan: Plan, owners: Sequence[Ids], nodes: Sequence[Share], best: bool
    ) -> _Token:
        """A token that is written, as an average of several.

        best: routers repeat themselves, reading goes on beside computing, and no call is longer than most.
        """
        random, calls = np.random.default_rng(0), self.link.calls
        missing = np.array([node.missing**2 if best else node.missing for node in nodes])
        read_s = missing / self.machine.reading(plan.largest_expert) if missing.any() else missing
        token = _Token({HERE: experts.dense_s + plan.layers * self.machine.layer_s})
        for own, (layer, (count, k)) in zip(owners, experts.layers.items(), strict=True):
            nbytes = experts.sizes[layer, 0]
            # The first of waits for things that come at these rates: K different ones, those of high rates more often.
            waits = random.exponential(size=(_TOKENS, count)) / [experts.used[layer, e] for e in range(count)]
            chosen = own[waits.argpartition(k - 1, axis=1)[:, :k]]
            asked = (chosen[..., None] == np.arange(len(nodes))).sum(1)  # (tokens, nodes)
            computing, reading = asked * experts.unit_s(nbytes), asked * (nbytes * read_s)
            read = np.maximum(reading - computing, 0) if best else reading
            drawn = np.percentile(calls.seconds, random.uniform(0, 99, asked.shape))
            called = asked > 0
            called[:, 0] = False  # no call takes one home
            in_flight = called.sum(1, keepdims=True)
            call = called * (calls.percentile(50) if best else drawn) + called * (in_flight - 1) * calls.further_s
            sent = experts.row_values * _ROW_VALUE * (in_flight[:, 0] + (asked * called).sum(1))
            wire = called * (sent / self.rows_per_s + self.link.wire_s)[:, None]
            token.add({EXPERTS: computing, READING: read, CALLS: call, ROWS: wire}, sent)
        return token

    @property
    def rows_per_s(self) -> float:
        """Bytes of rows that the first node's link and both its ends let through in a second."""
        return 1 / (1 / self.link.bytes_per_s + 1 / self.link.calls.bytes_per_s)

    def _chunk(self, experts: _Experts, plan: Plan, nodes: Sequence[Share], best: bool) -> float:
        """Seconds of `CHUNK` tokens that are read together, which take all experts once."""
        machine, layers, further = self.machine, len(experts.layers), CHUNK - 1
        ends = []
        for number, node in enumerate(nodes):
            computing = experts.all_s * node.experts / max(1, plan.expert_bytes)
            computing += further * experts.active_parameters * node.taken / machine.expert_macs_per_s
            lost = node.experts - node.held
            reading = lost / machine.reading(plan.largest_expert) if lost else 0.0
            busy = max(computing, reading) if best else computing + reading
            called = layers * self.link.calls.percentile(50 if best else 99) if number and node.experts else 0.0
            ends.append(busy + called)
        # Each node gets a token's row once for all of its experts that the token takes.
        taken = sum(k for _, k in experts.layers.values())
        away = sum(node.taken * taken + min(layers, node.taken * taken) for node in nodes[1:])
        rows = CHUNK * away * experts.row_values * _ROW_VALUE / self.rows_per_s
        dense = experts.dense_s + further * experts.dense_parameters / machine.macs_per_s
        return dense + plan.layers * machine.chunk_layer_s + max(ends) + rows


class _Token:
    """What tokens spend in layer after layer, (tokens, nodes) each, where the slowest node is waited for."""

    def __init__(self, parts: dict[str, float]):
        self.parts = dict.fromkeys((HERE, EXPERTS, READING, CALLS, ROWS), 0.0) | parts
        self.row_bytes = 0.0
        self._waits: Counter[int] = Counter()

    def add(self, parts: Mapping[str, NDArray[np.float64]], sent: NDArray[np.int64]) -> None:
        last = sum(parts.values(), np.zeros(())).argmax(1)
        self._waits.update(last.tolist())
        for part, seconds in parts.items():
            self.parts[part] += float(np.take_along_axis(seconds, last[:, None], 1).mean())
        self.row_bytes += float(sent.mean())

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def slowest(self) -> int:
        return self._waits.most_common(1)[0][0] if self._waits else 0


def _verdict(plan: Plan, rooms: Sequence[int]) -> Verdict:
    """rooms: what each node has for routed experts."""
    whole = sum(max(0, room) for room in rooms) >= plan.expert_bytes
    if min(rooms) < 0 or (not whole and min(rooms) < plan.least_experts):
        return Verdict.TOO_LARGE
    return Verdict.IN_MEMORY if whole else Verdict.FROM_DISK


class _Experts:
    """The routed experts of a model as nodes have them, and what else a token takes."""

    def __init__(self, spec: ModelSpec, plan: Plan, machine: Machine, hottest: Sequence[Key]):
        self.layers = spec.routed
        self.sizes = {
            (layer, expert): plan.active_experts[layer] // k
            for layer, (count, k) in self.layers.items()
            for expert in range(count)
        }
        known = [key for key in hottest if key in self.sizes]  # of another form of the same model, it may be
        self.used = uses(list(self.sizes), known)
        every: dict[int, float] = defaultdict(float)
        for (layer, _), use in self.used.items():
            every[layer] += use
        self.taken = {key: self.layers[key[0]][1] * use / every[key[0]] for key, use in self.used.items()}
        """How many of a token's choices fall on each."""
        self._spec, self._plan, self._rates = spec, plan, machine.weights_per_s
        active = sum(plan.active_experts.values()) / max(1, plan.expert_bytes)
        sizes = {kind: size for (role, kind), size in plan.sizes.items() if role == "experts"}
        self.all_s = self._seconds(sizes)
        """One token with every expert."""
        taken = {kind: size * active for kind, size in sizes.items()}
        self.active_parameters = sum(taken.values())
        dense = {kind: max(0.0, size - taken.get(kind, 0)) for kind, size in plan.active.items()}
        self.dense_parameters = sum(dense.values())
        self.dense_s = self._seconds(dense)
        """One token with all that is no routed expert."""

    def unit_s(self, nbytes: int) -> float:
        """One token with one expert of so many bytes."""
        return self.all_s * nbytes / self._plan.expert_bytes

    def _seconds(self, sizes: Mapping[Format, float]) -> float:
        return sum(size / self._rates[kind.kind] for kind, size in sizes.items())

    @cached_property
    def row_values(self) -> int:
        """Values of what an expert is given, and gives."""
        layer = next(iter(self._spec.routed), None)
        if layer is None:
            return 0
        tensors = self._spec.layer_tensors(layer).items()
        return next(t.shape[1] for name, t in tensors if t.expert == 0 and name.endswith(".up"))

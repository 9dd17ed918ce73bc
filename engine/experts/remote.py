"""The bank over several nodes: each applies the experts that it has, all at once, and this process its own meanwhile.

A node gets each row once, as float32, and gives back a row for every choice, which has its place in the result: no
digit depends on where an expert is. A node that fails loses nothing, for applying changes nothing: its experts go to
the others, and what it was asked for is asked of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.place import place, uses
from numoe.engine.experts.share import Applied, Formulas
from numoe.engine.experts.store import ExpertStore
from numoe.engine.experts.unit import Key
from numoe.engine.experts.uses import DecayedCounts
from numoe.engine.layers.bank import Formula
from numoe.engine.layers.ops import Floats, Ids

if TYPE_CHECKING:
    from numoe.engine.experts.pulled import Written

HERE = 0
"""The number of this process among the nodes."""
_MEASURED = 1 << 16  # calls whose times are remembered


class Lost(Exception):
    """A node does not answer, or cannot; the message tells why."""


class Node(Protocol):
    """Somebody elsewhere who has a share. Whatever is asked raises `Lost` when it is gone, within a bounded time."""

    name: str
    room: int
    """Bytes that it has for experts."""

    def define(self, formulas: Formulas) -> None: ...

    def hold(self, keys: Sequence[Key]) -> None:
        """These are its own from now on, those first that are used most. Waits for nothing."""
        ...

    def ask(self, layer: int, rows: Floats, places: Ids, experts: Ids) -> Callable[[], Applied]:
        """Begin `Share.apply`, and give what waits for its result."""
        ...

    def confirm(self, keys: Sequence[Key]) -> None:
        """As `Share.confirm`. Waits for nothing."""
        ...

    def prefetch(self, layer: int, experts: Ids) -> None: ...


class RemoteBank:
    """An `ExpertBank`. Safe to use from several threads.

    tell: told in a sentence when a node leaves or joins.
    """

    def __init__(
        self,
        store: ExpertStore,
        written: Written,
        room: int,
        nodes: Sequence[Node],
        hottest: Sequence[Key] = (),
        tell: Callable[[str], None] | None = None,
    ):
        """store: has all experts, from disk if need be, and `room` bytes; those of lost nodes come from it when no
        other is left. written: of the same. hottest: see `heat`."""
        self._local = LocalBank(store)
        self._store, self._written = store, written
        self._sizes = store.sizes()
        self._used = uses(list(self._sizes), hottest)
        self._room = max(1, room)  # who is left when all others are lost
        self._nodes: list[Node | None] = [None, *nodes]
        self._formulas: dict[int, tuple[Formula, Mapping[str, Floats]]] = {}
        self._tell = tell or (lambda sentence: None)
        self._lock = Lock()
        self._counts = DecayedCounts(len(self._sizes))
        self._times: deque[tuple[float, float]] = deque(maxlen=_MEASURED)
        self._where: dict[Key, int] = {}
        self._owners: dict[int, Ids] = {}
        self._place()

    # ------------------------------------------------------------------------------------------------ who has what

    def _place(self) -> None:
        """Share all experts out among those who are there."""
        rooms = [self._room, *(node.room if node else 0 for node in self._nodes[1:])]
        self._where = place(self._sizes, rooms, self._used, self._where)
        owners: dict[int, dict[int, int]] = {}
        for (layer, expert), node in self._where.items():
            owners.setdefault(layer, {})[expert] = node
        # A pass that has the arrays of before goes on with them.
        self._owners = {
            layer: np.array([of_layer.get(e, HERE) for e in range(max(of_layer) + 1)])
            for layer, of_layer in owners.items()
        }

    def _keys(self, number: int) -> list[Key]:
        keys = [key for key, node in self._where.items() if node == number]
        return sorted(keys, key=lambda key: -self._used[key])

    @property
    def own_bytes(self) -> int:
        """Of the experts that this process has for itself."""
        return sum(self._sizes[key] for key in self._keys(HERE))

    def begin(self) -> None:
        """Tell the nodes what they have, once all layers are defined."""
        self._store.warm(self._keys(HERE))
        for number, node in self._there():
            try:
                node.define(self._formulas)
            except Lost as lost:
                self._lose(number, lost)
        self._hold()

    def _hold(self) -> None:
        for number, node in self._there():
            try:
                node.hold(self._keys(number))
            except Lost as lost:
                self._lose(number, lost)

    def _there(self) -> Iterator[tuple[int, Node]]:
        for number, node in enumerate(list(self._nodes)):
            if node is not None:
                yield number, node

    def join(self, node: Node) -> None:
        """Have a node that has come later take its share.

        Raises:
            Lost: it is gone already.
        """
        node.define(self._formulas)
        with self._lock:
            self._nodes.append(node)
            self._place()
        self._hold()
        self._tell(f"node {node.name} has joined and takes its share of the experts")

    def _lose(self, number: int, why: Exception) -> None:
        with self._lock:
            node = self._nodes[number]
            if node is None:  # another thread has seen it too
                return
            self._nodes[number] = None
            self._place()
        left = sum(1 for _ in self._there())
        others = f"{left} other{'s' if left > 1 else ''}" if left else "this machine, from its disk"
        self._tell(f"node {node.name} is lost ({why}); its experts are taken over by {others}, and the answer goes on")
        self._hold()

    # ------------------------------------------------------------------------------------------------- the protocol

    def define(self, layer: int, formula: Formula, biases: Mapping[str, Floats]) -> None:
        self._local.define(layer, formula, biases)
        self._formulas[layer] = formula, biases

    def apply(self, layer: int, x: Floats, chosen: Ids, meanwhile: Callable[[], None]) -> Floats:
        begun, waited = time.perf_counter(), 0.0
        k = chosen.shape[1]
        experts = chosen.ravel()  # (T * K,)
        self._count(layer, experts)
        outputs = np.empty((len(experts), x.shape[1]), np.float32)
        left = np.arange(len(experts))
        while len(left):
            owners = self._owners[layer][experts[left]]
            asked, missing = self._ask(layer, x, k, experts, left, owners)
            here = left[owners == HERE]
            if len(here):
                outputs[here] = self._local.apply(layer, x[here // k], experts[here][:, None], meanwhile)
            else:
                meanwhile()
            meanwhile = _nothing
            waiting = time.perf_counter()
            for number, pairs, answer in asked:
                try:
                    made, hashes = answer()
                    self._compare(number, hashes)
                    outputs[pairs] = made
                except Lost as lost:
                    self._lose(number, lost)
                    missing.append(pairs)
            waited += time.perf_counter() - waiting
            left = np.sort(np.concatenate(missing)) if missing else left[:0]
        self._times.append((time.perf_counter() - begun, waited))
        return outputs

    def _compare(self, number: int, hashes: Mapping[Key, str]) -> None:
        """Raises Lost where an expert that a node has pulled is another one than here."""
        for (layer, expert), found in hashes.items():
            if found != self._written.hash((layer, expert)):
                raise Lost(f"expert {expert} of layer {layer}, as the hub gave it, is another one than here")
        if hashes and (node := self._nodes[number]):
            node.confirm(list(hashes))

    def _ask(
        self, layer: int, x: Floats, k: int, experts: Ids, left: Ids, owners: Ids
    ) -> tuple[list[tuple[int, Ids, Callable[[], Applied]]], list[Ids]]:
        """Begin one call a node for its choices among those `left`: those begun, and the choices of lost nodes."""
        asked, missing = [], []
        for number in np.unique(owners[owners != HERE]).tolist():
            pairs = left[owners == number]
            node = self._nodes[number]
            if node is None:  # lost by another thread since
                missing.append(pairs)
                continue
            tokens, places = np.unique(pairs // k, return_inverse=True)
            try:
                asked.append((number, pairs, node.ask(layer, x[tokens], places, experts[pairs])))
            except Lost as lost:
                self._lose(number, lost)
                missing.append(pairs)
        return asked, missing

    def wants(self, layer: int) -> bool:
        return self._local.wants(layer) or any(True for _ in self._there())

    def prefetch(self, layer: int, chosen: Ids) -> None:
        experts = np.unique(chosen)
        owners = self._owners[layer][experts]
        if (owners == HERE).any() and self._local.wants(layer):
            self._local.prefetch(layer, experts[owners == HERE])
        for number, node in self._there():
            if (owners == number).any():
                try:
                    node.prefetch(layer, experts[owners == number])
                except Lost as lost:
                    self._lose(number, lost)

    # ----------------------------------------------------------------------------------------------- what is known

    def _count(self, layer: int, experts: Ids) -> None:
        with self._lock:
            for expert in np.unique(experts).tolist():
                self._counts.use((layer, expert))

    def hottest(self) -> list[Key]:
        """The half of all experts that is used most, the first ones first, as far as they were used."""
        with self._lock:
            keys = sorted(self._sizes, key=self._counts.worth, reverse=True)[: -(-len(self._sizes) // 2)]
            return [key for key in keys if self._counts.worth(key) > -np.inf]

    def stats(self) -> dict[str, Any]:
        """The nodes that are there, and of the last calls of layers: seconds of half and of 99 of 100, and which share
        of them was waiting for others."""
        calls = np.array(self._times or [(0.0, 0.0)])
        return {
            "nodes": [node.name for _, node in self._there()],
            "calls": len(self._times),
            "call_p50_s": float(np.quantile(calls[:, 0], 0.5)),
            "call_p99_s": float(np.quantile(calls[:, 0], 0.99)),
            "waiting": float(calls[:, 1].sum() / max(calls[:, 0].sum(), 1e-9)),
        }


def _nothing() -> None:
    pass

"""Nodes of a model that are in this process, in place of those of a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from math import inf
from pathlib import Path

import numpy as np
import pytest

from numoe.engine import InputError, Model, load
from numoe.engine.experts.remote import Lost, RemoteBank
from numoe.engine.experts.share import Applied, Formulas, Settings, Share
from numoe.engine.experts.unit import Key
from numoe.engine.layers.ops import Floats, Ids

LOAD = import_module("numoe.engine.load")


class Near:
    """A node in this process. It goes off in a call: `off` says how many it answers before."""

    def __init__(self, number: int, settings: Settings, room: int, off: float = inf):
        self.name, self.room, self.left = f"node{number}", room, off
        self.share = Share()
        _, self.pulls = self.share.open(settings, 1)
        self.asked: list[tuple[int, int]] = []
        self.held: set[Key] = set()

    def define(self, formulas: Formulas) -> None:
        self.share.define(formulas)

    def hold(self, keys: Sequence[Key]) -> None:
        self.held = set(keys)
        self.share.hold(keys)

    def ask(self, layer: int, rows: Floats, places: Ids, experts: Ids) -> Callable[[], Applied]:
        self.asked.append((layer, len(rows)))
        assert rows.dtype == np.float32 and len(rows) == len(set(places.tolist()))
        assert {(layer, expert) for expert in experts.tolist()} <= self.held
        if self.left <= 0:
            raise Lost("it is off")
        self.left -= 1
        return lambda: self._answer(layer, rows, places, experts)

    def _answer(self, layer: int, rows: Floats, places: Ids, experts: Ids) -> Applied:
        if 0 < self.left < 1:
            self.left = 0
            raise Lost("it went off")
        try:
            return self.share.apply(layer, rows, places, experts)
        except InputError as error:
            raise Lost(str(error)) from None

    def confirm(self, keys: Sequence[Key]) -> None:
        self.share.confirm(keys)

    def prefetch(self, layer: int, experts: Ids) -> None:
        if self.left <= 0:
            raise Lost("it is off")
        self.share.prefetch(layer, experts)


Make = Callable[[int, Settings, float], Near]
"""Of a node's number, its settings, and when it goes off."""


def near(number: int, settings: Settings, off: float = inf) -> Near:
    return Near(number, settings, 1 << 40, off)


def use_near(patch: pytest.MonkeyPatch, offs: Sequence[float] = (inf, inf), make: Make = near) -> list[Near]:
    """Have nodes that go off after so many calls in place of any cluster; the nodes, once there are some."""
    made: list[Near] = []

    class NearCluster:
        def __init__(self, address: str, settings: Settings, tell: Callable[[str], None] | None):
            settings = replace(settings, ram=None, threads=1)
            made[:] = [make(number, settings, off) for number, off in enumerate(offs)]
            self.nodes = list(made)

        def watch(self, bank: RemoteBank) -> None:
            pass

    patch.setattr(LOAD, "Cluster", NearCluster)
    return made


def load_near(
    path: Path, patch: pytest.MonkeyPatch, offs: Sequence[float] = (inf, inf), make: Make = near
) -> tuple[Model, list[Near], list[str]]:
    """A model whose experts such nodes have; the nodes; and what is told."""
    told: list[str] = []
    made = use_near(patch, offs, make)
    return load(path, ray="local", tell=told.append), made, told

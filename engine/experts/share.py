"""What a node has of a model: some routed experts of every layer, in a budget of its own, and what they compute.

It reads headers of the node's own copy, and of the weights only the experts that it is asked for; where it has none,
it pulls these from the hub.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.budget import Budget, available_memory, free_memory, peak_rss
from numoe.engine.description import Description, describe
from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.store import ExpertStore
from numoe.engine.experts.unit import Key
from numoe.engine.home import models_folder
from numoe.engine.layers.bank import Formula
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.state import CHUNK
from numoe.quant.compute import workers
from numoe.quant.compute.kernels import use_block
from numoe.quant.compute.threads import usable_cores
from numoe.quant.compute.threads import use as use_threads
from numoe.quant.errors import DoesNotFit, InputError
from numoe.quant.stored.handle import Stored

if TYPE_CHECKING:
    from numoe.engine.experts.pulled import Origin

Formulas = Mapping[int, tuple[Formula, Mapping[str, Floats]]]
"""What `ExpertBank.define` was told, by layer."""

Applied = tuple[Floats, Mapping[Key, str]]
"""Rows that experts made, and the hashes of those of them that were pulled and nobody has compared yet: see
`pulled.Written.hash`."""


@cache
def _version() -> str:
    from importlib.metadata import version  # takes 2 MB, and most runs share nothing

    return version("numoe")


LEFT_TO_OTHERS = 32  # which part of a budget stays free in the machine, whatever they take
_COPIES = 4  # of a chunk's rows: as they arrive, an expert each, what comes out, and that on its way


@dataclass(frozen=True)
class Settings:
    """How nodes compute. model: as the user names it, which each node finds for itself; identity: by which it must be
    the same one; origin: where a node that has it not gets experts. ram, threads: of a node; block: of products, see
    `use_block`."""

    model: str
    identity: str
    origin: Origin | None
    ram: int | None
    threads: int | None
    block: int
    version: str = field(default_factory=_version)


class Share:
    """One node's, of one model. Its methods are what others call from afar."""

    def open(self, settings: Settings, sharers: int) -> tuple[int, str]:
        """Find the model; gives the bytes that there are for experts, and where it pulls them from, "" if it need not.

        sharers: processes of this machine that share what is free where no `ram` is given.

        Raises:
            InputError: it is not here and cannot be had, is another one or damaged, or not even one expert fits; or
                this is another version of numoe.
        """
        if settings.version != _version():
            raise InputError(
                f"it has numoe {_version()}, and the one that asks {settings.version}; install the same one"
            )
        use_threads(settings.threads or usable_cores())
        use_block(settings.block)
        self._pulled = None
        if path := _found(Path(settings.model)):
            description = describe(path)
            if description.identity != settings.identity:
                raise InputError("it has another model under this name; copy the same one to all nodes")
            store = experts_on_disk(description)
            assert store is not None  # else nobody shares them
            self._store = store
        elif settings.origin:
            from numoe.engine.experts.pulled import PulledExperts  # and all that reaches the hub

            self._pulled = PulledExperts(settings.origin)
            description, self._store = self._pulled.description, self._pulled.store
        else:
            raise InputError(
                f"it has neither {settings.model} nor {models_folder() / Path(settings.model).name}; copy the model "
                "there, or share its folder"
            )
        ram = settings.ram if settings.ram is not None else available_memory() // sharers
        budget = Budget(ram, peak_rss() if settings.ram is not None else 0)
        chosen = max(k for _, k in description.spec.routed.values())
        room = budget.room - _COPIES * 4 * CHUNK * chosen * description.spec.hidden
        room -= self._pulled.working_bytes if self._pulled else 0
        if room < (least := max(self._store.largest.values())):
            raise DoesNotFit(f"`ram` leaves a node {max(room, 0)} bytes for experts, of which one takes {least}")
        # Never all: what is asked for comes and goes, as shares do.
        self._store.allow(min(room, self._store.total_bytes - 1))
        self._store.share(free_memory, budget.total // LEFT_TO_OTHERS)
        self._bank = LocalBank(self._store)
        return room, settings.origin.repo_id if self._pulled and settings.origin else ""

    def define(self, formulas: Formulas) -> None:
        """As `ExpertBank.define`, of all layers."""
        for layer, (formula, biases) in formulas.items():
            self._bank.define(layer, formula, biases)

    def hold(self, keys: Sequence[Key]) -> None:
        """Read these while nothing is asked for, the first ones first; what was pulled of others is removed."""
        if self._pulled:
            self._pulled.keep_only(keys)
        self._store.warm(keys)

    def apply(self, layer: int, rows: Floats, places: Ids, experts: Ids) -> Applied:
        """Row i of the result (N, D) is expert experts[i] of a layer, applied to rows[places[i]], of rows (U, D)."""
        made = self._bank.apply(layer, rows[places], experts[:, None], lambda: None)
        fresh = self._pulled.fresh([(layer, expert) for expert in np.unique(experts).tolist()]) if self._pulled else {}
        return made, fresh

    def confirm(self, keys: Sequence[Key]) -> None:
        """The hashes that `apply` gave of these experts are right."""
        if self._pulled:
            self._pulled.confirm(keys)

    def prefetch(self, layer: int, experts: Ids) -> None:
        """As `ExpertBank.prefetch`, of experts (N,)."""
        if self._bank.wants(layer):
            self._bank.prefetch(layer, experts)

    def alive(self) -> int:
        """The most bytes of memory that this process held."""
        return peak_rss() + workers.private_bytes()


def _found(path: Path) -> Path | None:
    """Where this node has the model: in the same place as the one that asks, or among the models of its NUMOE_HOME."""
    return next((one for one in (path, models_folder() / path.name) if one.exists()), None)


def experts_on_disk(description: Description) -> ExpertStore | None:
    """The routed experts of a model, of which nothing is read yet; None: it has none."""
    experts: dict[Key, dict[str, Stored]] = {}
    for layer, name, tensor in description.spec.listing():
        if layer is not None and tensor.expert is not None:
            experts.setdefault((layer, tensor.expert), {})[name.rpartition(".")[2]] = description.places[name].stored
    return ExpertStore(description.checkpoint.files, experts) if experts else None

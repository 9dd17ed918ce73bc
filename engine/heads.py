"""What a model's own heads that only guess tokens have in common: finding and holding one, and following a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from numoe.engine.budget import Reservation
from numoe.engine.description import Description, place
from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.store import ExpertStore
from numoe.engine.families.names import Source
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.ops import Floats, NotFinite
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.engine.model import Model
from numoe.engine.places import Place
from numoe.engine.plan import kv_bytes
from numoe.quant.compute import workers
from numoe.quant.errors import DoesNotFit, InputError
from numoe.quant.formats.resident import held_nbytes, hold
from numoe.quant.stored.handle import Stored

SHARED = "embed", "head", "head_bias"
"""The model's weights, which a head uses too."""


class FoundHead(NamedTuple):
    """A head as a decoder, its weights beside the model's, and where they lie."""

    spec: ModelSpec
    tensors: dict[str, Tensor]
    places: dict[str, Place]


def find_head(
    description: Description,
    spec: ModelSpec,
    own: Mapping[str, Tensor],
    source: Callable[[str, int | None], Source | None],
) -> FoundHead | None:
    """One whose decoder is `spec`, with `own` weights besides; None where a checkpoint lacks one of them, or has one of
    another size.

    source: where the checkpoint keeps a weight, by its name and its expert's number.
    """
    tensors = {name: tensor for name, tensor in spec.tensors().items() if name not in SHARED} | dict(own)
    experts = next((experts for experts, _ in spec.routed.values()), 0)
    places = {}
    for name, tensor in tensors.items():
        found = source(name, tensor.expert)
        if found is None:
            return None
        try:
            places[name] = place(name, tensors, found, experts, description.checkpoint, "config.json")
        except InputError:  # of another size: a head of another make
            return None
    return FoundHead(spec, tensors, places)


class HeldHead(NamedTuple):
    """The weights of a head in memory, which `memory` is reserved for."""

    weights: Weights
    bank: LocalBank | None
    memory: Reservation


def hold_head(model: Model, found: FoundHead) -> HeldHead | None:
    """A head of a model in memory, with room for its cache; None where there is no room for it.

    Raises:
        InputError: a file cannot be read.
    """
    spec, tensors, places = found
    weights = Weights({"embed": model.decoder.embedding, "head": model.decoder.head})
    if model.decoder.head_bias is not None:
        weights.arrays["head_bias"] = model.decoder.head_bias
    experts: dict[tuple[int, int], dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        if tensor.expert is not None:
            key = int(name.split(".")[1]), tensor.expert
            experts.setdefault(key, {})[name.rpartition(".")[2]] = places[name].stored
    store = ExpertStore(model.description.checkpoint.files, experts) if experts else None
    wide = bool(model.wide_bytes)
    nbytes = sum(_held_nbytes(tensor, places[name], wide) for name, tensor in tensors.items())
    nbytes += kv_bytes(spec, spec.context)
    memory = None
    with suppress(DoesNotFit):
        memory = model.memory.sessions.budget.reserve("the head that predicts further", nbytes)
    if memory is None:
        return None
    for name, tensor in tensors.items():
        if tensor.held == "array":
            weights.arrays[name] = places[name].array(tensor.shape)
        elif tensor.expert is None:
            multiplied = tensor.held == "matrix"
            weights.matrices[name] = hold(places[name].stored.matrix(), multiplied=multiplied, wide=wide)
    workers.know(weights.matrices.values())
    if store:
        store.allow(store.total_bytes)
        if wide:
            store.widen()
    return HeldHead(weights, LocalBank(store) if store else None, memory)


def _held_nbytes(tensor: Tensor, place: Place, wide: bool) -> int:
    if tensor.held == "array":
        return 4 * tensor.size
    if tensor.held != "matrix":
        return place.stored.nbytes
    rows, columns = tensor.shape
    return held_nbytes(place.stored.format, (rows, columns), routed=tensor.expert is not None)[wide]


class Following(ABC):
    """What a head reads of the passes of a model's sessions, one at a time.

    Only the latest states are kept. Its own sequence begins at the first that it has, for positions count only relative
    to each other, and begins anew when its memory is full.
    """

    sort = 0
    free = False

    def __init__(self, cache: Cache, latest: int):
        """cache: of its own sequence. latest: how many states are kept."""
        self._cache, self._latest = cache, latest
        self._origin = self._base = self._done = 0
        """Positions: of its own first token, of the first state that is kept, and how far it has read."""
        self._states: Floats | None = None
        self._blocks: Sequence[Mapping[str, object]] | None = None
        self._finite = True

    @abstractmethod
    def _guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """What `propose` gives."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """As a `Drafter`. One whose damaged weights give no numbers guesses nothing any more: the text needs none."""
        try:
            return self._guess(tokens, most) if self._finite else []
        except NotFinite:
            self._finite = False
            return []

    def _see(self, step: Step, read: Callable[[], Floats]) -> None:
        """Keep what a pass of one sequence gave. read: makes what is read of its tokens, of the latest where there are
        more."""
        if len(step.segments) > 1:
            self._blocks = None
            return
        segment, kept = step.segments[0], self._states
        follows = segment.blocks is self._blocks and self._base <= segment.start <= self._end
        self._blocks, states = segment.blocks, read()
        if follows and kept is not None and len(states) == segment.count:
            states = np.concatenate([kept[: segment.start - self._base], states])
        self._states = states[-self._latest :]
        self._base = segment.stop_position - len(self._states)
        self._done = min(self._done, segment.start)
        if not follows or self._done < self._base:
            self._begin()

    @property
    def _end(self) -> int:
        return self._base + (0 if self._states is None else len(self._states))

    def _begin(self) -> None:
        """Its own sequence begins anew, at the first state there is."""
        self._cache.clear()
        self._origin = self._done = self._base

    def _unread(self, known: int, room: int) -> Floats | None:
        """The states that it has not read, of tokens below `known`, where its cache stands now; None: there are none,
        or not all of them. room: tokens that it is to guess further."""
        if self._blocks is None or self._states is None or not self._done < known <= self._end:
            return None
        own = self._done - self._origin
        if known - self._origin + room > self._cache.context or self._cache.reach(own) != own:
            self._begin()
        self._cache.rewind(self._done - self._origin)
        return self._states[self._done - self._base : known - self._base]

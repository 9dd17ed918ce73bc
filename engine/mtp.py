"""A model's own head that predicts one token further: multi-token prediction (DeepSeek-V3 report, section 2.2).

One more layer reads, for every token, what the last layer gave of it and the embedding of the token after it:
h = eh_proj [norm(embedding), norm(state)], or in V4 e_proj(norm(embedding)) + h_proj(norm(state)) for each residual
stream; with a norm of its own and the model's head it gives the token after that. What it gives further, it guesses
from its own states. Which weights a checkpoint has tells which of the two it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from numoe.engine.budget import Reservation
from numoe.engine.description import Description, place
from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.store import ExpertStore
from numoe.engine.families.names import Source
from numoe.engine.layers import ops
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats
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

_LATEST = 128
"""So many states are kept: as many as V4's window has."""
_ROOM = 1024
"""Tokens of the head's own sequence, before it begins anew with those states: its guesses need no long memory."""
_SHARED = "embed", "head", "head_bias"


def find_mtp(description: Description) -> tuple[ModelSpec, dict[str, Tensor], dict[str, Place]] | None:
    """The head as a decoder of one layer, its weights, and where they lie; None where a checkpoint has none that is
    known."""
    kind, layers, checkpoint = description.family, len(description.spec.layers), description.checkpoint

    def source(name: str, expert: int | None = None) -> Source | None:
        return next((one for one in kind.mtp_sources(name, layers, expert) if one.name in checkpoint), None)

    if source("enorm") is None:
        return None
    layer = kind.mtp.layer(kind.config(description.config), description.spec)
    context = min(description.spec.context, _ROOM)
    spec = replace(description.spec, layers=(layer,), tied=False, context=context)
    hidden = spec.hidden
    tensors = {name: tensor for name, tensor in spec.tensors().items() if name not in _SHARED}
    tensors |= {name: Tensor((hidden,), "norms", "array") for name in ("enorm", "hnorm")}
    joins = {"eh_proj": 2 * hidden} if "eh_proj" in kind.mtp.names else {"e_proj": hidden, "h_proj": hidden}
    tensors |= {name: Tensor((hidden, columns), "attention") for name, columns in joins.items()}
    places = {}
    experts = spec.routed[0][0] if spec.routed else 0
    for name, tensor in tensors.items():
        found = source(name, tensor.expert)
        if found is None:
            return None
        try:
            places[name] = place(name, tensors, found, experts, description.checkpoint, "config.json")
        except InputError:  # of another size: a head of another make
            return None
    return spec, tensors, places


def load_mtp(model: Model) -> MTP | None:
    """The head of a model in memory; None where it has none, or there is no room for it.

    Raises:
        InputError: a file cannot be read.
    """
    found = find_mtp(model.description)
    if found is None:
        return None
    spec, tensors, places = found
    weights = Weights({"embed": model.decoder.embedding, "head": model.decoder.head})
    if model.decoder.head_bias is not None:
        weights.arrays["head_bias"] = model.decoder.head_bias
    experts: dict[tuple[int, int], dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        if tensor.expert is not None:
            experts.setdefault((0, tensor.expert), {})[name.rpartition(".")[2]] = places[name].stored
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
    normed = model.description.family.mtp.normed
    return MTP(model, _Head(spec, weights, LocalBank(store) if store else None, normed), memory)


def _held_nbytes(tensor: Tensor, place: Place, wide: bool) -> int:
    if tensor.held == "array":
        return 4 * tensor.size
    if tensor.held != "matrix":
        return place.stored.nbytes
    rows, columns = tensor.shape
    return held_nbytes(place.stored.format, (rows, columns), routed=tensor.expert is not None)[wide]


class _Head(Decoder):
    """The layer as a decoder. `given`: the states (T, ...) that the next pass's tokens follow; `made`: what it gave."""

    given: Floats
    made: Floats

    def __init__(self, spec: ModelSpec, weights: Weights, bank: LocalBank | None, normed: bool):
        super().__init__(spec, weights, bank)
        self.weights = weights
        self.watch = self._keep
        self._normed = normed

    def read(self, state: Floats, decoder: Decoder) -> Floats:
        """What it reads of states that the last layer of a decoder gave: a copy."""
        if not self._normed:
            return state.copy()
        state = decoder.collapse(state)
        return decoder.norm(state) if decoder.norm else state.copy()

    def _keep(self, step: Step, state: Floats) -> None:
        self.made = self.read(state[-1:], self)

    def _open(self, step: Step) -> Floats:
        m, arrays, eps = self.weights.matrices, self.weights.arrays, self.spec.norm_eps
        after = ops.rms_norm(self._embedded(step), arrays["enorm"], eps)
        before = ops.rms_norm(self.given, arrays["hnorm"], eps)
        if "eh_proj" in m:
            return self.spec.residual.open(m["eh_proj"].matmul(np.concatenate([after, before], axis=1)))
        after = m["e_proj"].matmul(after)
        before = m["h_proj"].matmul(before.reshape(-1, self.spec.hidden)).reshape(before.shape)
        return before + after.reshape(len(after), *(1,) * (before.ndim - 2), -1)


class MTP:
    """A drafter that follows the passes of a model's sessions, one at a time.

    Only the latest states are kept. Its own sequence begins at the first that it has, for positions count only relative
    to each other, and begins anew when its memory is full.
    """

    sort = 0
    free = False

    def __init__(self, model: Model, head: _Head, memory: Reservation):
        self._head, self._memory = head, memory
        self._cache = head.cache(head.spec.context)
        self._latest = min(_LATEST, head.spec.context // 2)
        self._origin = self._base = self._done = 0
        """Positions: of its own first token, of the first state that is kept, and how far it has read."""
        self._states: Floats | None = None
        self._blocks: Sequence[Mapping[str, object]] | None = None
        self._model_decoder = model.decoder
        model.decoder.watch = self._see

    def _see(self, step: Step, state: Floats) -> None:
        """Keep what a pass of one sequence gave."""
        segment = step.segments[0]
        if len(step.segments) > 1:
            self._blocks = None
            return
        kept = self._states
        if kept is None or segment.blocks is not self._blocks or not self._base <= segment.start <= self._end:
            self._blocks, self._states = segment.blocks, self._read(state[-self._latest :])
            self._base = segment.stop_position
            self._base -= len(self._states)
            self._begin()
            return
        self._done = min(self._done, segment.start)
        kept = np.concatenate([kept[: segment.start - self._base], self._read(state)])
        self._base += max(0, len(kept) - self._latest)
        self._states = kept[-self._latest :]
        if self._done < self._base:
            self._begin()

    def _read(self, state: Floats) -> Floats:
        return self._head.read(state, self._model_decoder)

    @property
    def _end(self) -> int:
        return self._base + (0 if self._states is None else len(self._states))

    def _begin(self) -> None:
        """Its own sequence begins anew, at the first state there is."""
        self._cache.clear()
        self._origin = self._done = self._base

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        known = len(tokens) - 1  # tokens whose successor is known too
        if self._blocks is None or self._states is None or not self._done < known <= self._end:
            return []
        most = min(most, self._latest)
        if known - self._origin + most > self._cache.context:
            self._begin()
        self._cache.rewind(self._done - self._origin)
        self._head.given = self._states[self._done - self._base : known - self._base]
        logits = self._head.forward(np.array(tokens[self._done + 1 :], np.int64), self._cache, last=True)
        self._done = known
        proposed = list[int]()
        while True:
            proposed.append(int(logits.argmax()))
            if len(proposed) == most:
                return proposed
            self._head.given = self._head.made
            logits = self._head.forward(np.array(proposed[-1:], np.int64), self._cache, last=True)

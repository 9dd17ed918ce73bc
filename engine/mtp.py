"""A model's own head that predicts one token further: multi-token prediction (DeepSeek-V3 report, section 2.2).

One more layer reads, for every token, what the last layer gave of it and the embedding of the token after it:
h = eh_proj [norm(embedding), norm(state)], or in V4 e_proj(norm(embedding)) + h_proj(norm(state)) for each residual
stream; with a norm of its own and the model's head it gives the token after that. What it gives further, it guesses
from its own states. Which weights a checkpoint has tells which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from numoe.engine.description import Description
from numoe.engine.families.names import Source
from numoe.engine.heads import Following, FoundHead, HeldHead, find_head, hold_head
from numoe.engine.layers import ops
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.model import Model

_LATEST = 128
"""So many states are kept: as many as V4's window has."""
_ROOM = 1024
"""Tokens of the head's own sequence, before it begins anew with those states: its guesses need no long memory."""


def find_mtp(description: Description) -> FoundHead | None:
    """The head as a decoder of one layer; None where a checkpoint has none that is known."""
    kind, layers, checkpoint = description.family, len(description.spec.layers), description.checkpoint

    def source(name: str, expert: int | None = None) -> Source | None:
        sources = [*kind.mtp.sources(kind, name, layers, 1, expert), *(kind.sources(name) if name == "norm" else ())]
        return next((one for one in sources if one.name in checkpoint), None)

    if source("enorm") is None:
        return None
    layer = kind.mtp.layer(kind.config(description.config), description.spec)
    context = min(description.spec.context, _ROOM)
    spec = replace(description.spec, layers=(layer,), tied=False, context=context)
    hidden = spec.hidden
    own = {name: Tensor((hidden,), "norms", "array") for name in ("enorm", "hnorm")}
    joins = {"eh_proj": 2 * hidden} if "eh_proj" in kind.mtp.names else {"e_proj": hidden, "h_proj": hidden}
    own |= {name: Tensor((hidden, columns), "attention") for name, columns in joins.items()}
    return find_head(description, spec, own, source)


def load_mtp(model: Model) -> MTP | None:
    """The head of a model in memory; None where it has none, or there is no room for it.

    Raises:
        InputError: a file cannot be read.
    """
    found = find_mtp(model.description)
    held = found and hold_head(model, found)
    return MTP(model, found.spec, held) if found and held else None


class _Head(Decoder):
    """The layer as a decoder. `given`: the states (T, ...) that the next pass's tokens follow; `made`: what it gave."""

    given: Floats
    made: Floats

    def __init__(self, spec: ModelSpec, held: HeldHead, normed: bool):
        super().__init__(spec, held.weights, held.bank)
        self.weights = held.weights
        self.watch[0] = self._keep
        # What keeps nothing of a sequence is asked for the last token alone.
        self.last_from = 1 + max(number for number, block in enumerate(spec.blocks()) if block.kind.state())
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


class MTP(Following):
    """A drafter that follows the passes of a model's sessions."""

    at_once = 1

    def __init__(self, model: Model, spec: ModelSpec, held: HeldHead):
        self._head = head = _Head(spec, held, model.description.family.mtp.normed)
        self._memory = held.memory
        super().__init__(head.cache(spec.context), min(_LATEST, spec.context // 2))
        decoder = model.decoder

        def see(step: Step, state: Floats) -> None:
            self._see(step, lambda: head.read(state[-self._latest :], decoder))

        decoder.watch[len(decoder.spec.layers) - 1] = see

    def _guess(self, tokens: Sequence[int], most: int) -> list[int]:
        known = len(tokens) - 1  # tokens whose successor is known too
        most = min(most, self._latest)
        states = self._unread(known, most)
        if states is None:
            return []
        self._head.given = states
        logits = self._head.forward(np.array(tokens[known + 1 - len(states) :], np.int64), self._cache, last=True)
        self._done = known
        proposed = list[int]()
        while True:
            proposed.append(int(logits.argmax()))
            if len(proposed) == most:
                return proposed
            self._head.given = self._head.made
            logits = self._head.forward(np.array(proposed[-1:], np.int64), self._cache, last=True)

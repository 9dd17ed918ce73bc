"""A model's own head that guesses a block of tokens at once: DSpark (arXiv 2607.05147), as V4's dated releases have it.

Its layers read, of the latest tokens, what some of the model's layers gave, the mean of their residual streams:
main_norm(main_proj [layer, layer, ...]). The block is the last token and noise after it, all denoised in one pass,
whose attention goes both ways. Its logits are then corrected one after the other by the token before, of low rank:
logits + head embed[token]. How likely a token comes where those before it do, says
sigmoid(confidence [state, embed[token before]]): one that is not likely to be reached is not proposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from numoe.engine.description import Description
from numoe.engine.families.names import Drafts, Source
from numoe.engine.heads import Following, FoundHead, HeldHead, find_head, hold_head
from numoe.engine.layers import ops
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.model import Model
from numoe.quant.errors import InputError

_ROOM = 1024
"""Tokens of the head's own sequence beside its window, before it begins anew with that."""
_UNLIKELY = 0.2
"""Tokens that come less often are not proposed: one more costs about a tenth of a pass, which gives some two."""


def find_dspark(description: Description) -> tuple[FoundHead, Drafts] | None:
    """The head as a decoder; None where a checkpoint has none that is known, or has more of one than is known."""
    kind, layers, checkpoint = description.family, len(description.spec.layers), description.checkpoint
    head = kind.dspark
    if head is None:
        return None
    begin = head.place[1].partition("{")[0]
    stored = {name for name in checkpoint.names() if name.startswith(begin)}
    numbers = {name.removeprefix(begin).partition(".")[0] for name in stored}
    count = len(numbers)

    def source(name: str, expert: int | None = None) -> Source | None:
        return next((one for one in head.sources(kind, name, layers, count, expert) if one.name in checkpoint), None)

    if numbers != {str(number) for number in range(count)} or source("main_proj") is None:
        return None
    try:
        drafts = head.drafts(kind.config(description.config), description.spec, count)
    except InputError:  # the config says nothing of it, or of one of another make
        return None
    spec = replace(description.spec, layers=drafts.layers, tied=False, context=drafts.window + _ROOM)
    hidden, vocab = spec.hidden, spec.vocab
    own = {
        "main_proj": Tensor((hidden, len(drafts.targets) * hidden), "attention"),
        "main_norm": Tensor((hidden,), "norms", "array"),
        "markov.embed": Tensor((vocab, drafts.rank), "embedding", "rows"),
        "markov.head": Tensor((vocab, drafts.rank), "head"),
        "confidence": Tensor((hidden + drafts.rank,), "head", "array"),
    }
    found = find_head(description, spec, own, source)
    if found is None or stored - {place.stored.name for place in found.places.values()}:
        return None
    return found, drafts


def load_dspark(model: Model) -> DSpark | None:
    """The head of a model in memory; None where it has none, or there is no room for it.

    Raises:
        InputError: a file cannot be read.
    """
    found = find_dspark(model.description)
    held = found and hold_head(model, found[0])
    return DSpark(model, found[0].spec, held, found[1]) if found and held else None


class _Head(Decoder):
    """The layers as a decoder of one block. `state` (T, D): what it gives before its norm."""

    state: Floats

    def __init__(self, spec: ModelSpec, held: HeldHead, drafts: Drafts):
        super().__init__(spec, held.weights, held.bank)
        self._matrices, self._arrays, self._drafts = held.weights.matrices, held.weights.arrays, drafts
        self.watch[len(spec.layers) - 1] = self._keep

    def _keep(self, step: Step, state: Floats) -> None:
        self.state = self.collapse(state)

    def read(self, states: Sequence[Floats]) -> Floats:
        """What it reads of tokens, (S, D), of what each target gave of them, (S, D)."""
        read = self._matrices["main_proj"].matmul(np.concatenate(states, axis=1))
        return ops.rms_norm(read, self._arrays["main_norm"], self.spec.norm_eps)

    def guess(self, before: Floats, token: int, cache: Cache) -> tuple[list[int], Floats, list[float]]:
        """The block that follows a token: its tokens, their logits (T, vocab), and how likely each is reached.

        before: (S, D), what was read of the last S tokens before that one; the cache stands before them, then after.
        """
        drafts, table, correction = self._drafts, self._matrices["markov.embed"], self._matrices["markov.head"]
        position = cache.position + len(before)
        self.shared.before = before
        with cache.step(len(before)):  # what they leave is written in the pass
            pass
        logits = self.forward(np.array([token, *[drafts.noise] * (drafts.size - 1)], np.int64), cache)
        cache.rewind(position)
        block, likely, reached = [token], list[float](), 1.0
        for row, state in zip(logits, self.state, strict=True):
            given = table.rows(np.array(block[-1:], np.int64))  # (1, rank)
            row += correction.matmul(given)[0]
            block.append(int(row.argmax()))
            sure = np.concatenate([state, given[0]]) @ self._arrays["confidence"]
            reached *= float(ops.sigmoid(np.array([sure], np.float32))[0])
            likely.append(reached)
        return block[1:], logits, likely


class DSpark(Following):
    """A drafter that follows the passes of a model's sessions."""

    def __init__(self, model: Model, spec: ModelSpec, held: HeldHead, drafts: Drafts):
        self._head = _Head(spec, held, drafts)
        self._memory = held.memory
        self.at_once = drafts.size
        super().__init__(self._head.cache(spec.context), min(drafts.window, CHUNK))
        self._targets, self._given = drafts.targets, dict[int, Floats]()
        self._last = len(model.decoder.spec.layers) - 1
        for layer in {*drafts.targets, self._last}:
            model.decoder.watch[layer] = self._watching(layer)

    def _watching(self, layer: int) -> Callable[[Step, Floats], None]:
        def see(step: Step, state: Floats) -> None:
            if layer in self._targets and len(step.segments) == 1:
                self._given[layer] = state[-self._latest :].mean(axis=1)
            if layer == self._last:
                self._see(step, lambda: self._head.read([self._given[target] for target in self._targets]))

        return see

    def _guess(self, tokens: Sequence[int], most: int) -> list[int]:
        known = len(tokens) - 1  # tokens that the model has read
        before = self._unread(known, self.at_once)
        if before is None:
            return []
        block, _, likely = self._head.guess(before, tokens[-1], self._cache)
        self._done = known
        worth = sum(reached >= _UNLIKELY for reached in likely)
        return block[: min(most, max(1, worth))]

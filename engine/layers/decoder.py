"""The assembler: a ModelSpec and its weights become a decoder. There is one, for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.bank import ExpertBank
from numoe.engine.layers.block import Block, Shared
from numoe.engine.layers.cache import Cache, Pool
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.residual import Mixer
from numoe.engine.layers.rows import FLOAT32, RowForm
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.engine.layers.step import Step
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.kernels import all_finite

Wanted = Literal["last", "all"]
"""What a pass gives: logits after the last token of each sequence, or after every token."""


class _Built:
    """One block: state -> state."""

    def __init__(self, block: Block, weights: Weights, mixer: Mixer, shared: Shared):
        self.where = f"layer {shared.layer} ({block.kind.label})"
        self.compute = block.build(weights, shared)
        self.scale = weights.arrays[f"{block.name}_scale"] if block.scale else None
        self.mixer = mixer

    def __call__(self, state: Floats, step: Step) -> Floats:
        x, carried = self.mixer.enter(state)
        state = self.mixer.leave(state, self.compute(x, step), carried)
        if self.scale is not None:
            state *= self.scale
        return state


class Decoder:
    """Token ids and caches -> logits.

    bank: the routed experts, of a spec that has them; the other weights are in `weights`. form: of rows in caches.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, bank: ExpertBank | None = None, form: RowForm = FLOAT32):
        self.spec = spec
        self.form = form
        self.embedding = weights.matrices["embed"]
        self.head = self.embedding if spec.tied else weights.matrices["head"]
        self.head_bias = weights.arrays["head_bias"] if spec.head_bias else None
        self.norm = spec.norm.build(weights, "norm", spec.norm_eps) if spec.norm else None
        self.shared = Shared(spec.norm_eps, bank)
        self._pools: WeakValueDictionary[tuple[int, str], Pool] = WeakValueDictionary()
        self.blocks: list[_Built] = []
        self._ends: dict[int, int] = {}  # the layer of which a block is the last
        self.watch: dict[int, Callable[[Step, Floats], None]] = {}
        """Called with what a layer gives, by its number, in every pass; not to be kept without a copy."""
        self.last_from: int | None = None
        """The block from which on only the last token of each sequence is computed, for nobody asks for others."""
        parts = weights.numbered("layers.", len(spec.layers))
        for number, (blocks, part) in enumerate(zip(spec.layers, parts, strict=True)):
            for block in blocks:
                self.shared.layer, self.shared.block = number, len(self.blocks)
                join = block.join or spec.residual
                mixer = join.connect(part.below(f"{block.name}_residual."), spec.norm_eps)
                self.blocks.append(_Built(block, part, mixer, self.shared))
            self._ends[len(self.blocks) - 1] = number
        self.collapse: Callable[[Floats], Floats] = spec.residual.collapse(
            weights.below("head_residual."), spec.norm_eps
        )

    def cache(self, context: int, form: RowForm | None = None) -> Cache:
        """An empty cache for up to `context` tokens, allocated at once, beside others. form: None: the decoder's."""
        specs, form = [block.kind.state() for block in self.spec.blocks()], form or self.form
        pool = self._pools.get((context, form.name))
        slot = pool.take() if pool else None
        if slot is None:
            pool = self._pools[context, form.name] = Pool(specs, context, form)
            slot = pool.take()
        return Cache(specs, context, form, slot)

    def forward(self, ids: Ids, cache: Cache, *, last: bool = False) -> Floats:
        """Read tokens (T,), at most CHUNK, and give the logits after each, (T, vocab), or only the last's (1, vocab).

        The cache's position moves on when all is computed: an interrupted pass leaves it as it was.

        Raises:
            NotFinite: a layer, which it names, computes NaN or infinity.
        """
        return self.forward_all([(ids, cache)], "last" if last else "all")

    @np.errstate(over="ignore", invalid="ignore")  # the results are looked at
    def forward_all(self, parts: list[tuple[Ids, Cache]], wanted: Wanted | Sequence[Wanted] = "last") -> Floats:
        """The same for the next tokens of several sequences in one pass, at most CHUNK together.

        wanted: of all parts, or of each: "last" or "all". Rows of the result are in the order of the parts, one of a
        part whose last token's are wanted.
        """
        step = Step.of(parts)
        assert len(step.ids) <= CHUNK
        try:
            with self._moving(parts):
                state = self._states(step)
        except ops.NotFinite:  # once more, to name the layer: looking at every one takes time
            with self._moving(parts):
                self._states(Step.of(parts), watched=True)
            raise
        if wanted == "last" and len(state) > len(step.segments):
            state = state[step.last_rows]
        elif not isinstance(wanted, str):
            each = zip(wanted, step.segments, strict=True)
            state = np.concatenate([state[s.stop - 1 if one == "last" else s.first : s.stop] for one, s in each])
        x = self.collapse(state)  # (T, D)
        if self.norm:
            x = self.norm(x)
        logits = self.head.matmul(x)
        if self.head_bias is not None:
            logits += self.head_bias
        if self.spec.logit_scale != 1:
            logits *= np.float32(self.spec.logit_scale)
        if self.spec.logit_cap is not None:
            ops.soft_cap(logits, self.spec.logit_cap)
        if not all_finite(logits):
            raise ops.NotFinite("the head")
        return logits

    @contextmanager
    def _moving(self, parts: list[tuple[Ids, Cache]]) -> Iterator[None]:
        """A pass over the next tokens of caches, which are as they were before where it fails."""
        with ExitStack() as passes:
            for ids, cache in parts:
                passes.enter_context(cache.step(len(ids)))
            yield

    def _embedded(self, step: Step) -> Floats:
        x = self.embedding.rows(step.ids)  # (T, D)
        if self.spec.embedding_scale != 1:
            x *= np.float32(self.spec.embedding_scale)
        return x

    def _open(self, step: Step) -> Floats:
        """The residual's state before the first layer, (T, D) or (T, N, D)."""
        return self.spec.residual.open(self._embedded(step))

    def _states(self, step: Step, watched: bool = False) -> Floats:
        """The same after the last layer.

        watched: it is looked at after every block.

        Raises:
            NotFinite: it holds NaN or infinity, which a residual never loses again; or scores in a block do.
        """
        state = self._open(step)
        for begin in self.shared.beginnings:
            begin(step)
        for number, block in enumerate(self.blocks):
            if number == self.last_from:
                state, step = state[step.last_rows], step.last()
            try:
                state = block(state, step)
            except ops.NotFinite:
                raise ops.NotFinite(block.where) from None
            if watched and not all_finite(state):
                raise ops.NotFinite(block.where)
            if number == len(self.blocks) - 1 and not all_finite(state):
                raise ops.NotFinite("the last layer")
            if watch := self.watch.get(self._ends.get(number, -1)):
                watch(step, state)
        return state

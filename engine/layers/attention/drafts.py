"""DSpark's attention (arXiv 2607.05147): a block of drafts attends to all of itself, and to what it follows.

What it follows are no tokens of its own layer but what the model's layers gave of the latest tokens, projected: each
layer makes its key/value rows of that. All else is V4's sliding attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.attention.compressed import Compressed, CompressedAttention
from numoe.engine.layers.attention.softmax import Queries, attend
from numoe.engine.layers.block import Compute, Shared
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.state import KeptRows
from numoe.engine.layers.step import Segment, Step
from numoe.engine.layers.weights import Weights


class DraftAttention(CompressedAttention):
    """One shared key/value head over the latest `window` tokens before a block, and the block.

    A pass is of one block. `Shared.before` (S, D), of the last S tokens before it, becomes their rows in the same pass.
    """

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return _Drafting(self, weights, shared)


class _Drafting(Compressed):
    def __init__(self, spec: DraftAttention, weights: Weights, shared: Shared):
        super().__init__(spec, weights, shared)
        self.shared = shared

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        before, segment = self.shared.before, step.segments[0]
        assert before is not None
        rows = self.w.matrices["kv"].matmul(before)
        ops.rms_norm(rows, self.w.arrays["kv_norm"], self.norm_eps, out=rows)
        start = segment.start - len(rows)
        positions = np.arange(start, segment.start, dtype=np.float32)
        self.rotation.apply(rows[:, None], step.once("before", self.rotation.angles, positions))
        self.states(segment)["window"].write(rows[None], start)
        return super().__call__(x, step)

    def _attend(
        self,
        q: Floats,
        states: Mapping[str, KeptRows],
        segment: Segment,
        chosen: Ids | None,
        out: Floats,
        queries: Queries,
    ) -> None:
        rows = states["window"].view(max(0, segment.start - self.spec.window), segment.stop_position)
        out[:] = attend(q[None], [(rows, rows, None)], self.spec.head_dim**-0.5, self.sink)[0]

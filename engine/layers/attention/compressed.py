"""DeepSeek-V4's attention: a window of tokens, and beyond it entries compressed from whole windows.

One key/value head serves all query heads, and a row is key and value at once. Three kinds differ in what stands
beyond the window: nothing (sliding), every compressed entry (HCA), or those an indexer picks (CSA).
Formulas: DeepSeek-V4 report, sections 2.3.1 and 2.3.2; checked against transformers' deepseek_v4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.attention.indexer import Compressor, EntryIndexer, LightningIndexer, WindowCompressor
from numoe.engine.layers.attention.softmax import (
    SHORT,
    Part,
    Queries,
    Seen,
    attend,
    attend_together,
    first_visible,
    hidden_keys,
)
from numoe.engine.layers.block import Compute, Kind, Shared, angles
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.rope import Rope
from numoe.engine.layers.rows import Stretch, stretch
from numoe.engine.layers.state import KeptRows, Rows, Span
from numoe.engine.layers.step import Company, Segment, Step
from numoe.engine.layers.tensor import Tensor, prefixed
from numoe.engine.layers.weights import Weights
from numoe.quant.compute import workers
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import matmul_all


@dataclass(frozen=True)
class CompressedAttention(Kind):
    """One shared key/value head over a window of tokens and over compressed entries.

    The output goes through `out_groups` separate projections.
    """

    heads: int
    head_dim: int
    q_rank: int
    window: int
    out_groups: int
    out_rank: int
    rope: Rope
    compressor: Compressor | None = None
    indexer: EntryIndexer | None = None

    @property
    def label(self) -> str:
        return "sliding" if not self.compressor else "CSA" if self.indexer else "HCA"

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        q = self.heads * self.head_dim
        grouped = self.out_groups * self.out_rank
        table = {
            "q_a": Tensor((self.q_rank, hidden), "attention"),
            "q_norm": Tensor((self.q_rank,), "norms", "array"),
            "q_b": Tensor((q, self.q_rank), "attention"),
            "kv": Tensor((self.head_dim, hidden), "attention"),
            "kv_norm": Tensor((self.head_dim,), "norms", "array"),
            "sink": Tensor((self.heads,), "attention", "array"),
            "o_a": Tensor((grouped, q // self.out_groups), "attention"),
            "o_b": Tensor((hidden, grouped), "attention"),
        }
        if self.compressor:
            table |= prefixed("compressor.", self.compressor.tensors(hidden, "compressor"))
        if self.indexer:
            table |= prefixed("indexer.", self.indexer.tensors(hidden, self.q_rank))
        return table

    def state(self) -> Mapping[str, Rows]:
        rotated = self.rope.dim % self.head_dim
        table = {"window": Rows(1, self.head_dim, self.window, apart=rotated)}
        if self.compressor:
            table |= prefixed("compressor.", self.compressor.state(rotated))
        if self.indexer:
            table |= prefixed("indexer.", self.indexer.compressor.state())
        return table

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return Compressed(self, weights, shared)


class Compressed:
    """One layer's attention of any of the three kinds."""

    def __init__(self, spec: CompressedAttention, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.norm_eps = shared.norm_eps
        self.rotation = shared.rotation(spec.rope)
        self.states = shared.states()
        self.o_a = weights.matrices["o_a"].split(spec.out_groups)
        workers.know(self.o_a)
        self.sink = weights.arrays["sink"][None, None]  # (1, 1, H)
        self.compress = self.indexer = None
        if spec.compressor:
            self.compress = WindowCompressor(spec.compressor, spec.rope, weights.below("compressor."), shared)
        if spec.indexer:
            own = weights.below("indexer.")
            self.indexer = LightningIndexer(spec.indexer, spec.rope, own, shared)
            compressor = spec.indexer.compressor
            self.compress_keys = WindowCompressor(compressor, spec.rope, own.below("compressor."), shared)
        ratio = spec.compressor.ratio if spec.compressor else None
        self._sees = spec.window, ratio, spec.indexer.top_k if spec.indexer else None

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        spec, count, m = self.spec, len(x), self.w.matrices
        turned = angles(self.rotation, step)
        given = Activations(x)
        latent, row = matmul_all([(m["q_a"], given, None), (m["kv"], given, None)])  # (T, rank), (T, C)
        ops.rms_norm(latent, self.w.arrays["q_norm"], self.norm_eps, out=latent)
        q_latent = Activations(latent)
        q = m["q_b"].matmul(q_latent).reshape(count, spec.heads, spec.head_dim)
        ops.rms_norm(q, None, self.norm_eps, out=q)
        self.rotation.apply(q, turned)
        ops.rms_norm(row, self.w.arrays["kv_norm"], self.norm_eps, out=row)
        self.rotation.apply(row[:, None], turned)
        if self.compress:
            self.compress(given, step, self.states, "compressor.")
        index = None
        if self.indexer:
            self.compress_keys(given, step, self.states, "indexer.")
            index = self.indexer.queries(given, q_latent, step)

        out = np.empty_like(q)
        step.keep(self.states, "window", row[:, None])
        alone = list(step.alone)
        for company in step.companies:
            alone += self._attend_together(q, company, step, out)
        queries = Queries()
        for segment in alone:
            own, states = segment.rows, self.states(segment)
            chosen = None if index is None else self._choose(states, segment, (index[0][own], index[1][own]))
            self._attend(q[own], states, segment, chosen, out[own], queries)
        queries.run()
        # A row is a value too, so the output carries the keys' rotation: turn it back by the query's position.
        self.rotation.apply(out, turned.inverse())
        return self._project_out(out)

    def _attend(
        self,
        q: Floats,
        states: Mapping[str, KeptRows],
        segment: Segment,
        chosen: Ids | None,
        out: Floats,
        queries: Queries,
    ) -> None:
        """q and out (T, H, C) of one sequence, which `queries` is to fill; chosen: as `_choose` gave."""
        spec, count, start = self.spec, segment.count, segment.start
        width = spec.heads if chosen is None else max(spec.heads, spec.head_dim)

        def block(a: int, b: int) -> None:
            parts = self._parts(states, start + a, start + b, None if chosen is None else chosen[a:b])
            out[a:b] = attend(q[None, a:b], parts, spec.head_dim**-0.5, self.sink)[0]

        queries.add(block, count, width, self._most_keys(start + count, count), spec.head_dim)

    def _parts(self, states: Mapping[str, KeptRows], start: int, stop: int, chosen: Ids | None) -> list[Part]:
        """What the tokens from start on attend to."""
        parts = [self._window(states, start, stop)]
        if self.compress and (beyond := self._beyond(states, start, stop)):
            parts.append(self._entries(*beyond, chosen))
        return parts

    def _attend_together(self, q: Floats, company: Company, step: Step, out: Floats) -> list[Segment]:
        """Of q and out (T, H, C), the rows of those that see few keys, and all there are; gives the others."""
        others: list[Segment] = []
        for some, window, entries in step.once((company, *self._sees), self._runs, company):
            if len(some.segments) == 1:
                others += some.segments
                continue
            states, parts = self.states(some), list[Seen]()
            for name, span in (("window", window), ("compressor.rows", entries)):
                if span.high:
                    rows, hidden = states[name].floats(span)
                    parts.append((rows, rows, hidden))
            asking = q[some.rows][:, None]  # (B, 1, H, C)
            out[some.rows] = attend_together(asking, parts, self.spec.head_dim**-0.5, self.sink)[:, 0]
        return others

    def _runs(self, company: Company) -> list[tuple[Company, Span, Span]]:
        """Those that attend together, the tokens of their windows, and the entries beyond."""
        spec, most, made = self.spec, SHORT // self.spec.head_dim, []

        def entries(one: Segment) -> int:
            return one.stop_position // spec.compressor.ratio if spec.compressor else 0

        def keys(one: Segment) -> int:
            chooses = spec.indexer is not None and entries(one) > spec.indexer.top_k
            return most + 1 if chooses else min(one.stop_position, spec.window) + entries(one)

        for some in company.runs([keys(one) for one in company.segments], most):
            window = Span.of((first_visible(one.start, spec.window), one.stop_position) for one in some.segments)
            made.append((some, window, Span.of((0, entries(one)) for one in some.segments)))
        return made

    def _project_out(self, out: Floats) -> Floats:
        """(T, H, C) -> (T, D)."""
        count = len(out)
        groups = out.reshape(count, self.spec.out_groups, -1)
        rank = self.o_a[0].shape[0]
        mixed = np.empty((count, self.spec.out_groups * rank), np.float32)
        matmul_all(
            [
                (part, Activations(np.ascontiguousarray(groups[:, g])), mixed[:, g * rank : (g + 1) * rank])
                for g, part in enumerate(self.o_a)
            ]
        )
        return self.w.matrices["o_b"].matmul(mixed)

    def _most_keys(self, position: int, count: int) -> int:
        """Upper bound on the keys that a query of this chunk has, for sizing blocks."""
        beyond = position // self.spec.compressor.ratio if self.spec.compressor else 0
        if self.indexer:
            beyond = min(beyond, self.indexer.spec.top_k)
        return min(position, self.spec.window + count) + beyond

    def _window(self, states: Mapping[str, KeptRows], start: int, stop: int) -> Part:
        first = first_visible(start, self.spec.window)
        rows = states["window"].view(first, stop)
        return rows, rows, hidden_keys(start, stop, first, self.spec.window)

    def _beyond(self, states: Mapping[str, KeptRows], start: int, stop: int) -> tuple[Stretch, Ids] | None:
        """The compressed entries that queries from `start` on see, and how many of them each does: those of windows
        that are closed by then."""
        assert self.spec.compressor
        visible = np.arange(start + 1, stop + 1) // self.spec.compressor.ratio  # (T,)
        return (states["compressor.rows"].view(0, int(visible[-1])), visible) if visible[-1] else None

    def _entries(self, rows: Stretch, visible: Ids, chosen: Ids | None) -> Part:
        """All entries, or where there are more those that are chosen."""
        most = rows.shape[1]
        if chosen is None or most <= chosen.shape[1]:
            return rows, rows, None if visible[0] == most else np.arange(most) >= visible[:, None]
        own = stretch(rows.pick(chosen))  # (T, K, C)
        return own, own, chosen >= visible[:, None]

    def _choose(self, states: Mapping[str, KeptRows], segment: Segment, index: tuple[Floats, Floats]) -> Ids | None:
        """Which entries the tokens of a sequence attend to, (T, top_k); None: to all that they see."""
        assert self.indexer and self.spec.compressor
        start, end = segment.start, segment.start + segment.count
        if end // self.spec.compressor.ratio <= self.indexer.spec.top_k:
            return None
        q, weights = index
        visible = np.arange(start + 1, end + 1) // self.spec.compressor.ratio
        return self.indexer.choose(q, weights, states["indexer.rows"], visible)

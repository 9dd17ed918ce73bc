"""Grouped-query attention (arXiv 2305.13245): q = rope(x Wq), k = rope(x Wk), v = x Wv; softmax(q k^T scale) v Wo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.attention.indexer import BlockIndexer, BlockLightningIndexer
from numoe.engine.layers.attention.softmax import (
    SHORT,
    Queries,
    attend,
    attend_together,
    first_visible,
    head_parts,
    hidden_keys,
)
from numoe.engine.layers.block import Compute, Kind, Shared, angles
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.rope import Rope, Temperature
from numoe.engine.layers.state import KeptRows, Rows, Span
from numoe.engine.layers.step import Company, Segment, Step
from numoe.engine.layers.tensor import Tensor, prefixed
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import matmul_all


@dataclass(frozen=True)
class OutputGate:
    """The output of heads times score(x Wg): a number for each channel of each head (Trinity), or for each head."""

    score: Literal["sigmoid", "softplus"]
    by_head: bool = False


@dataclass(frozen=True)
class GroupedQueryAttention(Kind):
    """H query heads share `kv_heads` key/value heads; with `window`, a token sees only that many positions."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    """None: positions play no part but for the mask."""
    window: int | None = None
    head_norm: bool = False
    """RMS norm over each query and key head, before rope (Qwen3)."""
    biases: str = ""
    """Which of the projections q, k, v and o have biases."""
    sinks: bool = False
    """A learned score a head that takes part in the softmax and has no value (gpt-oss)."""
    gate: bool = False
    """Each head's output is multiplied with the sigmoid of a gate; Wq has a query and a gate a head (Qwen3-Next)."""
    scale: float | None = None
    """What scores are multiplied with; None: head_dim^-1/2."""
    plain_norms: str = ""
    """Which of q, k and v have an RMS norm over each head without a weight, after rope (Gemma 4, Llama 4)."""
    shared_values: bool = False
    """v = x Wk: values are what keys are before norm and rope (Gemma 4)."""
    chunk: int | None = None
    """A token sees the positions of its own chunk alone, of so many from 0 on (Llama 4)."""
    temperature: Temperature | None = None
    """What queries are multiplied with (Llama 4, Ministral 3)."""
    whole_norm: bool = False
    """RMS norm over all query heads together and over all key heads, before rope (OLMo 2, MiniMax-M2)."""
    late_norm: bool = False
    """The norm of heads comes after rope (Hunyuan)."""
    value_dim: int | None = None
    """Channels of a value head; None: head_dim."""
    value_scale: float = 1.0
    """What values are multiplied with (MiMo-V2)."""
    output_gate: OutputGate | None = None
    """One that has a projection of its own (Trinity, Laguna)."""
    clip: float | None = None
    """Bounds queries, keys and values on both sides, before rope (OLMoE)."""
    indexer: BlockIndexer | None = None
    """What picks the tokens that one attends to (Qwen3.8)."""

    @property
    def label(self) -> str:
        return "sliding" if self.window else "chunked" if self.chunk else "indexed" if self.indexer else "full"

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        q, k, value_dim = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.value_dim or self.head_dim
        table = {
            "q": Tensor((2 * q if self.gate else q, hidden), "attention"),
            "k": Tensor((k, hidden), "attention"),
            "v": Tensor((self.kv_heads * value_dim, hidden), "attention"),
            "o": Tensor((hidden, self.heads * value_dim), "attention"),
        }
        if self.shared_values:
            del table["v"]
        if self.output_gate:
            width = 1 if self.output_gate.by_head else value_dim
            table["gate"] = Tensor((self.heads * width, hidden), "attention")
        if self.head_norm:
            table |= {name: Tensor((self.head_dim,), "norms", "array") for name in ("q_norm", "k_norm")}
        if self.whole_norm:
            table |= {f"{name}_norm": Tensor((width,), "norms", "array") for name, width in (("q", q), ("k", k))}
        table |= {
            f"{name}_bias": Tensor((table[name].shape[0],), "attention", "array")
            for name in self.biases
            if name in table
        }
        if self.sinks:
            table["sink"] = Tensor((self.heads,), "attention", "array")
        return table | prefixed("indexer.", self.indexer.tensors(hidden)) if self.indexer else table

    def state(self) -> Mapping[str, Rows]:
        kept = self.window or self.chunk
        table = {
            "k": Rows(self.kv_heads, self.head_dim, kept, apart=self.head_dim, fine=True),
            "v": Rows(self.kv_heads, self.value_dim or self.head_dim, kept),
        }
        return table | prefixed("indexer.", self.indexer.state()) if self.indexer else table

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return GroupedQuery(self, weights, shared)


class GroupedQuery:
    """One layer's grouped-query attention."""

    def __init__(self, spec: GroupedQueryAttention, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.norm_eps = shared.norm_eps
        self.states = shared.states()
        self.rotation = shared.rotation(spec.rope) if spec.rope else None
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        self.sink = weights.arrays["sink"].reshape(spec.kv_heads, 1, -1) if spec.sinks else None  # (G, 1, R)
        self.indexer = None
        if spec.indexer:
            self.indexer = BlockLightningIndexer(spec.indexer, weights.below("indexer."), shared)
        self._most = 0 if spec.indexer else SHORT // (spec.kv_heads * spec.head_dim)  # keys of who attends with others

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        spec, count = self.spec, len(x)
        given = Activations(x)
        asked = self.indexer.ask(given, step, self.states, "indexer.") if self.indexer else None
        heads, v, gate = self._project(given)
        q, k = heads[:, : spec.heads], heads[:, spec.heads :]
        if spec.whole_norm:
            self._norm(q.reshape(count, -1), k.reshape(count, -1))
        if spec.head_norm and not spec.late_norm:
            self._norm(q, k)
        if spec.clip:
            for part in (heads, v):
                np.clip(part, -spec.clip, spec.clip, out=part)
        if self.rotation:
            self.rotation.apply(heads, angles(self.rotation, step))
        if spec.head_norm and spec.late_norm:
            self._norm(q, k)
        if spec.value_scale != 1:
            v *= np.float32(spec.value_scale)
        for name, part in (("q", q), ("k", k), ("v", v)):
            if name in spec.plain_norms:
                ops.rms_norm(part, None, self.norm_eps, out=part)
        if spec.temperature:
            q *= spec.temperature.of(step.positions)[:, None, None]
        out = np.empty((count, spec.heads, v.shape[-1]), np.float32)
        step.keep(self.states, "k", k)
        step.keep(self.states, "v", v)
        alone = list(step.alone)
        for company in step.companies:
            alone += self._attend_together(q, company, step, out)
        queries = Queries()
        for segment in alone:
            own = segment.rows
            index = None if asked is None else (asked[0][own], asked[1][own])
            self._attend(q[own], self.states(segment), segment, index, out[own], queries)
        queries.run()
        if gate is not None:
            soft = spec.output_gate and spec.output_gate.score == "softplus"
            out *= ops.softplus(gate) if soft else ops.sigmoid(gate)
        y = self.w.matrices["o"].matmul(out.reshape(count, -1))
        if "o" in spec.biases:
            y += self.w.arrays["o_bias"]
        return y

    def _norm(self, q: Floats, k: Floats) -> None:
        """In place, over the last axis; views of both are fine."""
        ops.rms_norm(q, self.w.arrays["q_norm"], self.norm_eps, out=q)
        ops.rms_norm(k, self.w.arrays["k_norm"], self.norm_eps, out=k)

    def _project(self, activations: Activations) -> tuple[Floats, Floats, Floats | None]:
        """Queries and keys (T, H + G, C), values (T, G, Cv), and the gates (T, H, Cv or 1) if there are any."""
        spec, count = self.spec, len(activations)
        heads = np.empty((count, spec.heads + spec.kv_heads, spec.head_dim), np.float32)
        values = np.empty((count, spec.kv_heads, spec.value_dim or spec.head_dim), np.float32)
        channels = heads.reshape(count, -1)
        first = spec.heads * spec.head_dim
        parts = {"q": channels[:, :first], "k": channels[:, first:], "v": values.reshape(count, -1)}
        if spec.shared_values:
            del parts["v"]
        if spec.gate:
            parts["q"] = np.empty((count, 2 * first), np.float32)
        if spec.output_gate:
            parts["gate"] = np.empty((count, self.w.matrices["gate"].shape[0]), np.float32)
        matmul_all([(self.w.matrices[name], activations, part) for name, part in parts.items()])
        for name, part in parts.items():
            if name in spec.biases:
                part += self.w.arrays[f"{name}_bias"]
        if spec.shared_values:
            values[:] = heads[:, spec.heads :]
        if not spec.gate:
            return heads, values, parts["gate"].reshape(count, spec.heads, -1) if spec.output_gate else None
        both = parts["q"].reshape(count, spec.heads, 2, spec.head_dim)
        heads[:, : spec.heads] = both[:, :, 0]
        return heads, values, np.ascontiguousarray(both[:, :, 1])

    def _attend_together(self, q: Floats, company: Company, step: Step, out: Floats) -> list[Segment]:
        """Of q (T, H, C) and out (T, H, Cv), the rows of those that see few keys; gives the others."""
        spec, others = self.spec, list[Segment]()
        for some, span in step.once((company, spec.window, spec.chunk, self._most), self._runs, company):
            if len(some.segments) == 1:
                others += some.segments
                continue
            states = self.states(some)
            (keys, hidden), (values, _) = states["k"].floats(span), states["v"].floats(span)
            asking = q[some.rows].reshape(len(keys), spec.kv_heads, -1, q.shape[-1])  # (B, G, R, C)
            mixed = attend_together(asking, [(keys, values, hidden)], self.scale, self.sink)
            out[some.rows] = mixed.reshape(len(keys), *out.shape[1:])
        return others

    def _runs(self, company: Company) -> list[tuple[Company, Span]]:
        """Those that attend together, and the keys that they see."""
        spec = self.spec

        def first(one: Segment) -> int:
            return first_visible(one.start, spec.window, spec.chunk)

        runs = company.runs([one.stop_position - first(one) for one in company.segments], self._most)
        return [(some, Span.of((first(one), one.stop_position) for one in some.segments)) for some in runs]

    def _attend(
        self,
        q: Floats,
        states: Mapping[str, KeptRows],
        segment: Segment,
        index: tuple[Floats, Floats] | None,
        out: Floats,
        queries: Queries,
    ) -> None:
        """q (T, H, C) and out (T, H, Cv) of one sequence, which `queries` is to fill; index: what the indexer asks."""
        spec, count, start = self.spec, segment.count, segment.start
        groups, share = spec.kv_heads, spec.heads // spec.kv_heads
        grouped = out.reshape(count, groups, share, -1)
        kept = spec.window or spec.chunk
        most = start + count if kept is None else min(start + count, kept + count)

        def block(heads: slice, a: int, b: int) -> None:
            first = first_visible(start + a, spec.window, spec.chunk)
            asking = q[a:b].reshape(b - a, groups, share, -1).transpose(1, 0, 2, 3)[heads]  # (G, T, R, C)
            hidden = hidden_keys(start + a, start + b, first, spec.window, spec.chunk)
            keys, values = (states[name].view(first, start + b).heads(heads) for name in "kv")
            if self.indexer and index is not None:
                asked = index[0][a:b], index[1][a:b]
                picked = self.indexer.hidden(*asked, states["indexer.rows"], start + a)
                hidden = hidden if picked is None else picked
                if picked is not None and b - a == 1:  # of which the keys are few
                    seen = np.flatnonzero(~picked[0])
                    keys, values, hidden = keys.some(seen), values.some(seen), None
            sink = None if self.sink is None else self.sink[heads]
            grouped[a:b, heads] = attend(asking, [(keys, values, hidden)], self.scale, sink).transpose(1, 0, 2, 3)

        work = 0 if self.indexer else 2 * spec.heads * most * spec.head_dim  # an indexer chooses for all heads
        for heads in head_parts(count, groups, work):
            queries.add(partial(block, heads), count, share * (heads.stop - heads.start), most, spec.head_dim)

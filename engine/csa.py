"""DeepSeek-V4's attention: a window of tokens, and beyond it entries compressed from whole windows.

One key/value head serves all query heads, and a row is key and value at once. Three kinds differ in what stands
beyond the window: nothing (sliding), every compressed entry (HCA), or those an indexer picks (CSA).
Formulas: DeepSeek-V4 report, sections 2.3.1 and 2.3.2; checked against transformers' deepseek_v4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from numoe.engine import ops
from numoe.engine.attention import Part, attend, first_visible, hidden_keys, query_blocks
from numoe.engine.kvcache import Rows
from numoe.engine.ops import Floats
from numoe.engine.rope import Rotation
from numoe.engine.spec import CompressedAttention, Compressor, Indexer
from numoe.engine.weights import Weights
from numoe.quant import workers
from numoe.quant.activations import Activations
from numoe.quant.qtensor import matmul_all


class WindowCompressor:
    """Closed windows of tokens -> rows: sum_j softmax_j(gate_j + ape_j) kv_j per channel, normed, rotated."""

    def __init__(self, spec: Compressor, weights: Weights, rotation: Rotation, norm_eps: float):
        self.spec = spec
        self.w = weights
        self.rotation = rotation
        self.norm_eps = norm_eps

    def __call__(self, x: Activations, cache: Mapping[str, Rows], prefix: str, start: int) -> None:
        """Take in tokens x (T, D) at start, ..., and add the rows of the windows they close to the cache."""
        spec = self.spec
        open_rows, rows = cache[f"{prefix}.open"], cache[f"{prefix}.rows"]
        both = np.empty((len(x), 2 * spec.width), np.float32)
        matmul_all(
            [(self.w.matrices["kv"], x, both[:, : spec.width]), (self.w.matrices["gate"], x, both[:, spec.width :])]
        )
        open_rows.append(both[None])
        first, last = start // spec.ratio, (start + len(x)) // spec.ratio
        if first == last:
            return
        # The slots of a window: with overlap, the previous window's first halves come before its second halves.
        tokens = open_rows.view(max(0, first - spec.overlap) * spec.ratio, last * spec.ratio)[0]
        kv, gate = np.split(tokens.reshape(-1, spec.ratio, 2 * spec.width), 2, axis=-1)  # (windows, ratio, width)
        gate = gate + self.w.arrays["ape"]
        if spec.overlap:
            kv, gate = self._overlapped(kv, 0.0, first), self._overlapped(gate, -np.inf, first)
        share = np.exp(gate - gate.max(axis=1, keepdims=True))
        entries = (kv * share).sum(axis=1)
        entries /= share.sum(axis=1)
        ops.rms_norm(entries, self.w.arrays["norm"], self.norm_eps, out=entries)
        self.rotation.apply(entries[:, None], first * spec.ratio, spec.ratio)
        rows.append(entries[None])

    def _overlapped(self, halves: Floats, missing: float, first: int) -> Floats:
        """(windows [one earlier first], ratio, 2 dim) -> (windows, 2 ratio, dim); window 0 has no predecessor."""
        dim = self.spec.dim
        if first == 0:
            none = np.full_like(halves[:1], missing)
            halves = np.concatenate([none, halves])
        return np.concatenate([halves[:-1, :, :dim], halves[1:, :, dim:]], axis=1)


class LightningIndexer:
    """score(t, w) = sum_h weight_h(x_t) relu(q_h k_w): the best `top_k` entries of each token."""

    def __init__(self, spec: Indexer, weights: Weights, rotation: Rotation, norm_eps: float):
        self.spec = spec
        self.w = weights
        self.rotation = rotation
        self.compress = WindowCompressor(spec.compressor, weights.below("compressor."), rotation, norm_eps)

    def queries(self, x: Activations, q_latent: Activations, start: int) -> tuple[Floats, Floats]:
        """Rotated queries (T, heads, dim) and head weights (T, heads), both factors of the score scaled in."""
        heads, dim = self.spec.heads, self.spec.compressor.dim
        q = self.rotation.apply(self.w.matrices["q"].matmul(q_latent).reshape(len(x), heads, dim), start)
        weights = self.w.matrices["weights"].matmul(x)
        weights *= np.float32(heads**-0.5 * dim**-0.5)
        return q, weights

    def choose(self, q: Floats, weights: Floats, keys: Floats, visible: NDArray[np.int64]) -> NDArray[np.int64]:
        """The chosen entries (T, top_k) of each token, of which token t may see the first visible[t]."""
        scores = np.matmul(q, keys.T)  # (T, heads, W)
        np.maximum(scores, np.float32(0), out=scores)
        total = np.matmul(weights[:, None], scores)[:, 0]  # (T, W)
        total[np.arange(len(keys)) >= visible[:, None]] = -np.inf
        return ops.top_k(total, self.spec.top_k)


class Compressed:
    """One layer's attention of any of the three kinds."""

    def __init__(self, spec: CompressedAttention, weights: Weights, rotation: Rotation, norm_eps: float):
        self.spec = spec
        self.w = weights
        self.rotation = rotation
        self.norm_eps = norm_eps
        self.o_a = weights.matrices["o_a"].split(spec.out_groups)
        workers.know(self.o_a)
        self.sink = weights.arrays["sink"][None, None]  # (1, 1, H)
        self.compress = self.indexer = None
        if spec.compressor:
            self.compress = WindowCompressor(spec.compressor, weights.below("compressor."), rotation, norm_eps)
        if spec.indexer:
            self.indexer = LightningIndexer(spec.indexer, weights.below("indexer."), rotation, norm_eps)

    def __call__(self, x: Floats, cache: Mapping[str, Rows], start: int) -> Floats:
        """x (T, D) of tokens at start, start + 1, ... -> (T, D)."""
        spec, count, m = self.spec, len(x), self.w.matrices
        given = Activations(x)
        latent, row = matmul_all([(m["q_a"], given, None), (m["kv"], given, None)])  # (T, rank), (T, C)
        ops.rms_norm(latent, self.w.arrays["q_norm"], self.norm_eps, out=latent)
        q_latent = Activations(latent)
        q = m["q_b"].matmul(q_latent).reshape(count, spec.heads, spec.head_dim)
        ops.rms_norm(q, None, self.norm_eps, out=q)
        self.rotation.apply(q, start)

        ops.rms_norm(row, self.w.arrays["kv_norm"], self.norm_eps, out=row)
        self.rotation.apply(row[:, None], start)
        cache["window"].append(row[None])
        if self.compress:
            self.compress(given, cache, "compressor", start)
        index = None
        if self.indexer:
            self.indexer.compress(given, cache, "indexer", start)
            index = self.indexer.queries(given, q_latent, start)

        out = np.empty_like(q)
        for a, b in query_blocks(count, spec.heads, self._most_keys(start + count, count)):
            parts = [self._window(cache, start + a, start + b)]
            if self.compress and (beyond := self._beyond(cache, start, a, b, index)):
                parts.append(beyond)
            out[a:b] = attend(q[None, a:b], parts, spec.head_dim**-0.5, self.sink)[0]
        # A row is a value too, so the output carries the keys' rotation: turn it back by the query's position.
        self.rotation.apply(out, start, inverse=True)

        groups = out.reshape(count, spec.out_groups, -1)
        rank = self.o_a[0].shape[0]
        mixed = np.empty((count, spec.out_groups * rank), np.float32)
        matmul_all(
            [
                (part, Activations(np.ascontiguousarray(groups[:, g])), mixed[:, g * rank : (g + 1) * rank])
                for g, part in enumerate(self.o_a)
            ]
        )
        return m["o_b"].matmul(mixed)

    def _most_keys(self, position: int, count: int) -> int:
        """Upper bound on keys or indexer scores a query of this chunk has, for sizing blocks."""
        keys = min(position, self.spec.window + count)
        return keys + (position // self.spec.compressor.ratio if self.spec.compressor else 0)

    def _window(self, cache: Mapping[str, Rows], start: int, stop: int) -> Part:
        first = first_visible(start, self.spec.window)
        rows = cache["window"].view(first, stop)
        return rows, rows, hidden_keys(start, stop, first, self.spec.window)

    def _beyond(
        self, cache: Mapping[str, Rows], start: int, a: int, b: int, index: tuple[Floats, Floats] | None
    ) -> Part | None:
        """The compressed entries that queries a..b of the chunk see; a token sees the windows closed by then."""
        assert self.spec.compressor
        ratio = self.spec.compressor.ratio
        visible = np.arange(start + a + 1, start + b + 1) // ratio  # (T,)
        most = int(visible[-1])
        if most == 0:
            return None
        rows = cache["compressor.rows"].view(0, most)
        if self.indexer is None or index is None or most <= self.indexer.spec.top_k:
            hidden = None if visible[0] == most else np.arange(most) >= visible[:, None]
            return rows, rows, hidden
        q, weights = index
        chosen = self.indexer.choose(q[a:b], weights[a:b], cache["indexer.rows"].view(0, most)[0], visible)
        own = rows[0, chosen]  # (T, K, C)
        return own, own, chosen >= visible[:, None]

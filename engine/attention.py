"""Softmax attention over cached rows, and the grouped-query kind.

Shapes: T queries, S keys, G key/value heads, R query heads on each (H = G R), C channels a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from numoe.engine import ops
from numoe.engine.kvcache import Rows
from numoe.engine.ops import Floats
from numoe.engine.rope import Rotation
from numoe.engine.spec import GroupedQueryAttention
from numoe.engine.weights import Weights
from numoe.quant.activations import Activations
from numoe.quant.qtensor import matmul_all

SCORE_BYTES = 32 << 20
"""Bound on the scores held at once: queries are taken in blocks that stay below it."""

Part = tuple[Floats, Floats, NDArray[np.bool_] | None]
"""Keys, values and the (T, S) keys to hide: shared by all queries (G, S, C), or each query's own (T, S, C)."""


def query_blocks(queries: int, heads: int, keys: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose scores over `keys` keys stay below SCORE_BYTES."""
    step = max(1, SCORE_BYTES // (4 * heads * max(keys, 1)))
    for start in range(0, queries, step):
        yield start, min(start + step, queries)


def first_visible(start: int, window: int | None) -> int:
    """Position of the first key that queries from `start` on see."""
    return 0 if window is None else max(0, start - window + 1)


def hidden_keys(start: int, stop: int, first: int, window: int | None) -> NDArray[np.bool_] | None:
    """(T, S) True where the query at start + t must not see the key at first + s; None if all are seen."""
    if stop - start == 1:
        return None
    query, key = np.arange(start, stop)[:, None], np.arange(first, stop)[None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    return hidden


def attend(q: Floats, parts: list[Part], scale: float, sink: Floats | None = None) -> Floats:
    """softmax(q K^T scale) V over the keys of all parts together.

    q is (G, T, R, C), the result (G, T, R, Cv). `sink` (G, 1, R) adds a key of that score and no value.
    With one key/value head a part may give each query its own keys.
    """
    groups, count, share, _ = q.shape
    spans = list(pairwise(accumulate((keys.shape[1] for keys, _, _ in parts), initial=0)))
    scores = np.empty((groups, count, share, spans[-1][1]), np.float32)
    q = q * np.float32(scale)
    for (keys, _, hidden), (a, b) in zip(parts, spans, strict=True):
        part = scores[..., a:b]
        if _own_keys(keys, q):
            np.matmul(q[0], keys.transpose(0, 2, 1), out=part[0])
        else:
            rows = (groups, count * share, -1)
            np.matmul(q.reshape(rows), keys.transpose(0, 2, 1), out=part.reshape(rows))
        if hidden is not None:
            np.copyto(part, np.float32(-np.inf), where=hidden[None, :, None])
    if sink is None:
        ops.softmax(scores)
    else:
        top = np.maximum(scores.max(axis=-1), sink)  # (G, T, R)
        scores -= top[..., None]
        np.exp(scores, out=scores)
        scores /= (scores.sum(axis=-1) + np.exp(sink - top))[..., None]
    out: Floats | None = None
    for (_, values, _), (a, b) in zip(parts, spans, strict=True):
        part = scores[..., a:b]
        if _own_keys(values, q):
            mixed = np.matmul(part[0], values)[None]
        else:
            mixed = np.matmul(part.reshape(groups, count * share, -1), values).reshape(groups, count, share, -1)
        out = mixed if out is None else np.add(out, mixed, out=out)
    assert out is not None
    return out


def _own_keys(keys: Floats, q: Floats) -> bool:
    """Whether a part's first axis is the queries' rather than the key/value heads' (the same where both are 1)."""
    return len(keys) != len(q)


class GroupedQuery:
    """q = rope(x Wq), k = rope(x Wk), v = x Wv; softmax(q k^T / sqrt(C)) v Wo, each k and v serving R heads."""

    def __init__(self, spec: GroupedQueryAttention, weights: Weights, rotation: Rotation, norm_eps: float):
        self.spec = spec
        self.w = weights
        self.rotation = rotation
        self.norm_eps = norm_eps

    def __call__(self, x: Floats, cache: Mapping[str, Rows], start: int) -> Floats:
        """x (T, D) of tokens at start, start + 1, ... -> (T, D)."""
        spec, count = self.spec, len(x)
        activations = Activations(x)
        rotated = spec.heads + spec.kv_heads
        heads = np.empty((count, rotated + spec.kv_heads, spec.head_dim), np.float32)
        q, k, v = heads[:, : spec.heads], heads[:, spec.heads : rotated], heads[:, rotated:]
        channels = heads.reshape(count, -1)
        first, second = spec.heads * spec.head_dim, rotated * spec.head_dim
        parts = {"q": channels[:, :first], "k": channels[:, first:second], "v": channels[:, second:]}
        matmul_all([(self.w.matrices[name], activations, part) for name, part in parts.items()])
        if spec.bias:
            for name, part in parts.items():
                part += self.w.arrays[f"{name}_bias"]
        if spec.head_norm:
            ops.rms_norm(q, self.w.arrays["q_norm"], self.norm_eps, out=q)
            ops.rms_norm(k, self.w.arrays["k_norm"], self.norm_eps, out=k)
        self.rotation.apply(heads[:, :rotated], start)
        cache["k"].append(k.transpose(1, 0, 2))
        cache["v"].append(v.transpose(1, 0, 2))

        groups, share = spec.kv_heads, spec.heads // spec.kv_heads
        out = np.empty((count, groups, share, spec.head_dim), np.float32)
        most = start + count if spec.window is None else min(start + count, spec.window + count)
        for a, b in query_blocks(count, spec.heads, most):
            first = first_visible(start + a, spec.window)
            keys, values = cache["k"].view(first, start + b), cache["v"].view(first, start + b)
            block = q[a:b].reshape(b - a, groups, share, -1).transpose(1, 0, 2, 3)  # (G, T, R, C)
            hidden = hidden_keys(start + a, start + b, first, spec.window)
            out[a:b] = attend(block, [(keys, values, hidden)], spec.head_dim**-0.5).transpose(1, 0, 2, 3)
        y = self.w.matrices["o"].matmul(out.reshape(count, -1))
        if spec.bias:
            y += self.w.arrays["o_bias"]
        return y

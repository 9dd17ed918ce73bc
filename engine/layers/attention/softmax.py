"""softmax(q K^T) V over rows that are kept of earlier tokens, in bounded memory.

Shapes: T queries, S keys, G key/value heads, R query heads on each (H = G R), C channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers import ops
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.rows import Stretch
from numoe.quant.compute.threads import Task, run_worth

SCORE_BYTES = 4 << 20
"""Bound on the scores that a thread holds: queries, and where one has more keys than that, keys are taken in blocks."""

_BLOCKS = 8
"""Queries are cut into so many blocks at least, unless they are few: for threads to share them, and for early queries
to be spared the late ones' keys."""
_FEW_QUERIES = 16

_WORTH, _WORTH_A_TASK = 1 << 22, 1 << 19
"""Threads share multiplications where there are so many, and so many to a task."""
_HEAD_PARTS = 4
"""The heads of one query are so many tasks at most."""

Part = tuple[Stretch, Stretch, NDArray[np.bool_] | None]
"""Keys, values and the (T, S) keys to hide: shared by all queries (G, S, C), or each query's own (T, S, C)."""

Seen = tuple[Floats, Floats, NDArray[np.bool_] | None]
"""Keys (B, G, S, C) and values (B, G, S, Cv) of several sequences, and which of them a sequence has not, (B, S)."""

SHORT = 1 << 17
"""Sequences with up to so many numbers in their keys attend together: for longer ones threads share the work."""

_A_TASK = 16
"""So many of them are one task."""

_FEW = 64
"""Up to so many queries of a head BLAS is faster with the keys on the left of the product."""


def query_blocks(queries: int, heads: int, keys: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose scores over `keys` keys stay below SCORE_BYTES, of one query at least."""
    step = max(1, min(SCORE_BYTES // (4 * heads * max(keys, 1)), max(_FEW_QUERIES, -(-queries // _BLOCKS))))
    for start in range(0, queries, step):
        yield start, min(start + step, queries)


class Queries:
    """The blocks of queries of a pass, of all its sequences, which threads share where there is enough to do."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._multiplications = 0

    def add(self, attend: Callable[[int, int], None], queries: int, heads: int, keys: int, width: int) -> None:
        """Have attend(a, b) called for ranges of queries, each with so many keys of so many channels at most."""
        self._tasks += [partial(attend, a, b) for a, b in query_blocks(queries, heads, keys)]
        self._multiplications += 2 * queries * heads * keys * width

    def run(self) -> None:
        # Threads that each have little to do at a time wait for Python's lock instead.
        worth = self._multiplications >= max(_WORTH, _WORTH_A_TASK * len(self._tasks))
        run_worth(self._tasks, self._multiplications if worth else 0)


def head_parts(queries: int, groups: int, multiplications: int) -> list[slice]:
    """Ranges of the key/value heads, each of whose queries are a task: several where one query has much to do."""
    if queries > 1 or multiplications < _WORTH:
        return [slice(0, groups)]
    step = -(-groups // _HEAD_PARTS)
    return [slice(first, min(first + step, groups)) for first in range(0, groups, step)]


def first_visible(start: int, window: int | None, chunk: int | None = None) -> int:
    """Position of the first key that queries from `start` on see: of a window, or of the chunk that they are in."""
    if chunk is not None:
        return start - start % chunk
    return 0 if window is None else max(0, start - window + 1)


def hidden_keys(
    start: int, stop: int, first: int, window: int | None, chunk: int | None = None
) -> NDArray[np.bool_] | None:
    """(T, S) True where the query at start + t must not see the key at first + s; None if all are seen."""
    if stop - start == 1:
        return None
    query, key = np.arange(start, stop)[:, None], np.arange(first, stop)[None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    if chunk is not None:
        hidden |= key < query - query % chunk
    return hidden


def attend(q: Floats, parts: list[Part], scale: float, sink: Floats | None = None) -> Floats:
    """softmax(q K^T scale) V over the keys of all parts together.

    q is (G, T, R, C), the result (G, T, R, Cv). `sink` (G, 1, R) adds a key of that score and no value.
    With one key/value head a part may give each query its own keys.
    """
    q = q * scale
    ends = [0, *accumulate([keys.shape[1] for keys, _, _ in parts])]
    shape = *q.shape[:3], ends[-1]
    if 4 * prod(shape) > SCORE_BYTES:
        return _attend_in_turn(q, parts, sink)
    scores = np.empty(shape, np.float32)
    for part, (keys, _, hidden) in enumerate(parts):
        _score(q, keys, 0, hidden, scores[..., ends[part] : ends[part + 1]])
    del q  # as large as what is to come
    _softmax(scores, sink)
    out: Floats | None = None
    for part, (_, values, _) in enumerate(parts):
        mixed = _mix(scores[..., ends[part] : ends[part + 1]], values, 0)
        out = mixed if out is None else np.add(out, mixed, out=out)
    assert out is not None
    return out


def attend_together(q: Floats, parts: Sequence[Seen], scale: float, sink: Floats | None = None) -> Floats:
    """`attend` of one query of each of B sequences over the keys of all parts: q (B, G, R, C), gives (B, G, R, Cv)."""
    out = np.empty((*q.shape[:3], parts[0][1].shape[-1]), np.float32)
    tasks: list[Task] = []
    for first in range(0, len(q), _A_TASK):
        own = slice(first, first + _A_TASK)
        seen = [(k[own], v[own], None if hidden is None else hidden[own]) for k, v, hidden in parts]
        tasks.append(partial(_attend_some, q[own], seen, scale, sink, out[own]))
    run_worth(tasks, 2 * q.size * sum(keys.shape[2] for keys, _, _ in parts))
    return out


def _attend_some(q: Floats, parts: Sequence[Seen], scale: float, sink: Floats | None, out: Floats) -> None:
    """`attend_together` of some of the sequences, to `out`."""
    q = q * scale
    spans = list(pairwise(accumulate([keys.shape[2] for keys, _, _ in parts], initial=0)))
    scores = np.empty((*q.shape[:3], spans[-1][1]), np.float32)  # (B, G, R, S)
    for (keys, _, hidden), (a, b) in zip(parts, spans, strict=True):
        np.matmul(q, keys.transpose(0, 1, 3, 2), out=scores[..., a:b])
        if hidden is not None:
            np.copyto(scores[..., a:b], np.float32(-np.inf), where=hidden[:, None, None])
    top = scores.max(axis=-1) if sink is None else np.maximum(scores.max(axis=-1), sink[None, :, 0])
    scores -= top[..., None]
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, dtype=np.float64)  # whose digits do not depend on how many keys others have
    if sink is not None:
        total += np.exp(sink[None, :, 0] - top)
    scores /= total.astype(np.float32)[..., None]
    for part, ((_, values, _), (a, b)) in enumerate(zip(parts, spans, strict=True)):
        if part == 0:
            np.matmul(scores[..., a:b], values, out=out)
        else:
            out += np.matmul(scores[..., a:b], values)


def _softmax(scores: Floats, sink: Floats | None) -> None:
    """In place, over the last axis; `sink`: a score without a value beside those of each query."""
    if sink is None:
        ops.softmax(scores)
    else:
        top = np.maximum(scores.max(axis=-1), sink)
        scores -= top[..., None]
        np.exp(scores, out=scores)
        scores /= (scores.sum(axis=-1) + np.exp(sink - top))[..., None]


def _attend_in_turn(q: Floats, parts: list[Part], sink: Floats | None) -> Floats:
    """`attend`, block of keys after block: sums relative to the highest score so far (arXiv 1805.02867)."""
    shape = q.shape[:3]
    step = max(1, SCORE_BYTES // (4 * prod(shape)))
    top = np.full(shape, np.finfo(np.float32).min)  # (G, T, R)
    total = np.zeros(shape, np.float32)
    if sink is not None:
        top = np.maximum(top, sink)
        total += np.exp(sink - top)
    out = np.zeros((*shape, parts[0][1].shape[-1]), np.float32)  # (G, T, R, Cv)
    space = np.empty((*shape, step), np.float32)
    for keys, values, hidden in parts:
        for a in range(0, keys.shape[1], step):
            b = min(a + step, keys.shape[1])
            scores = space[..., : b - a]
            _score(q, keys, a, None if hidden is None else hidden[:, a:b], scores)
            higher = np.maximum(top, scores.max(axis=-1))
            fade = np.exp(top - higher)
            scores -= higher[..., None]
            np.exp(scores, out=scores)
            total *= fade
            total += scores.sum(axis=-1)
            out *= fade[..., None]
            out += _mix(scores, values, a)
            top = higher
    out /= total[..., None]
    return out


def _score(q: Floats, keys: Stretch, first: int, hidden: NDArray[np.bool_] | None, out: Floats) -> None:
    """q K^T of the keys from `first` on, minus infinity where they are hidden: (G, T, R, S) to `out`."""
    groups, count, share, _ = q.shape
    own = _own(keys, q)
    rows = q[0] if own else q.reshape(groups, count * share, -1)
    for a, b, block, factors in keys.blocks(first, first + out.shape[-1]):
        part = out[..., a - first : b - first]
        if own:
            np.matmul(rows, block.transpose(0, 2, 1), out=part[0])
        elif keys.form.is_float32 or count * share > _FEW:
            np.matmul(rows, block.transpose(0, 2, 1), out=part.reshape(groups, count * share, -1))
        else:
            product = np.matmul(block, rows.transpose(0, 2, 1))  # (G, S, T R)
            part.reshape(groups, count * share, -1)[:] = product.transpose(0, 2, 1)
        if factors is not None:
            part *= factors[:, None, None]
    if hidden is not None:
        np.copyto(out, np.float32(-np.inf), where=hidden[None, :, None])


def _mix(weights: Floats, values: Stretch, first: int) -> Floats:
    """Sums of the values (G, S, Cv) from `first` on, weighted by (G, T, R, S), which this may change: (G, T, R, Cv)."""
    groups, count, share, _ = weights.shape
    out: Floats | None = None
    for a, b, block, factors in values.blocks(first, first + weights.shape[-1]):
        part = weights[..., a - first : b - first]
        if factors is not None:
            part *= factors[:, None, None]
        if _own(values, weights):
            mixed = np.matmul(part[0], block)[None]
        else:
            mixed = np.matmul(part.reshape(groups, count * share, -1), block).reshape(groups, count, share, -1)
        out = mixed if out is None else np.add(out, mixed, out=out)
    assert out is not None
    return out


def _own(keys: Stretch, q: Floats) -> bool:
    """Whether a part's first axis is the queries' rather than the key/value heads' (the same where both are 1)."""
    return keys.shape[0] != len(q)

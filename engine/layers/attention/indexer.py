"""The lightning indexer, which picks the keys that a token attends to: of all tokens before it (DeepSeek-V3.2, arXiv
2512.02556), or of what stands beyond the window in DeepSeek-V4's attention, entries compressed from whole windows of
tokens. Formulas: DeepSeek-V4 report, sections 2.3.1 and 2.3.2; checked against transformers' deepseek_v32. Qwen3.8's
picks blocks of tokens by the mean of their keys; checked against transformers' qwen4_exp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.engine.layers import ops
from numoe.engine.layers.attention.softmax import SCORE_BYTES
from numoe.engine.layers.block import Shared, angles
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.rope import Angles, Rope
from numoe.engine.layers.rows import Stretch
from numoe.engine.layers.state import KeptRows, Rows
from numoe.engine.layers.step import Company, Segment, Step
from numoe.engine.layers.tensor import Tensor, prefixed
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.compute.threads import Task, run_worth
from numoe.quant.formats.qtensor import matmul_all

_KEY_EPS = 1e-6
_MOST_KEYS = 1 << 12
"""Scored at once by all heads."""
_SCORE_COPIES = 4
"""Of the scores of all keys, while the best are looked for."""


@dataclass(frozen=True)
class Compressor:
    """Each closed window of `ratio` tokens becomes one key/value row of `dim`.

    With `overlap` a row also mixes in the previous window, through a second half of the projections.
    """

    ratio: int
    dim: int
    overlap: bool

    @property
    def width(self) -> int:
        """Columns of the kv and gate projections."""
        return self.dim * (2 if self.overlap else 1)

    def tensors(self, hidden: int, role: str) -> dict[str, Tensor]:
        return {
            "ape": Tensor((self.ratio, self.width), role, "array"),
            "kv": Tensor((self.width, hidden), role),
            "gate": Tensor((self.width, hidden), role),
            "norm": Tensor((self.dim,), "norms", "array"),
        }

    def state(self, apart: int = 0) -> dict[str, Rows]:
        """`rows`: the compressed entries; `open`: kv and gate of the tokens that a coming entry still needs.

        apart: see `Rows`.
        """
        return {
            "rows": Rows(1, self.dim, stride=self.ratio, apart=apart),
            "open": Rows(1, 2 * self.width, self.ratio * (2 if self.overlap else 1), exact=True),
        }


class WindowCompressor:
    """Closed windows of tokens -> rows: sum_j softmax_j(gate_j + ape_j) kv_j per channel, normed, rotated."""

    def __init__(self, spec: Compressor, rope: Rope, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.rotation = shared.rotation(rope)
        self.norm_eps = shared.norm_eps

    def __call__(
        self, x: Activations, step: Step, states: Callable[[Segment | Company], Mapping[str, Any]], prefix: str
    ) -> None:
        """Take in tokens x (T, D): keep their kv and gate in each sequence's states, whose names begin with `prefix`,
        and the rows of the windows that they close."""
        width = self.spec.width
        both = np.empty((len(x), 2 * width), np.float32)
        matmul_all([(self.w.matrices["kv"], x, both[:, :width]), (self.w.matrices["gate"], x, both[:, width:])])
        step.keep(states, f"{prefix}open", both[:, None])
        closing = [one for one in step.segments if one.start // self.spec.ratio < one.stop_position // self.spec.ratio]
        if closing:
            self._close(closing, states, prefix, step)

    def _close(
        self,
        segments: Sequence[Segment],
        states: Callable[[Segment | Company], Mapping[str, Any]],
        prefix: str,
        step: Step,
    ) -> None:
        """Keep the rows of the windows that tokens of these sequences close, W in all."""
        ratio, dim = self.spec.ratio, self.spec.dim
        spans = [(one.start // ratio, one.stop_position // ratio) for one in segments]
        parts = [self._windows(states(one)[f"{prefix}open"], *span) for one, span in zip(segments, spans, strict=True)]
        kv, gate = self._kv_and_gate([own for _, own in parts])
        if self.spec.overlap:  # a window's slots: the first halves of the one before it, then its own second halves
            kv_before, gate_before = self._kv_and_gate([before for before, _ in parts])
            kv = np.concatenate([kv_before[..., :dim], kv[..., dim:]], axis=1)  # (W, 2 ratio, dim)
            gate = np.concatenate([gate_before[..., :dim], gate[..., dim:]], axis=1)
        share = np.exp(gate - gate.max(axis=1, keepdims=True))
        entries = (kv * share).sum(axis=1)  # (W, dim)
        entries /= share.sum(axis=1)
        ops.rms_norm(entries, self.w.arrays["norm"], self.norm_eps, out=entries)
        self.rotation.apply(entries[:, None], step.once((self.rotation, ratio), self._angles, spans))
        done = 0
        for one, (first, last) in zip(segments, spans, strict=True):
            states(one)[f"{prefix}rows"].write(entries[None, done : done + last - first], first)
            done += last - first

    def _kv_and_gate(self, windows: Sequence[Floats]) -> tuple[Floats, Floats]:
        """Of those of each sequence, (w, ratio, 2 width): (W, ratio, width) each."""
        kv, gate = np.split(windows[0] if len(windows) == 1 else np.concatenate(windows), 2, axis=-1)
        return kv, gate + self.w.arrays["ape"]

    def _windows(self, kept: KeptRows, first: int, last: int) -> tuple[Floats, Floats]:
        """The windows first..last of a sequence, (W, ratio, 2 width), and with overlap those one before each: the first
        one of all follows one of no weight."""
        spec = self.spec
        rows = kept.view(max(0, first - spec.overlap) * spec.ratio, last * spec.ratio).floats()
        windows = rows.reshape(-1, spec.ratio, 2 * spec.width)
        if not spec.overlap:
            return windows, windows
        if first == 0:
            none = np.zeros_like(windows[:1])
            none[..., spec.width :] = -np.inf
            windows = np.concatenate([none, windows])
        return windows[:-1], windows[1:]

    def _angles(self, spans: Sequence[tuple[int, int]]) -> Angles:
        """Of the windows' first tokens."""
        starts = [np.arange(first, last, dtype=np.float32) for first, last in spans]
        return self.rotation.angles(np.concatenate(starts) * self.spec.ratio)


@dataclass(frozen=True)
class Indexer:
    """Scores keys of `dim` for a token and keeps the `top_k` best."""

    heads: int
    dim: int
    top_k: int

    def tensors(self, hidden: int, q_rank: int) -> dict[str, Tensor]:
        return {
            "q": Tensor((self.heads * self.dim, q_rank), "indexer"),
            "weights": Tensor((self.heads, hidden), "indexer"),
        }


@dataclass(frozen=True)
class EntryIndexer(Indexer):
    """Its keys are compressed entries."""

    compressor: Compressor

    def tensors(self, hidden: int, q_rank: int) -> dict[str, Tensor]:
        return super().tensors(hidden, q_rank) | prefixed("compressor.", self.compressor.tensors(hidden, "indexer"))


@dataclass(frozen=True)
class TokenIndexer(Indexer):
    """Its keys are LayerNorm(Wk x), one a token."""

    rope: Rope

    def tensors(self, hidden: int, q_rank: int) -> dict[str, Tensor]:
        return super().tensors(hidden, q_rank) | {
            "k": Tensor((self.dim, hidden), "indexer"),
            "k_norm": Tensor((self.dim,), "norms", "array"),
            "k_norm_bias": Tensor((self.dim,), "norms", "array"),
        }

    def state(self) -> Rows:
        return Rows(1, self.dim)


@dataclass(frozen=True)
class BlockIndexer:
    """Scores blocks of `ratio` tokens and keeps the `top_k` best; what is no full block yet is seen as well.

    A block's key is norm(mean of Wk x), rotated as its first token; all heads of a query weigh the same.
    """

    heads: int
    dim: int
    top_k: int
    ratio: int
    rope: Rope

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return {
            "q": Tensor((self.heads * self.dim, hidden), "indexer"),
            "k": Tensor((self.dim, hidden), "indexer"),
            **{f"{name}_norm": Tensor((self.dim,), "norms", "array") for name in "qk"},
        }

    def state(self) -> dict[str, Rows]:
        """`rows`: the blocks' keys; `open`: those of tokens that a coming block still needs."""
        return {"rows": Rows(1, self.dim, stride=self.ratio), "open": Rows(1, self.dim, self.ratio, exact=True)}


class LightningIndexer:
    """score(t, w) = sum_h weight_h(x_t) relu(q_h k_w): the best `top_k` keys of each token."""

    def __init__(self, spec: Indexer | BlockIndexer, rope: Rope, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.rotation = shared.rotation(rope)

    def queries(self, x: Activations, q_latent: Activations, step: Step) -> tuple[Floats, Floats]:
        """Rotated queries (T, heads, dim) and head weights (T, heads), both factors of the score scaled in."""
        heads, dim = self.spec.heads, self.spec.dim
        q = self.w.matrices["q"].matmul(q_latent).reshape(len(x), heads, dim)
        self.rotation.apply(q, angles(self.rotation, step))
        weights = self.w.matrices["weights"].matmul(x)
        weights *= np.float32(heads**-0.5 * dim**-0.5)
        return q, weights

    def choose(self, q: Floats, weights: Floats, kept: KeptRows, visible: Ids) -> Ids:
        """The chosen keys (T, top_k) of each token, of which token t may see the first visible[t]; where those are
        fewer, with some that it may not see."""
        count = len(q)
        chosen = np.empty((count, self.spec.top_k), np.int64)
        most = int(visible[-1])
        step = max(1, SCORE_BYTES // (_SCORE_COPIES * 4 * most))

        def pick(a: int, b: int) -> None:
            keys = int(visible[b - 1])
            if keys <= self.spec.top_k:  # and there are more for later tokens
                chosen[a:b] = np.arange(self.spec.top_k)
                return
            total = self._totals(q[a:b], weights[a:b], kept.view(0, keys))
            total[np.arange(keys) >= visible[a:b, None]] = -np.inf
            chosen[a:b] = ops.top_k(total, self.spec.top_k)

        tasks: list[Task] = [partial(pick, a, min(a + step, count)) for a in range(0, count, step)]
        run_worth(tasks, min(step, count) * most * self.spec.heads * self.spec.dim)
        return chosen

    def _totals(self, q: Floats, weights: Floats, keys: Stretch) -> Floats:
        """The scores (T, W) of keys (1, W, C)."""
        count, heads, _ = q.shape
        total = np.empty((count, keys.shape[1]), np.float32)
        step = max(1, min(_MOST_KEYS, SCORE_BYTES // (4 * count * heads)))

        def score(start: int, stop: int) -> None:
            for a, b, block, factors in keys.blocks(start, stop):
                scores = np.matmul(q, block[0].T)  # (T, heads, part of W)
                np.maximum(scores, np.float32(0), out=scores)
                np.matmul(weights[:, None], scores, out=total[:, None, a:b])
                if factors is not None:
                    total[:, a:b] *= factors

        spans = ((start, min(start + step, keys.shape[1])) for start in range(0, keys.shape[1], step))
        tasks: list[Task] = [partial(score, *span) for span in spans]  # shared where there is one token
        run_worth(tasks, step * q.size)
        return total


class TokenLightningIndexer(LightningIndexer):
    """One layer's indexer of tokens."""

    spec: TokenIndexer

    def __init__(self, spec: TokenIndexer, weights: Weights, shared: Shared):
        super().__init__(spec, spec.rope, weights, shared)

    def keys(self, x: Activations, step: Step) -> Floats:
        """(T, dim), rotated."""
        a = self.w.arrays
        rows = ops.layer_norm(self.w.matrices["k"].matmul(x), a["k_norm"], a["k_norm_bias"], _KEY_EPS)
        self.rotation.apply(rows[:, None], angles(self.rotation, step))
        return rows

    def choose_tokens(self, q: Floats, weights: Floats, kept: KeptRows, segment: Segment) -> Ids | None:
        """Which tokens those of a sequence attend to, (T, top_k): none after themselves; None: to all there are."""
        start, end = segment.start, segment.start + segment.count
        if end <= self.spec.top_k:
            return None
        return self.choose(q, weights, kept, np.arange(start + 1, end + 1))


class BlockLightningIndexer(LightningIndexer):
    """One layer's indexer of blocks."""

    spec: BlockIndexer

    def __init__(self, spec: BlockIndexer, weights: Weights, shared: Shared):
        super().__init__(spec, spec.rope, weights, shared)
        self.norm_eps = shared.norm_eps

    def ask(
        self, x: Activations, step: Step, states: Callable[[Segment | Company], Mapping[str, Any]], prefix: str
    ) -> tuple[Floats, Floats]:
        """What `hidden` takes of tokens x (T, D); keeps their keys in the states whose names begin with `prefix`."""
        spec = self.spec
        q, keys = matmul_all([(self.w.matrices[name], x, None) for name in "qk"])
        q = q.reshape(len(x), spec.heads, spec.dim)
        ops.rms_norm(q, self.w.arrays["q_norm"], self.norm_eps, out=q)
        self.rotation.apply(q, angles(self.rotation, step))
        step.keep(states, f"{prefix}open", keys[:, None])
        for segment in step.segments:
            own = states(segment)
            first, last = segment.start // spec.ratio, (segment.start + segment.count) // spec.ratio
            if first == last:
                continue
            tokens = own[f"{prefix}open"].view(first * spec.ratio, last * spec.ratio).floats()[0]
            blocks = tokens.reshape(last - first, spec.ratio, -1).mean(axis=1)
            ops.rms_norm(blocks, self.w.arrays["k_norm"], self.norm_eps, out=blocks)
            starts = np.arange(first * spec.ratio, last * spec.ratio, spec.ratio, dtype=np.float32)
            self.rotation.apply(blocks[:, None], self.rotation.angles(starts))
            own[f"{prefix}rows"].write(blocks[None], first)
        return q, np.full((len(x), spec.heads), spec.dim**-0.5, np.float32)

    def hidden(self, q: Floats, weights: Floats, kept: KeptRows, start: int) -> NDArray[np.bool_] | None:
        """(T, S) True where the query at start + t does not attend to the token at s; None: all before it are seen."""
        spec, count, ratio = self.spec, len(q), self.spec.ratio
        most = (start + count) // ratio
        if most <= spec.top_k:
            return None
        visible = np.arange(start + 1, start + count + 1) // ratio  # blocks that are full by then
        chosen = self.choose(q, weights, kept, visible)
        seen = np.zeros((count, most), bool)
        np.put_along_axis(seen, chosen, True, axis=1)
        seen &= np.arange(most) < visible[:, None]
        token, position = np.arange(start + count), np.arange(start, start + count)[:, None]
        whole = np.zeros((count, start + count), bool)
        whole[:, : most * ratio] = np.repeat(seen, ratio, axis=1)
        whole |= (token >= visible[:, None] * ratio) & (token <= position)
        return ~whole

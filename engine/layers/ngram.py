"""Hashed n-gram embeddings (Qwen3.8-Flash-Next): what the last few tokens are together is looked up, and added to X.

The tokens before one are those after the last `end`, which stands for the others. h_n = id_t m_0 xor id_{t-1} m_1 xor
.. id_{t-n+1} m_{n-1} names row h_n mod size in the parts of a table that are for n-grams; e_t is all rows side by side.
With k = norm(e Wk) and q = norm(X) of a stream, v = e Wv is let through by g = sigmoid(r(k q / sqrt(D))), where r(s) is
sign(s) sqrt(|s|): X' = X + g v + silu(conv(norm(g v))), conv causal over every N-th token.
Checked against transformers' qwen4_exp.

Shapes: T tokens, S streams, D channels of one, E channels of embeddings, N tokens of the longest n-gram.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.recurrent.shortconv import convolve
from numoe.engine.layers.state import Recurrent, RecurrentState
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import matmul_all

_LEAST = np.float32(1e-6)


@dataclass(frozen=True)
class NgramEmbedding(Kind):
    """Of streams (T, S, D), as their residual has them. Its table is never in memory: rows are read when named."""

    streams: int
    channels: int
    """Of a stream, D."""
    sizes: tuple[int, ...]
    """Rows of each head's part of the table: first those of 2-grams, last those of N-grams."""
    multipliers: tuple[int, ...]
    """One for each token of the longest n-gram, the newest token's first."""
    width: int
    """Channels that all heads give together, E."""
    kernel: int
    end: int
    rows: int
    """Of the table, of which the last ones may serve nothing."""
    pieces: int
    """Tensors that it is cut into, of as many rows each, the last one of what is left."""
    label = "n-grams on disk"

    @property
    def part_rows(self) -> int:
        return -(-self.rows // self.pieces)

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        streams, dim = self.streams * hidden, self.width // len(self.sizes)
        table = {
            "key": Tensor((streams, self.width), "attention"),
            "value": Tensor((hidden, self.width), "attention"),
            "conv": Tensor((streams, self.kernel), "attention", "array"),
            **{f"{name}_norm": Tensor((streams,), "norms", "array") for name in ("key", "query", "conv")},
        }
        for part, first in enumerate(range(0, self.rows, self.part_rows)):
            rows = min(self.part_rows, self.rows - first)
            touched = 0 if part else self.width
            table[f"table.{part}"] = Tensor((rows, dim), "n-gram embedding", "disk", touched=touched)
        return table

    def state(self) -> Mapping[str, Recurrent]:
        return {
            "ids": Recurrent((len(self.multipliers) - 1,)),
            "conv": Recurrent(((self.kernel - 1) * len(self.multipliers), self.streams * self.channels)),
        }

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return Ngrams(self, weights, shared)


class Ngrams:
    """One layer's."""

    def __init__(self, spec: NgramEmbedding, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.norm_eps = shared.norm_eps
        self.states = shared.states()
        self.conv = np.ascontiguousarray(weights.arrays["conv"].T)  # (kernel, S D)
        self.norms = {
            name: weights.arrays[f"{name}_norm"].reshape(spec.streams, -1) for name in ("key", "query", "conv")
        }
        self.multipliers = np.array(spec.multipliers, np.int64)
        self.sizes = np.array(spec.sizes, np.int64).reshape(len(spec.multipliers) - 1, -1)
        firsts = list(accumulate(spec.sizes[:-1], initial=0))
        self.firsts = np.array(firsts, np.int64).reshape(self.sizes.shape)

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, S, D) -> (T, S, D)."""
        spec, count = self.spec, len(x)
        given = Activations(self._embeddings(step))
        key, value = matmul_all([(self.w.matrices[name], given, None) for name in ("key", "value")])
        score = np.vecdot(self._normed(key.reshape(x.shape), "key"), self._normed(x, "query"))  # (T, S)
        score /= np.float32(spec.channels**0.5)
        gate = ops.sigmoid(np.sign(score) * np.sqrt(np.maximum(np.abs(score), _LEAST)))
        out = gate[:, :, None] * value[:, None]
        rows = self._normed(out, "conv").reshape(count, -1)
        mixed = np.empty_like(rows)
        for segment in step.segments:
            state = self.states(segment)["conv"]
            mixed[segment.rows] = convolve(rows[segment.rows], state, self.conv, len(spec.multipliers))
        out += ops.silu(mixed).reshape(x.shape)
        return out

    def _normed(self, x: Floats, name: str) -> Floats:
        """Each stream for itself, a new array."""
        return ops.rms_norm(x, self.norms[name], self.norm_eps)

    def _embeddings(self, step: Step) -> Floats:
        """(T, E)."""
        rows = np.concatenate([self._rows(step.ids[s.rows], self.states(s)["ids"]) for s in step.segments])
        found = np.empty((rows.size, self.spec.width // len(self.spec.sizes)), np.float32)
        part, within = np.divmod(rows.ravel(), self.spec.part_rows)
        for number in np.unique(part).tolist():
            found[part == number] = self.w.matrices[f"table.{number}"].rows(within[part == number])
        return found.reshape(len(rows), -1)

    def _rows(self, ids: Ids, state: RecurrentState) -> Ids:
        """Which rows of the table the next tokens of a sequence name, (T, heads).

        state: the N - 1 ids before, less `end`, so that nothing read means that.
        """
        longest, end = len(self.multipliers), self.spec.end
        history = np.concatenate([state.now.astype(np.int64) + end, ids])
        np.copyto(state.following, history[len(ids) :] - end)
        count, named = len(ids), []
        mixed = ids * self.multipliers[0]
        open_ = np.ones(count, bool)  # no end among the tokens between
        for back in range(1, longest):
            earlier = history[longest - 1 - back :][:count]
            open_ &= earlier != end
            mixed = mixed ^ (np.where(open_, earlier, end) * self.multipliers[back])
            named.append(mixed[:, None] % self.sizes[back - 1] + self.firsts[back - 1])
        return np.concatenate(named, axis=1)

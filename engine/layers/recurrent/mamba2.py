"""Mamba-2 (arXiv 2405.21060): a matrix a head that forgets, and adds an outer product a token.

S_t = e^{d_t a} S_{t-1} + d_t b_t u_t^T, y_t = S_t^T c_t + skip u_t; checked against transformers' nemotron_h and
granitemoehybrid. u, b and c come out of a short causal convolution over the last few tokens; b and c serve the heads of
a group; d_t = softplus(x Wd + dt) is a number of a head, and so are a < 0 and skip. The output is multiplied with silu
of a gate, and each group of it is normed.

Many tokens at once are computed in chunks, within which state space duality makes them matrix products: what a token
reads of another is (c_t b_s) times what is left of it.

Shapes: T tokens, H heads, P channels a head, G groups of R = H / G heads, N states, C = H P.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.recurrent.shortconv import convolve
from numoe.engine.layers.state import Recurrent, RecurrentState
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights

_CHUNK = 64  # tokens: what they read of each other grows with its square, the number of products falls with it


@dataclass(frozen=True)
class Mamba2(Kind):
    """The norm is of C / G channels at a time."""

    heads: int
    head_dim: int
    groups: int
    states: int
    kernel: int
    """Tokens that the convolution sees, the newest included."""
    biases: str = ""
    """Which of the projections i(n) and o(ut) and the c(onvolution) have biases."""
    step_limits: tuple[float, float] = (0.0, inf)
    """d_t is clipped to them."""
    label = "Mamba-2"

    @property
    def channels(self) -> int:
        """Of u, b and c together, C + 2 G N."""
        return self.heads * self.head_dim + 2 * self.groups * self.states

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        values = self.heads * self.head_dim
        table = {
            "in": Tensor((values + self.channels + self.heads, hidden), "attention"),
            "conv": Tensor((self.channels, self.kernel), "attention", "array"),
            "decay": Tensor((self.heads,), "attention", "array"),
            "dt_bias": Tensor((self.heads,), "attention", "array"),
            "skip": Tensor((self.heads,), "attention", "array"),
            "norm": Tensor((values,), "norms", "array"),
            "o": Tensor((hidden, values), "attention"),
        }
        for name in ("in", "conv", "o"):
            if name[0] in self.biases:
                table[f"{name}_bias"] = Tensor((table[name].shape[0],), "attention", "array")
        return table

    def state(self) -> Mapping[str, Recurrent]:
        return {
            "conv": Recurrent((self.kernel - 1, self.channels)),
            "memory": Recurrent((self.groups, self.states, self.heads // self.groups * self.head_dim)),
        }

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return Mixer(self, weights, shared)


class Mixer:
    """One layer's Mamba-2. The weight `decay` is a = -exp(A), below zero."""

    def __init__(self, spec: Mamba2, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.norm_eps = shared.norm_eps
        self.states = shared.states()
        self.conv = np.ascontiguousarray(weights.arrays["conv"].T)  # (kernel, channels)
        self.norm = weights.arrays["norm"].reshape(spec.groups, -1)

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        spec, arrays, count = self.spec, self.w.arrays, len(x)
        projected = self.w.matrices["in"].matmul(x)
        if "in_bias" in arrays:
            projected += arrays["in_bias"]
        values = spec.heads * spec.head_dim
        gate, mixed, d = np.split(projected, (values, values + spec.channels), axis=1)
        d = ops.softplus(d + arrays["dt_bias"])  # (T, H)
        np.clip(d, *spec.step_limits, out=d)
        out = np.empty((count, values), np.float32)
        for segment in step.segments:
            own, states = segment.rows, self.states(segment)
            seen = convolve(mixed[own], states["conv"], self.conv)
            if "conv_bias" in arrays:
                seen += arrays["conv_bias"]
            out[own] = self._mix(ops.silu(seen), d[own], states["memory"])
        out *= ops.silu(gate)
        grouped = out.reshape(count, spec.groups, -1)
        ops.rms_norm(grouped, self.norm, self.norm_eps, out=grouped)
        y = self.w.matrices["o"].matmul(out)
        return y + arrays["o_bias"] if "o_bias" in arrays else y

    def _mix(self, seen: Floats, d: Floats, state: RecurrentState) -> Floats:
        """y (T, C) of one sequence's next tokens; the state after them goes to `state.following`."""
        spec, count = self.spec, len(seen)
        values, width = spec.heads * spec.head_dim, spec.groups * spec.states
        u, b, c = np.split(seen, (values, values + width), axis=1)
        u = u.reshape(count, spec.heads, -1)
        y = u * self.w.arrays["skip"][:, None]
        u = u * d[..., None]
        by_group = (count, spec.groups, -1)
        b, c = (part.reshape(by_group).transpose(1, 0, 2) for part in (b, c))  # (G, T, N)
        u = u.reshape(*by_group, spec.head_dim).transpose(1, 2, 0, 3)  # (G, R, T, P)
        decay = (d * self.w.arrays["decay"]).reshape(by_group).transpose(1, 2, 0)  # (G, R, T), logarithms
        memory, before = state.following, state.now
        for start in range(0, count, _CHUNK):
            own = slice(start, min(start + _CHUNK, count))
            made = _chunk(u[:, :, own], b[:, own], c[:, own], decay[:, :, own], before, memory)
            y[own] += made.reshape(-1, *y.shape[1:])
            before = memory
        return y.reshape(count, -1)


def _chunk(u: Floats, b: Floats, c: Floats, decay: Floats, before: Floats, memory: Floats) -> Floats:
    """S_t^T c_t (T, G, R, P) of the next T tokens, and the state after them to `memory` (G, N, R P), maybe `before`.

    With s_t the sum of decays up to t: e^{s_t} S_0^T c_t + sum_{r <= t} (c_t b_r) e^{s_t - s_r} u_r.
    """
    groups, share, count, dim = u.shape
    total = np.cumsum(decay, axis=2, dtype=np.float64)  # (G, R, T)
    read = np.matmul(c, before).reshape(groups, count, share, dim)
    since = ops.fading(total, np.zeros(1))
    read *= since.transpose(0, 2, 1)[..., None]
    products = np.matmul(c, b.transpose(0, 2, 1))[:, None]  # (G, 1, T, T)
    if count > 1:
        left = ops.fading(total[..., :, None], total[..., None, :])  # (G, R, T, T)
        products = np.tril(products * left)
        added = u * left[..., -1, :, None]
    else:
        added = u
    read += np.matmul(products, u).transpose(0, 2, 1, 3)
    faded = np.repeat(since[..., -1], dim, axis=1)[:, None]  # (G, 1, R P)
    np.multiply(before, faded, out=memory)
    memory += np.matmul(b.transpose(0, 2, 1), added.transpose(0, 2, 1, 3).reshape(groups, count, -1))
    return read.transpose(1, 0, 2, 3)

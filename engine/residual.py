"""How a block's output joins the residual stream: plainly, or through hyper-connections.

A residual turns the token embeddings into its state, gives each block its input, takes the block's output in,
and collapses the state for the head.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from numoe.engine import ops
from numoe.engine.ops import Floats
from numoe.engine.spec import HyperConnections
from numoe.engine.weights import Weights


class Mixer(Protocol):
    """One block's connection to the residual."""

    def enter(self, state: Floats) -> tuple[Floats, Any]:
        """The block's input (T, D), and what `leave` needs."""
        ...

    def leave(self, state: Floats, out: Floats, carried: Any) -> Floats:
        """The new state, with the block's output (T, D) in it."""
        ...


class Plain:
    """state (T, D): x + block(x)."""

    def enter(self, state: Floats) -> tuple[Floats, None]:
        return state, None

    def leave(self, state: Floats, out: Floats, carried: None) -> Floats:
        state += out
        return state


class Hyper:
    """mHC (DeepSeek-V4 report, section 2.2): state X (T, N, D) of N streams.

    From f = rms_norm(flatten X) fn^T: pre = sigmoid(f s0 + b) + eps weights the streams into the block's input;
    post = 2 sigmoid(f s1 + b) spreads its output; comb, softmax(f s2 + b) made doubly stochastic, mixes them:
    X' = post out + comb^T X.
    """

    def __init__(self, spec: HyperConnections, weights: Weights, norm_eps: float):
        self.spec = spec
        self.fn, self.base, self.scale = (weights.arrays[n] for n in ("fn", "base", "scale"))
        self.norm_eps = norm_eps

    def enter(self, state: Floats) -> tuple[Floats, tuple[Floats, Floats]]:
        n, eps = self.spec.streams, np.float32(self.spec.eps)
        f = _project(state, self.fn, self.norm_eps)
        f[:, :n] *= self.scale[0]
        f[:, n : 2 * n] *= self.scale[1]
        f[:, 2 * n :] *= self.scale[2]
        f += self.base
        ops.sigmoid(f[:, : 2 * n])
        pre, post = f[:, :n] + eps, f[:, n : 2 * n] * np.float32(2)
        comb = ops.softmax(f[:, 2 * n :].reshape(-1, n, n))
        comb += eps
        return _collapse(pre, state), (post, self._doubly_stochastic(comb))

    def _doubly_stochastic(self, comb: Floats) -> Floats:
        """Sinkhorn-Knopp: columns, then rows and columns in turn, are divided by their sums."""
        eps = np.float32(self.spec.eps)
        comb /= comb.sum(axis=1, keepdims=True) + eps
        for _ in range(self.spec.sinkhorn_iterations - 1):
            comb /= comb.sum(axis=2, keepdims=True) + eps
            comb /= comb.sum(axis=1, keepdims=True) + eps
        return comb

    def leave(self, state: Floats, out: Floats, carried: tuple[Floats, Floats]) -> Floats:
        post, comb = carried
        mixed = np.matmul(comb.transpose(0, 2, 1), state)  # (T, N, D)
        mixed += post[:, :, None] * out[:, None]
        return mixed


class HyperHead:
    """The last collapse of the streams: weights sigmoid(f s + b) + eps."""

    def __init__(self, spec: HyperConnections, weights: Weights, norm_eps: float):
        self.spec = spec
        self.fn, self.base, self.scale = (weights.arrays[n] for n in ("fn", "base", "scale"))
        self.norm_eps = norm_eps

    def __call__(self, state: Floats) -> Floats:
        """(T, N, D) -> (T, D)."""
        f = _project(state, self.fn, self.norm_eps)
        f *= self.scale
        f += self.base
        return _collapse(ops.sigmoid(f) + np.float32(self.spec.eps), state)


def _project(state: Floats, fn: Floats, norm_eps: float) -> Floats:
    """rms_norm(flatten X) fn^T, (T, N, D) -> (T, outputs)."""
    flat = state.reshape(len(state), -1)
    square = np.vecdot(flat, flat)
    square /= np.float32(flat.shape[1])
    f: Floats = np.matmul(flat, fn.T)
    f /= np.sqrt(square + np.float32(norm_eps))[:, None]
    return f


def _collapse(pre: Floats, state: Floats) -> Floats:
    """sum_n pre_n X_n, (T, N) and (T, N, D) -> (T, D)."""
    return np.matmul(pre[:, None], state)[:, 0]

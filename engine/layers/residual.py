"""How a block's output joins the residual stream: plainly, or through hyper-connections, mixed or gated.

A residual turns the token embeddings into its state, gives each block its input, takes the block's output in,
and collapses the state for the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import matmul_all


class Mixer(Protocol):
    """One block's connection to the residual."""

    def enter(self, state: Floats) -> tuple[Floats, Any]:
        """The block's input (T, D), and what `leave` needs."""
        ...

    def leave(self, state: Floats, out: Floats, carried: Any) -> Floats:
        """The new state, with the block's output (T, D) in it."""
        ...


class Residual(Protocol):
    """A model's residual stream, as data."""

    @property
    def streams(self) -> int:
        """How many rows of D channels a token's state has."""
        ...

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        """The weights of a block's connection."""
        ...

    def head_tensors(self, hidden: int) -> dict[str, Tensor]:
        """Those of the last collapse."""
        ...

    def connect(self, weights: Weights, norm_eps: float) -> Mixer: ...

    def open(self, x: Floats) -> Floats:
        """The state of token embeddings (T, D)."""
        ...

    def collapse(self, weights: Weights, norm_eps: float) -> Callable[[Floats], Floats]:
        """What makes (T, D) of a state, before the final norm."""
        ...


@dataclass(frozen=True)
class PlainResidual:
    """state (T, D): x + scale block(x)."""

    scale: float = 1.0
    streams = 1

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return {}

    def head_tensors(self, hidden: int) -> dict[str, Tensor]:
        return {}

    def connect(self, weights: Weights, norm_eps: float) -> Mixer:
        return Plain(self.scale)

    def open(self, x: Floats) -> Floats:
        return x

    def collapse(self, weights: Weights, norm_eps: float) -> Callable[[Floats], Floats]:
        return lambda state: state


@dataclass(frozen=True)
class HyperConnections:
    """mHC (DeepSeek-V4): `streams` residual streams, mixed by a doubly stochastic matrix around every block."""

    streams: int
    sinkhorn_iterations: int
    eps: float

    def _mixer(self, outputs: int, scales: int, hidden: int) -> dict[str, Tensor]:
        return {
            "fn": Tensor((outputs, self.streams * hidden), "residual mixing", "array"),
            "base": Tensor((outputs,), "residual mixing", "array"),
            "scale": Tensor((scales,), "residual mixing", "array"),
        }

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return self._mixer((2 + self.streams) * self.streams, 3, hidden)

    def head_tensors(self, hidden: int) -> dict[str, Tensor]:
        return self._mixer(self.streams, 1, hidden)

    def connect(self, weights: Weights, norm_eps: float) -> Mixer:
        return Hyper(self, weights, norm_eps)

    def open(self, x: Floats) -> Floats:
        return np.repeat(x[:, None], self.streams, axis=1)  # (T, N, D)

    def collapse(self, weights: Weights, norm_eps: float) -> Callable[[Floats], Floats]:
        return HyperHead(self, weights, norm_eps)


@dataclass(frozen=True)
class GatedStreams:
    """Low-rank hyper-connections (Qwen3.8-Flash-Next): `streams` of them, weighted channel by channel."""

    streams: int
    rank: int

    def head_tensors(self, hidden: int) -> dict[str, Tensor]:
        width = self.streams * hidden
        return {
            "norm": Tensor((width,), "norms", "array"),
            "down": Tensor((self.rank, width), "residual mixing"),
            "up": Tensor((width, self.rank), "residual mixing"),
        }

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return self.head_tensors(hidden) | {"inject": Tensor((self.streams, self.streams * hidden), "residual mixing")}

    def connect(self, weights: Weights, norm_eps: float) -> Mixer:
        return Gated(self, weights, norm_eps)

    def open(self, x: Floats) -> Floats:
        return np.repeat(x[:, None], self.streams, axis=1)  # (T, N, D)

    def collapse(self, weights: Weights, norm_eps: float) -> Callable[[Floats], Floats]:
        mixer = Gated(self, weights, norm_eps)
        return lambda state: mixer.enter(state)[0]


class Plain:
    """x + scale block(x), in x's memory."""

    def __init__(self, scale: float):
        self.scale = np.float32(scale)

    def enter(self, state: Floats) -> tuple[Floats, None]:
        return state, None

    def leave(self, state: Floats, out: Floats, carried: None) -> Floats:
        state += out if self.scale == 1 else out * self.scale
        return state


class Hyper:
    """mHC (DeepSeek-V4 report, section 2.2): state X (T, N, D) of N streams.

    From f = rms_norm(flatten X) fn^T: pre = sigmoid(f s0 + b) + eps weights the streams into the block's input;
    post = 2 sigmoid(f s1 + b) spreads its output; comb, softmax(f s2 + b) made doubly stochastic, mixes them:
    X' = post out + comb^T X.
    """

    def __init__(self, spec: HyperConnections, weights: Weights, norm_eps: float):
        self.spec = spec
        self.fn, self.base, scale = (weights.arrays[n] for n in ("fn", "base", "scale"))
        self.scales = np.repeat(scale, (spec.streams, spec.streams, spec.streams**2))
        self.norm_eps = norm_eps

    def enter(self, state: Floats) -> tuple[Floats, tuple[Floats, Floats]]:
        n, eps = self.spec.streams, self.spec.eps
        f = _project(state, self.fn, self.norm_eps)
        f *= self.scales
        f += self.base
        gates = ops.sigmoid(f[:, : 2 * n].copy())
        pre, post = gates[:, :n] + eps, gates[:, n:] * 2
        comb = ops.softmax(f[:, 2 * n :].reshape(-1, n, n))
        comb += eps
        return _collapse(pre, state), (post, self._doubly_stochastic(comb))

    def _doubly_stochastic(self, comb: Floats) -> Floats:
        """Sinkhorn-Knopp: columns, then rows and columns in turn, are divided by their sums."""
        for turn in range(max(1, 2 * self.spec.sinkhorn_iterations - 1)):
            total = np.add.reduce(comb, axis=2 if turn % 2 else 1, keepdims=True)
            total += self.spec.eps
            comb /= total
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
        return _collapse(ops.sigmoid(f) + self.spec.eps, state)


class Gated:
    """State X (T, N, D) of N streams, each normed: n. Checked against transformers' qwen4_exp.

    g = sigmoid(silu(n Wd / N) Wu) weights channels of the block's input, the mean of g n over streams; each stream
    takes its output in times 2 sigmoid(n Wi / N), which the last collapse does not have.
    """

    def __init__(self, spec: GatedStreams, weights: Weights, norm_eps: float):
        self.streams = spec.streams
        self.m = weights.matrices
        self.norm = weights.arrays["norm"].reshape(spec.streams, -1)  # (N, D)
        self.norm_eps = norm_eps

    def enter(self, state: Floats) -> tuple[Floats, Floats | None]:
        rows = ops.rms_norm(state, self.norm, self.norm_eps)  # (T, N, D)
        given = Activations(rows.reshape(len(rows), -1))
        low, *injected = matmul_all([(self.m[name], given, None) for name in ("down", "inject") if name in self.m])
        low /= self.streams
        gate = ops.sigmoid(self.m["up"].matmul(ops.silu(low))).reshape(rows.shape)
        gate *= rows
        post = None
        for post in injected:
            post /= self.streams
            ops.sigmoid(post)
            post *= 2
        return gate.mean(axis=1), post

    def leave(self, state: Floats, out: Floats, carried: Floats) -> Floats:
        state += carried[:, :, None] * out[:, None]
        return state


def _project(state: Floats, fn: Floats, norm_eps: float) -> Floats:
    """rms_norm(flatten X) fn^T, (T, N, D) -> (T, outputs)."""
    flat = state.reshape(len(state), -1)
    square = np.vecdot(flat, flat)
    square /= flat.shape[1]
    square += norm_eps
    np.sqrt(square, out=square)
    f: Floats = np.matmul(flat, fn.T)
    f /= square[:, None]
    return f


def _collapse(pre: Floats, state: Floats) -> Floats:
    """sum_n pre_n X_n, (T, N) and (T, N, D) -> (T, D)."""
    return np.matmul(pre[:, None], state)[:, 0]

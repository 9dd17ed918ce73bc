"""Gated DeltaNet (arXiv 2412.06464): a matrix a head that forgets, and learns one key and value a token.

S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T, o_t = S_t^T q_t / sqrt(C); checked against transformers'
qwen3_5. Queries, keys and values come out of a short causal convolution over the last few tokens, and are (queries and
keys) of length one; a_t = exp(-exp(A) softplus(x Wa + dt)) and b_t = sigmoid(x Wb) are numbers of a head.

Many tokens at once are computed in chunks: within one, what each token writes depends on what those before it wrote,
which is a triangular system of equations, and all else is matrix products.

Shapes: T tokens, H value heads, C key channels a head, V value channels a head, G key heads (each serves H / G).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.recurrent.shortconv import convolve
from numoe.engine.layers.state import Recurrent, RecurrentState
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import matmul_all

_CHUNK = 64  # tokens: the triangular system grows with its square, the number of products falls with it
_LENGTH_EPS = np.float32(1e-6)


@dataclass(frozen=True)
class GatedDeltaNet(Kind):
    """The output is normed a head and multiplied with silu of a gate."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the convolution sees, the newest included."""
    tiled: bool = False
    """Key head h serves the value heads h, h + G, ... and not H / G neighbours (GGUF's order of value heads)."""
    label = "DeltaNet"

    @property
    def channels(self) -> int:
        """Of queries, keys and values together, G C + G C + H V."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        values = self.value_heads * self.value_dim
        return {
            "qkv": Tensor((self.channels, hidden), "attention"),
            "gate": Tensor((values, hidden), "attention"),
            "b": Tensor((self.value_heads, hidden), "attention"),
            "a": Tensor((self.value_heads, hidden), "attention"),
            "conv": Tensor((self.channels, self.kernel), "attention", "array"),
            "decay": Tensor((self.value_heads,), "attention", "array"),
            "dt_bias": Tensor((self.value_heads,), "attention", "array"),
            "norm": Tensor((self.value_dim,), "norms", "array"),
            "o": Tensor((hidden, values), "attention"),
        }

    def state(self) -> Mapping[str, Recurrent]:
        return {
            "conv": Recurrent((self.kernel - 1, self.channels)),
            "memory": Recurrent((self.value_heads, self.key_dim, self.value_dim)),
        }

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return DeltaNet(self, weights, shared)


class DeltaNet:
    """One layer's gated DeltaNet. The weight `decay` is -exp(A), below zero."""

    def __init__(self, spec: GatedDeltaNet, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.norm_eps = shared.norm_eps
        self.states = shared.states()
        self.conv = np.ascontiguousarray(weights.arrays["conv"].T)  # (kernel, channels)

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        spec, count, m = self.spec, len(x), self.w.matrices
        given = Activations(x)
        mixed, gate, b, a = matmul_all([(m[name], given, None) for name in ("qkv", "gate", "b", "a")])
        beta = ops.sigmoid(b)  # (T, H)
        a += self.w.arrays["dt_bias"]
        decay = ops.softplus(a)
        decay *= self.w.arrays["decay"]  # (T, H), the logarithm of a_t
        out = np.empty((count, spec.value_heads, spec.value_dim), np.float32)
        for segment in step.segments:
            own, states = segment.rows, self.states(segment)
            q, k, v = self._heads(ops.silu(convolve(mixed[own], states["conv"], self.conv)))
            out[own] = self._mix(q, k, v, beta[own], decay[own], states["memory"])
        ops.rms_norm(out, self.w.arrays["norm"], self.norm_eps, out=out)
        out *= ops.silu(gate).reshape(out.shape)
        return m["o"].matmul(out.reshape(count, -1))

    def _heads(self, mixed: Floats) -> tuple[Floats, Floats, Floats]:
        """Queries and keys (H, T, C), of length one and queries scaled, and values (H, T, V)."""
        spec, count = self.spec, len(mixed)
        width = spec.key_heads * spec.key_dim
        q, k = (mixed[:, i * width : (i + 1) * width].reshape(count, spec.key_heads, -1) for i in range(2))
        v = mixed[:, 2 * width :].reshape(count, spec.value_heads, -1)
        q, k = (part / np.sqrt(np.vecdot(part, part) + _LENGTH_EPS)[..., None] for part in (q, k))
        q *= np.float32(spec.key_dim**-0.5)
        heads = np.arange(spec.value_heads)
        served = heads % spec.key_heads if spec.tiled else heads // (spec.value_heads // spec.key_heads)
        q, k = (np.take(part.transpose(1, 0, 2), served, axis=0) for part in (q, k))
        return q, k, v.transpose(1, 0, 2)

    def _mix(self, q: Floats, k: Floats, v: Floats, beta: Floats, decay: Floats, state: RecurrentState) -> Floats:
        """o of one sequence's next tokens, (T, H, V); the state after them goes to `state.following`."""
        count = q.shape[1]
        memory, before = state.following, state.now
        out = np.empty((count, *v.shape[::2]), np.float32)
        for a in range(0, count, _CHUNK):
            own = slice(a, min(a + _CHUNK, count))
            made = _chunk(q[:, own], k[:, own], v[:, own], beta[own].T, decay[own].T, before, memory)
            out[own] = made.transpose(1, 0, 2)
            before = memory
        return out


def _chunk(q: Floats, k: Floats, v: Floats, beta: Floats, decay: Floats, before: Floats, memory: Floats) -> Floats:
    """o (H, T, V) of the next T tokens, and the state after them to `memory` (H, C, V), which may be `before`.

    With c_t the sum of decays up to t, what token t writes is u_t = b_t (v_t - e^{c_t} S_0^T k_t) - sum_{s<t} b_t
    (k_t k_s) e^{c_t - c_s} u_s; then o_t = e^{c_t} S_0^T q_t + sum_{s<=t} (q_t k_s) e^{c_t - c_s} u_s.
    """
    count = q.shape[1]
    total = np.cumsum(decay, axis=1)  # (H, T)
    since = np.exp(total)[..., None]
    written = v - np.matmul(k * since, before)  # (H, T, V)
    written *= beta[..., None]
    seen = np.matmul(q * since, before)  # (H, T, V)
    keys = k.transpose(0, 2, 1)
    # What is later than t must not overflow on its way to zero.
    fading = np.exp(np.minimum(total[:, :, None] - total[:, None], 0))  # (H, T, T)
    if count > 1:
        system = np.tril(np.matmul(k * beta[..., None], keys) * fading, -1)
        system += np.eye(count, dtype=np.float32)
        written = np.linalg.solve(system, written)
    seen += np.matmul(np.tril(np.matmul(q, keys) * fading), written)
    left = np.exp(total[:, -1:] - total)[..., None]  # of what each token wrote, (H, T, 1)
    np.multiply(before, since[:, -1:], out=memory)
    memory += np.matmul((k * left).transpose(0, 2, 1), written)
    return seen

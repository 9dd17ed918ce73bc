"""The gated delta rule (arXiv 2412.06464): a matrix a head that forgets, and learns one key and value a token.

S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T, o_t = S_t^T q_t. What is left of the matrix, a_t, is one
number of a head (gated DeltaNet) or one of each of its key channels (Kimi Delta Attention, arXiv 2510.26692).

Many tokens at once are computed in chunks: within one, what each token writes depends on what those before it wrote,
which is a triangular system of equations, and all else is matrix products.

Shapes: T tokens, H heads, C key channels a head, V value channels a head; D is 1 or C, the numbers that decays have.
"""

from __future__ import annotations

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.ops import Floats, Wide
from numoe.engine.layers.state import RecurrentState

_CHUNK = 64  # tokens: the triangular system grows with its square, the number of products falls with it
_CHUNK_OF_CHANNELS = 16  # where each pair of tokens has a number for every channel
_LENGTH_EPS = np.float32(1e-6)


def unit_length(x: Floats) -> Floats:
    """Rows (..., C) divided by their lengths, a new array."""
    return x / np.sqrt(np.vecdot(x, x) + _LENGTH_EPS)[..., None]


def delta_rule(q: Floats, k: Floats, v: Floats, b: Floats, decay: Floats, state: RecurrentState, out: Floats) -> None:
    """The next tokens of one sequence; the matrices after them go to `state.following`.

    Shapes: q and k (H, T, C), v (H, T, V), b (H, T), decay (H, T, D), the logarithm of a_t; out (T, H, V).
    """
    count = q.shape[1]
    memory, before = state.following, state.now
    step = _CHUNK if decay.shape[-1] == 1 else _CHUNK_OF_CHANNELS
    for start in range(0, count, step):
        own = slice(start, min(start + step, count))
        made = _chunk(q[:, own], k[:, own], v[:, own], b[:, own], decay[:, own], before, memory)
        out[own] = made.transpose(1, 0, 2)
        before = memory


def _chunk(q: Floats, k: Floats, v: Floats, b: Floats, decay: Floats, before: Floats, memory: Floats) -> Floats:
    """o (H, T, V) of the next T tokens, and the state after them to `memory` (H, C, V), which may be `before`.

    With c_t the sum of decays up to t, what token t writes is u_t = b_t (v_t - S_0^T (e^{c_t} k_t)) - sum_{s<t} b_t
    (e^{c_t - c_s} k_t k_s) u_s; then o_t = S_0^T (e^{c_t} q_t) + sum_{s<=t} (e^{c_t - c_s} q_t k_s) u_s.
    """
    count = q.shape[1]
    total = np.cumsum(decay, axis=1, dtype=np.float64)  # (H, T, D)
    since = ops.fading(total, np.zeros(1))
    written = v - np.matmul(k * since, before)  # (H, T, V)
    written *= b[..., None]
    seen = np.matmul(q * since, before)  # (H, T, V)
    asked, system = _pairs(q, k * b[..., None], k, total)
    if count > 1:
        system = np.tril(system, -1)
        system += np.eye(count, dtype=np.float32)
        written = np.linalg.solve(system, written)
    seen += np.matmul(np.tril(asked), written)
    left = ops.fading(total[:, -1:], total)  # of what each token wrote, (H, T, D)
    np.multiply(before, since[:, -1:].transpose(0, 2, 1), out=memory)
    memory += np.matmul((k * left).transpose(0, 2, 1), written)
    return seen


def _pairs(x: Floats, y: Floats, keys: Floats, total: Wide) -> tuple[Floats, Floats]:
    """e^{c_t - c_s} x_t k_s and the same of y (H, T, T), at s <= t."""
    if total.shape[-1] == 1:
        faded = ops.fading(total, total.transpose(0, 2, 1))  # (H, T, T)
        turned = keys.transpose(0, 2, 1)
        return np.matmul(x, turned) * faded, np.matmul(y, turned) * faded
    # e^{c_t} and e^{-c_s} apart would not be float32 where a channel forgets fast.
    faded = ops.fading(total[:, :, None], total[:, None])  # (H, T, T, C)
    faded *= keys[:, None]
    both = np.matmul(faded, np.stack([x, y], axis=-1))  # (H, T, T, 2)
    return both[..., 0], both[..., 1]

"""Small float32 operations on rows. T tokens, D channels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from numoe.quant.errors import InputError

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]
Ids = NDArray[np.int64]

_HALF, _ONE = np.array(0.5, np.float32), np.array(1, np.float32)  # calls with Python's numbers take twice as long


class NotFinite(InputError):
    """Something was computed to NaN or infinity. `where`: by what, the subject of a sentence."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} computes to NaN or infinity, as damaged weights make it; `numoe verify` finds those of a pulled "
            "model, or fetch its files again"
        )


def rms_norm(x: Floats, weight: Floats | None, eps: float, out: Floats | None = None) -> Floats:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467); `weight` None for none.

    Shapes: x (..., D), weight (D,). `out` may be x itself.
    """
    root = np.sqrt(np.vecdot(x, x) / x.shape[-1] + eps)
    out = np.divide(x, root[..., None], out=out)
    if weight is not None:
        out *= weight
    return out


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis (arXiv 1607.06450), a new array."""
    out = x - x.mean(axis=-1, keepdims=True)
    out = rms_norm(out, weight, eps, out=out)
    out += bias
    return out


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), in place and without overflow."""
    # tanh never overflows, and sigmoid(x) = (1 + tanh(x / 2)) / 2.
    np.multiply(x, _HALF, out=x)
    np.tanh(x, out=x)
    np.add(x, _ONE, out=x)
    np.multiply(x, _HALF, out=x)
    return x


def swiglu(gate: Floats, up: Floats, limit: float | None = None, alpha: float = 1.0, shift: float = 0.0) -> Floats:
    """gate * sigmoid(alpha gate) * (up + shift), in gate's memory; silu(gate) * up where neither is given.

    `limit` clips gate above and up on both sides (DeepSeek-V4, gpt-oss).
    """
    if limit is not None:
        np.minimum(gate, limit, out=gate)
        up.clip(-limit, limit, out=up)
    if shift:
        up += shift
    up *= gate
    if alpha != 1:
        gate *= alpha
    sigmoid(gate)
    gate *= up
    return gate


def geglu(gate: Floats, up: Floats) -> Floats:
    """gelu(gate) * up, in gate's memory; gelu(x) = x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3)) (arXiv 1606.08415)."""
    up *= gate
    inner = gate * gate
    inner *= 0.044715
    inner += 1
    gate *= inner
    gate *= (8 / np.pi) ** 0.5
    sigmoid(gate)
    gate *= up
    return gate


def soft_cap(x: Floats, cap: float) -> Floats:
    """cap tanh(x / cap), in place: never beyond `cap` on either side."""
    x /= cap
    np.tanh(x, out=x)
    x *= cap
    return x


def softmax(x: Floats) -> Floats:
    """exp(x - max) / sum over the last axis, in place."""
    x -= np.maximum.reduce(x, axis=-1, keepdims=True)
    np.exp(x, out=x)
    x /= np.add.reduce(x, axis=-1, keepdims=True)
    return x


def silu(x: Floats) -> Floats:
    """x * sigmoid(x), a new array."""
    out = sigmoid(x.copy())
    out *= x
    return out


def softplus(x: Floats) -> Floats:
    """log(1 + exp(x)) without overflow."""
    return np.logaddexp(x, np.float32(0))


def fading(later: Wide, earlier: Wide) -> Floats:
    """e^(later - earlier) of sums of logarithms below zero, 1 where it would be more, as float32.

    The sums are float64: one token that wipes all out makes them so large that float32 differences lose their digits.
    """
    shape = np.broadcast_shapes(later.shape, earlier.shape)
    left: Floats = np.subtract(later, earlier, out=np.empty(shape, np.float32), casting="same_kind")
    np.minimum(left, 0, out=left)  # what is later must not overflow on its way to nowhere
    return np.exp(left, out=left)


def top_k(scores: Floats, k: int) -> Ids:
    """Indices of the k largest of each row, (T, n) -> (T, k), ascending by index.

    Among equal scores at the border the lowest index is taken, so that the choice never depends on the machine.

    Raises:
        NotFinite: among the scores is NaN, as damaged weights make them.
    """
    n = scores.shape[-1]
    if k >= n:
        return np.broadcast_to(np.arange(n), (len(scores), n))
    ranked = scores.copy()
    ranked.partition(n - k, axis=-1)
    border = ranked[:, n - k, None]  # (T, 1) the k-th largest
    above = scores > border
    level = scores == border
    room = k - np.add.reduce(above, axis=-1, keepdims=True, dtype=np.int32)
    chosen = above | (level & (np.add.accumulate(level, axis=-1, dtype=np.int32) <= room))
    indices = chosen.nonzero()[1]
    if len(indices) != len(scores) * k:
        raise NotFinite("what picks experts or tokens")
    return indices.reshape(len(scores), k)

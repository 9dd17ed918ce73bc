"""Kimi Delta Attention (arXiv 2510.26692): the gated delta rule with a decay of its own for every key channel.

a_t = exp(-exp(A) softplus(f(x) + dt)), or with a lower bound exp(bound sigmoid(exp(A) (f(x) + dt))), where A is a
number of a head and f one matrix or two; b_t = sigmoid(x Wb). Queries, keys and values go through short convolutions;
y = Wo (norm(o_t) sigmoid(g(x))). Checked against transformers' kimi_linear and bailing_hybrid.

Shapes: T tokens, H heads, C channels a head of queries, keys and values alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.recurrent.delta_rule import delta_rule, unit_length
from numoe.engine.layers.recurrent.shortconv import convolve
from numoe.engine.layers.state import Recurrent
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import matmul_all


@dataclass(frozen=True)
class KimiDeltaAttention(Kind):
    """Heads whose queries, keys and values all have `head_dim` channels."""

    heads: int
    head_dim: int
    kernel: int
    """Tokens that the convolutions see, the newest included."""
    rank: int | None = None
    """Channels between the two matrices that give decays, and gates; None: it is one matrix each."""
    lower_bound: float | None = None
    """Of the logarithm of a decay, below zero."""
    label = "KDA"

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        width = self.heads * self.head_dim
        shapes = dict.fromkeys("qkv", (width, hidden)) | {"b": (self.heads, hidden)}
        for name in ("forget", "gate"):
            if self.rank is None:
                shapes[name] = width, hidden
            else:
                shapes |= {f"{name}_a": (self.rank, hidden), f"{name}_b": (width, self.rank)}
        table = {name: Tensor(shape, "attention") for name, shape in shapes.items()}
        table |= {f"{name}_conv": Tensor((width, self.kernel), "attention", "array") for name in "qkv"}
        return table | {
            "decay": Tensor((self.heads,), "attention", "array"),
            "dt_bias": Tensor((width,), "attention", "array"),
            "norm": Tensor((self.head_dim,), "norms", "array"),
            "o": Tensor((hidden, width), "attention"),
        }

    def state(self) -> Mapping[str, Recurrent]:
        return {
            "conv": Recurrent((self.kernel - 1, 3 * self.heads * self.head_dim)),
            "memory": Recurrent((self.heads, self.head_dim, self.head_dim)),
        }

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return KimiDelta(self, weights, shared)


class KimiDelta:
    """One layer's Kimi Delta Attention. The weight `decay` is -exp(A), below zero."""

    def __init__(self, spec: KimiDeltaAttention, weights: Weights, shared: Shared):
        self.spec = spec
        self.w = weights
        self.norm_eps = shared.norm_eps
        self.states = shared.states()
        self.conv = np.concatenate([weights.arrays[f"{name}_conv"] for name in "qkv"]).T.copy()  # (kernel, 3 H C)

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        spec, count, given = self.spec, len(x), Activations(x)
        width = spec.heads * spec.head_dim
        mixed = np.empty((count, 3 * width), np.float32)
        parts = [mixed[:, i * width : (i + 1) * width] for i in range(3)]
        last = "" if spec.rank is None else "_a"
        products = [(self.w.matrices[name], given, part) for name, part in zip("qkv", parts, strict=True)]
        others = [(self.w.matrices[name], given, None) for name in ("b", f"forget{last}", f"gate{last}")]
        *_, b, forget, gate = matmul_all([*products, *others])
        if spec.rank is not None:
            forget, gate = (self.w.matrices[f"{n}_b"].matmul(y) for n, y in (("forget", forget), ("gate", gate)))
        beta, decay = ops.sigmoid(b), self._decay(forget)  # (T, H), (T, H, C)
        out = np.empty((count, spec.heads, spec.head_dim), np.float32)
        for segment in step.segments:
            own, states = segment.rows, self.states(segment)
            made = ops.silu(convolve(mixed[own], states["conv"], self.conv))
            q, k, v = made.reshape(segment.count, 3, spec.heads, -1).transpose(1, 2, 0, 3)  # (H, T, C)
            q, k = unit_length(q), unit_length(k)
            q *= np.float32(spec.head_dim**-0.5)
            delta_rule(q, k, v, beta[own].T, decay[own].transpose(1, 0, 2), states["memory"], out[own])
        ops.rms_norm(out, self.w.arrays["norm"], self.norm_eps, out=out)
        out *= ops.sigmoid(gate).reshape(out.shape)
        return self.w.matrices["o"].matmul(out.reshape(count, -1))

    def _decay(self, forget: Floats) -> Floats:
        """The logarithm of a_t, (T, H, C), of f(x) (T, H C)."""
        spec, rate = self.spec, self.w.arrays["decay"][:, None]
        forget += self.w.arrays["dt_bias"]
        by_head = forget.reshape(len(forget), spec.heads, spec.head_dim)
        if spec.lower_bound is None:
            return ops.softplus(by_head) * rate
        return ops.sigmoid(by_head * -rate) * np.float32(spec.lower_bound)

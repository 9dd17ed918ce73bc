"""Gated DeltaNet (arXiv 2412.06464): a matrix a head that forgets, and learns one key and value a token.

S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T, o_t = S_t^T q_t / sqrt(C); checked against transformers'
qwen3_5. Queries, keys and values come out of a short causal convolution over the last few tokens, and are (queries and
keys) of length one; a_t = exp(-exp(A) softplus(x Wa + dt)) and b_t = sigmoid(x Wb) are numbers of a head.

Shapes: T tokens, H value heads, C key channels a head, V value channels a head, G key heads (each serves H / G).
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
    joined: tuple[str, ...] = ()
    """What is one matrix, in which the rows of a key head and of the value heads that it serves are neighbours:
    "qkvz" (queries, keys, values and gates), "ba" (Qwen3-Next)."""
    sigmoid_gate: bool = False
    """The output is multiplied with sigmoid of the gate, not silu (Qwen3.8)."""
    label = "DeltaNet"

    @property
    def channels(self) -> int:
        """Of queries, keys and values together, G C + G C + H V."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        values = self.value_heads * self.value_dim
        rows = {"qkv": self.channels, "gate": values}
        if "qkvz" in self.joined:
            rows = {"qkvz": self.channels + values}
        rows |= {"ba": 2 * self.value_heads} if "ba" in self.joined else dict.fromkeys("ba", self.value_heads)
        return {name: Tensor((count, hidden), "attention") for name, count in rows.items()} | {
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
        spec, count = self.spec, len(x)
        mixed, gate, b, a = self._project(x)
        beta = ops.sigmoid(b)  # (T, H)
        a += self.w.arrays["dt_bias"]
        decay = ops.softplus(a)
        decay *= self.w.arrays["decay"]  # (T, H), the logarithm of a_t
        out = np.empty((count, spec.value_heads, spec.value_dim), np.float32)
        for segment in step.segments:
            own, states = segment.rows, self.states(segment)
            q, k, v = self._heads(ops.silu(convolve(mixed[own], states["conv"], self.conv)))
            delta_rule(q, k, v, beta[own].T, decay[own].T[..., None], states["memory"], out[own])
        ops.rms_norm(out, self.w.arrays["norm"], self.norm_eps, out=out)
        score = ops.sigmoid if spec.sigmoid_gate else ops.silu
        out *= score(gate).reshape(out.shape)
        return self.w.matrices["o"].matmul(out.reshape(count, -1))

    def _project(self, x: Floats) -> list[Floats]:
        """Queries, keys and values (T, channels), the gates (T, H V), b and a (T, H)."""
        spec, given = self.spec, Activations(x)
        names = [name for name in ("qkvz", "qkv", "gate", "ba", "b", "a") if name in self.w.matrices]
        made = dict(zip(names, matmul_all([(self.w.matrices[n], given, None) for n in names]), strict=True))
        served = spec.value_heads // spec.key_heads
        if "qkvz" in made:
            values = served * spec.value_dim
            q, k, v, z = self._of_key_heads(made["qkvz"], (spec.key_dim, spec.key_dim, values, values))
            made |= {"qkv": np.concatenate([q, k, v], axis=1), "gate": z}
        if "ba" in made:
            made["b"], made["a"] = self._of_key_heads(made["ba"], (served, served))
        return [made[name] for name in ("qkv", "gate", "b", "a")]

    def _of_key_heads(self, mixed: Floats, widths: tuple[int, ...]) -> list[Floats]:
        """The parts of these widths that each key head has beside one another, (T, G width) each."""
        count = len(mixed)
        parts = np.split(mixed.reshape(count, self.spec.key_heads, -1), np.cumsum(widths)[:-1], axis=-1)
        return [part.reshape(count, -1) for part in parts]

    def _heads(self, mixed: Floats) -> tuple[Floats, Floats, Floats]:
        """Queries and keys (H, T, C), of length one and queries scaled, and values (H, T, V)."""
        spec, count = self.spec, len(mixed)
        width = spec.key_heads * spec.key_dim
        q, k = (mixed[:, i * width : (i + 1) * width].reshape(count, spec.key_heads, -1) for i in range(2))
        v = mixed[:, 2 * width :].reshape(count, spec.value_heads, -1)
        q, k = unit_length(q), unit_length(k)
        q *= np.float32(spec.key_dim**-0.5)
        heads = np.arange(spec.value_heads)
        served = heads % spec.key_heads if spec.tiled else heads // (spec.value_heads // spec.key_heads)
        q, k = (np.take(part.transpose(1, 0, 2), served, axis=0) for part in (q, k))
        return q, k, v.transpose(1, 0, 2)

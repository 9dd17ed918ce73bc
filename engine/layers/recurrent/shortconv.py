"""Gated short convolution (LFM2): y = (c * conv(b * u)) Wo with b, c, u = x Wi, and conv causal over a few tokens.

Checked against transformers' lfm2_moe. Shapes: T tokens, C channels (as many as hidden ones), K tokens of the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.state import Recurrent, RecurrentState
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights


def convolve(x: Floats, state: RecurrentState, kernel: Floats, every: int = 1) -> Floats:
    """sum_j w_j x_{t - every (K - 1 - j)} of one sequence's next tokens, (T, C); kernel (K, C), of the newest last.

    state: the every (K - 1) tokens before, as rows; those before the next ones go to its `following`.
    """
    count = len(x)
    rows = np.concatenate([state.now, x])  # (every (K - 1) + T, C)
    np.copyto(state.following, rows[count:])
    out = rows[:count] * kernel[0]
    for j in range(1, len(kernel)):
        out += rows[every * j : every * j + count] * kernel[j]
    return out


@dataclass(frozen=True)
class ShortConvolution(Kind):
    """`kernel`: tokens that the convolution sees, the newest included."""

    channels: int
    kernel: int
    bias: bool = False
    label = "convolution"

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        table = {
            "in": Tensor((3 * self.channels, hidden), "attention"),
            "conv": Tensor((self.channels, self.kernel), "attention", "array"),
            "o": Tensor((hidden, self.channels), "attention"),
        }
        if self.bias:
            table |= {f"{name}_bias": Tensor((t.shape[0],), "attention", "array") for name, t in list(table.items())}
        return table

    def state(self) -> Mapping[str, Recurrent]:
        return {"conv": Recurrent((self.kernel - 1, self.channels))}

    def build(self, weights: Weights, shared: Shared) -> Compute:
        states = shared.states()
        matrices, arrays = weights.matrices, weights.arrays
        kernel = np.ascontiguousarray(arrays["conv"].T)  # (K, C)

        def compute(x: Floats, step: Step) -> Floats:
            mixed = matrices["in"].matmul(x)  # (T, 3C)
            if self.bias:
                mixed += arrays["in_bias"]
            before, after, values = np.split(mixed, 3, axis=1)  # (T, C) each
            values *= before
            out = np.empty_like(x, shape=(len(x), self.channels))
            for segment in step.segments:
                out[segment.rows] = convolve(values[segment.rows], states(segment)["conv"], kernel)
            if self.bias:
                out += arrays["conv_bias"]
            out *= after
            out = matrices["o"].matmul(out)
            return out + arrays["o_bias"] if self.bias else out

        return compute

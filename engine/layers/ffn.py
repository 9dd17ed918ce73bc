"""Gated feed-forward blocks: down(silu(gate x) * up x) and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations
from numoe.quant.formats.qtensor import QTensor, matmul_all

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class SwiGLU(Kind):
    """down(gate * sigmoid(alpha gate) * (up + shift)); with `limit`, gate is clipped above and up on both sides.

    With `gelu`, down(gelu(gate) * up): GeGLU (arXiv 2002.05202), of the approximation by tanh.
    """

    width: int
    limit: float | None = None
    bias: bool = False
    alpha: float = 1.0
    shift: float = 0.0
    gelu: bool = False
    label = "dense"

    def tensors(self, hidden: int, role: str = "dense ffn") -> dict[str, Tensor]:
        table = {
            "gate": Tensor((self.width, hidden), role),
            "up": Tensor((self.width, hidden), role),
            "down": Tensor((hidden, self.width), role),
        }
        if self.bias:
            table |= {f"{n}_bias": Tensor((t.shape[0],), role, "array") for n, t in list(table.items())}
        return table

    def build(self, weights: Weights, shared: Shared) -> Compute:
        def compute(x: Floats, step: Step) -> Floats:
            return feed_forward(self, [(weights, Activations(x))])[0]

        return compute


def feed_forward(spec: SwiGLU, parts: Sequence[tuple[Weights, Activations]]) -> list[Floats]:
    """Several blocks of one kind at once, each with its own tokens: (T, D) each."""
    rows = [slice(a, b) for a, b in pairwise(accumulate([len(x) for _, x in parts], initial=0))]
    gate = np.empty((rows[-1].stop, spec.width), np.float32)
    up = np.empty_like(gate)
    products: list[tuple[QTensor, Activations, Floats | None]] = []
    for (w, x), own in zip(parts, rows, strict=True):
        products += [(w.matrices["gate"], x, gate[own]), (w.matrices["up"], x, up[own])]
    matmul_all(products)
    if spec.bias:
        for (w, _), own in zip(parts, rows, strict=True):
            gate[own] += w.arrays["gate_bias"]
            up[own] += w.arrays["up_bias"]
    mixed = ops.geglu(gate, up) if spec.gelu else ops.swiglu(gate, up, spec.limit, spec.alpha, spec.shift)
    hidden = Activations(mixed)
    outs = matmul_all([(w.matrices["down"], hidden.take(own), None) for (w, _), own in zip(parts, rows, strict=True)])
    if spec.bias:
        for (w, _), out in zip(parts, outs, strict=True):
            out += w.arrays["down_bias"]
    return outs

"""Feed-forward blocks: down(silu(gate x) * up x) and its variants, and down(max(up x, 0)^2) without a gate."""

from __future__ import annotations

from abc import abstractmethod
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


class FeedForward(Kind):
    """A kind that experts can be of as well: several are computed at once."""

    label = "dense"

    @abstractmethod
    def tensors(self, hidden: int, role: str = "dense ffn") -> dict[str, Tensor]:
        """`up` is among them, and its inputs are all that the block is given."""

    @abstractmethod
    def forward(self, parts: Sequence[tuple[Weights, Activations]]) -> list[Floats]:
        """Several blocks of this kind, each with its own tokens: (T, D) each."""

    def build(self, weights: Weights, shared: Shared) -> Compute:
        def compute(x: Floats, step: Step) -> Floats:
            return self.forward([(weights, Activations(x))])[0]

        return compute


@dataclass(frozen=True)
class SwiGLU(FeedForward):
    """down(gate * sigmoid(alpha gate) * (up + shift)); with `limit`, gate is clipped above and up on both sides.

    With `gelu`, down(gelu(gate) * up): GeGLU (arXiv 2002.05202), of the approximation by tanh.
    """

    width: int
    limit: float | None = None
    bias: bool = False
    alpha: float = 1.0
    shift: float = 0.0
    gelu: bool = False

    def tensors(self, hidden: int, role: str = "dense ffn") -> dict[str, Tensor]:
        table = {
            "gate": Tensor((self.width, hidden), role),
            "up": Tensor((self.width, hidden), role),
            "down": Tensor((hidden, self.width), role),
        }
        if self.bias:
            table |= {f"{n}_bias": Tensor((t.shape[0],), role, "array") for n, t in list(table.items())}
        return table

    def forward(self, parts: Sequence[tuple[Weights, Activations]]) -> list[Floats]:
        return feed_forward(self, parts)


def feed_forward(spec: SwiGLU, parts: Sequence[tuple[Weights, Activations]]) -> list[Floats]:
    """Several blocks of one kind at once, each with its own tokens: (T, D) each."""
    rows = [slice(a, b) for a, b in pairwise(accumulate([len(x) for _, x in parts], initial=0))]
    gate = np.empty((rows[-1].stop, spec.width), np.float32)
    up = np.empty(gate.shape, np.float32)
    products: list[tuple[QTensor, Activations, Floats | None]] = []
    for (w, x), own in zip(parts, rows, strict=True):
        products += [(w.matrices["gate"], x, gate[own]), (w.matrices["up"], x, up[own])]
    matmul_all(products)
    if spec.bias:
        for (w, _), own in zip(parts, rows, strict=True):
            gate[own] += w.arrays["gate_bias"]
            up[own] += w.arrays["up_bias"]
    mixed = ops.geglu(gate, up) if spec.gelu else ops.swiglu(gate, up, spec.limit, spec.alpha, spec.shift)
    return _down(parts, rows, Activations(mixed))


def _down(parts: Sequence[tuple[Weights, Activations]], rows: Sequence[slice], hidden: Activations) -> list[Floats]:
    """The last product of each block, with its bias if there is one."""
    outs = matmul_all([(w.matrices["down"], hidden.take(own), None) for (w, _), own in zip(parts, rows, strict=True)])
    for (w, _), out in zip(parts, outs, strict=True):
        if "down_bias" in w.arrays:
            out += w.arrays["down_bias"]
    return outs


@dataclass(frozen=True)
class SquaredReLU(FeedForward):
    """down(max(up x, 0)^2), of Primer (arXiv 2109.08668)."""

    width: int
    bias: bool = False

    def tensors(self, hidden: int, role: str = "dense ffn") -> dict[str, Tensor]:
        table = {"up": Tensor((self.width, hidden), role), "down": Tensor((hidden, self.width), role)}
        if self.bias:
            table |= {f"{n}_bias": Tensor((t.shape[0],), role, "array") for n, t in list(table.items())}
        return table

    def forward(self, parts: Sequence[tuple[Weights, Activations]]) -> list[Floats]:
        rows = [slice(a, b) for a, b in pairwise(accumulate([len(x) for _, x in parts], initial=0))]
        up = np.empty((rows[-1].stop, self.width), np.float32)
        matmul_all([(w.matrices["up"], x, up[own]) for (w, x), own in zip(parts, rows, strict=True)])
        if self.bias:
            for (w, _), own in zip(parts, rows, strict=True):
                up[own] += w.arrays["up_bias"]
        np.maximum(up, 0, out=up)
        return _down(parts, rows, Activations(np.square(up, out=up)))

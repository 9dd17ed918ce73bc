"""Norms before and after blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from numoe.engine.layers import ops
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    center: bool = False
    """The mean of x is taken off first: LayerNorm (arXiv 1607.06450)."""
    bias: bool = False
    """And a bias is added at last."""

    def tensors(self, width: int) -> dict[str, Tensor]:
        """Of rows of `width` channels; the norm's own name comes before these."""
        weight = Tensor((width,), "norms", "array")
        return {"": weight, "_bias": weight} if self.bias else {"": weight}

    def build(self, weights: Weights, name: str, eps: float) -> Callable[[Floats], Floats]:
        """(T, D) -> (T, D), a new array."""
        weight = weights.arrays[name]
        if not self.center and not self.bias:
            return partial(ops.rms_norm, weight=weight, eps=eps)
        bias = weights.arrays[f"{name}_bias"] if self.bias else None

        def compute(x: Floats) -> Floats:
            x = x - x.mean(axis=-1, keepdims=True) if self.center else x
            out = ops.rms_norm(x, weight, eps)
            if bias is not None:
                out += bias
            return out

        return compute

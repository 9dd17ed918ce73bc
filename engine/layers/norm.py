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

    def tensors(self, width: int) -> dict[str, Tensor]:
        """Of rows of `width` channels; the norm's own name comes before these."""
        return {"": Tensor((width,), "norms", "array")}

    def build(self, weights: Weights, name: str, eps: float) -> Callable[[Floats], Floats]:
        """(T, D) -> (T, D), a new array."""
        return partial(ops.rms_norm, weight=weights.arrays[name], eps=eps)

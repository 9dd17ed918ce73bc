"""Which experts a token goes to, and with which weights. Shapes: T tokens, D hidden, E experts, K chosen a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights


@dataclass(frozen=True)
class Router:
    """Chooses K experts a token: scores = score(x W^T), choice by scores + bias, weights from the scores."""

    score: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparse mixer"]
    bias: bool = False
    """A learned correction that takes part in the choice and not in the weights (aux-loss-free balancing)."""
    tolerance: float = 0.0
    """Of the sparse mixer: how far below the best, as a share of the larger size, others still take from its weight."""
    hash_vocab: int = 0
    """Rows of the table that fixes the choice by token id (V4's first layers); 0: the choice is by score."""
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """Experts are chosen within the `top_groups` best groups, a group being scored by its best (two) experts."""
    normalize: bool = True
    """Divide the chosen weights by their sum. With softmax scores, that is softmax after the choice."""
    scale: float = 1.0
    logit_bias: bool = False
    """A bias of the projection, which takes part in scores, choice and weights alike (gpt-oss)."""
    cap: float | None = None
    """Bounds what scores are of: cap tanh(x W^T / cap) (Laguna)."""
    least: float = 0.0
    """The sum that chosen weights are divided by is not below it (ERNIE 4.5)."""
    norm: bool = False
    """An RMS norm of its own comes before the projection (Gemma 4)."""
    expert_scale: bool = False
    """Each expert's weight is multiplied at last with a learned number of its own (Gemma 4)."""

    def tensors(self, hidden: int, experts: int, top_k: int) -> dict[str, Tensor]:
        table = {"router": Tensor((experts, hidden), "router")}
        if self.bias:
            table["router_bias"] = Tensor((experts,), "router", "array")
        if self.logit_bias:
            table["router_logit_bias"] = Tensor((experts,), "router", "array")
        if self.norm:
            table["router_norm"] = Tensor((hidden,), "router", "array")
        if self.expert_scale:
            table["router_scale"] = Tensor((experts,), "router", "array")
        if self.hash_vocab:
            table["router_table"] = Tensor((self.hash_vocab, top_k), "router", "array", touched=0, below=experts)
        return table


class Routing:
    """One layer's router."""

    def __init__(self, spec: Router, top_k: int, weights: Weights, norm_eps: float):
        self.spec = spec
        self.norm_eps = norm_eps
        self.norm = weights.arrays.get("router_norm")
        self.expert_scale = weights.arrays.get("router_scale")
        self.top_k = top_k
        self.matrix = weights.matrices["router"]
        self.bias = weights.arrays.get("router_bias")
        self.logit_bias = weights.arrays.get("router_logit_bias")
        self.table = weights.arrays.get("router_table")

    def __call__(self, x: Floats, ids: Ids) -> tuple[Ids, Floats]:
        """Chosen experts (T, K) and their weights (T, K) of tokens x (T, D) with these ids."""
        spec = self.spec
        if self.norm is not None:
            x = ops.rms_norm(x, self.norm, self.norm_eps)
        scores = self.matrix.matmul(x)  # (T, E)
        if self.logit_bias is not None:
            scores += self.logit_bias
        if spec.cap:
            scores = np.tanh(scores / np.float32(spec.cap)) * np.float32(spec.cap)
        if spec.score == "sparse mixer":
            return self._mix(scores)
        if spec.score == "softmax":
            ops.softmax(scores)
        elif spec.score == "sigmoid":
            ops.sigmoid(scores)
        else:
            scores = np.sqrt(ops.softplus(scores))
        chosen = self.table[ids] if self.table is not None else self._choose(scores)
        weights = scores[np.arange(len(scores))[:, None], chosen]
        if spec.normalize:
            total = np.add.reduce(weights, axis=1, keepdims=True)
            total += 1e-20
            np.maximum(total, spec.least, out=total)
            weights /= total
        weights *= spec.scale
        if self.expert_scale is not None:
            weights *= self.expert_scale[chosen]
        return chosen, weights

    def _mix(self, scores: Floats) -> tuple[Ids, Floats]:
        """SparseMixer (arXiv 2409.12136): the best of what is left K times, its weight a softmax over those near it."""
        rows, left = np.arange(len(scores)), scores.copy()
        chosen = np.empty((len(scores), self.top_k), np.int64)
        weights = np.empty(chosen.shape, np.float32)
        for k in range(self.top_k):
            chosen[:, k] = left.argmax(axis=1)
            best = left[rows, chosen[:, k], None]
            far = best - scores > self.spec.tolerance * np.maximum(np.abs(scores), best)
            near = np.exp(np.where(far, -np.inf, left - best))
            weights[:, k] = 1 / near.sum(axis=1)
            left[rows, chosen[:, k]] = -np.inf
        return chosen, weights

    def _choose(self, scores: Floats) -> Ids:
        spec = self.spec
        if self.bias is not None:
            scores = scores + self.bias
        if spec.groups > 1:
            grouped = scores.reshape(len(scores), spec.groups, -1)  # (T, groups, E / groups)
            best = 1 if spec.group_score == "max" else 2
            strength = np.partition(grouped, -best, axis=-1)[..., -best:].sum(axis=-1)  # (T, groups)
            masked = np.full_like(grouped, -np.inf)
            rows, kept = np.arange(len(scores))[:, None], ops.top_k(strength, spec.top_groups)
            masked[rows, kept] = grouped[rows, kept]
            scores = masked.reshape(scores.shape)
        return ops.top_k(scores, self.top_k)

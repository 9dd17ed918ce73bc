"""Feed-forward blocks: one SwiGLU, or a router's choice among many.

Shapes: T tokens, D hidden, E experts, K chosen a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from numoe.engine import ops
from numoe.engine.experts import ExpertStore
from numoe.engine.ops import Floats
from numoe.engine.spec import MixtureOfExperts, Router, SwiGLU
from numoe.engine.weights import Weights
from numoe.quant.activations import Activations
from numoe.quant.kernels import FEW
from numoe.quant.qtensor import QTensor, matmul_all

Ids = NDArray[np.int64]


class Dense:
    """down(silu(gate x) * up x)."""

    def __init__(self, spec: SwiGLU, weights: Weights):
        self.spec = spec
        self.w = weights

    def __call__(self, x: Floats, ids: Ids | None = None) -> Floats:
        """(T, D) -> (T, D); token ids play no part."""
        return feed_forward(self.spec, [(self.w, Activations(x))])[0]


def feed_forward(spec: SwiGLU, parts: Sequence[tuple[Weights, Activations]]) -> list[Floats]:
    """Several blocks of one kind at once, each with its own tokens: (T, D) each."""
    bounds = accumulate((len(x) for _, x in parts), initial=0)
    rows = [slice(a, b) for a, b in pairwise(bounds)]
    gate, up = (np.empty((rows[-1].stop, spec.width), np.float32) for _ in range(2))
    products: list[tuple[QTensor, Activations, Floats | None]] = []
    for (w, x), own in zip(parts, rows, strict=True):
        products += [(w.matrices["gate"], x, gate[own]), (w.matrices["up"], x, up[own])]
    matmul_all(products)
    if spec.bias:
        for (w, _), own in zip(parts, rows, strict=True):
            gate[own] += w.arrays["gate_bias"]
            up[own] += w.arrays["up_bias"]
    hidden = Activations(ops.swiglu(gate, up, spec.limit))
    outs = matmul_all([(w.matrices["down"], hidden.take(own), None) for (w, _), own in zip(parts, rows, strict=True)])
    if spec.bias:
        for (w, _), out in zip(parts, outs, strict=True):
            out += w.arrays["down_bias"]
    return outs


class Routing:
    """Which experts a token goes to, and with which weights."""

    def __init__(self, spec: Router, top_k: int, weights: Weights):
        self.spec = spec
        self.top_k = top_k
        self.matrix = weights.matrices["router"]
        self.bias = weights.arrays.get("router_bias")
        self.table = weights.arrays.get("router_table")

    def __call__(self, x: Floats, ids: Ids) -> tuple[Ids, Floats]:
        """Chosen experts (T, K) and their weights (T, K) of tokens x (T, D) with these ids."""
        spec = self.spec
        scores = self.matrix.matmul(x)  # (T, E)
        if spec.score == "softmax":
            ops.softmax(scores)
        elif spec.score == "sigmoid":
            ops.sigmoid(scores)
        else:
            scores = np.sqrt(ops.softplus(scores))
        chosen = self.table[ids] if self.table is not None else self._choose(scores)
        weights = np.take_along_axis(scores, chosen, axis=1)
        if spec.normalize:
            weights /= weights.sum(axis=1, keepdims=True) + np.float32(1e-20)
        weights *= np.float32(spec.scale)
        return chosen, weights

    def _choose(self, scores: Floats) -> Ids:
        spec = self.spec
        if self.bias is not None:
            scores = scores + self.bias
        if spec.groups > 1:
            grouped = scores.reshape(len(scores), spec.groups, -1)
            best = 1 if spec.group_score == "max" else 2
            strength = np.partition(grouped, -best, axis=-1)[..., -best:].sum(axis=-1)  # (T, groups)
            masked = np.full_like(grouped, -np.inf)
            rows, kept = np.arange(len(scores))[:, None], ops.top_k(strength, spec.top_groups)
            masked[rows, kept] = grouped[rows, kept]
            scores = masked.reshape(scores.shape)
        return ops.top_k(scores, self.top_k)


class Mixture:
    """sum_k weight_k expert_k(x), plus the shared expert."""

    def __init__(self, spec: MixtureOfExperts, weights: Weights, experts: ExpertStore, layer: int):
        self.spec = spec
        self.route = Routing(spec.router, spec.top_k, weights)
        self.shared = Dense(spec.shared, weights.below("shared.")) if spec.shared else None
        self.experts = experts
        self.layer = layer
        self.following: Mixture | None = None
        """The next mixture, if its choice is to be guessed from this one's input."""
        self.chosen: Ids = np.empty((0, spec.top_k), np.int64)
        """The latest choice, (T, K)."""

    def __call__(self, x: Floats, ids: Ids) -> Floats:
        """(T, D) and the tokens' ids (T,) -> (T, D). Every chosen expert runs once, on all its tokens."""
        chosen, weights = self.route(x, ids)
        self.chosen = chosen
        activations = Activations(x)
        count, k = chosen.shape
        order = np.argsort(chosen, axis=None, kind="stable")
        bounds = np.searchsorted(chosen.ravel()[order], np.arange(self.spec.experts + 1))
        # Each choice has a place of its own, so that the sum over K below does not depend on the experts' order.
        outputs = np.empty((count * k, x.shape[1]), np.float32)
        with self.experts.stream(self.layer, np.unique(chosen)) as arriving:
            if self.following:
                self.following.foresee(x, ids)
            shared = self.shared(x) if self.shared else None
            for batch in arriving:
                # Few tokens leave an expert little work: all that are there share the threads then.
                for part in [batch] if count <= FEW else [[one] for one in batch]:
                    places = [order[bounds[e] : bounds[e + 1]] for e, _ in part]
                    blocks = [
                        (Weights(matrices), activations.take(own // k))
                        for (_, matrices), own in zip(part, places, strict=True)
                    ]
                    for own, out in zip(places, feed_forward(self.spec.expert, blocks), strict=True):
                        outputs[own] = out
        out = np.matmul(weights[:, None], outputs.reshape(count, k, -1))[:, 0]
        if shared is not None:
            out += shared
        return out

    def foresee(self, x: Floats, ids: Ids) -> None:
        """Have the experts fetched ahead that these tokens will probably take here.

        `x` (T, D) is the input of the mixture before: what the layers between add to it is small.
        """
        if self.experts.expects(self.layer):
            self.experts.expect(self.layer, np.unique(self.route(x, ids)[0]))

    def foresee_exactly(self, ids: Ids) -> None:
        """The same where a table tells the experts of the tokens' ids alone, before any layer has run."""
        if self.route.table is not None and self.experts.expects(self.layer):
            self.experts.expect(self.layer, np.unique(self.route.table[ids]))

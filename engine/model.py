"""The assembler: a ModelSpec and its weights become a decoder. There is one, for every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from numoe.engine import ops
from numoe.engine.attention import GroupedQuery
from numoe.engine.csa import Compressed
from numoe.engine.experts import ExpertStore
from numoe.engine.kvcache import CHUNK, Cache, Rows
from numoe.engine.mla import Latent
from numoe.engine.moe import Dense, Ids, Mixture
from numoe.engine.ops import Floats
from numoe.engine.residual import Hyper, HyperHead, Mixer, Plain
from numoe.engine.rope import Rotation
from numoe.engine.spec import (
    CompressedAttention,
    FeedForward,
    GroupedQueryAttention,
    HyperConnections,
    LayerSpec,
    ModelSpec,
    MultiHeadLatentAttention,
    PlainResidual,
    Rope,
    SwiGLU,
)
from numoe.engine.weights import Weights

# Kind of specification -> what computes it.
ATTENTION: dict[type, Callable[..., Callable[[Floats, Mapping[str, Rows], int], Floats]]] = {
    GroupedQueryAttention: GroupedQuery,
    MultiHeadLatentAttention: Latent,
    CompressedAttention: Compressed,
}


class Layer:
    """state -> state: attention, then feed-forward, each normed and joined to the residual."""

    def __init__(self, spec: LayerSpec, weights: Weights, rotation: Rotation, norm_eps: float, ffn: Dense | Mixture):
        self.norm_eps = norm_eps
        self.attention_norm = weights.arrays["attention_norm"]
        self.ffn_norm = weights.arrays["ffn_norm"]
        self.attention = ATTENTION[type(spec.attention)](
            spec.attention, weights.below("attention."), rotation, norm_eps
        )
        self.ffn = ffn
        self.attention_residual = _mixer(spec.residual, weights.below("attention_residual."), norm_eps)
        self.ffn_residual = _mixer(spec.residual, weights.below("ffn_residual."), norm_eps)

    def __call__(self, state: Floats, cache: Mapping[str, Rows], ids: Ids, start: int) -> Floats:
        x, carried = self.attention_residual.enter(state)
        x = self.attention(ops.rms_norm(x, self.attention_norm, self.norm_eps), cache, start)
        state = self.attention_residual.leave(state, x, carried)
        x, carried = self.ffn_residual.enter(state)
        x = self.ffn(ops.rms_norm(x, self.ffn_norm, self.norm_eps), ids)
        return self.ffn_residual.leave(state, x, carried)


def _mixer(spec: PlainResidual | HyperConnections, weights: Weights, norm_eps: float) -> Mixer:
    return Plain() if isinstance(spec, PlainResidual) else Hyper(spec, weights, norm_eps)


def _feed_forward(spec: FeedForward, weights: Weights, experts: ExpertStore | None, layer: int) -> Dense | Mixture:
    if isinstance(spec, SwiGLU):
        return Dense(spec, weights)
    assert experts is not None
    return Mixture(spec, weights, experts, layer)


class Decoder:
    """Token ids and a cache -> logits.

    experts: the routed experts, of a spec that has them; the other weights are in `weights`.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, experts: ExpertStore | None = None):
        self.spec = spec
        self.embedding = weights.matrices["embed"]
        self.head = self.embedding if spec.tied else weights.matrices["head"]
        self.norm = weights.arrays["norm"]
        rotations: dict[Rope, Rotation] = {}
        self.layers = []
        for i, (layer, part) in enumerate(zip(spec.layers, weights.numbered("layers.", len(spec.layers)), strict=True)):
            rotation = rotations.setdefault(layer.attention.rope, Rotation(layer.attention.rope))
            ffn = _feed_forward(layer.ffn, part.below("ffn."), experts, i)
            self.layers.append(Layer(layer, part, rotation, spec.norm_eps, ffn))
        self.mixtures = [layer.ffn for layer in self.layers if isinstance(layer.ffn, Mixture)]
        for mixture, following in pairwise(self.mixtures):
            mixture.following = following if following.route.table is None else None
        self.trace: Callable[[int, int, Ids], None] | None = None
        """Called with (position of the first token, layer, chosen experts (T, K)) after each mixture."""
        residual = spec.layers[-1].residual
        self.streams = residual.streams if isinstance(residual, HyperConnections) else 0
        self.collapse: Callable[[Floats], Floats] | None = None
        if isinstance(residual, HyperConnections):
            self.collapse = HyperHead(residual, weights.below("head_residual."), spec.norm_eps)

    def cache(self, context: int) -> Cache:
        """An empty cache for up to `context` tokens, allocated at once."""
        return Cache([layer.attention for layer in self.spec.layers], context)

    def forward(self, ids: Ids, cache: Cache, *, last: bool = False) -> Floats:
        """Read tokens (T,), at most CHUNK, and give the logits after each, (T, vocab), or only the last's (1, vocab).

        The cache's position moves on when all is computed: an interrupted pass leaves it as it was.
        """
        assert len(ids) <= CHUNK
        start = cache.position
        state: Any = self.embedding.rows(ids)  # (T, D)
        if self.streams:
            state = np.repeat(state[:, None], self.streams, axis=1)  # (T, N, D)
        for mixture in self.mixtures:
            mixture.foresee_exactly(ids)
        try:
            for layer, rows in zip(self.layers, cache.layers, strict=True):
                state = layer(state, rows, ids, start)
                if self.trace and isinstance(layer.ffn, Mixture):
                    self.trace(start, layer.ffn.layer, layer.ffn.chosen)
            cache.position = start + len(ids)
        finally:
            cache.rewind(cache.position)  # drops the rows of a pass that did not finish
        if last:
            state = state[-1:]
        if self.collapse:
            state = self.collapse(state)
        return self.head.matmul(ops.rms_norm(state, self.norm, self.spec.norm_eps))

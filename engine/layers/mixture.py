"""Mixture of experts: sum_k weight_k expert_k(x), plus shared experts that every token passes through.

Shapes: T tokens, D hidden, E experts, K chosen a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numoe.engine.layers import ops
from numoe.engine.layers.block import Compute, Kind, Shared
from numoe.engine.layers.ffn import FeedForward
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.router import Router, Routing
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor, prefixed
from numoe.engine.layers.weights import Weights


@dataclass(frozen=True)
class MixtureOfExperts(Kind):
    """K of E experts a token, weighted by the router."""

    experts: int
    top_k: int
    expert: FeedForward
    router: Router
    shared: FeedForward | None = None
    shared_gate: bool = False
    """The shared expert's output is multiplied with the sigmoid of one projection of x (Qwen2-MoE)."""
    expert_norm: bool = False
    """An RMS norm comes before the experts, and not before the router (Gemma 4)."""
    scale: float = 1.0
    """The sum of what routed and shared experts give is multiplied with it."""
    weighted_inputs: bool = False
    """A chosen expert's input is multiplied with its weight, not its output (Llama 4)."""
    latent: int | None = None
    """Routed experts work on so many channels, projected from and back to the hidden ones (Nemotron 3 Super)."""

    @property
    def routed(self) -> tuple[int, int]:
        return self.experts, self.top_k

    @property
    def label(self) -> str:
        return "hash-routed" if self.router.hash_vocab else "routed"

    @property
    def details(self) -> str:
        return f"{self.top_k} of {self.experts} a token" + (", and a shared one" if self.shared else "")

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        table = self.router.tensors(hidden, self.experts, self.top_k)
        if self.shared:
            table |= prefixed("shared.", self.shared.tensors(hidden, "shared experts"))
        if self.shared_gate:
            table["shared_gate"] = Tensor((1, hidden), "router")
        if self.expert_norm:
            table["experts_norm"] = Tensor((hidden,), "norms", "array")
        if self.latent:
            table["latent"] = Tensor((self.latent, hidden), "shared experts")
            table["hidden"] = Tensor((hidden, self.latent), "shared experts")
        of_expert = self.expert.tensors(self.latent or hidden, "experts")
        for name, tensor in of_expert.items():
            if tensor.held == "array":  # a bias of all experts lies in one array
                touched = self.top_k * tensor.size
                table[f"experts.{name}"] = Tensor(
                    (self.experts, *tensor.shape), "experts' biases", "array", touched=touched
                )
        shapes = {name: tensor.shape for name, tensor in of_expert.items() if tensor.held != "array"}
        for e in range(self.experts):
            for name, shape in shapes.items():
                table[f"experts.{e}.{name}"] = Tensor(shape, "experts", expert=e, touched=None if e < self.top_k else 0)
        return table

    def build(self, weights: Weights, shared: Shared) -> Compute:
        return Mixture(self, weights, shared)


class Mixture:
    """One layer's mixture."""

    def __init__(self, spec: MixtureOfExperts, weights: Weights, shared: Shared):
        assert shared.bank is not None
        self.spec = spec
        self.route = Routing(spec.router, spec.top_k, weights, shared.norm_eps)
        self.norm = weights.arrays["experts_norm"] if spec.expert_norm else None
        self.dense = spec.shared.build(weights.below("shared."), shared) if spec.shared else None
        self.gate = weights.matrices["shared_gate"] if spec.shared_gate else None
        self.latent, self.hidden = (weights.matrices.get(name) for name in ("latent", "hidden"))
        self.bank = shared.bank
        biases = {n.removeprefix("experts."): a for n, a in weights.arrays.items() if n.startswith("experts.")}
        self.bank.define(shared.layer, spec.expert.forward, biases)
        self.layer = shared.layer
        self.shared = shared
        self.guess_next: Callable[[Floats, Step], None] | None = None
        if self.route.table is not None:
            shared.beginnings.append(self._prefetch_by_ids)
        elif shared.mixture_before is not None:
            shared.mixture_before.guess_next = self._prefetch_by_guess
        shared.mixture_before = self

    def __call__(self, x: Floats, step: Step) -> Floats:
        """(T, D) -> (T, D)."""
        chosen, weights = self.route(x, step.ids)
        if self.shared.trace:
            for segment in step.segments:
                self.shared.trace(segment.start, self.layer, chosen[segment.rows])
        always: list[Floats] = []

        def meanwhile() -> None:
            if self.guess_next:
                self.guess_next(x, step)
            if self.dense:
                always.append(self._always(x, step))

        inputs = x if self.norm is None else ops.rms_norm(x, self.norm, self.shared.norm_eps)
        if self.latent is not None:
            inputs = self.latent.matmul(inputs)
        if self.spec.weighted_inputs:
            rows = (inputs[:, None] * weights[..., None]).reshape(-1, inputs.shape[-1])  # (T * K, D)
            outputs = self.bank.apply(self.layer, rows, chosen.reshape(-1, 1), meanwhile)
            weights = np.ones_like(weights)
        else:
            outputs = self.bank.apply(self.layer, inputs, chosen, meanwhile)
        # (T * K, D), or so many channels as are latent
        out = np.matmul(weights[:, None], outputs.reshape(*chosen.shape, -1))[:, 0]  # (T, D)
        if self.hidden is not None:
            out = self.hidden.matmul(out)
        for one in always:
            out += one
        if self.spec.scale != 1:
            out *= np.float32(self.spec.scale)
        return out

    def _always(self, x: Floats, step: Step) -> Floats:
        """What the shared expert gives, (T, D)."""
        assert self.dense
        out = self.dense(x, step)
        if self.gate is not None:
            out *= ops.sigmoid(self.gate.matmul(x))
        return out

    def _prefetch_by_guess(self, x: Floats, step: Step) -> None:
        """Have the experts fetched ahead that these tokens will probably take here.

        `x` (T, D) is the input of the mixture before: what the layers between add to it is small.
        """
        if self.bank.wants(self.layer):
            self.bank.prefetch(self.layer, self.route(x, step.ids)[0])

    def _prefetch_by_ids(self, step: Step) -> None:
        """The same where a table tells the experts of the tokens' ids alone, before any layer has run."""
        if self.route.table is not None and self.bank.wants(self.layer):
            self.bank.prefetch(self.layer, self.route.table[step.ids])

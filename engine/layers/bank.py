"""Where a mixture's routed experts are computed: in memory, from disk, watched, elsewhere.

The boundary is "apply these experts to these rows", so that whoever has an expert's weights can compute it where they
are. What comes back has a place for every choice of every token, so that no sum depends on the order or the place in
which experts were computed: the output is the same, bit for bit, for every bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.weights import Weights
from numoe.quant.compute.activations import Activations

Formula = Callable[[Sequence[tuple[Weights, Activations]]], list[Floats]]
"""What experts compute: several at once, each with its own weights and tokens (T, D), give (T, D) each."""


class ExpertBank(Protocol):
    """The routed experts of all layers."""

    def define(self, layer: int, formula: Formula, biases: Mapping[str, Floats]) -> None:
        """Say what the experts of a layer compute, before any is applied; biases (E, width) by name."""
        ...

    def apply(self, layer: int, x: Floats, chosen: Ids, meanwhile: Callable[[], None]) -> Floats:
        """Row t * K + k of the result (T * K, D) is expert chosen[t, k] of a layer, applied to x[t].

        Args:
            x: (T, D).
            chosen: (T, K).
            meanwhile: called once, when all that takes time without computing has begun.

        Raises:
            InputError: an expert cannot be had.
        """
        ...

    def wants(self, layer: int) -> bool:
        """Whether it pays to say beforehand what `apply` will be asked for in a layer."""
        ...

    def prefetch(self, layer: int, chosen: Ids) -> None:
        """Say that a layer will probably ask for these experts (T, K). Changes speed alone."""
        ...

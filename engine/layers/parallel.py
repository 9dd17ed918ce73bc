"""Blocks beside each other, all of the same x: sum_i after_i(f_i(before_i(x))).

Attention and feed-forward (arXiv 2204.02311, section 2), or a dense and a routed feed-forward (Gemma 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from numoe.engine.layers.block import Block, Compute, Kind, Shared
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.state import StateSpec
from numoe.engine.layers.step import Step
from numoe.engine.layers.tensor import Tensor
from numoe.engine.layers.weights import Weights


@dataclass(frozen=True)
class Parallel(Kind):
    """Each block has its own norms and weights; states of two may not have the same name."""

    blocks: tuple[Block, ...]

    @property
    def routed(self) -> tuple[int, int]:
        return max(block.kind.routed for block in self.blocks)

    @property
    def label(self) -> str:
        return " beside ".join(block.kind.label for block in self.blocks)

    def parts(self, name: str) -> Iterator[tuple[str, Kind]]:
        for block in self.blocks:
            yield from block.kind.parts(block.name)

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        return {name: tensor for block in self.blocks for name, tensor in block.tensors(hidden).items()}

    def state(self) -> Mapping[str, StateSpec]:
        return {name: one for block in self.blocks for name, one in block.kind.state().items()}

    def build(self, weights: Weights, shared: Shared) -> Compute:
        computed = [block.build(weights, shared) for block in self.blocks]

        def compute(x: Floats, step: Step) -> Floats:
            first, *others = computed
            out = first(x, step)
            for one in others:
                out += one(x, step)
            return out

        return compute

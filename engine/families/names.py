"""Where checkpoints keep the tensors of a family, and what a family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numoe.engine.layers.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps a tensor: a name with {layer} and {expert} filled in.

    `stacked`: the experts of a layer are one tensor, this expert its slice along the first axis.
    `part` (i, n): the tensor is the i-th of n equal row ranges of the stored one (fused gate_up).
    """

    name: str
    stacked: bool = False
    part: tuple[int, int] = (0, 1)


Names = Mapping[str, tuple[Source, ...]]
"""Canonical name with {layer}/{expert} -> the places it may be stored at, tried in order."""


@dataclass(frozen=True)
class Family:
    """A model family: a pure function from config.json to a ModelSpec, and its tensors' names.

    `ignored`: regular expressions of stored tensors that the decoder does not need (drafting heads, tables
    that are recomputed). Any other tensor without a place in the spec is refused when loading.
    """

    spec: Callable[[dict[str, Any]], ModelSpec]
    names: Names
    ignored: tuple[str, ...] = ()

    def sources(self, canonical: str) -> Iterator[tuple[Source, int | None]]:
        """The places where a tensor may be, names filled in, with the expert's index if it is one's."""
        parts = canonical.split(".")
        layer = expert = None
        for i in range(len(parts) - 1):
            if parts[i] == "layers":
                layer, parts[i + 1] = int(parts[i + 1]), "{layer}"
            elif parts[i] == "experts":
                expert, parts[i + 1] = int(parts[i + 1]), "{expert}"
        for source in self.names[".".join(parts)]:
            filled = source.name.format(layer=layer, expert=expert)
            yield Source(filled, source.stacked, source.part), expert

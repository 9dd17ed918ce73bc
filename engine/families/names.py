"""Where checkpoints keep the tensors of a family, and what a family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numoe.engine.config import Config
from numoe.engine.layers.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps a tensor: a name with {layer} and {expert} filled in.

    `stacked`: the experts of a layer are one tensor, this expert its slice along the first axis.
    `fused`: the stored tensor holds the rows of these tensors one after another, itself among them; their canonical
    names differ from its own in the last word.
    """

    name: str
    stacked: bool = False
    fused: tuple[str, ...] = ()


Names = Mapping[str, tuple[Source, ...]]
"""Canonical name with {layer}/{expert} -> the places it may be stored at, tried in order."""


@dataclass(frozen=True)
class Family:
    """A model family: a pure function from config.json to a ModelSpec, and its tensors' names.

    `defaults`: what keys that a config.json leaves out stand for, as in transformers.
    `ignored`: regular expressions of stored tensors that the decoder does not need (drafting heads, tables
    that are recomputed). Any other tensor without a place in the spec is refused when loading.
    """

    reader: Callable[[Config], ModelSpec]
    names: Names
    defaults: Mapping[str, Any]
    ignored: tuple[str, ...] = ()

    def spec(
        self, values: Mapping[str, Any], where: str = "config.json", spelt: Callable[[str], str] = str
    ) -> ModelSpec:
        """What a config.json describes.

        Args:
            where, spelt: what errors call the file and a key.

        Raises:
            InputError: a key is missing, of a wrong type, or says what is not computed.
        """
        return self.reader(Config(values, self.defaults, where, spelt))

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
            yield replace(source, name=source.name.format(layer=layer, expert=expert)), expert

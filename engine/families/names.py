"""Where checkpoints keep the tensors of a family, and what a family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from numoe.engine.families.config import Arrangement, Config
from numoe.engine.layers.block import Layer
from numoe.engine.layers.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps a tensor: a name with {layer}, {expert} and {part} filled in.

    `stacked`: the experts of a layer are one tensor, this expert its slice along the first axis.
    `fused`: the stored tensor holds the rows of these matrices (of arrays: the last axis) one after another, itself
    among them, or with `alternating` in turn; their canonical names differ from its own in the last word.
    `transposed`: the matrix is stored (in, out). It is turned when it is read, and held in as many bytes.
    `either`: it is transposed only where its shape is not the right one as it is.
    `flat`: the rows of a stack of matrices, or the one row of a vector, are the rows of this matrix.
    `made`: what makes the array of what is stored.
    """

    name: str
    stacked: bool = False
    fused: tuple[str, ...] = ()
    alternating: bool = False
    transposed: bool = False
    either: bool = False
    flat: bool = False
    made: Callable[[NDArray[Any]], NDArray[Any]] | None = None


Names = Mapping[str, tuple[Source, ...]]
"""Canonical name with {layer}/{expert}, of a part of a table with {part} -> the places it may be stored at, tried in
order."""


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says: the keys below its architecture's name, and its tensors' shapes by name.

    `divisors`: the values of the first of `gguf.DIVISORS` that is among the tensors.
    """

    path: Path
    keys: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    divisors: Sequence[float] | None = None


@dataclass(frozen=True)
class Gguf:
    """How GGUF files tell models of a family.

    `architecture`: their general.architecture.
    `names`: what the tensors are called, mostly of `gguf.names`.
    `keys`: key below the architecture -> config.json key, beside those that all have.
    `optional`: of all keys those that may be left out, and what that means.
    `given`: config.json keys that every such file means and none says.
    `unread`: keys that restate others, or that `settle` reads.
    `settle`: puts into a config what follows from several keys or from tensors; may raise InputError.
    `arranged`: as in `Config`, where converters store weights in another order.
    `biases`: the projections that have one where queries have.
    `marks`: what holds for its files alone. Of several families of an architecture the one with the most that all
    hold is meant.
    """

    architecture: str
    names: Names
    keys: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    settle: Callable[[dict[str, Any], GgufFile], None] = lambda config, file: None
    arranged: Callable[[GgufFile], Arrangement] = lambda file: {}
    biases: str = "qkvo"
    marks: tuple[Callable[[GgufFile], bool], ...] = ()


NEXT: Names = {
    **{
        name: (Source(f"model.layers.{{layer}}.{name}.weight"), Source(f"blk.{{layer}}.nextn.{name}.weight"))
        for name in ("eh_proj", "enorm", "hnorm")
    },
    "norm": (
        Source("model.layers.{layer}.shared_head.norm.weight"),
        Source("blk.{layer}.nextn.shared_head_norm.weight"),
        Source("blk.{layer}.layer_output_norm.weight"),
    ),
}
"""What DeepSeek-V3 and others call their own weights of a head that predicts further, and what GGUF files do."""


def _usual_layer(config: Config, spec: ModelSpec) -> Layer:
    """The last that has no recurrent state, and an indexer of its own where layers share one."""

    def states(layer: Layer) -> list[bool]:
        return [state.only_now for block in layer for state in block.kind.state().values()]

    return max(reversed(spec.layers), key=lambda layer: (not any(states(layer)), len(states(layer))))


@dataclass(frozen=True)
class Head:
    """A model's own head that only guesses tokens, where a checkpoint has one.

    `names`: of its own weights, {layer} the number after the last layer, {last} that of its last layer; and those of
    its layers, `layers.0` and so on, that have names of their own.
    `place`: what names of its layers begin with by the model's table, and what they do, {number} from 0.
    """

    names: Names = field(default_factory=lambda: NEXT)
    place: tuple[str, str] = ("", "")

    def sources(self, family: Family, canonical: str, layers: int, count: int, expert: int | None) -> Iterator[Source]:
        """The places where a tensor of the head may be, which is of `count` layers after so many of the model."""
        own = self.names.get(canonical, ())
        yield from (replace(source, name=source.name.format(layer=layers, last=count - 1)) for source in own)
        if canonical.startswith("layers."):
            _, number, rest = canonical.split(".", 2)
            layer = layers + int(number)
            usual, here = (place.format(layer=layer, number=number) for place in self.place)
            for source in family.sources(f"layers.{layer}.{rest}", layer, expert):
                yield replace(source, name=source.name.replace(usual, here, 1))


@dataclass(frozen=True)
class Mtp(Head):
    """One that predicts one token further, see `numoe.engine.mtp`.

    Its own weights are `eh_proj`, or `e_proj` and `h_proj`; `enorm`, `hnorm`, and `norm` (else the model's).
    `layer`: what its layer is.
    `normed`: it reads states after the model's last norm, and its own after its own.
    """

    layer: Callable[[Config, ModelSpec], Layer] = _usual_layer
    normed: bool = True


@dataclass(frozen=True)
class Drafts:
    """A head that guesses a block of tokens at once, as data, see `numoe.engine.dspark`."""

    layers: tuple[Layer, ...]
    size: int
    """Tokens of a block."""
    noise: int
    """The token that stands for those that are not known."""
    targets: tuple[int, ...]
    """The model's layers that it reads."""
    rank: int
    """Channels of the token before, from which a token is corrected."""
    window: int
    """How many of the latest tokens it attends to."""


@dataclass(frozen=True)
class DSpark(Head):
    """One that guesses a block, see `numoe.engine.dspark`.

    Its own weights are `main_proj`, `main_norm`, `markov.embed`, `markov.head`, `confidence` and `norm`.
    `drafts`: what one of so many layers is; raises InputError where the config says nothing of it, or something else.
    """

    drafts: Callable[[Config, ModelSpec, int], Drafts] = field(kw_only=True)


@dataclass(frozen=True)
class Family:
    """A model family: a pure function from config.json to a ModelSpec, and its tensors' names.

    `model_types`: what config.json calls it; a model of several parts has its decoder's config in `text_config`.
    `defaults`: what keys that a config.json leaves out stand for, as in transformers.
    `ignored`: regular expressions of stored tensors that the decoder does not need (drafting heads, tables
    that are recomputed). Any other tensor without a place in the spec is refused when loading.
    `title`: the models that people know it by, as the README lists them.
    `gguf`: the architectures that GGUF files of it have.
    `arranged`: as in `Config`.
    `mlx`: whether mlx-lm stores its weights as they are, but for their codes: of others it moves or shifts some.
    `mtp`, `dspark`: where checkpoints keep a head that guesses tokens.
    """

    title: str
    model_types: tuple[str, ...]
    reader: Callable[[Config], ModelSpec]
    names: Names
    defaults: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    gguf: tuple[Gguf, ...] = ()
    arranged: Arrangement = field(default_factory=dict)
    mlx: bool = False
    mtp: Mtp = field(default_factory=Mtp)
    dspark: DSpark | None = None

    def spec(
        self, values: Mapping[str, Any], where: str = "config.json", spelt: Callable[[str], str] = str
    ) -> ModelSpec:
        """What a config.json describes.

        Args:
            where, spelt: what errors call the file and a key.

        Raises:
            InputError: a key is missing, of a wrong type, or says what is not computed.
        """
        return self.reader(self.config(values, where, spelt))

    def config(
        self, values: Mapping[str, Any], where: str = "config.json", spelt: Callable[[str], str] = str
    ) -> Config:
        """The config of the decoder. Whether its head is tied says the whole, where that says it."""
        whole = Config(values, {}, where, spelt)
        text = whole.table("text_config")
        if not text:
            return Config(values, self.defaults, where, spelt, self.arranged)
        merged = text | {"model_type": values.get("model_type")}
        if values.get("tie_word_embeddings") is not None:  # transformers saves that of the text with its default
            merged["tie_word_embeddings"] = values["tie_word_embeddings"]
        return Config(merged, self.defaults, where, lambda key: spelt(f"text_config.{key}"))

    def sources(self, canonical: str, layer: int | None = None, expert: int | None = None) -> Iterator[Source]:
        """The places where a tensor may be, names filled in; after the family's own its canonical name, in conversions.

        layer, expert: those in its name, as `ModelSpec.listing` tells them.
        """
        known = canonical
        if layer is not None:
            known = known.replace(f"layers.{layer}.", "layers.{layer}.", 1)
        if expert is not None:
            known = known.replace(f".experts.{expert}.", ".experts.{expert}.", 1)
        begin, _, part = known.rpartition(".")
        if part.isdigit():
            known = f"{begin}.{{part}}"
        for source in self.names[known]:
            yield replace(source, name=source.name.format(layer=layer, expert=expert, part=part))
            if self.mlx and ".experts.{expert}." in source.name:
                switched = source.name.replace(".experts.{expert}.", ".switch_mlp.").format(layer=layer)
                yield replace(source, name=switched, stacked=True)
        yield Source(canonical)
        yield Source(f"{canonical}.weight")  # a part of a stacked tensor, in conversions up to format 4

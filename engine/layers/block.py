"""What a layer is made of: blocks in a row, each a kind between its norms, joined to the residual stream.

A kind (an attention, a recurrent mixer, a feed-forward) is one file: its formula, its frozen dataclass, and the methods
below, which loading, planning, `show` and the decoder all use, so that an estimate cannot drift from the engine.

Letters used in shapes: T tokens, D hidden, H heads, E experts, K chosen experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numoe.engine.layers.bank import ExpertBank
from numoe.engine.layers.norm import Norm
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.residual import Residual
from numoe.engine.layers.rope import Angles, Rope, Rotation
from numoe.engine.layers.state import StateSpec
from numoe.engine.layers.step import Company, Segment, Step
from numoe.engine.layers.tensor import Tensor, prefixed
from numoe.engine.layers.weights import Weights

Compute = Callable[[Floats, Step], Floats]
"""(T, D) of a pass -> (T, D)."""


class Kind(ABC):
    """What stands between two norms, as data."""

    @property
    def routed(self) -> tuple[int, int]:
        """Routed experts, and how many of them a token takes."""
        return 0, 0

    @property
    @abstractmethod
    def label(self) -> str:
        """What `show` calls it."""

    @property
    def details(self) -> str:
        """What `show` says of it besides, "" for nothing."""
        return ""

    @abstractmethod
    def tensors(self, hidden: int) -> dict[str, Tensor]:
        """Its weights by name."""

    def parts(self, name: str) -> Iterator[tuple[str, Kind]]:
        """What `show` counts of a block of this kind and name: itself, or the blocks that it is made of."""
        yield name, self

    def state(self) -> Mapping[str, StateSpec]:
        """What it keeps of a sequence, by name."""
        return {}

    @abstractmethod
    def build(self, weights: Weights, shared: Shared) -> Compute:
        """What computes it. Raises InputError when its weights do not go together."""


@dataclass(frozen=True)
class Block:
    """A kind with its norms; canonical names begin with `name`."""

    name: str
    kind: Kind
    before: Norm | None = Norm()
    after: Norm | None = None
    scale: bool = False
    """The stream is multiplied with one learned number after it (Gemma 4)."""
    join: Residual | None = None
    """How it joins the stream; None: as the model's blocks do."""

    def tensors(self, hidden: int) -> dict[str, Tensor]:
        """Its weights: NAME_norm, NAME_post_norm, NAME_scale, and NAME.x for each x of its kind."""
        table = prefixed(f"{self.name}_norm", self.before.tensors(hidden)) if self.before else {}
        if self.after:
            table |= prefixed(f"{self.name}_post_norm", self.after.tensors(hidden))
        if self.scale:
            table[f"{self.name}_scale"] = Tensor((1,), "norms", "array")
        return table | prefixed(f"{self.name}.", self.kind.tensors(hidden))

    def build(self, weights: Weights, shared: Shared) -> Compute:
        """What computes the kind between its norms, of the weights of its layer."""
        before = self.before.build(weights, f"{self.name}_norm", shared.norm_eps) if self.before else None
        after = self.after.build(weights, f"{self.name}_post_norm", shared.norm_eps) if self.after else None
        inner = self.kind.build(weights.below(f"{self.name}."), shared)

        def compute(x: Floats, step: Step) -> Floats:
            y = inner(before(x) if before else x, step)
            return after(y) if after else y

        return compute


Layer = tuple[Block, ...]


class Foreseeing(Protocol):
    """A mixture, whose input (T, D) is near enough to that of the next one to guess its experts from."""

    guess_next: Callable[[Floats, Step], None] | None


@dataclass
class Shared:
    """What the kinds of one decoder have in common, and what they tell it while they are built."""

    norm_eps: float
    bank: ExpertBank | None = None
    layer: int = 0
    """Number of the layer that is being built."""
    block: int = 0
    """Number of the block that is being built, counted through all layers."""
    mixture_before: Foreseeing | None = None
    """The last mixture that was built."""
    beginnings: list[Callable[[Step], None]] = field(default_factory=list)
    """Called before a pass."""
    before: Floats | None = None
    """What a block of drafts follows, (S, D), see `DraftAttention`."""
    trace: Callable[[int, int, Ids], None] | None = None
    """Called with (position of the first token, layer, chosen experts (T, K)) of each sequence by every mixture."""
    _rotations: dict[Rope, Rotation] = field(default_factory=dict)

    def states(self) -> Callable[[Segment | Company], Mapping[str, Any]]:
        """What gives the states of the block that is being built, of one sequence, or the rows of several."""
        block = self.block

        def of(some: Segment | Company) -> Mapping[str, Any]:
            return some.states(block)

        return of

    def rotation(self, rope: Rope) -> Rotation:
        """One for all layers of equal `rope`."""
        if rope not in self._rotations:
            self._rotations[rope] = Rotation(rope)
        return self._rotations[rope]


def angles(rotation: Rotation, step: Step) -> Angles:
    """Of a pass's positions, computed once for all layers of equal rope."""
    return step.once(rotation, rotation.angles, step.positions)

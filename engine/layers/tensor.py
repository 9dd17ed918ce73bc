"""One weight of a model, as the kind that uses it declares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeVar

Held = Literal["matrix", "rows", "array", "disk"]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Tensor:
    """Its shape, what it serves, and how it is held."""

    shape: tuple[int, ...]
    role: str
    held: Held = "matrix"
    """"matrix": a QTensor (out, in) that is multiplied with; "rows": one that only gives some of its rows; "array": a
    float32 (or int64) ndarray; "disk": one whose rows are read from disk as they are asked for."""
    expert: int | None = None
    """Which of its layer's routed experts it is part of."""
    touched: int | None = None
    """How many parameters one token's computation touches; None: all. Of E routed experts a token touches K, counted
    as the first K."""
    below: int | None = None
    """Its values are numbers of things, from 0 to this."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return prod(self.shape)


def prefixed(prefix: str, table: Mapping[str, _Value]) -> dict[str, _Value]:
    """The same table with longer names."""
    return {prefix + name: value for name, value in table.items()}

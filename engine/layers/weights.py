"""The weights of a model or of one of its parts, by canonical name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from numoe.quant.formats.qtensor import QTensor


@dataclass(frozen=True)
class Weights:
    """`matrices` stay in their stored format, `arrays` are float32 (look-up tables: int64)."""

    matrices: dict[str, QTensor] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def below(self, prefix: str) -> Weights:
        """The part whose names begin with `prefix`, without it."""
        cut = len(prefix)
        return Weights(
            {name[cut:]: value for name, value in self.matrices.items() if name.startswith(prefix)},
            {name[cut:]: value for name, value in self.arrays.items() if name.startswith(prefix)},
        )

    def numbered(self, prefix: str, count: int) -> list[Weights]:
        """The parts `prefix`0. to `prefix`(count - 1). in one pass."""
        parts = [Weights() for _ in range(count)]
        for which in ("matrices", "arrays"):
            table: Mapping[str, QTensor | NDArray[Any]] = getattr(self, which)
            for name, value in table.items():
                if name.startswith(prefix):
                    number, _, rest = name[len(prefix) :].partition(".")
                    getattr(parts[int(number)], which)[rest] = value
        return parts

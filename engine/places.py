"""Where a checkpoint stores a weight of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numoe.quant.stored.handle import Stored


@dataclass(frozen=True)
class Place:
    """What is stored, and what makes the weight of it."""

    stored: Stored
    """The matrix itself; of an array, the whole tensor that it is part of."""
    columns: slice | None = None
    """Of an array, the part of the last axis that is this one's."""
    made: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    """What makes an array of what is stored."""

    def array(self, shape: tuple[int, ...], stored: Stored | None = None) -> NDArray[Any]:
        """The array, of a shape that has as many values; `stored`: the same where it lies now.

        Raises what `Stored.array` raises.
        """
        values = (stored or self.stored).array()
        if self.columns is not None:
            values = np.ascontiguousarray(values[..., self.columns])
        if self.made is not None:
            values = self.made(values)
        return values.reshape(shape)

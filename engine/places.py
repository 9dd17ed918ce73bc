"""Where a checkpoint stores a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from numoe.quant.stored.checkpoint import Rows


@dataclass(frozen=True)
class Place:
    """What `Checkpoint.matrix` takes."""

    name: str
    index: int | None = None
    """Which one of a stack of experts."""
    rows: Rows | None = None
    """Those of a fused tensor that are this one's."""
    made: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    """What makes an array of what is stored."""

"""Where a checkpoint stores a weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """What `Checkpoint.matrix` takes."""

    name: str
    index: int | None = None
    """Which one of a stack of experts."""
    rows: tuple[int, int] | None = None
    """Row range of a fused tensor."""

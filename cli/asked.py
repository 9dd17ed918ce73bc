"""What `numoe fit` is asked, and what it found: a model, a machine, and what the one takes of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numoe.engine import Description, Plan
    from numoe.engine.budget import Budget
    from numoe.engine.hub.repository import Repository
    from numoe.engine.measure.forecast import Forecast, Machine


@dataclass(frozen=True)
class Column:
    """What a model takes in one format."""

    plan: Plan
    peak_disk_bytes: int
    kv_bytes: dict[int, int]
    int8_bytes: int
    """Of the context that is planned, with rows of int8."""
    forecast: Forecast
    process_bytes: int
    widens: bool

    @property
    def expert_share(self) -> float:
        return self.forecast.expert_bytes / self.plan.expert_bytes if self.plan.expert_bytes else 1.0

    @property
    def memory(self) -> dict[str, int]:
        """All of the peak, by what it is for."""
        wide = self.plan.wide_bytes if self.widens else 0
        parts = {
            "weights for every token": self.plan.resident_bytes,
            f"context of {self.plan.context:,} tokens": self.plan.kv_bytes,
            "experts": 0,
            "faster form of weights": wide,
            "work space": self.plan.scratch_bytes,
            "numoe itself": self.process_bytes,
        }
        parts["experts"] = self.forecast.peak_bytes - sum(parts.values())
        return parts

    @property
    def least_ram_bytes(self) -> int:
        """The least --ram with which it runs."""
        return self.plan.least_bytes + self.process_bytes

    @property
    def whole_ram_bytes(self) -> int:
        """The least --ram with which nothing is read from disk."""
        return self.plan.total_bytes + self.process_bytes


@dataclass(frozen=True)
class Asked:
    """A model, and the machine that it is to run on."""

    model: str
    description: Description
    remote: Repository | None
    memory: Budget
    machine: Machine
    columns: dict[str, Column]

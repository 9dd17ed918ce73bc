"""What a model does on a machine, from figures that were measured of it.

What one token takes is a sum: its weights by the speed of their format's kernel, something a layer, and the bytes of
its experts that are not in memory by the speed of the disk. Real runs of models of about its size say by which factor
that sum errs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import median

from numoe.engine.layers.state import CHUNK
from numoe.engine.plan import Plan, Verdict
from numoe.quant.compute.kernels import BLOCKS
from numoe.quant.formats.format import Format

_JUDGED = 5
_UNTRIED = 1.5
_LEAST_MARGIN = 1.1
_ALIKE = 8  # the factor by which models differ that tell of each other
_NOTABLE = 0.3  # processes of others


@dataclass(frozen=True)
class Run:
    """Tokens a second of a run: as predicted before it, with the correction of then, and as measured."""

    model: str
    predicted: float
    correction: float
    measured: float
    weights: int | None = None
    """Parameters of the model that a token's computation touches; None: not known."""


@dataclass(frozen=True)
class Forecast:
    """What a model does on a machine. Speeds are tokens a second, low and high; 0 where it does not run."""

    verdict: Verdict
    expert_bytes: int
    """Routed experts that are in memory."""
    peak_bytes: int
    """The most memory that the process takes, or would take at least where it does not run."""
    decode: tuple[float, float]
    prefill: tuple[float, float]


@dataclass(frozen=True)
class Calls:
    """What calls to other nodes of a cluster took, as measured between processes of one machine."""

    seconds: tuple[float, ...]
    """Of one call, without rows to speak of: percentiles at even distances, from the shortest to the longest."""
    further_s: float
    """How much longer it takes until all are back for each further one in flight."""
    bytes_per_s: float
    """Rows that are sent and come back, at the ends of the network."""

    def percentile(self, percent: float) -> float:
        """The seconds in which so many of 100 calls were back."""
        at = percent / 100 * (len(self.seconds) - 1)
        below = self.seconds[int(at)]
        return below + (self.seconds[ceil(at)] - below) * (at - int(at))


USUAL_CALLS = Calls((0.0006, 0.0009, 0.001, 0.0012, 0.0021), 0.001, 1.4e9)
"""Of Ray 2.60 on two shared cores of an AMD EPYC (Zen 4), where nothing was measured."""


@dataclass(frozen=True)
class Machine:
    """What was measured of a machine. `name` tells it from others, and from itself with other versions."""

    name: str
    cores: int
    weights_per_s: Mapping[str, float]
    """Weights that one token is multiplied with in a second, by `Format.kind`: of all but ggml's block types, and of
    those of them that were asked for."""
    macs_per_s: float
    """Multiply-adds a second of further tokens with the same weights, all tokens of a chunk."""
    expert_macs_per_s: float
    """The same of as many tokens as share a routed expert."""
    layer_s: float
    """What a layer takes for one token beside its weights."""
    chunk_layer_s: float
    """The same for a chunk of tokens."""
    process_bytes: int
    """Memory of a process with an empty model."""
    wide_weights_per_s: Mapping[str, float] = field(default_factory=dict)
    """`weights_per_s` in the form that takes more memory, of the formats that have one."""
    read_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Reading from disk, as many reads at a time as the expert store makes, by the bytes of a read."""
    block: int = BLOCKS[-1]
    """Which of BLOCKS few tokens are multiplied fastest with."""
    runs: tuple[Run, ...] = ()
    """The latest, oldest first."""
    measured_at: float | None = None
    """When, in seconds of the system's clock; None: not known."""
    calls: Calls | None = None
    """Between nodes, where Ray is there to measure them with."""
    load: float = 0.0
    """How many other processes computed or waited for a core then, on average over the minute before."""

    @property
    def measured_when(self) -> str:
        """How old the figures are and what else the machine did then, as the end of a sentence; "" where not known."""
        if self.measured_at is None:
            return ""
        ago = max(0.0, time.time() - self.measured_at)
        units = (("day", 86400), ("hour", 3600), ("minute", 60))
        count, unit = next(((int(ago // length), name) for name, length in units if ago >= length), (0, ""))
        when = f" {count} {unit}{'' if count == 1 else 's'} ago" if count else ""
        load = f" under a load of {self.load:.1f} from other programs" if self.load >= _NOTABLE else ""
        return f", measured{when}{load}" if when or load else ""

    @property
    def correction(self) -> float:
        """What the speeds that the figures give are multiplied by: the median of what runs have shown."""
        return median([run.measured / run.predicted * run.correction for run in self.runs]) if self.runs else 1.0

    @property
    def judged(self) -> tuple[float, ...]:
        """Of the latest runs, measured through predicted."""
        return tuple(run.measured / run.predicted for run in self.runs[-_JUDGED:])

    @property
    def margin(self) -> float:
        """The factor by which a prediction may be too high or too low."""
        return max([_LEAST_MARGIN, *self.judged, *(1 / ratio for ratio in self.judged)]) if self.runs else _UNTRIED

    def about(self, plan: Plan) -> Machine:
        """This machine by the runs of models of about this size: what a tiny one does tells nothing of a large one."""
        size = plan.active_parameters
        alike = [run for run in self.runs if run.weights is None or 1 / _ALIKE <= run.weights / max(1, size) <= _ALIKE]
        return self if len(alike) == len(self.runs) else replace(self, runs=tuple(alike))

    def with_cores(self, cores: int) -> Machine:
        """This machine if it had so many cores."""
        share = cores / self.cores
        dense, wide = (
            {kind: share * rate for kind, rate in rates.items()}
            for rates in (self.weights_per_s, self.wide_weights_per_s)
        )
        return replace(
            self,
            cores=cores,
            weights_per_s=dense,
            wide_weights_per_s=wide,
            macs_per_s=share * self.macs_per_s,
            expert_macs_per_s=share * self.expert_macs_per_s,
        )

    def with_reading(self, nbytes: int, rate: float) -> Machine:
        """This machine if it read so many bytes a second, `nbytes` at a time."""
        return replace(self, read_bytes_per_s={**self.read_bytes_per_s, str(piece(nbytes)): rate})

    def reading(self, nbytes: int) -> float:
        """Bytes a second of reads of about so many bytes. Raises KeyError where that was not measured."""
        return self.read_bytes_per_s[str(piece(nbytes))]

    def forecast(self, plan: Plan, room: int) -> Forecast:
        """What a model does here with `room` bytes of memory.

        Raises:
            KeyError: experts are read from disk, and how fast that goes at their size was not measured.
        """
        verdict = plan.verdict(room)
        held = plan.held_experts(room)
        taken = plan.total_bytes + plan.wide_bytes if plan.widens(room) else plan.beside_experts + held
        peak = self.process_bytes + max(taken, plan.least_bytes)
        none = (0.0, 0.0)
        if verdict is Verdict.TOO_LARGE:
            return Forecast(verdict, held, peak, none, none)
        share = held / plan.expert_bytes if plan.expert_bytes else 1.0
        wide, alike = plan.widens(room), self.about(plan)
        return Forecast(verdict, held, peak, alike.decode(plan, share, wide), alike._prefill(plan, share, wide))

    def decode(self, plan: Plan, share: float, wide: bool) -> tuple[float, float]:
        """Tokens a second that a model writes, low and high, with this share of its routed experts in memory.

        `wide`: whether its weights take the form that needs more of it.

        Low: the others are missed as often as they are many, and are waited for. High: routers repeat themselves, so
        that only the square of that is missed, and reading goes on beside computing. Raises what `forecast` raises.
        """
        missing = sum(plan.active_experts.values()) * (1 - share)
        compute = plan.layers * self.layer_s + self._kernels(plan.active, wide)
        return self._range(1, plan, compute, missing, missing * (1 - share))

    def _prefill(self, plan: Plan, share: float, wide: bool) -> tuple[float, float]:
        """The same for tokens that a model reads, `CHUNK` at a time: together they take all experts once."""
        macs = (CHUNK - 1) * plan.chunk_parameters
        rate = self.expert_macs_per_s if plan.active_experts else self.macs_per_s
        compute = plan.layers * self.chunk_layer_s + self._kernels(plan.chunk, wide) + macs / rate
        missing = plan.expert_bytes * (1 - share)
        return self._range(CHUNK, plan, compute, missing, missing)

    def _kernels(self, weights: Mapping[Format, int], wide: bool) -> float:
        """Seconds for one token."""
        rates = {**self.weights_per_s, **self.wide_weights_per_s} if wide else self.weights_per_s
        return sum(count / rates[stored.kind] for stored, count in weights.items())

    def _range(self, tokens: int, plan: Plan, compute: float, missing: float, fewer: float) -> tuple[float, float]:
        slow = fast = compute
        if missing:
            rate = self.reading(plan.largest_expert)
            slow, fast = compute + missing / rate, max(compute, fewer / rate)
        corrected = tokens * self.correction
        return corrected / slow / self.margin, corrected / fast * self.margin


def piece(nbytes: int) -> int:
    """The size of reads that stands for `nbytes`: a power of two from 64 KiB to 16 MiB."""
    return 1 << min(max(nbytes - 1, 0).bit_length(), 24) if nbytes > 1 << 16 else 1 << 16

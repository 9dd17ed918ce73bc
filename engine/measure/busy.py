"""Whether other programs keep the cores busy that a model computes with."""

from __future__ import annotations

import time
from dataclasses import dataclass

_LONG_ENOUGH = 2.0  # seconds; the system counts in hundredths, and everything is busy for a moment
_MUCH = 0.4  # of a core, without which threads wait for each other


@dataclass(frozen=True)
class Sample:
    """Seconds so far: of the clock, of all cores without work, and of the work of this process and its workers."""

    clock: float
    idle: float
    own: float
    cores: int

    @classmethod
    def now(cls) -> Sample:
        """What the system has counted up to now."""
        import psutil

        every = psutil.cpu_times(percpu=True)
        idle = sum(one.idle + getattr(one, "iowait", 0.0) for one in every)
        process = psutil.Process()
        own = 0.0
        for one in (process, *process.children()):
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += times.user + times.system
        return cls(time.perf_counter(), idle, own, len(every))


def taken_by_others(before: Sample, after: Sample, threads: int) -> float:
    """The cores that others had between two samples; 0 if that was too short, or left as many as threads need."""
    seconds = after.clock - before.clock
    if threads < 2 or seconds < _LONG_ENOUGH:
        return 0.0
    others = after.cores - (after.idle - before.idle + after.own - before.own) / seconds
    return others if threads - (after.cores - others) >= _MUCH else 0.0

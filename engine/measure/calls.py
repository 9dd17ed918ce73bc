"""What a call to another node of a Ray cluster takes, measured between processes of this machine."""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import numpy as np

from numoe.engine.experts.cluster import connect
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.state import CHUNK
from numoe.engine.measure.forecast import Calls

_ACTORS = 3
_TURNS = 100
_LONG_TURNS = 10
_WIDTH = 4096
_SHARES = 20


def measure_calls() -> Calls:
    """What calls take of a small cluster that is started here, unless this process is in one, and left again.

    Raises:
        InputError: Ray is not installed, or does not start.
    """
    own = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    ray = connect("local")
    try:
        made = ray.remote(num_cpus=0)(_Echo)
        actors = [made.remote() for _ in range(_ACTORS)]
        row, chunk = (np.zeros((tokens, _WIDTH), np.float32) for tokens in (1, CHUNK))
        _took(ray, actors, row)
        alone = [_took(ray, actors[:1], row) for _ in range(_TURNS)]
        together = [_took(ray, actors, row) for _ in range(_TURNS)]
        long = [_took(ray, actors[:1], chunk) for _ in range(_LONG_TURNS)]
        for actor in actors:
            ray.kill(actor)
    finally:
        if own:
            ray.shutdown()
    further = max(0.0, median(together) - median(alone)) / (_ACTORS - 1)
    rows_s = max(median(long) - median(alone), 1e-6)
    shares = np.percentile(alone, np.linspace(0, 100, _SHARES + 1)).tolist()
    return Calls(tuple(shares), max(further, 1e-6), 2 * chunk.nbytes / rows_s)


class _Echo:
    """An actor that gives back rows."""

    def rows(self, x: Floats) -> Floats:
        return x + 1


def _took(ray: Any, actors: list[Any], x: Floats) -> float:
    """Seconds until all have given rows back."""
    begun = time.perf_counter()
    ray.get([actor.rows.remote(x) for actor in actors])
    return time.perf_counter() - begun

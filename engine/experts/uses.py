"""How often experts were used: which of them are worth their memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from numoe.engine.experts.unit import Key

HALF_LIFE = 4
"""A use counts half as much after this many times as many uses as the cache holds units.

Of 1 to 64, on traces of `tiny`, this gave the most hits at nearly every size; see `numoe.engine.measure.replay`.
"""


class DecayedCounts:
    """How often keys were used, in logarithms: what orders them is known at their last use and never changes."""

    def __init__(self, capacity: int):
        """capacity: units that the cache holds."""
        self._half_life = HALF_LIFE * max(1, capacity)
        self._uses = 0
        self._counts: dict[Key, float] = {}

    def use(self, key: Key) -> float:
        """Count a use, and give the key's worth from now on."""
        # A use at time t counts 2^(t / half-life) for good, instead of all others less and less.
        now = self._uses / self._half_life
        count = self.worth(key)
        self._counts[key] = now + math.log2(1 + 2 ** (count - now)) if count > -math.inf else now
        self._uses += 1
        return self._counts[key]

    def worth(self, key: Key) -> float:
        return self._counts.get(key, -math.inf)

    def assume(self, keys: Sequence[Key]) -> None:
        """Have keys that were not used yet be worth less than a use, and the first the most."""
        for rank, key in enumerate(keys):
            self._counts.setdefault(key, -1 - rank / len(keys))

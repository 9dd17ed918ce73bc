"""Whether it pays to read experts before a layer asks for them: how often it then did."""

from __future__ import annotations

_TRIALS = 32
"""Units that are fetched for a layer before its guesses are judged."""
_PAYS = 0.5
"""Share of them that the layer must ask for."""


class Guesses:
    """Counts of units that were fetched ahead for each layer, and of those that it asked for."""

    def __init__(self) -> None:
        self.fetched = 0
        self.used = 0
        self.recent: dict[int, tuple[int, int]] = {}
        """The same by layer, where what was long ago counts for less."""

    def pay(self, layer: int) -> bool:
        fetched, used = self.recent.get(layer, (0, 0))
        return fetched < _TRIALS or used >= _PAYS * fetched

    def count(self, layer: int, used: bool) -> None:
        """Count a unit that was fetched for a layer, and whether it asked for it."""
        self.fetched += 1
        self.used += used
        fetched, right = self.recent.get(layer, (0, 0))
        fetched, right = fetched + 1, right + used
        if fetched == 8 * _TRIALS:
            fetched, right = fetched // 2, right // 2
        self.recent[layer] = fetched, right

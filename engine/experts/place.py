"""Which node has which routed experts: pure arithmetic over their bytes and how often they are used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from numoe.engine.experts.unit import Key

_UNKNOWN = 1.0
_KNOWN = 4.0, 2.0
"""How often experts are taken, one that nothing is noted of being the unit: the first of those noted, and the last.
About what traces say of the half that is used most; see the README."""


def uses(keys: Sequence[Key], hottest: Sequence[Key]) -> dict[Key, float]:
    """About how often each is taken, of those that were noted as used most, the first ones first."""
    first, last = _KNOWN
    noted = {key: first - (first - last) * rank / len(hottest) for rank, key in enumerate(hottest)}
    return {key: noted.get(key, _UNKNOWN) for key in keys}


def place(
    sizes: Mapping[Key, int], rooms: Sequence[int], used: Mapping[Key, float], before: Mapping[Key, int] | None = None
) -> dict[Key, int]:
    """The node of each expert, an index into `rooms`.

    Nodes get bytes in proportion to their rooms, to one expert; and of each layer experts that are used equally often,
    for the nodes compute a layer together and the last one decides.

    Args:
        sizes: bytes of each expert.
        rooms: bytes that each node has for them; a node with none gets none, while another has some.
        used: how often each is taken.
        before: where they are now. Who is on a node that has room for it stays there.
    """
    rooms = rooms if any(room > 0 for room in rooms) else [1] * len(rooms)
    shares = [max(0, room) / sum(max(0, room) for room in rooms) for room in rooms]
    quotas = [share * sum(sizes.values()) for share in shares]
    placed = _staying(sizes, quotas, used, before or {})
    filled = [0.0] * len(rooms)
    busy: dict[int, list[float]] = defaultdict(lambda: [0.0] * len(rooms))
    for key, node in placed.items():
        filled[node] += sizes[key]
        busy[key[0]][node] += used[key]
    for key in sorted(sizes.keys() - placed.keys(), key=lambda key: (-used[key], key)):
        # Less than a byte missing is a rounding, not room.
        open_nodes = [n for n, quota in enumerate(quotas) if quota and filled[n] + 0.5 < quota]
        of_layer = busy[key[0]]
        node = min(
            open_nodes or [n for n, share in enumerate(shares) if share],
            key=lambda n: (of_layer[n] / shares[n], filled[n] / shares[n], n),
        )
        placed[key] = node
        filled[node] += sizes[key]
        of_layer[node] += used[key]
    return placed


def _staying(
    sizes: Mapping[Key, int], quotas: Sequence[float], used: Mapping[Key, float], before: Mapping[Key, int]
) -> dict[Key, int]:
    """Those that stay where they are: of a node with too many, some of all heats leave."""
    members: dict[int, list[Key]] = defaultdict(list)
    for key, node in before.items():
        members[node].append(key)
    largest = max(sizes.values())  # by which a node is above its part, so that all have a place
    staying = {}
    for node, keys in members.items():
        if not quotas[node]:
            continue
        keys.sort(key=lambda key: (-used[key], key))
        filled = sum(sizes[key] for key in keys)
        share = quotas[node] / filled if filled >= quotas[node] + largest else 1.0
        seen = kept = 0
        for key in keys:
            seen += sizes[key]
            if kept + sizes[key] <= seen * share + 0.5:
                staying[key] = node
                kept += sizes[key]
    return staying

"""Damage to bytes, texts and JSON documents, drawn by a random generator."""

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 1 << 31, (1 << 32) - 1, 1 << 53, (1 << 63) - 1, 1 << 63, -(1 << 63),
    1 << 64, 3 * 10**7, 10**30, 0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "no", "\x00",
    "\x1b]0;x\x07", "../../x", "/etc/passwd",
    "\ud800", "é" * 300, "9" * 5000, [], {}, [[]], [None], {"": {}}, [1, "a"], ["a"] * 50,
    {"a": {"b": [1]}}, "default",
)  # fmt: skip
"""Values of every kind and at every edge."""

_RUNS = (b"", b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x80" * 10, b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 2000)
_RUNS += (b"9" * 5000, b"\n", b"{{", b"}}", b'"', b"\\ud800", b"1e999", b"-", b"{% for i in range(9) %}")


def damaged(random: Random, data: bytes) -> bytes:
    """Bits flipped, pieces lost, doubled, moved or put in, whatever the bytes mean."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        at = random.randrange(len(made) + 1)
        # What comes first says how the rest is read.
        at = random.randrange(min(64, len(made)) + 1) if random.random() < 0.3 else at
        end = min(len(made), at + random.choice((1, 2, 4, 8, 40, 1000)))
        match random.randrange(6):
            case 0:
                for i in range(at, min(at + 1, len(made))):
                    made[i] ^= 1 << random.randrange(8)
            case 1:
                del made[at:end]
            case 2:
                made[at:at] = made[at:end]
            case 3:
                made[at:end] = random.choice(_RUNS)
            case 4:
                made[at:at] = random.choice(_RUNS)
            case 5:
                del made[at:]
    return bytes(made)


def changed(random: Random, document: bytes) -> bytes:
    """A JSON document with some values replaced, keys lost, renamed or doubled."""
    value = json.loads(document)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _changed(random, value)
    return json.dumps(value).encode()


def _changed(random: Random, value: Any) -> Any:
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any, depth: int = 0) -> None:
        for key in inner if isinstance(inner, dict) else range(min(len(inner), 40)) if isinstance(inner, list) else ():
            places.append((inner, key))
            if depth < 30:
                walk(inner[key], depth + 1)

    walk(value)
    if not places or random.random() < 0.02:
        return deepcopy(random.choice(ODD))
    container, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[random.choice(("x", "", "é", *map(str, container)))] = container.pop(key)
        case 2 if isinstance(container, list):
            container.insert(key, deepcopy(container[key]))
        case 3:
            container[key] = [container[key]]
        case 4 if isinstance(container[key], int | float):
            container[key] = container[key] * random.choice((-1, 2, 0.5, 1000, 1 << 40))
        case _:
            container[key] = deepcopy(random.choice(ODD))
    return value


def either(*mutators: Mutator) -> Mutator:
    """One of several, anew for each case."""
    return lambda random, data: random.choice(mutators)(random, data)


def lines(random: Random, data: bytes) -> bytes:
    """JSON lines, of which one is changed."""
    made = data.splitlines()
    at = random.randrange(len(made))
    made[at] = changed(random, made[at])
    return b"\n".join(made)


def seeded(mutate: Mutator, seeds: Sequence[bytes], number: int) -> bytes:
    """The case of a number: always the same one."""
    random = Random(number)
    return mutate(random, random.choice(seeds))

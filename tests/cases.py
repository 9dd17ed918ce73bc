"""Which golden cases a test runs on: one of each combination of what it may break on, and all with `-m slow`."""

from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any

import pytest
import tiny

from numoe.engine.families import family
from numoe.engine.layers.spec import ModelSpec


@cache
def spec(case: str) -> ModelSpec:
    """What its config.json describes."""
    config = tiny.load_golden(case).config
    return family(config["model_type"]).spec(config)


def recurrent(case: str) -> bool:
    """Whether a layer of it carries what it keeps of a sequence on from token to token."""
    return any(state.only_now for block in spec(case).blocks() for state in block.kind.state().values())


def states(case: str) -> Hashable:
    """The kinds of its layers that keep something of a sequence, by their labels."""
    return frozenset(block.kind.label for block in spec(case).blocks() if block.kind.state())


def layout(case: str) -> Hashable:
    """The forms in which its tensors are stored: element type, dimensions, whether of a routed expert."""
    listing = tiny.description(case)["listing"]
    return frozenset((dtype, len(shape), ".experts." in name) for name, dtype, shape in listing)


def one_of_each(key: Callable[[str], Hashable], cases: Iterable[str] = tuple(tiny.cases())) -> list[Any]:
    """The cases as parameters: of those with equal keys the shortest prompt, and the others marked slow."""
    by_length = sorted(cases, key=lambda case: len(tiny.load_golden(case).ids))
    first: dict[Hashable, str] = {}
    for case in by_length:
        first.setdefault(key(case), case)
    return [pytest.param(case, marks=() if case in first.values() else pytest.mark.slow) for case in sorted(by_length)]


STATES = one_of_each(states)
LAYOUTS = one_of_each(layout)

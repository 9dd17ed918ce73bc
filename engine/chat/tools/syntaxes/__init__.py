"""The syntaxes of calls: files, each of one kind, found by themselves. A new one is a row or a file here."""

import pkgutil
from collections.abc import Collection
from importlib import import_module

from numoe.engine.chat.tools.call import Syntax

SYNTAXES: tuple[Syntax, ...] = tuple(
    syntax
    for module in pkgutil.iter_modules(__path__, f"{__name__}.")
    for syntax in import_module(module.name).SYNTAXES
)


def syntax_of(template: str, markers: Collection[str]) -> Syntax | None:
    """The syntax in which a model writes calls, by its chat template, or else by the markers of its vocabulary.

    Some have marks in common: the one counts of which most is there. None: none that is known.
    """
    written = [one for one in SYNTAXES if all(sign in template for sign in one.signs)]
    if not written:
        written = [one for one in SYNTAXES if one.markers and one.markers[0] in markers]
    return max(written, key=lambda one: len("".join(one.signs)), default=None)

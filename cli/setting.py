"""A setting: how it is declared, what its flag is, and how its values are read and checked."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Flag, StrEnum, auto
from math import inf
from pathlib import Path
from typing import Any

import typer

from numoe.quant.convert.recipes import RECIPES, roles
from numoe.quant.errors import InputError, WrongUsage


class May(Flag):
    """Where a setting can be given beside the command line."""

    NOWHERE = 0
    CONFIG = auto()
    """config.toml and NUMOE_*"""
    LINE = auto()
    """A line of a batch."""
    TALK = auto()
    """/set in a chat."""
    ANYWHERE = CONFIG | LINE | TALK


class Background(StrEnum):
    """What answers are shown on."""

    AUTO = "auto"
    DARK = "dark"
    LIGHT = "light"


class Rows(StrEnum):
    """The keys of `numoe.engine.layers.rows.ROW_FORMS`, which takes NumPy to import."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "int8"


SIZE = "SIZE"
"""The metavar of amounts of memory."""
_JSON: Mapping[Any, tuple[type, ...]] = {float: (float, int), list[str]: (list,), Rows: (str,), Background: (str,)}
_WANTED: Mapping[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list of texts",
    dict: "an object",
    Rows: " or ".join(Rows),
    Background: " or ".join(Background),
}
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """What can be said of how a command does its work.

    name: in Python, in files and in /set. kind: the type of what its flag takes.
    group: of settings that commands take together.
    default: where a command names no other; None: it has no value, ...: it must be given.
    short, long: its flags; without `long` it is the name with dashes. metavar: what --help calls the value.
    least, most: the bounds of a number.
    field: of the engine's `Settings` or `Sampling`, which it fills.
    may: where else it can be given.
    scan: reads a number that can be written in several ways.
    completes: what the value can be that begins so, for completion in shells. parse: makes the value of what the flag
    takes. json: the types of that value; none: those of `kind`.
    secret: it is never shown.
    """

    name: str
    kind: Any
    help: str
    group: str = ""
    default: Any = None
    metavar: str | None = None
    short: str = ""
    long: str = ""
    least: float | None = None
    most: float | None = None
    field: str = ""
    may: May = May.NOWHERE
    scan: Callable[[str], Any] | None = None
    parse: Callable[[str], Any] | None = None
    completes: Callable[[str], list[str]] | None = None
    json: tuple[type, ...] = ()
    secret: bool = False

    @property
    def flag(self) -> str:
        """As the command line has it: --max-tokens."""
        return self.long.partition("/")[0] or f"--{self.name.replace('_', '-')}"

    @property
    def is_choice(self) -> bool:
        """Whether it is one of few words."""
        return isinstance(self.kind, type) and issubclass(self.kind, StrEnum)

    @property
    def types(self) -> tuple[type, ...]:
        """Those that its value can have in JSON and TOML."""
        return self.json or _JSON.get(self.kind) or (self.kind,)

    @property
    def parameter(self) -> inspect.Parameter:
        """What Typer makes an option of: a text, unless it is a switch or can be repeated, which `value` reads."""
        flags = [flag for flag in (self.short, self.long or self.flag) if flag]
        typed = self.kind in (bool, list[str])
        default = self.default if typed or self.default is ... else self.shown_default
        option = typer.Option(
            default,
            *flags,
            metavar=self.metavar or ("|".join(self.kind) if self.is_choice else None),
            help=self.explained,
            autocompletion=self.completes,
            show_default=False,
        )
        kind = self.kind if typed else str
        annotation = kind if default is not None else kind | None
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)

    @property
    def shown_default(self) -> str | None:
        """The default as a text, None where it has none."""
        if self.default in (None, ...):
            return None
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def explained(self) -> str:
        """What --help says."""
        own = "" if self.kind is bool or self.default in (None, ..., 0) else f" Default: {self.shown_default}."
        return self.help + self.bounds + own

    def value(self, given: Any) -> Any:
        """The value that a flag means by what Typer makes of it.

        Raises:
            WrongUsage: it is of another type, or out of bounds.
            InputError: it cannot be parsed.
        """
        if self.kind == list[str]:
            return tuple(given or ())
        if self.parse is not None:
            return given if given is None else self.parse(given)
        if not isinstance(given, str):
            return given
        value = self.read(given, self.flag)
        self.check(value, self.flag, given)
        return self.kind(value) if self.is_choice else value

    @property
    def bounds(self) -> str:
        """What a number can be, behind its help."""
        return "" if self.least is None else f" F{self.range[1:]}."

    @property
    def range(self) -> str:
        """From where to where a number can be."""
        assert self.least is not None
        return f"from {number(self.least)} " + ("on" if self.most is None else f"to {number(self.most)}")

    def read(self, text: str, named: str, none: str = "") -> Any:
        """The value that a text stands for.

        Args:
            named: begins the error.
            none: the text that stands for no value, of a setting that need not have one.

        Raises:
            WrongUsage: it is of another type.
        """
        none = none if self.default is None else ""
        if none and text == none:
            return () if self.kind == list[str] else None
        if self.kind == list[str]:
            return (text,)
        try:
            return _BOOLS[text.lower()] if self.kind is bool else (self.scan or self.types[0])(text)
        except (KeyError, ValueError):
            raise self._refusal(f" or {none}" if none else "", named, f'"{text}"') from None

    def check(self, value: Any, named: str, given: str | None = None) -> None:
        """Refuse what a document gives, or a text means, and this setting cannot have; `named` begins the error.

        Raises:
            WrongUsage: it is of another type, or out of bounds.
        """
        fits = isinstance(value, Path) if self.kind is Path else type(value) in self.types
        if isinstance(value, list):
            fits &= all(isinstance(one, str) for one in value)
        elif fits and self.parse is recipe:
            fits = _is_recipe(value)
        elif self.is_choice:
            fits &= value in list(self.kind)
        elif fits and self.least is not None:
            fits = self.least <= value <= (inf if self.most is None else self.most) and value != inf
        elif fits and self.kind is str and self.metavar == SIZE:
            from numoe.engine.plan import parse_bytes

            try:
                parse_bytes(value)
            except WrongUsage as error:
                raise WrongUsage(f"{named}: {error}") from None
        if not fits:
            raise self._refusal("", named, json.dumps(value, default=str) if given is None else f'"{given}"')

    def _refusal(self, more: str, named: str, value: str) -> WrongUsage:
        if self.parse is recipe:
            wanted = f"{', '.join(RECIPES)} or formats by role"
        else:
            wanted = _WANTED[self.kind if self.is_choice else self.types[0]]
        if self.least is not None:
            wanted += f" {self.range}"
        given = "what is given" if self.secret else value if len(value) <= 60 else f"{value[:57]}..."
        return WrongUsage(f"{named} takes {wanted}{more}, not {given}")

    def shown(self, value: Any) -> str:
        """A value as `numoe config` has it; the name of a file that holds a secret is none."""
        if value in (None, ...):
            return "-"
        if self.secret and not str(value).startswith("@"):
            return "(set, and not shown)"
        if isinstance(value, float):
            return f"{value:g}"
        return str(value).lower() if isinstance(value, bool) else str(value)


def number(value: float) -> str:
    """A bound as a sentence has it: whole ones to their last digit."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def recipe(text: str) -> str:
    """A way to quantize."""
    try:
        roles(text)
    except InputError as error:
        raise WrongUsage(str(error)) from None
    return text


def _is_recipe(text: str) -> bool:
    try:
        roles(text)
    except InputError:
        return False
    return True

"""config.toml and NUMOE_* variables: what options are when they are not given; `numoe config`.

temp = 0.7            config.toml, in NUMOE_HOME
NUMOE_TEMP=0.7        goes before it, and --temp before both
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numoe.cli.output import Output, print_error
from numoe.cli.settings import May, Setting, settings_in
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

KEYS = settings_in(May.CONFIG)
"""The settings that can have another default, by name. Every command that takes one follows it."""
TOOLS = "tools"
"""The table of config.toml in which `numoe chat` finds commands that a model may ask for."""
_PATIENCE = 20.0  # seconds to wait while another process writes the file


@dataclass(frozen=True)
class Default:
    """A value and where it is from."""

    value: Any
    source: str


def path() -> Path:
    """The file, whether it is there or not."""
    from numoe.engine.home import home

    return home() / "config.toml"


def settings() -> tuple[dict[str, Default], list[InputError]]:
    """Every key that is set, and what is wrong: a file that is not valid, unknown keys, values of another kind."""
    found: dict[str, Default] = {}
    wrong: list[InputError] = []
    file = path()
    try:
        values = _read(file)
    except InputError as error:
        values, wrong = {}, [error]
    for key, value in values.items():
        if key == TOOLS:
            continue
        try:
            _setting(key, f"{file}: ").check(value, f"{file}: {key}")
            found[key] = Default(value, str(file))
        except InputError as error:
            wrong.append(error)
    for key in KEYS:
        variable = f"NUMOE_{key.upper()}"
        if text := os.environ.get(variable):
            try:
                found[key] = Default(_parsed(key, text, variable), variable)
            except InputError as error:
                wrong.append(error)
    return found, wrong


def tool_tables() -> dict[str, Any]:
    """The tables of commands by the names of their tools.

    Raises:
        InputError: the file is not valid.
    """
    tables = _read(path()).get(TOOLS, {})
    if not isinstance(tables, dict):
        raise InputError(f"{path()}: {TOOLS} is no table; write [{TOOLS}.NAME]")
    return tables


def defaults(command: Any) -> dict[str, Any]:
    """The keys that are set, of those that a command has, as Click's `default_map` wants them.

    Raises:
        InputError: what `settings` finds wrong; not if the command has none of the keys.
    """
    names = [option.name for option in command.params if option.name in KEYS]
    if not names:
        return {}
    values, wrong = settings()
    if wrong:
        raise wrong[0]
    return {name: values[name].value for name in names if name in values}


def _read(file: Path) -> dict[str, Any]:
    from numoe.quant.documents import parse_toml, read_document

    if not file.exists():
        return {}
    if not file.is_file():
        raise InputError(f"{file} is not an ordinary file; remove it")
    return parse_toml(read_document(file), file)


def _parsed(key: str, text: str, source: str) -> Any:
    value = KEYS[key].read(text, source)
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{source} takes a text, and {text!a} is not UTF-8")
    KEYS[key].check(value, source)
    return value


def _setting(key: str, where: str = "") -> Setting:
    if key not in KEYS:
        raise InputError(f'{where}there is no setting "{key}"; there are {", ".join(KEYS)}')
    return KEYS[key]


config = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
Key = Annotated[str, typer.Argument(metavar="KEY", help="An option's name, without the dashes before it.")]
Value = Annotated[str, typer.Argument(metavar="VALUE", help="What it is where it is not given.")]


@config.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """Show the defaults of options and where each is from, or change those in config.toml."""
    if context.invoked_subcommand is not None:
        return
    values, wrong = settings()
    commands: Mapping[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    with Output() as output:
        output.table(
            [(key, *_row(values[key])) if key in values else (key, _own(commands, key), "") for key in KEYS],
        )
        output.note(f"The file is {path()}.")
    for error in wrong:
        print_error(str(error))
    if wrong:
        raise typer.Exit(1)


def _row(default: Default) -> tuple[str, str]:
    return _shown(default.value), default.source


def _own(commands: Mapping[str, Any], key: str) -> str:
    """What commands take by themselves, and which, where they differ."""
    own: dict[str, list[str]] = {}
    for name, command in commands.items():
        for option in command.params:
            if option.name == key:
                own.setdefault(_shown(option.default), []).append(name)
    if len(own) == 1:
        return next(iter(own))
    return ", ".join(f"{value} ({' '.join(names)})" for value, names in own.items())


def _shown(value: Any) -> str:
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@config.command("set")
def set_(key: Key, value: Value) -> None:
    """Write a default into config.toml."""
    name = key.replace("-", "_")
    _setting(name)
    parsed = _parsed(name, value, key)
    with _changed() as document:
        document[name] = parsed


@config.command()
def unset(key: Key) -> None:
    """Take a default out of config.toml."""
    with _changed() as document:
        name = key if key in document else key.replace("-", "_")
        if name not in document:
            raise InputError(f"{path()} does not set {key}; `numoe config` shows what is set")
        del document[name]


@contextmanager
def _changed() -> Iterator[TOMLDocument]:
    """The file with its comments, which stay where they are; written when it is changed, while others wait."""
    import tomlkit

    from numoe.engine.home import home, make
    from numoe.quant.files import locked_soon, write_whole

    _read(path())  # what is no file of settings is left alone, without a lock beside it
    file = path().resolve()  # a link to where somebody keeps their settings stays one
    try:
        make(home())
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked_soon(file, str(file), _PATIENCE):
            _read(file)
            text = file.read_text(encoding="utf-8-sig") if file.exists() else ""
            document = tomlkit.parse(text)
            yield document
            write_whole(file, document.as_string().encode(), private=True)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); check the folder") from error

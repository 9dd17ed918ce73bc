"""config.toml and NUMOE_* variables: what options are when they are not given; `numoe config`.

temp = 0.7            config.toml, in NUMOE_HOME
NUMOE_TEMP=0.7        goes before it, and --temp before both
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numoe.cli.output import Output
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

KEYS: Mapping[str, type] = {
    "system": str,
    "think": bool,
    "think_budget": int,
    "show_thinking": bool,
    "max_tokens": int,
    "temp": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repeat_penalty": float,
    "seed": int,
    "ctx": int,
    "ram": str,
    "threads": int,
    "quant": str,
    "plain": bool,
    "quiet": bool,
}
"""The options that can have another default, by their names in Python. Every command that has one follows it."""
_KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """A value and where it is from."""

    value: Any
    source: str


def path() -> Path:
    """The file, whether it is there or not."""
    from numoe.engine.home import home

    return home() / "config.toml"


def settings() -> dict[str, Setting]:
    """Every key that is set.

    Raises:
        InputError: the file is not valid, a key is not known, or its value is of another kind.
    """
    file = path()
    found = {}
    for key, value in _read(file).items():
        if key not in KEYS:
            raise _unknown(key, f"{file}: ")
        kind = KEYS[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InputError(f"{file}: {key} is {_KINDS[kind]}, not {value!r}; correct it")
        found[key] = Setting(value, str(file))
    for key in KEYS:
        variable = f"NUMOE_{key.upper()}"
        if text := os.environ.get(variable):
            found[key] = Setting(_parsed(key, text, variable), variable)
    return found


def defaults(commands: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys that are set, by command, as Click's `default_map` wants them. Raises as `settings` does."""
    values = settings()
    return {
        name: {option.name: values[option.name].value for option in command.params if option.name in values}
        for name, command in commands.items()
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise InputError(f"{file} is not valid TOML ({error}); correct or remove it") from None


def _parsed(key: str, text: str, source: str) -> Any:
    kind = KEYS[key]
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise InputError(f"{source} is {_KINDS[kind]}, not {text!r}") from None


def _unknown(key: str, where: str = "") -> InputError:
    return InputError(f'{where}there is no setting "{key}"; there are {", ".join(KEYS)}')


config = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
Key = Annotated[str, typer.Argument(metavar="KEY", help="An option's name, without the dashes before it.")]
Value = Annotated[str, typer.Argument(metavar="VALUE", help="What it is where it is not given.")]


@config.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """Show the defaults of options and where each is from, or change those in config.toml."""
    if context.invoked_subcommand is not None:
        return
    values = settings()
    commands: Mapping[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    with Output() as output:
        output.table(
            [(key, *_row(values[key])) if key in values else (key, _own(commands, key), "") for key in KEYS],
        )
        output.note(f"The file is {path()}.")


def _row(setting: Setting) -> tuple[str, str]:
    return _shown(setting.value), setting.source


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
    if name not in KEYS:
        raise _unknown(key)
    document = _document()
    document[name] = _parsed(name, value, key)
    _write(document)


@config.command()
def unset(key: Key) -> None:
    """Take a default out of config.toml."""
    document = _document()
    name = key if key in document else key.replace("-", "_")
    if name not in document:
        raise InputError(f"{path()} does not set {key}; `numoe config` shows what is set")
    del document[name]
    _write(document)


def _document() -> TOMLDocument:
    """The file with its comments, which stay where they are."""
    import tomlkit

    file = path()
    _read(file)
    return tomlkit.parse(file.read_text(encoding="utf-8")) if file.exists() else tomlkit.document()


def _write(document: TOMLDocument) -> None:
    file = path()
    from numoe.quant.files import write_whole

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, document.as_string().encode())
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); check the folder") from error

"""config.toml and NUMOE_* variables: what options are when they are not given; `numoe config`.

temp = 0.7            config.toml, in NUMOE_HOME
NUMOE_TEMP=0.7        goes before it, and --temp before both
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numoe.cli.config_file import TABLES, TOOLS, changed, check_table, check_tools, path, read
from numoe.cli.output import Output, print_error
from numoe.cli.setting import May, Setting
from numoe.cli.settings import TAKEN, Options, settings_in
from numoe.cli.usage import Command, Group, refuse_rest
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    pass

KEYS = settings_in(May.CONFIG)
"""The settings that can have another default, by name. Every command that takes one follows it."""


@dataclass(frozen=True)
class Default:
    """A value and where it is from."""

    value: Any
    source: str


def settings() -> tuple[dict[str, Default], list[InputError]]:
    """Every key that is set, and what is wrong: a file that is not valid, unknown keys, values of another kind."""
    found: dict[str, Default] = {}
    wrong: list[InputError] = []
    file = path()
    try:
        values = read(file)
    except InputError as error:
        values, wrong = {}, [error]
    for key, value in values.items():
        try:
            if key in TABLES:
                check_table(key, value, file)
                continue
            if key == TOOLS:
                check_tools(value, file)
                continue
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
    return {name: _given(values[name].value) for name in names if name in values}


def options_of(command: str, options: Options) -> Options:
    """The options that another command would have: those that were chosen here, its own defaults otherwise."""
    kept, _ = settings()
    made = Options()
    for name, setting in TAKEN[command].items():
        own = kept[name].value if name in kept else setting.default
        made[name] = options[name] if name in options.chosen else setting.value(None if own is ... else own)
    made.stated = {name: value for name, value in options.stated.items() if name in made}
    made.chosen = {name: made[name] for name in made if name in options.chosen or name in kept}
    return made


def _given(value: Any) -> Any:
    """A value as if a flag had it: a switch, or a text."""
    return value if isinstance(value, bool) else str(value)


def _parsed(key: str, text: str, source: str) -> Any:
    value = KEYS[key].read(text, source)
    _refuse_halves(KEYS[key], text, source)
    KEYS[key].check(value, source, text)
    return value


def _refuse_halves(setting: Setting, text: str, source: str) -> None:
    if re.search("[\ud800-\udfff]", text):
        raise WrongUsage(f"{source} takes a text, and {'this' if setting.secret else ascii(text)} is not UTF-8")


def _setting(key: str, where: str = "") -> Setting:
    if key not in KEYS:
        raise WrongUsage(f'{where}there is no setting "{key}"; there are {", ".join(KEYS)}')
    return KEYS[key]


config = typer.Typer(cls=Group, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})


def _keys(incomplete: str) -> list[str]:
    return [key for key in KEYS if key.startswith(incomplete)]


_KEY_HELP = "An option's name, without the dashes before it."
Key = Annotated[str, typer.Argument(metavar="KEY", help=_KEY_HELP, autocompletion=_keys)]
Value = Annotated[str, typer.Argument(metavar="VALUE", help="What it is where it is not given.")]


@config.callback(invoke_without_command=True)
def show(context: typer.Context) -> None:
    """Show the defaults of options and where each is from, or change those in config.toml.

    Examples:
    numoe config
    numoe config get temp
    numoe config set temp 0.7
    """
    if context.invoked_subcommand is not None:
        return
    values, wrong = settings()
    commands: Mapping[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    with Output() as output:
        output.table(
            [
                (key, setting.shown(values[key].value), values[key].source)
                if key in values
                else (key, _own(commands, setting), "")
                for key, setting in KEYS.items()
            ],
        )
        output.note(f"The file is {path()}.")
    for error in wrong:
        print_error(str(error))
    if wrong:
        raise typer.Exit(1)


def _own(commands: Mapping[str, Any], setting: Setting) -> str:
    """What commands take by themselves, and which, where they differ."""
    own: dict[str, list[str]] = {}
    for name, command in commands.items():
        for option in command.params:
            if option.name == setting.name:
                own.setdefault(setting.shown(option.default), []).append(name)
    if len(own) == 1:
        return next(iter(own))
    return ", ".join(f"{value} ({' '.join(names)})" for value, names in own.items())


@config.command(cls=Command)
def get(context: typer.Context, key: Key) -> None:
    """Print what an option is where it is not given.

    Examples:
    numoe config get temp
    """
    refuse_rest(context)
    name = key.replace("-", "_")
    setting = _setting(name)
    values, wrong = settings()
    if wrong:
        raise wrong[0]
    commands: Mapping[str, Any] = context.find_root().command.commands  # type: ignore[attr-defined]
    Output().text(setting.shown(values[name].value) if name in values else _own(commands, setting))


@config.command("set", cls=Command)
def set_(context: typer.Context, key: Key, value: Value) -> None:
    """Write a default into config.toml.

    Examples:
    numoe config set model Qwen/Qwen3-30B-A3B
    numoe config set ram 16GB
    """
    refuse_rest(context)
    name = key.replace("-", "_")
    _setting(name)
    parsed = _parsed(name, value, key)
    with changed() as document:
        document[name] = parsed
    Output().note(f"{name} is {KEYS[name].shown(parsed)}")


@config.command(cls=Command)
def unset(context: typer.Context, key: Key) -> None:
    """Take a default out of config.toml.

    Examples:
    numoe config unset ram
    """
    refuse_rest(context)
    with changed() as document:
        name = key if key in document else key.replace("-", "_")
        if name not in document:
            raise WrongUsage(f"{path()} does not set {key}; `numoe config` shows what is set")
        del document[name]
    Output().note(f"{name} is not set any more")

"""Tools of a chat: commands that config.toml lists, which the model may ask for and the user lets run.

[tools.weather]
command = ["weather-cli", "{city}"]
description = "The weather in a city."
parameters = {type = "object", properties = {city = {type = "string"}}, required = ["city"]}

{city} in the command is an argument of the call; without any such the whole call is given on standard input, as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from numoe.cli.config_file import TOOLS, tool_tables
from numoe.cli.output import Output
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.chat.tools.call import Call, Use

_SECONDS = 120
_LONGEST = 20_000  # characters of what a command says that the model reads
_MOST_ROUNDS = 20  # of calls to one question


class Commands:
    """The commands by the names of their tools."""

    def __init__(self, tables: Mapping[str, Any], ask: Callable[[str], bool], output: Output) -> None:
        """
        Args:
            tables: those of config.toml. ask: the user, whether to run a command.

        Raises:
            InputError: there are none, or one is not what it should be.
        """
        if not tables:
            raise InputError(f"no tools are listed; give each a table [{TOOLS}.NAME] with a command in config.toml")
        self._commands = {name: _command(name, table) for name, table in tables.items()}
        self._tables, self._ask, self._output = tables, ask, output

    @property
    def use(self) -> Use:
        """As the model is told of them."""
        from numoe.engine.chat.tools.call import Tool, Use

        tools = []
        for name, table in self._tables.items():
            parameters = table.get("parameters", {"type": "object", "properties": {}})
            tools.append(Tool(name, table.get("description", ""), parameters, strict=False))
        return Use(tuple(tools))

    def run(self, call: Call) -> str:
        """What the command of a call says, or why it says nothing; shown as the model reads it."""
        command = [_filled(word, call.values) for word in self._commands[call.name]]
        if not self._ask(f"Run {json.dumps(command, ensure_ascii=False)}?"):
            return "The user did not let this command run."
        try:
            done = subprocess.run(
                command,
                input=call.arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
            said = done.stdout if not done.returncode else f"{done.stdout}\nExit code {done.returncode}."
        except subprocess.TimeoutExpired:
            said = f"It took more than {_SECONDS} seconds, and was ended."
        except (OSError, ValueError) as error:
            said = f"It cannot be run ({error})."
        if len(said) > _LONGEST:
            said = f"{said[:_LONGEST]}\n... and {len(said) - _LONGEST} characters more."
        self._output.note(said.rstrip("\n"))
        return said

    def results(self, calls: tuple[Call, ...], rounds: int) -> tuple[str, ...]:
        """What the commands of calls say. rounds: how often there were some for this question.

        Raises:
            InputError: it does not end.
        """
        if rounds > _MOST_ROUNDS:
            raise InputError(f"the model has called tools {_MOST_ROUNDS} times for one question; ask another way")
        return tuple(self.run(call) for call in calls)


def commands_of(output: Output, typed_in: bool) -> Commands:
    """Those that the user's config.toml lists. typed_in: somebody is there to be asked; else none is run.

    Raises:
        InputError: there are none, or one is not what it should be.
    """
    return Commands(tool_tables(), output.ask if typed_in else lambda question: False, output)


def _command(name: str, table: Any) -> list[str]:
    if not isinstance(table, dict) or (wrong := table.keys() - {"command", "description", "parameters"}):
        what = "is no table" if not isinstance(table, dict) else f"has {min(wrong)}"
        raise InputError(f"[{TOOLS}.{name}] in config.toml {what}; it has command, description and parameters")
    command = table.get("command")
    words = command.split() if isinstance(command, str) else command
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise InputError(f"[{TOOLS}.{name}] in config.toml has no command; give its words as a list of texts")
    if not isinstance(table.get("parameters", {}), dict) or not isinstance(table.get("description", ""), str):
        raise InputError(f"[{TOOLS}.{name}] in config.toml takes a text as description and a table as parameters")
    return words


def _filled(word: str, values: Mapping[str, Any]) -> str:
    """A word of a command with arguments in it: never more than one word, whatever they say."""

    def argument(found: re.Match[str]) -> str:
        value = values.get(found[1], "")
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return re.sub(r"\{(\w+)\}", argument, word)

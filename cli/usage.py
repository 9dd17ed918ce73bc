"""How a command line is read and explained: --help with examples, and wrong usage told in words of our own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from numoe.quant.errors import WrongUsage

UsageError: Any = typer.BadParameter.__base__
"""What Typer raises of wrong usage; it may have a Click of its own."""
VARIABLE = "_NUMOE_COMPLETE"
"""By which shells ask."""
SHELLS = "bash", "zsh", "fish", "powershell"
_BY_SHELL = "--install-completion", "--show-completion"
_BASH = r"""
_numoe_completion() {
    local line IFS=$'\n'
    COMPREPLY=()
    while read -r line; do
        [[ $line ]] || continue
        [[ $line == */ ]] && compopt -o nospace 2> /dev/null
        COMPREPLY+=("$(printf %q "$line")")
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _NUMOE_COMPLETE=complete_bash "$1" 2> /dev/null)
}
complete -o default -F _numoe_completion numoe
"""


class Command(TyperCommand):
    """A command whose docstring ends with examples. Words that are left over are refused by `refuse_rest`."""

    allow_extra_args = True

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *_places(self)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = _width()
        super().format_help(ctx, formatter)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        _write_help(self, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(self, formatter)


class Group(TyperGroup):
    """Commands, listed by the first sentence of each."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = _width()
        super().format_help(ctx, formatter)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        _write_help(self, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)
        with formatter.section("Commands"):
            _write_pairs(formatter, [(name, _first_sentence(command)) for name, command in self.commands.items()])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_examples(self, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[-1] in _BY_SHELL:  # without its name: that of the login
            args = [*args, Path(os.environ.get("SHELL", "")).name]
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            close = get_close_matches(args[0], self.commands, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise WrongUsage(
                f"{ctx.command_path} has no command {_quoted(args[0])}{hint or f'; it has {_listed(self.commands)}'}"
            )
        return super().resolve_command(ctx, args)


def refuse_rest(context: typer.Context) -> None:
    """Raises WrongUsage if words are left over behind those that a command takes."""
    if context.args:
        takes = " and ".join(_places(context.command)).translate(str.maketrans("", "", "[]")) or "options alone"
        more = "; put a prompt into quotes" if "PROMPT" in takes else ""
        raise WrongUsage(
            f"{context.command_path} takes {takes}, and {_quoted(' '.join(context.args))} is left over{more}"
        )


def sentence(error: Any) -> str:
    """What Typer refuses of a command line, with the next step."""
    context, kind, name = error.ctx, type(error).__name__, getattr(error, "option_name", "")
    if kind == "BadOptionUsage":
        return f"{name} {'takes no' if 'not take' in error.message else 'needs a'} value"
    if context is None or kind == "NoArgsIsHelpError":
        return str(error.message)
    help_ = f"`{context.command_path} --help` tells what it takes"
    if kind == "NoSuchOption":
        flags = [
            flag for parameter in context.command.get_params(context) for flag in parameter.opts if flag[:2] == "--"
        ]
        close = get_close_matches(name, flags, n=1)
        return f"there is no option {_quoted(name)}{f'; did you mean {close[0]}?' if close else f'; {help_}'}"
    if kind == "MissingParameter":
        return f"{context.command_path} needs {_place(error.param)}; {help_}"
    return f"{context.command_path} cannot be used so; {help_}"


def complete(shell: str, install: bool) -> None:
    """Print what teaches a shell numoe's commands and names, or put it where the shell reads it.

    Raises:
        WrongUsage: it is none of SHELLS.
    """
    from typer.completion import get_completion_script
    from typer.completion import install as put

    if shell not in SHELLS:
        shown = f", not {_quoted(shell)}" if shell else ""
        raise WrongUsage(f"{_BY_SHELL[not install]} takes {_listed(SHELLS, 'or')}{shown}")
    script = get_completion_script(prog_name="numoe", complete_var=VARIABLE, shell=shell)
    if shell == "bash":  # with names quoted that have spaces in them
        script = _BASH.strip()
    if not install:
        typer.echo(script)
        return
    _, path = put(shell=shell, prog_name="numoe", complete_var=VARIABLE)
    if shell == "bash":
        path.write_text(script + "\n")
    typer.echo(f"{shell} completes numoe from its next start on; the script is {path}", err=True)


def _places(command: Any) -> list[str]:
    """The arguments of a command, those that need not be given in brackets."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    return [_place(one) if one.required else f"[{_place(one)}]" for one in arguments]


def _place(parameter: Any) -> str:
    name = parameter.opts[-1] if parameter.param_type_name == "option" else parameter.name
    return str(parameter.metavar or name.upper()) if parameter.param_type_name == "argument" else str(name)


def _quoted(text: str) -> str:
    return f'"{text}"' if len(text) <= 60 else f'"{text[:57]}..."'


def _listed(names: Any, word: str = "and") -> str:
    *most, last = names
    return f"{', '.join(most)} {word} {last}" if most else str(last)


def _width() -> int:
    """Columns for help; more than a hundred are hard to read."""
    return max(24, min(100, shutil.get_terminal_size().columns) - 2)


def _write_pairs(formatter: Any, rows: list[tuple[str, str]]) -> None:
    formatter.write_dl(rows, col_max=min(30, formatter.width // 2))


def complete_now() -> None:
    """Let Typer answer a shell that asks what to complete."""
    if VARIABLE in os.environ:
        from typer.completion import completion_init

        completion_init()


def _parts(command: Any) -> tuple[list[str], list[str]]:
    """The paragraphs of a docstring, and the lines of its examples."""
    text, _, examples = (command.help or "").partition("\n\nExamples:\n")
    return text.split("\n\n"), examples.split("\n") if examples else []


def _first_sentence(command: Any) -> str:
    return re.split(r"(?<=[\w`])[.;:]\s", _parts(command)[0][0].replace("\n", " ") + " ")[0].strip(" .") + "."


def _write_help(command: Any, formatter: Any) -> None:
    for paragraph in _parts(command)[0]:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(" ".join(paragraph.split()))


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    if arguments:
        with formatter.section("Arguments"):
            _write_pairs(formatter, [(_place(one), one.help or "") for one in arguments])
    with formatter.section("Options"):
        _write_pairs(formatter, list(_rows(command, ctx)))


def _rows(command: Any, ctx: Any) -> Iterator[tuple[str, str]]:
    for option in command.get_params(ctx):
        if option.param_type_name == "option" and not option.hidden:
            flags = ", ".join(sorted(option.opts, key=len))
            more = "".join(f" / {flag}" for flag in option.secondary_opts)
            value = "" if option.is_flag else f" {option.metavar}"
            yield f"{flags}{more}{value}", option.help or ""


def _write_examples(command: Any, formatter: Any) -> None:
    _, examples = _parts(command)
    if examples:
        with formatter.section("Examples"):
            for line in examples:  # to be copied, so never folded
                formatter.write(f"  {line.strip()}\n")

"""`numoe alias` and `numoe template`: names of one's own for models and prompts, in config.toml."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from numoe.cli.config_file import change_table, table
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.quant.errors import WrongUsage

_Pairs = Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help="With nothing after =: remove it.")]


@takes("json")
def alias(pairs: _Pairs = None, *, options: Options) -> None:
    """Show, set or remove short names for models. They can be given wherever a MODEL can.

    Examples:
    numoe alias fast=Qwen/Qwen3-30B-A3B
    numoe alias
    numoe run fast "What colour is a frog?"
    numoe alias fast=
    """
    _change("alias", pairs, options["json"])


@takes("json")
def template(pairs: _Pairs = None, *, options: Options) -> None:
    """Show, set or remove prompts for `numoe run -t NAME`. The text stands where {input} is, or else below.

    Examples:
    numoe template summarise="Summarise this in one sentence: {input}"
    numoe run tiny -t summarise < letter.txt
    numoe template summarise=
    """
    _change("template", pairs, options["json"])


def _change(kind: str, pairs: list[str] | None, json: bool) -> None:
    from numoe.engine.chat.answer import is_text
    from numoe.engine.home import TINY

    output = Output()
    named = [pair.partition("=") for pair in pairs or ()]
    for name, equals, value in named:
        if not equals or not re.fullmatch(r"\w[\w.-]*", name):
            raise WrongUsage(
                f'`numoe {kind}` takes NAME=VALUE, the name in letters, digits, ".", "-" and "_", not '
                f'"{name}{equals}{value}"'
            )
        if not is_text(value):
            raise WrongUsage(f"numoe {kind} takes texts, and {value!a} is not UTF-8")
        if kind == "alias" and name == TINY and value:
            raise WrongUsage(f"{TINY} is the name of a model of its own; choose another one")
    for name, _, value in named:
        change_table(kind, name, value)
        output.note(f"{name} is {value}" if value else f"{name} is removed")
    if pairs:
        return
    found = table(kind)
    if json:
        output.document(found)
    elif found:
        output.table(list(found.items()))
    else:
        output.note(f"There are none yet; `numoe {kind} --help` tells how to make one.")

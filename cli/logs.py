"""`numoe logs`: what was asked and answered by `numoe run`, where that is switched on."""

from __future__ import annotations

from typing import Annotated

import typer

from numoe.cli.output import Output
from numoe.cli.settings import Options, takes


@takes("last", "json")
def logs(
    search: Annotated[str | None, typer.Argument(metavar="TEXT", help="Only those that say this.")] = None,
    *,
    options: Options,
) -> None:
    """Show the prompts of `numoe run` and their answers, the latest last, once `numoe config set log true` is said.

    Examples:
    numoe config set log true
    numoe logs -n 3
    numoe logs sheep --json
    """
    from numoe.cli.history import answered, entries, log_path

    with Output() as output:
        found = list(entries(search or ""))[-options["last"] :]
        if options["json"]:
            output.document({"file": str(log_path()), "entries": found})
        elif not found:
            output.note(
                f'The log does not say "{search}".'
                if search
                else "Nothing is logged yet; `numoe config set log true` has `numoe run` do it."
            )
        else:
            for entry in found:
                output.text(f"{entry.get('time')}, {entry.get('model')}\n> {entry['prompt']}\n{answered(entry)}\n")

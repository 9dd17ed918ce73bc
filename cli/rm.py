"""`numoe rm`: a pulled model removed from the disk."""

from __future__ import annotations

import typer

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.cli.text import typed
from numoe.quant.errors import WrongUsage


@takes("yes")
def rm(model: arguments.Pulled, options: Options) -> None:
    """Remove a pulled model, or what an unfinished pull has left.

    Examples:
    numoe rm Qwen/Qwen3-30B-A3B:int4
    """
    from numoe.engine import home
    from numoe.engine.plan import format_bytes

    found = home.find(model)
    if not found:
        raise WrongUsage(f'no pulled model is called "{model}"; `numoe list` shows them')
    one = home.only(model, found)
    size = format_bytes(one.nbytes)
    output = Output()
    if not options["yes"]:
        if not typed():
            raise WrongUsage(f"there is nobody to ask whether {one.name} ({size}) may go; add -y")
        if not output.ask(f"remove {one.name} ({size}) from {one.path}?"):
            raise typer.Exit(1)
    home.remove(one)
    output.note(f"removed {one.name}, {size}")

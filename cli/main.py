"""`numoe`: registers the commands and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from numoe.cli.bench import bench
from numoe.cli.chat import chat
from numoe.cli.output import print_error
from numoe.cli.perplexity import perplexity
from numoe.cli.quantize import quantize
from numoe.cli.run import run
from numoe.cli.show import show
from numoe.quant.errors import InputError

# Plain help: Rich would take longer to import than everything else together.
app = typer.Typer(
    name="numoe",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(chat)
app.command()(show)
app.command()(quantize)
app.command()(bench)
app.command()(perplexity)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"numoe {version('numoe')}")
        raise typer.Exit


@app.callback()
def _numoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run large open mixture-of-experts language models in pure NumPy."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run one command (default: of `sys.argv`) and exit.

    Typer itself answers wrong usage with 2, Ctrl-C with 130 and a closed pipe with 1, the last two in silence.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of every `finally`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows \u4e2d instead of failing
    try:
        app(args, prog_name="numoe")
    except InputError as error:
        print_error(str(error))
    except MemoryError:
        print_error("there is not enough memory; close other programs, lower --ctx or take a smaller model")
    except OSError as error:
        print_error(str(error))
    except Exception as error:
        if os.environ.get("NUMOE_DEBUG"):
            raise
        print_error(
            f"this is a bug in numoe ({type(error).__name__}: {error}); NUMOE_DEBUG=1 shows where, please report"
        )
    sys.exit(1)

"""`numoe`: registers the commands and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or a model that does not fit, 3 an answer of a given form that was cut off
before its end, 130 Ctrl-C, 141 the reader of stdout left, 143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from numoe.cli.bench import bench
from numoe.cli.chat import chat
from numoe.cli.config import config, defaults
from numoe.cli.fit import fit
from numoe.cli.list import list_models
from numoe.cli.output import print_error
from numoe.cli.perplexity import perplexity
from numoe.cli.pull import pull
from numoe.cli.quantize import quantize
from numoe.cli.rm import rm
from numoe.cli.run import run
from numoe.cli.show import show
from numoe.cli.verify import verify
from numoe.quant.errors import DoesNotFit, InputError

# Plain help: Rich would take longer to import than everything else together.
app = typer.Typer(
    name="numoe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run)
app.command()(chat)
app.command()(fit)
app.command()(show)
app.command()(pull)
app.command()(quantize)
app.command("list")(list_models)
app.command()(verify)
app.command()(rm)
app.command()(bench)
app.command()(perplexity)
app.add_typer(config, name="config")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"numoe {version('numoe')}")
        raise typer.Exit


@app.callback()
def _numoe(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Run large open mixture-of-experts language models in pure NumPy."""
    if context.invoked_subcommand != "config":  # which mends what is wrong there
        context.default_map = defaults(context.command.commands)  # type: ignore[attr-defined]


def main(args: list[str] | None = None) -> NoReturn:
    """Run one command (default: of `sys.argv`) and exit.

    Typer itself answers wrong usage with 2, Ctrl-C with 130 and a closed pipe with 1, the last two in silence; we say
    141 to that, as the shell does of programs that the signal ends.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of every `finally`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows \u4e2d instead of failing
    try:
        app(args, prog_name="numoe")
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):
            left.code = 128 + 13  # SIGPIPE, which Windows has no name for
        raise
    except DoesNotFit as error:
        print_error(str(error))
        sys.exit(2)
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

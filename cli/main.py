"""`numoe`: registers the commands and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or a model that does not fit, 3 an answer of a given form that was cut off
before its end, 130 Ctrl-C, 141 the reader of stdout left, 143 SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from numoe.cli.bench import bench
from numoe.cli.chat.loop import chat
from numoe.cli.config import config, defaults
from numoe.cli.fit import fit
from numoe.cli.list import list_models
from numoe.cli.logs import logs
from numoe.cli.names import alias, template
from numoe.cli.output import print_error
from numoe.cli.perplexity import perplexity
from numoe.cli.pull import pull
from numoe.cli.quantize import quantize
from numoe.cli.rm import rm
from numoe.cli.run import run
from numoe.cli.search import search
from numoe.cli.serve.command import serve
from numoe.cli.settings import with_bare
from numoe.cli.show import show
from numoe.cli.usage import Command, Group, UsageError, complete, complete_now, sentence
from numoe.cli.verify import verify
from numoe.quant.errors import DoesNotFit, InputError, WrongUsage

# Plain help: Rich would take longer to import than everything else together.
app = typer.Typer(
    name="numoe",
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    run, chat, serve, search, fit, show, pull, quantize, verify, rm, bench, perplexity, alias, template, logs,
):  # fmt: skip
    app.command(cls=Command)(_command)
app.command("list", cls=Command)(list_models)
app.add_typer(config, name="config")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"numoe {version('numoe')}")
        raise typer.Exit


def _completing(install: bool) -> Any:
    def callback(shell: str | None) -> None:
        if shell is not None:
            complete(shell, install)
            raise typer.Exit

    does = "Teach a shell" if install else "Print what teaches a shell"
    flag = "--install-completion" if install else "--show-completion"
    help = f"{does} numoe's commands, models and chats: bash, zsh, fish or powershell; else the one of your login."
    return typer.Option(flag, metavar="SHELL", callback=callback, is_eager=True, help=help)


@app.command("help", cls=Command)
def help_(names: Annotated[list[str] | None, typer.Argument(metavar="COMMAND")] = None) -> None:
    """Tell what numoe does, or one of its commands.

    Examples:
    numoe help
    numoe help run
    numoe help config set
    """
    app([*(names or []), "--help"], prog_name="numoe", standalone_mode=False)


@app.callback()
def _numoe(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("-V", "--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
    install: Annotated[str | None, _completing(install=True)] = None,
    shown: Annotated[str | None, _completing(install=False)] = None,
) -> None:
    """Run large open mixture-of-experts language models in pure NumPy.

    Examples:
    numoe run tiny "What colour is a frog?"
    numoe chat
    numoe fit Qwen/Qwen3-30B-A3B --ram 16GB
    numoe help run
    """
    name = context.invoked_subcommand or ""
    command = context.command.commands[name]  # type: ignore[attr-defined]
    try:
        context.default_map = {name: defaults(command)}
    except InputError as error:
        wrong = error

        def refuse(**_: object) -> None:
            raise wrong

        command.callback = refuse  # instead of the command; its --help is answered before that


class _Stream(io.TextIOWrapper):
    """Standard output or error where it cannot be written, as on a full disk: told once, and what was held is dropped.

    Nobody can be told that of standard error, and what goes there is no reason to fail.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text) if text != "" else 0  # which Typer writes to see what kind of stream it is
        except OSError as error:
            return self._dropped(error, len(text))

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._dropped(error, 0)

    def _dropped(self, error: OSError, written: int) -> int:
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self.fileno())  # else the end of Python fails once more
        os.close(void)
        if self.fileno() == 1:
            if isinstance(error, BrokenPipeError):
                raise error
            why = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise InputError(f"standard output cannot be written ({why}); send it to another place") from None
        return written


def _prepare_streams() -> None:
    """Make standard streams that text cannot break, also where the shell closed them (`>&-`)."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened gets the number. This one can be neither read nor written, just as well.
            os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
            if number:
                setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        stream = getattr(sys, name)
        if number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows \u4e2d instead of failing
        if number and type(stream) is io.TextIOWrapper:
            encoding, errors, live, through = (
                stream.encoding,
                stream.errors,
                stream.line_buffering,
                stream.write_through,
            )
            made = _Stream(stream.detach(), encoding, errors, line_buffering=live, write_through=through)
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)  # which is asked for the terminal's size
    for name in ("COLUMNS", "LINES"):  # what says nothing of a screen's size, such as 0
        if not (size := os.environ.get(name, "80")).isdecimal() or not 8 <= int(size[:9]) < 10_000:
            del os.environ[name]


def main(args: list[str] | None = None) -> NoReturn:
    """Run one command (default: of `sys.argv`) and exit.

    Typer itself answers Ctrl-C with 130 and a closed pipe with 1, both in silence; we say 141 to that, as the shell
    does of programs that the signal ends.
    """
    ended: list[int] = []

    def end(number: int, frame: Any) -> None:
        ended.append(128 + number)
        sys.exit(ended[0])  # by way of every `finally`

    signal.signal(signal.SIGTERM, end)
    _prepare_streams()
    complete_now()
    args = with_bare(sys.argv[1:] if args is None else args)
    try:
        try:
            code = app(args, prog_name="numoe", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):
            left.code = 128 + 13  # SIGPIPE, which Windows has no name for
        if ended:
            left.code = ended[0]  # Ray's C++, where it waits, makes another of it
        raise
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.message, file=sys.stderr)
        else:
            print_error(sentence(error))
        sys.exit(2)
    except (DoesNotFit, WrongUsage) as error:
        print_error(str(error))
        sys.exit(2)
    except InputError as error:
        print_error(str(error))
    except MemoryError:
        print_error("there is not enough memory; close other programs, lower --ctx or take a smaller model")
    except BrokenPipeError:
        sys.exit(128 + 13)
    except OSError as error:
        print_error(f"{error.filename}: {error.strerror}; check that place" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:  # among them PanicException, by which libraries in Rust fail
        if os.environ.get("NUMOE_DEBUG"):
            raise
        if isinstance(error, RuntimeError) and "start new thread" in str(error):
            print_error("the system lets numoe begin no more threads; allow more (`ulimit -u`, or a container's pids)")
            sys.exit(1)
        print_error(
            f"this is a bug in numoe ({type(error).__name__}: {error}); NUMOE_DEBUG=1 shows where, please report"
        )
    else:
        sys.exit(code or 0)
    sys.exit(1)

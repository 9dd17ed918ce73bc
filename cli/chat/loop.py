"""`numoe chat`: a conversation at the prompt, or of piped lines."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from numoe.cli import arguments
from numoe.cli.output import Output, print_error
from numoe.cli.settings import Options, filled, spelled, takes
from numoe.cli.text import typed
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.cli.chat.commands import Talk
    from numoe.cli.chat.prompt import Prompt
    from numoe.engine import Model
    from numoe.engine.chat.files import Chat


@takes(
    "continue_", "session", "list", "save", "plain", "system", "commands", "reasoning", "ending", "sampling", "room",
    "quiet", temp=0.6, top_p=0.95,
)  # fmt: skip
def chat(model: arguments.ModelOrLast = None, *, options: Options) -> None:
    """Talk with a model.

    Chats keep themselves and go on with -c or --session, with the settings they had where no option says otherwise.
    Piped input is one turn a line, and is kept only with these options.
    """
    session, goes_on = options["session"], options["continue_"]
    if goes_on and session is not None:
        raise typer.BadParameter("-c goes on with the last chat and --session with a named one; give one of them")
    typed_in = typed() and sys.stderr.isatty()
    with ExitStack() as stack:
        output = stack.enter_context(_screen(options) if typed_in else Output(options["quiet"]))
        from numoe.cli.chat.commands import Talk, chat_rows
        from numoe.cli.chat.tools import commands_of
        from numoe.engine.chat.files import alone, chat_path, chats

        if options["list"]:
            if rows := chat_rows():
                output.table(rows)
            else:
                output.note("No chats are kept yet.")
            return
        kept = chats()
        if goes_on and not kept:
            raise InputError("no chat is kept yet; `numoe chat` begins one")
        path = kept[0] if goes_on else chat_path(session) if session is not None else None
        held = stack.enter_context(ExitStack())
        if path is not None:
            held.enter_context(alone(path))
        begun = _begun(path, model, options, output.note)
        keeps = options["save"] and (typed_in or path is not None)
        commands = commands_of(output, typed_in) if options["commands"] else None
        talk = Talk(output, _loader(options, output), begun, path, held, keeps)
        talk.offer(commands)
        stack.callback(talk.leave)
        _talk(talk, stack, typed_in, options["save"])


def _screen(options: Options) -> Output:
    if not sys.stdout.isatty() or options["plain"] or os.environ.get("TERM") == "dumb":
        return Output(options["quiet"])
    from numoe.cli.chat.screen import Screen

    return Screen(options["quiet"])


def _begun(path: Path | None, model: str | None, options: Options, note: Callable[[str], None]) -> Chat:
    """The chat that is gone on with, or a new one. One that was kept has its settings where no option says otherwise.

    path: its file, which need not be there yet. model: another one than it had.
    """
    from numoe.cli.chat.commands import model_name
    from numoe.engine import describe
    from numoe.engine.chat.files import Chat, chats
    from numoe.engine.home import lookup

    resumed = path is not None and path.exists()
    if path is not None and resumed:
        chat = Chat.read(path)
        if model is None and lookup(chat.model) is None:
            raise InputError(
                f'the chat "{path.stem}" is one with {chat.model}, which is not here any more; give another MODEL'
            )
    else:
        chat = Chat(_last_model(chats(), note) if model is None else model)
        options.recommend(describe(chat.model).sampling)
    if model is not None:
        chat = replace(chat, model=model_name(model))
    return replace(chat, settings=filled(chat.settings, options.stated if resumed else options))


def _loader(options: Options, output: Output) -> Callable[[Chat], Model]:
    from numoe.engine import describe, load

    def loaded(chat: Chat) -> Model:
        output.status(f"loading {chat.model}")
        described = describe(chat.model)
        room = described.plan(chat.settings.context).context
        made = load(described, ram=options["ram"], threads=options["threads"], ctx=room)
        output.clear_status()
        for told in made.tokenizer.notes:
            output.note(told)
        return made

    return loaded


def _talk(talk: Talk, stack: ExitStack, typed_in: bool, saves: bool) -> None:
    """Do what every line says, to the last. Of lines that are typed in, one that fails is told of."""
    from numoe.cli.chat.commands import SPELLINGS

    lines = _piped_lines()
    if typed_in:
        from numoe.cli.chat.prompt import Prompt
        from numoe.engine.home import home

        if hasattr(signal, "SIGHUP"):  # the terminal is closed
            signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
        _introduce(talk)
        prompt = Prompt(home() / "history" if saves else None, talk.completions)
        lines = _typed_lines(stack.enter_context(prompt), talk)
    for line in lines:
        try:
            talk.hear(line)
        except EOFError:
            return
        except (InputError, KeyboardInterrupt) as error:
            if not typed_in:
                raise
            talk.output.settle()
            if isinstance(error, InputError):
                print_error(spelled(str(error), SPELLINGS))
            else:
                talk.output.note("Stopped.")


def _last_model(kept: Sequence[Path], note: Callable[[str], None]) -> str:
    """The model of the last chat that can be read and whose model is here, else tiny; says which was passed over."""
    from numoe.engine import describe
    from numoe.engine.chat.files import Chat
    from numoe.engine.home import TINY

    passed = 0
    for path in kept:
        try:
            model = Chat.read(path).model
            describe(model)
            return model
        except (InputError, OSError) as error:
            passed += 1
            if passed == 1:
                note(f"The model is not that of the last chat, {path.stem}: {spelled(str(error))}")
    return TINY


def _introduce(talk: Talk) -> None:
    model, session = talk.conversation.model, talk.conversation.session
    talk.output.note(f"{model.path.name}, context {session.context} tokens. /help lists the commands.")
    if talk.conversation.chat.model == "tiny":
        size = model.plan().parameters / 1e6
        talk.output.note(
            f"A demonstration of {size:.1f} M parameters. Whether a larger one runs here, before it is downloaded: "
            "numoe fit Qwen/Qwen3-30B-A3B"
        )


def _typed_lines(prompt: Prompt, talk: Talk) -> Iterator[str]:
    pressed = False
    while True:
        try:
            line = prompt.read(talk.draft or "")
        except KeyboardInterrupt:
            if pressed:
                return
            pressed, talk.draft = True, None
            talk.output.note("Once more, Ctrl-D or /bye leaves.")
            continue
        except EOFError:
            return
        pressed = False
        if line:
            yield line
        else:
            talk.draft = None


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin.buffer if sys.stdin else ():
            if text := line.decode("utf-8").strip():
                yield text
    except UnicodeDecodeError:
        raise InputError("the piped text is not UTF-8; convert it first") from None

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

from numoe.cli import arguments
from numoe.cli.fetch import fetch_missing
from numoe.cli.output import Output, billions, print_error
from numoe.cli.settings import Options, filled, spelled, takes
from numoe.cli.text import typed
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.cli.chat.prompt import Prompt
    from numoe.cli.chat.talk import Talk
    from numoe.engine import Model
    from numoe.engine.chat.files import Chat


@takes(
    "model", "pull", "continue_", "session", "list", "search", "show", "json", "save", "plain", "theme", "system",
    "commands", "reasoning", "ending", "sampling", "room", "prompt_cache", "check", "quiet",
    temp=0.6, top_p=0.95,
)  # fmt: skip
def chat(model_argument: arguments.ModelOrLast = None, *, options: Options) -> None:
    """Talk with a model.

    Chats keep themselves and go on with -c or --session, with the settings they had where no option says otherwise.
    Piped input is one turn a line, and is kept only with these options.

    Examples:
    numoe chat
    numoe chat Qwen/Qwen3-30B-A3B --ram 16GB --think
    numoe chat -c
    numoe chat --search sheep
    numoe chat --show trip > trip.txt
    """
    if options["show"] is not None or options["list"] or options["search"] is not None:
        if model_argument is not None:
            raise WrongUsage(f'--list, --search and --show are of all chats; leave out "{model_argument}"')
        if options["show"] is not None and (options["list"] or options["search"] is not None):
            raise WrongUsage("--show prints one chat, and --list and --search list them; choose one")
        with Output(options["quiet"]) as output:
            if options["show"] is not None:
                _show(options["show"], options["json"], output)
            else:
                _list(options["search"], options["json"], output)
        return
    if options["json"]:
        raise WrongUsage("--json goes with --list, --search or --show; `numoe run --json` answers so")
    converse(model_argument or arguments.meant(options["model"]), options)


def converse(model: str | None, options: Options) -> None:
    """Talk: begin a chat, or go on with one.

    Args:
        model: None: that of the chat, or of the last one, else tiny.
        options: those of `chat`.
    """
    session, goes_on = options["session"], options["continue_"]
    if goes_on and session is not None:
        raise WrongUsage("-c goes on with the last chat and --session with a named one; give one of them")
    typed_in = typed() and sys.stderr.isatty()
    with ExitStack() as stack:
        output = stack.enter_context(_screen(options) if typed_in else Output(options["quiet"]))
        from numoe.cli.chat.talk import Talk
        from numoe.cli.chat.tools import commands_of
        from numoe.engine.chat.files import alone, chat_path, chats

        if options["pull"] and model is not None:
            fetch_missing(model, options, output)
        kept = chats()
        if goes_on and not kept:
            raise WrongUsage("no chat is kept yet; `numoe chat` begins one")
        path = kept[0] if goes_on else chat_path(session) if session is not None else None
        if path is not None and path.exists() and "model" not in options.stated and model == options["model"]:
            model = None  # a default is no reason to go on with another one
        held = stack.enter_context(ExitStack())
        if path is not None:
            held.enter_context(alone(path))
        begun = _begun(path, model, options, output.note)
        keeps = options["save"] and (typed_in or path is not None)
        commands = commands_of(output, typed_in) if options["commands"] else None
        talk = Talk(output, _loader(options, output), begun, path, held, keeps, options["prompt_cache"])
        talk.offer(commands)
        stack.callback(talk.leave)
        _talk(talk, stack, typed_in, options["save"])


def _list(search: str | None, json: bool, output: Output) -> None:
    """The kept chats, or those in which something was said."""
    from numoe.cli.chat.kept import kept, table

    found = list(kept(search or ""))
    if json:
        output.document({"chats": [one.document() for one in found]})
    elif found:
        output.table(table(found), numbers=[3, 4])
    else:
        output.note(f'No kept chat says "{search}".' if search else "No chats are kept yet.")


def _show(name: str, json: bool, output: Output) -> None:
    """What was said in a kept chat."""
    from numoe.cli.chat.kept import said
    from numoe.engine.chat.files import Chat, chat_path

    chat = Chat.read(chat_path(name))
    if json:
        sys.stdout.write(chat.text())
    else:
        output.text(said(chat.turns) or "Nothing was said yet.")


def _screen(options: Options) -> Output:
    if not sys.stdout.isatty() or options["plain"] or os.environ.get("TERM") == "dumb":
        return Output(options["quiet"])
    from numoe.cli.chat.screen import Screen

    return Screen(options["quiet"], options["theme"])


def _begun(path: Path | None, model: str | None, options: Options, note: Callable[[str], None]) -> Chat:
    """The chat that is gone on with, or a new one. One that was kept has its settings where no option says otherwise.

    path: its file, which need not be there yet. model: another one than it had.
    """
    from numoe.cli.chat.kept import model_name
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
    from numoe.cli.request import load_drafted
    from numoe.engine import describe

    def loaded(chat: Chat) -> Model:
        progress = output.loading(chat.model)
        described = describe(chat.model, check=options["check"])
        room = described.plan(chat.settings.context).context
        made = load_drafted(described, room, options, output.note, progress)
        output.clear_status()
        for told in made.tokenizer.notes:
            output.note(told)
        return made

    return loaded


def _talk(talk: Talk, stack: ExitStack, typed_in: bool, saves: bool) -> None:
    """Do what every line says, to the last. Of lines that are typed in, one that fails is told of."""
    from numoe.cli.chat.commands import completions, hear
    from numoe.cli.chat.talk import SPELLINGS

    lines = _piped_lines()
    if typed_in:
        from numoe.cli.chat.prompt import Prompt
        from numoe.engine.home import home

        if hasattr(signal, "SIGHUP"):  # the terminal is closed
            signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
        _introduce(talk)
        prompt = Prompt(home() / "history" if saves else None, completions, lambda: talk.keeps)
        lines = _typed_lines(stack.enter_context(prompt), talk)
    for line in lines:
        try:
            hear(talk, line)
        except EOFError:
            return
        except (InputError, KeyboardInterrupt) as error:
            if not typed_in:
                if isinstance(error, InputError):
                    raise type(error)(spelled(str(error), SPELLINGS)) from error
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
    """What the model is, what it can keep in mind, and how to find out about larger ones."""
    from numoe.engine.home import TINY

    model, session = talk.conversation.model, talk.conversation.session
    planned = model.plan()
    active = f", {billions(planned.active_parameters)} active" if planned.active_parameters < planned.parameters else ""
    talk.output.note(
        f"{model.path.name}: {model.spec.family}, {billions(planned.parameters)} parameters{active}; context "
        f"{session.context} tokens. /help lists the commands."
    )
    if talk.conversation.chat.model == TINY:
        memory = _memory()
        talk.output.note(
            "A demonstration: it knows a few animals, colours and numbers. Whether a larger model runs in the "
            f"{memory} of this machine, before it is downloaded:"
        )
        talk.output.note(f"numoe fit Qwen/Qwen3-30B-A3B --ram {memory}")


def _memory() -> str:
    """What the machine has, or its container allows, as --ram takes it."""
    from numoe.engine.budget import machine_memory

    total, limit = machine_memory()
    nbytes = total if limit is None else limit
    return f"{nbytes // 10**9}GB" if nbytes >= 10**9 else f"{nbytes // 10**6}MB"


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

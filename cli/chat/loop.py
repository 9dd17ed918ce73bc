"""`numoe chat`: a conversation at the prompt, or of piped lines."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numoe.cli import options
from numoe.cli.output import Output, print_error
from numoe.cli.text import typed
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.cli.chat.commands import Talk
    from numoe.cli.chat.prompt import Prompt
    from numoe.engine import Model
    from numoe.engine.chat.files import Chat

Continue = Annotated[bool, typer.Option("-c", "--continue", help="Go on with the last chat.")]
Listing = Annotated[bool, typer.Option("--list", help="List the chats that are kept, and leave.")]
Plain = Annotated[bool, typer.Option("--plain", help="Show answers as the model writes them, not as Markdown.")]


def chat(
    context: typer.Context,
    model: options.ModelOrLast = None,
    continue_: Continue = False,
    session: options.Session = None,
    listing: Listing = False,
    plain: Plain = False,
    system: options.System = None,
    think: options.Think = False,
    think_budget: options.ThinkBudget = None,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    temp: options.Temperature = 0.6,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repeat_penalty: options.RepeatPenalty = 1.0,
    seed: options.Seed = None,
    ctx: options.Context = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model.

    Chats keep themselves and go on with -c or --session, with the settings they had where no option says otherwise.
    Piped input is one turn a line, and is kept only with these options.
    """
    if continue_ and session is not None:
        raise typer.BadParameter("-c goes on with the last chat and --session with a named one; give one of them")
    typed_in = typed() and sys.stderr.isatty()
    rendered = typed_in and sys.stdout.isatty() and not plain and os.environ.get("TERM") != "dumb"
    with ExitStack() as stack:
        output = stack.enter_context(_screen(quiet) if rendered else Output(quiet))
        from numoe.cli.chat.commands import Talk, changed, chat_rows, model_name
        from numoe.engine import describe, load
        from numoe.engine.chat.files import Chat, alone, chat_path, chats
        from numoe.engine.home import home, lookup

        if listing:
            if rows := chat_rows():
                output.table(rows)
            else:
                output.note("No chats are kept yet.")
            return
        kept = chats()
        if continue_ and not kept:
            raise InputError("no chat is kept yet; `numoe chat` begins one")
        path = kept[0] if continue_ else chat_path(session) if session is not None else None
        held = stack.enter_context(ExitStack())
        if path is not None:
            held.enter_context(alone(path))
        resumed = path is not None and path.exists()
        if path is not None and resumed:
            past = Chat.read(path)
            if model is None and lookup(past.model) is None:
                raise InputError(
                    f'the chat "{path.stem}" is one with {past.model}, which is not here any more; give another MODEL'
                )
        else:
            past = Chat(_last_model(kept, output.note) if model is None else model)
        if model is not None:
            past = replace(past, model=model_name(model))
        values: dict[str, Any] = {"system": system, "think": think, "think_budget": think_budget}
        values |= {"max_tokens": max_tokens, "stop": tuple(stop or ()), "temp": temp, "top_p": top_p, "top_k": top_k}
        values |= {"min_p": min_p, "repeat_penalty": repeat_penalty, "seed": seed, "ctx": ctx}
        if resumed:
            values = {name: value for name, value in values.items() if options.given(context, name)}
        past = replace(past, settings=changed(past.settings, values))

        def loaded(chat: Chat) -> Model:
            output.status(f"loading {chat.model}")
            described = describe(chat.model)
            room = described.plan(chat.settings.context).context
            made = load(described, ram=ram, threads=threads, ctx=room)
            output.clear_status()
            for told in made.tokenizer.notes:
                output.note(told)
            return made

        talk = Talk(output, loaded, past, path, held, keeps=typed_in or path is not None)
        stack.callback(talk.leave)
        lines = _piped_lines()
        if typed_in:
            from numoe.cli.chat.prompt import Prompt

            if hasattr(signal, "SIGHUP"):  # the terminal is closed
                signal.signal(signal.SIGHUP, lambda number, frame: sys.exit(128 + number))
            _introduce(talk)
            prompt = Prompt(home() / "history", talk.completions)
            lines = _typed_lines(stack.enter_context(prompt), talk)
        for line in lines:
            try:
                talk.hear(line)
            except EOFError:
                return
            except (InputError, KeyboardInterrupt) as error:
                if not typed_in:
                    raise
                output.settle()
                if isinstance(error, InputError):
                    print_error(str(error))
                else:
                    output.note("Stopped.")


def _screen(quiet: bool) -> Output:
    from numoe.cli.chat.screen import Screen

    return Screen(quiet)


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
                note(f"The model is not that of the last chat, {path.stem}: {error}")
    return TINY


def _introduce(talk: Talk) -> None:
    model, session = talk.conversation.model, talk.conversation.session
    talk.output.note(f"{model.path.name}, context {session.context} tokens. /help lists the commands.")
    if talk.conversation.chat.model == "tiny":
        size = model.plan().parameters / 1e6
        talk.output.note(f"A demonstration of {size:.1f} M parameters. For more: numoe pull Qwen/Qwen3-30B-A3B")


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

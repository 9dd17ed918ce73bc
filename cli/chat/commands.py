"""What a line of a chat asks for: a command, which begins with a slash, or an answer."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from numoe.cli.arguments import models_here
from numoe.cli.chat import values
from numoe.cli.chat.kept import kept, model_name, said, write
from numoe.cli.chat.talk import Talk, cache_of
from numoe.cli.output import printable
from numoe.cli.text import attachment
from numoe.engine import Model
from numoe.engine.chat.files import Chat, alone, cache_path, chat_path, chats, chats_folder
from numoe.engine.home import expanded
from numoe.engine.plan import format_bytes
from numoe.quant.errors import InputError, WrongUsage


class Command(NamedTuple):
    """What follows its name, what it does, and the function that is given the chat and what was typed."""

    takes: str
    does: str
    run: Callable[[Talk, str], None]


COMMANDS: dict[str, Command] = {}
"""By name, in the order of /help."""
KEYS = (
    ("//", "begins a question with a slash: //etc is asked as /etc"),
    ("Ctrl-C", "stops an answer"),
    ("Alt-Enter", 'begins a new line; so does Enter after """, up to the next """'),
    ("Ctrl-G", "opens the editor"),
    ("Tab", "completes commands, settings, models, chats and files"),
)
_OTHERWISE = {
    "exit": "bye", "quit": "bye", "q": "bye", "?": "help", "h": "help", "new": "clear", "reset": "clear",
    "search": "list", "regen": "retry", "regenerate": "retry", "continue": "more",
}  # fmt: skip
"""What else people type for a command."""


def hear(talk: Talk, line: str) -> None:
    """Do what a line says. /bye raises EOFError.

    Raises:
        InputError: what the line asks for is not possible; everything is as it was.
        KeyboardInterrupt: before the answer began. The question is forgotten.
    """
    if not line.startswith("/") or line.startswith("//"):
        talk.ask(line[1:] if line.startswith("//") else line)
        return
    talk.draft = None
    typed, *rest = re.split(r"\s+", line[1:], maxsplit=1)
    _do(talk, typed, "".join(rest).strip())


def _do(talk: Talk, typed: str, text: str) -> None:
    """Do what a command says."""
    name = _meant(typed)
    if name is None and values.meant(typed.partition("=")[0]):
        values.change(talk, f"{typed} {text}".strip())
    elif name is None:
        raise _unknown(typed)
    elif text and not COMMANDS[name].takes:
        raise WrongUsage(f'/{name} stands alone, and "{printable(text)[:60]}" is left over')
    else:
        COMMANDS[name].run(talk, text)


def _meant(typed: str) -> str | None:
    """The command that a word means, None: none."""
    name = _OTHERWISE.get(typed.lower(), typed.lower())
    return name if name in COMMANDS else None


def _unknown(typed: str) -> WrongUsage:
    close = get_close_matches(typed.lower(), [*COMMANDS, *values.NAMES], n=1, cutoff=0.7)
    hint = f"did you mean /{close[0]}?" if close else "/help lists them"
    return WrongUsage(f"there is no command /{printable(typed)[:40]}; {hint}")


def completions() -> dict[str, tuple[list[str], bool]]:
    """The commands; the words that may follow each, and whether a file may."""
    names = [path.stem for path in chats()]
    words: dict[str, tuple[list[str], bool]] = {name: ([], False) for name in (*COMMANDS, "exit")}
    words |= {
        "set": ([*values.NAMES], False),
        "help": ([*COMMANDS], False),
        "think": (["on", "off", "show", "hide"], False),
    }
    return words | {
        "save": (names, True),
        "load": (names, True),
        "rename": (names, False),
        "file": ([], True),
        "delete": (names, False),
        "export": ([], True),
        "model": ([*models_here("")], True),
    }


def _command(takes: str, does: str) -> Callable[[Callable[[Talk, str], None]], Callable[[Talk, str], None]]:
    """A decorator for the function of a command, which is called as it is but for the underscore."""

    def made(run: Callable[[Talk, str], None]) -> Callable[[Talk, str], None]:
        COMMANDS[run.__name__[1:]] = Command(takes, does, run)
        return run

    return made


@_command("NAME", "tell of a command (without NAME: of all)")
def _help(talk: Talk, text: str) -> None:
    typed = text.removeprefix("/")
    name = _meant(typed) if typed else None
    if typed and name is None:
        raise _unknown(typed)
    told = [name] if name else COMMANDS
    rows = [(f"/{one} {COMMANDS[one].takes}".rstrip(), COMMANDS[one].does) for one in told]
    talk.output.notes(rows if name else [*rows, *KEYS])


@_command("TEXT", "set the instructions (without TEXT: none)")
def _system(talk: Talk, text: str) -> None:
    values.change_system(talk, text)


@_command("NAME VALUE", "change a setting (without VALUE: tell of it; without NAME: of all)")
def _set(talk: Talk, text: str) -> None:
    values.change(talk, text)


@_command("", "the model, the chat and its settings")
def _show(talk: Talk, text: str) -> None:
    chat, session = talk.conversation.chat, talk.conversation.session
    forgotten = f", of which the first {chat.forgotten} are no longer told" if chat.forgotten else ""
    rows = [
        ("model", chat.model),
        ("chat", talk.path.stem if talk.path else "not kept yet"),
        ("turns", f"{len(chat.turns)}{forgotten}"),
        ("context", f"{session.position} of {session.context} tokens used"),
        ("system", chat.settings.system or "none"),
        ("think", ("on" if chat.settings.think else "off") + (", folded" if talk.output.folds else "")),
        ("files", ", ".join(talk.files) or "none"),
    ]
    talk.output.notes(rows + values.values(talk))


@_command("on|off", "ask for reasoning or not; show|hide unfolds or folds it")
def _think(talk: Talk, text: str) -> None:
    match text:
        case "on" | "off":
            values.change_thinking(talk, text)
        case "show" | "hide":
            talk.output.folds = text == "hide"
            turns = talk.conversation.chat.turns
            thinking = turns[-1].trimmed().thinking if turns else ""
            if text == "show" and thinking:
                talk.output.note(thinking)
            else:
                talk.output.note(f"Reasoning is {'folded' if text == 'hide' else 'shown'}.")
        case _:
            raise WrongUsage("/think takes on, off, show or hide")


@_command("", "answer the last question again")
def _retry(talk: Talk, text: str) -> None:
    talk.answer(talk.conversation.retry)


@_command("TEXT", "change the last question (without TEXT: at the prompt)")
def _edit(talk: Talk, text: str) -> None:
    if text:
        talk.answer(lambda **options: talk.conversation.edit(text, **options))
    else:
        turns = talk.conversation.chat.turns
        if not turns:
            raise InputError("nothing was asked yet; ask something first")
        talk.draft = turns[-1].question


@_command("", "forget the last question and its answer")
def _undo(talk: Talk, text: str) -> None:
    question = talk.conversation.undo().question
    talk.keep()
    talk.output.note(f"Forgotten: {question.splitlines()[0]}")


@_command("", "go on with an answer that was cut")
def _more(talk: Talk, text: str) -> None:
    turns = talk.conversation.chat.turns
    if turns and turns[-1].finish_reason != "stop":
        talk.output.go_on(turns[-1].trimmed().text)
    talk.answer(talk.conversation.more)


@_command("", "begin a new chat; this one stays in the list")
def _clear(talk: Talk, text: str) -> None:
    talk.leave()
    talk.conversation.chat = replace(talk.conversation.chat, turns=(), forgotten=0)
    talk.move(None)
    talk.files.clear()
    talk.output.note("A new chat.")


@_command("NAME", "keep the chat under a name, or in a file NAME.json")
def _save(talk: Talk, text: str) -> None:
    path = _named(text)
    if path != talk.path and os.path.lexists(path):
        what = f'the chat "{path.stem}"' if cache_of(path) else path
        raise InputError(f"{what} is there already; give another name, or remove it first")
    talk.keep_in(path)
    talk.output.note(f"The chat is kept {f'as {path.stem}' if cache_of(path) else f'in {path}'}.")


@_command("NAME", "go on with another chat")
def _load(talk: Talk, text: str) -> None:
    path = _named(text)
    Chat.read(path)  # what is no chat is left as it is, without a lock beside it
    talk.move(path, lambda path: talk.open(Chat.read(path), cache_of(path)))
    talk.keeps = True


@_command("TEXT", "the chats that are kept (with TEXT: in which it is said)")
def _list(talk: Talk, text: str) -> None:
    rows = [
        (one.name, one.wrong or f"{one.title}, {one.turns} turn{'s' * (one.turns != 1)}, {one.model}, {one.age}")
        for one in kept(text)
    ]
    none = f"No kept chat says {text}." if text else "No chats are kept yet."
    talk.output.notes(rows or [(none, "")])


@_command("", "all that was said")
def _transcript(talk: Talk, text: str) -> None:
    talk.output.text(said(talk.conversation.chat.turns) or "Nothing was said yet.")


@_command("FILE", "write what was said into FILE.md, or with its settings into FILE.json")
def _export(talk: Talk, text: str) -> None:
    path = expanded(text, "there is no file")
    if path.suffix not in (".md", ".json"):
        raise WrongUsage("/export takes a file that ends with .md or .json")
    write(talk.conversation.chat, path)
    talk.output.note(f"What was said is in {path}.")


@_command("NAME", "keep the chat under another name")
def _rename(talk: Talk, text: str) -> None:
    before, path = talk.path, chat_path(text)
    if before is None:
        raise InputError("this chat is not kept yet; /save NAME keeps it")
    _save(talk, text)
    if path != before:
        for old in (before, cache_path(before)):
            old.unlink(missing_ok=True)


@_command("NAME", "remove a chat that is kept")
def _delete(talk: Talk, text: str) -> None:
    path = chat_path(text)
    if path == talk.path:
        raise InputError("this is the chat that you are in; /clear begins another")
    Chat.read(path)
    with alone(path):
        for old in (path, cache_path(path)):
            old.unlink(missing_ok=True)
    talk.output.note(f"The chat {text} is removed.")


@_command("PATH|off", "put a text file before the next question (off: none)")
def _file(talk: Talk, text: str) -> None:
    if text == "-":
        raise InputError("/file takes the path of a text file")
    if text == "off":
        talk.files.clear()
    elif text:
        name, room = str(expanded(text, "there is no file")), talk.conversation.session.context
        files = talk.files | {name: attachment(name)}
        if _exceeds(talk.conversation.model, files.values(), room):
            others = " with the files before it" if len(files) > 1 else ""
            raise InputError(f"{text} takes more{others} than the {room} tokens of the context; give a part of it")
        talk.files = files
    characters = sum(map(len, talk.files.values()))
    names = f" ({', '.join(talk.files)})" if len(talk.files) > 1 or not text else ""
    talk.output.note(
        f"{characters} characters go with the next question{names}."
        if talk.files
        else "No file goes with the next question."
    )


@_command("", "copy the last answer to the clipboard")
def _copy(talk: Talk, text: str) -> None:
    turns = talk.conversation.chat.turns
    if not turns:
        raise InputError("there is no answer to copy yet")
    if not sys.stderr.isatty():
        raise InputError("/copy needs a terminal")
    answer = base64.b64encode(turns[-1].trimmed().text.encode()).decode()
    sys.stderr.write(f"\x1b]52;c;{answer}\x07")  # OSC 52: the terminal puts it on its clipboard
    sys.stderr.flush()
    talk.output.note("The last answer is copied, if the terminal allows it.")


@_command("", "tokens, memory and experts")
def _stats(talk: Talk, text: str) -> None:
    stats, session = talk.conversation.model.stats(), talk.conversation.session
    rows = [
        ("context", f"{session.position} of {session.context} tokens"),
        ("weights", format_bytes(stats["weight_bytes"])),
        ("peak memory", format_bytes(stats["peak_rss_bytes"])),
    ]
    if talk.guesses.get("proposed"):
        rows.append(("guesses", "{acceptance:.0%} of {proposed} tokens came in the last answer".format(**talk.guesses)))
        if gain := talk.guesses["gain"]:
            rows.append(("", f"which made it {gain:.2f} times as fast"))
    if experts := stats["experts"]:
        asked = experts["hits"] + experts["misses"]
        rows.append(("experts", f"{experts['hits']} of {asked} were in memory when they were needed"))
        read = f"{format_bytes(experts['bytes_read'])} read from disk, {experts['wait_s']:.3g} s of waiting for it"
        rows.append(("", read))
    talk.output.notes(rows)


@_command("NAME", "answer with another model from here on")
def _model(talk: Talk, text: str) -> None:
    if text:
        talk.open(replace(talk.conversation.chat, model=model_name(text)))
        talk.keep()
    talk.output.note(f"The model is {talk.conversation.chat.model}.")


@_command("", "leave, as /exit and Ctrl-D do")
def _bye(talk: Talk, text: str) -> None:
    raise EOFError


def _named(text: str) -> Path:
    """The file that /save and /load mean."""
    if not text:
        raise InputError("give the chat a name, or a file that ends with .json")
    if not text.endswith(".json"):
        return chat_path(text)
    path, folder = expanded(text, "there is no file"), chats_folder()
    parent = os.path.realpath(path.parent)  # a file has one name, by which it is locked
    return (folder if parent == os.path.realpath(folder) else Path(parent)) / path.name


def _exceeds(model: Model, texts: Iterable[str], room: int) -> bool:
    """Whether texts take more tokens than that, found out without reading much more of them."""
    tokens, size = 0, 1 << 16
    for text in texts:
        for start in range(0, len(text), size):
            tokens += len(model.tokenizer.encode(text[start : start + size], special=False))
            if tokens >= room:
                return True
    return False

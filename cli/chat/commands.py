"""What a chat does with a line: a command, or a question."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from numoe.cli.arguments import meant, models_here
from numoe.cli.chat.kept import kept, said, write
from numoe.cli.chat.tools import Commands
from numoe.cli.output import Output, printable
from numoe.cli.reply import NO_SWITCH, Interrupt, Neighbours, drafts, show, statistics
from numoe.cli.settings import SETTINGS, May, Setting, filled, settings_in, spelled
from numoe.cli.text import attachment
from numoe.engine import Model, describe
from numoe.engine.chat.answer import Answer
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat, alone, cache_path, chat_path, chats, chats_folder, new_path
from numoe.engine.chat.tools.call import Call
from numoe.engine.experts import heat
from numoe.engine.home import TINY, expanded
from numoe.engine.measure.machine import record
from numoe.engine.plan import format_bytes
from numoe.quant.errors import InputError, WrongUsage

COMMANDS = {
    "help": ("", "list the commands"),
    "system": ("TEXT", "set the instructions (without TEXT: none)"),
    "set": ("NAME VALUE", "change a setting (without NAME: list them, their ranges and what they do)"),
    "show": ("", "the model, the chat and its settings"),
    "think": ("on|off", "ask for reasoning or not; show|hide unfolds or folds it"),
    "retry": ("", "answer the last question again"),
    "edit": ("TEXT", "change the last question (without TEXT: at the prompt)"),
    "undo": ("", "forget the last question and its answer"),
    "more": ("", "go on with an answer that was cut"),
    "clear": ("", "begin a new chat; this one stays in the list"),
    "save": ("NAME", "keep the chat under a name, or in a file NAME.json"),
    "load": ("NAME", "go on with another chat"),
    "list": ("TEXT", "the chats that are kept (with TEXT: in which it is said)"),
    "transcript": ("", "all that was said"),
    "export": ("FILE", "write what was said into FILE.md, or with its settings into FILE.json"),
    "rename": ("NAME", "keep the chat under another name"),
    "delete": ("NAME", "remove a chat that is kept"),
    "file": ("PATH|off", "put a text file before the next question (off: none)"),
    "copy": ("", "copy the last answer to the clipboard"),
    "stats": ("", "tokens, memory and experts"),
    "model": ("NAME", "answer with another model from here on"),
    "bye": ("", "leave, as /exit and Ctrl-D do"),
}
KEYS = (
    ("//", "begins a question with a slash: //etc is asked as /etc"),
    ("Ctrl-C", "stops an answer"),
    ("Alt-Enter", 'begins a new line; so does Enter after """, up to the next """'),
    ("Ctrl-G", "opens the editor"),
    ("Tab", "completes commands, settings, models, chats and files"),
)
_SETTINGS = settings_in(May.TALK)
_OTHERWISE = {"exit": "bye", "quit": "bye", "q": "bye", "?": "help", "h": "help"}
"""What else people type for a command."""
SPELLINGS = {one.name: f"{one.flag} of numoe chat" for one in SETTINGS} | {
    name: f"/set {one.name}" for one in _SETTINGS.values() for name in (one.name, one.field)
}
SPELLINGS |= {"system": "/system", "think": "/think", "numoe chat list=true": "/list"}
"""How settings are given here, for `spelled`."""


class Talk:
    """A chat at the terminal: its conversation, where it is kept, and what is typed but not asked yet.

    draft: what the next prompt begins with, to be asked in place of the last question; None: with nothing.
    """

    def __init__(
        self,
        output: Output,
        load: Callable[[Chat], Model],
        chat: Chat,
        path: Path | None,
        alone: ExitStack,
        keeps: bool = True,
        prompt_cache: Path | None = None,
    ) -> None:
        """
        Args:
            path: the chat's file; None: named after the first question.
            alone: what keeps other processes from going on with the chat; see `conversation.alone`.
            keeps: write the chat to a file at all; may be changed at any time.
            prompt_cache: a file that the chat can begin with.

        Raises:
            InputError: the model cannot be loaded, or has no chat template.
        """
        self.output = output
        self.draft: str | None = None
        self._load = load
        self._path = path
        self._alone = alone
        self.keeps = keeps
        self._files: dict[str, str] = {}  # by their names, what is put before the next question
        self._drafts: dict[str, Any] = {}  # of the last answer
        self._neighbours = Neighbours()
        self._answered = False  # since the cache file was written or read
        self._commands: Commands | None = None
        self.conversation = Conversation(load(chat), chat, _cache(path) if chat.turns else None, prompt_cache)
        self._tell_resumed()

    def offer(self, commands: Commands | None) -> None:
        """Tell the model of these commands from here on; None: of none."""
        self._commands = commands
        chat = self.conversation.chat
        use = commands.use if commands else None
        self.conversation.chat = replace(chat, settings=replace(chat.settings, use=use))

    def _call(self, calls: tuple[Call, ...]) -> None:
        """Run what an answer calls, as far as the user lets it, and have it gone on."""
        rounds = 0
        while calls and self._commands:
            rounds += 1
            results = self._commands.results(calls, rounds)
            calls = self._answer_once(partial(self.conversation.go_on, results)).turn.calls

    def hear(self, line: str) -> None:
        """Do what a line says. /bye raises EOFError.

        Raises:
            InputError: what the line asks for is not possible; everything is as it was.
            KeyboardInterrupt: before the answer began. The question is forgotten.
        """
        edits, self.draft = self.draft is not None, None
        if line.startswith("/") and not line.startswith("//"):
            typed, _, text = line[1:].partition(" ")
            name = _OTHERWISE.get(typed.lower(), typed.lower())
            if name in COMMANDS:
                getattr(self, f"do_{name}")(text.strip())
            elif _setting(name):
                self.do_set(line[1:])
            else:
                raise WrongUsage(f"there is no command /{printable(typed)[:40]}; /help lists them")
        else:
            line = line[1:] if line.startswith("//") else line
            question = "\n\n".join([*self._files.values(), line])
            ask = self.conversation.edit if edits else self.conversation.ask
            try:
                self._answer(lambda **options: ask(question, **options))
            except InputError as error:
                raise InputError(f"{error}; /file off leaves out the files") if self._files else error from None
            self._files.clear()

    def completions(self) -> dict[str, tuple[list[str], bool]]:
        """The commands; the words that may follow each, and whether a file may."""
        names = [path.stem for path in chats()]
        words: dict[str, tuple[list[str], bool]] = {name: ([], False) for name in (*COMMANDS, "exit")}
        words |= {"set": (["system", "history", *_SETTINGS], False), "think": (["on", "off", "show", "hide"], False)}
        return words | {
            "save": (names, True),
            "load": (names, True),
            "rename": (names, False),
            "file": ([], True),
            "delete": (names, False),
            "export": ([], True),
            "model": ([*models_here("")], True),
        }

    def leave(self) -> None:
        """Keep what the session remembers, so that the chat goes on at once the next time."""
        cache = _cache(self._path)
        if self.keeps and self._answered and cache and self.conversation.chat.turns:
            self.output.status("saving the chat")
            self.conversation.save_cache(cache)
            self._answered = False
            self.output.clear_status()

    def _answer(self, start: Callable[..., Answer]) -> None:
        self._call(self._answer_once(start).turn.calls)

    def _answer_once(self, start: Callable[..., Answer]) -> Answer:
        conversation, before = self.conversation, self._experts()
        with Interrupt() as interrupt:
            answer = start(cancelled=interrupt.cancelled, progress=self.output.reading)
            if answer.dropped:
                turns = f"the oldest {answer.dropped} turns are" if answer.dropped > 1 else "the oldest turn is"
                self.output.note(f"The context is full: {turns} no longer told to the model.")
            self._neighbours.begin()
            try:
                show(answer, self.output)
            finally:
                self._answered = True
                self._keep()
        self._neighbours.end(self.output)
        session = conversation.session
        self._drafts = drafts(answer.generation)
        if answer.turn.finish_reason == "repetition":
            self.output.note("Stopped: the answer repeats itself without end. /more goes on all the same.")
        elif answer.turn.finish_reason == "length":
            full = session.position == session.context
            self.output.note(("The context is full." if full else "Cut off at max_tokens.") + " /more goes on.")
        used = f"context {session.position}/{session.context}"
        now = self._experts()
        names = "hits", "misses", "wait_s", "shed"
        asked: dict[str, Any] = {name: now[name] - before.get(name, 0) for name in names if name in now}
        asked["hit_rate"] = asked.get("hits", 0) / max(1, asked.get("hits", 0) + asked.get("misses", 0))
        self.output.note(f"{statistics(answer.generation, asked)}, {used}")
        record(session.model, len(answer.generation.tokens) - 1, answer.generation.decode_seconds)
        heat.keep(session.model)
        return answer

    def _experts(self) -> dict[str, Any]:
        experts: dict[str, Any] = self.conversation.model.stats()["experts"]
        return experts

    def _keep(self) -> None:
        """Write the chat; one that nothing was said in has no file."""
        chat = self.conversation.chat
        if self.keeps and (self._path or chat.turns):
            if self._path is None:
                self._move(new_path(chat.turns[0].question), chat.write)
            else:
                chat.write(self._path)

    def _move(self, path: Path | None, begin: Callable[[Path], object] = lambda path: None) -> None:
        """Keep the chat in this file from here on, if `begin` succeeds there, and other processes out of it."""
        with ExitStack() as stack:
            if path is not None:
                if path != self._path:
                    stack.enter_context(alone(path))
                begin(path)
            if path != self._path:
                self._alone.close()
                self._alone.push(stack.pop_all())
                self._path = path

    def _tell_resumed(self) -> None:
        conversation = self.conversation
        if not conversation.chat.turns:
            return
        turns, tokens = len(conversation.chat.turns), len(conversation.history())
        what = f"{turns} turn{'s' * (turns != 1)}, {tokens} tokens"
        if conversation.restored:
            self.output.note(f"{what}, of which {conversation.restored} are restored.")
        else:
            why = f": {spelled(conversation.reason, SPELLINGS)}" if conversation.reason else ""
            self.output.note(f"{what}, which are read again with the next question{why}.")
        self.output.recall(said(conversation.chat.turns[-1:]))

    def _open(self, chat: Chat, cache: Path | None = None) -> None:
        """Go on with another chat, model or context. Where that fails, with what there was."""
        before = self.conversation.chat
        self.leave()
        model = self.conversation.model if chat.model == before.model else None
        if model is None:
            describe(chat.model)
        del self.conversation  # frees the memory that the next one needs
        try:
            self.conversation = Conversation(model or self._load(chat), chat, cache)
        except (InputError, KeyboardInterrupt):
            self.conversation = Conversation(model or self._load(before), before)
            raise
        self.offer(self._commands)
        self._tell_resumed()

    def _change(self, values: Mapping[str, Any]) -> None:
        chat = self.conversation.chat
        chat = replace(chat, settings=filled(chat.settings, values))
        if "ctx" in values:
            self._open(chat)
        else:
            self.conversation.chat = chat
        self._keep()

    def _settings(self) -> list[tuple[str, str]]:
        settings = self.conversation.chat.settings
        values = {**asdict(settings), **asdict(settings.sampling)}
        return [(name, _shown(values[setting.field])) for name, setting in _SETTINGS.items()]

    # ------------------------------------------------------------------------------------------- commands

    def do_help(self, text: str) -> None:
        rows = [(f"/{name} {what}".rstrip(), does) for name, (what, does) in COMMANDS.items()]
        self.output.notes([*rows, *KEYS])

    def do_system(self, text: str) -> None:
        self._change({"system": text or None})
        self.output.note("The instructions are set." if text else "There are no instructions now.")

    def do_set(self, text: str) -> None:
        if not text:
            settings = zip(self._settings(), _SETTINGS.values(), strict=True)
            rows = [(f"{name} {value}", setting.help + setting.bounds) for (name, value), setting in settings]
            kept = f"history {'on' if self.keeps else 'off'}", "Keep what is said and typed."
            self.output.notes([*rows, kept])
            return
        name, _, value = text.replace("=", " ", "=" in text.partition(" ")[0]).partition(" ")
        if name.lstrip("-").lower() == "system":
            self.do_system(value.strip())
            return
        if name.lower() == "history":
            self._set_history(value.strip())
            return
        setting = _setting(name)
        if setting is None:
            raise WrongUsage(f"there is no setting {name}; there are system, history, {', '.join(_SETTINGS)}")
        if not value.strip():
            raise WrongUsage(f"/set {setting.name} needs a value: {setting.help}{setting.bounds}")
        parsed = setting.read(value.strip(), setting.name, none="none")
        if parsed is not None and not isinstance(parsed, tuple):
            setting.check(parsed, setting.name, value.strip())
        self._change({setting.name: parsed})
        self.output.note(f"{setting.name} is {dict(self._settings())[setting.name]}.")

    def _set_history(self, value: str) -> None:
        if value not in ("on", "off"):
            raise WrongUsage(f'history takes on or off, not "{value}"')
        self.keeps = value == "on"
        self.output.note("What is said is kept." if self.keeps else "What is said and typed from here on is not kept.")
        self._keep()

    def do_show(self, text: str) -> None:
        chat, session = self.conversation.chat, self.conversation.session
        forgotten = f", of which the first {chat.forgotten} are no longer told" if chat.forgotten else ""
        rows = [
            ("model", chat.model),
            ("chat", self._path.stem if self._path else "not kept yet"),
            ("turns", f"{len(chat.turns)}{forgotten}"),
            ("context", f"{session.position} of {session.context} tokens used"),
            ("system", chat.settings.system or "none"),
            ("think", ("on" if chat.settings.think else "off") + (", folded" if self.output.folds else "")),
            ("files", ", ".join(self._files) or "none"),
        ]
        self.output.notes(rows + self._settings())

    def do_think(self, text: str) -> None:
        match text:
            case "on" | "off":
                self._change({"think": text == "on"})
                said = f"Reasoning is {'asked for' if text == 'on' else 'not asked for'}."
                if not self.conversation.session.model.description.chat_format.asks_for_reasoning:
                    said += f" {NO_SWITCH} /think_budget 0 ends it at once."
                self.output.note(said)
            case "show" | "hide":
                self.output.folds = text == "hide"
                turns = self.conversation.chat.turns
                thinking = turns[-1].trimmed().thinking if turns else ""
                if text == "show" and thinking:
                    self.output.note(thinking)
                else:
                    self.output.note(f"Reasoning is {'folded' if text == 'hide' else 'shown'}.")
            case _:
                raise WrongUsage("/think takes on, off, show or hide")

    def do_retry(self, text: str) -> None:
        self._answer(self.conversation.retry)

    def do_edit(self, text: str) -> None:
        if text:
            self._answer(lambda **options: self.conversation.edit(text, **options))
        else:
            turns = self.conversation.chat.turns
            if not turns:
                raise InputError("nothing was asked yet; ask something first")
            self.draft = turns[-1].question

    def do_undo(self, text: str) -> None:
        question = self.conversation.undo().question
        self._keep()
        self.output.note(f"Forgotten: {question.splitlines()[0]}")

    def do_more(self, text: str) -> None:
        turns = self.conversation.chat.turns
        if turns and turns[-1].finish_reason != "stop":
            self.output.go_on(turns[-1].trimmed().text)
        self._answer(self.conversation.more)

    def do_clear(self, text: str) -> None:
        self.leave()
        self.conversation.chat = replace(self.conversation.chat, turns=(), forgotten=0)
        self._move(None)
        self._files.clear()
        self.output.note("A new chat.")

    def do_save(self, text: str) -> None:
        path = _named(text)
        if path != self._path and os.path.lexists(path):
            what = f'the chat "{path.stem}"' if _cache(path) else path
            raise InputError(f"{what} is there already; give another name, or remove it first")
        self._move(path, self.conversation.chat.write)
        self.keeps = self._answered = True
        self.output.note(f"The chat is kept {f'as {path.stem}' if _cache(path) else f'in {path}'}.")

    def do_load(self, text: str) -> None:
        path = _named(text)
        Chat.read(path)  # what is no chat is left as it is, without a lock beside it
        self._move(path, lambda path: self._open(Chat.read(path), _cache(path)))
        self.keeps = True

    def do_list(self, text: str) -> None:
        rows = [
            (one.name, one.wrong or f"{one.title}, {one.turns} turn{'s' * (one.turns != 1)}, {one.model}, {one.age}")
            for one in kept(text)
        ]
        none = f"No kept chat says {text}." if text else "No chats are kept yet."
        self.output.notes(rows or [(none, "")])

    def do_transcript(self, text: str) -> None:
        self.output.text(said(self.conversation.chat.turns) or "Nothing was said yet.")

    def do_export(self, text: str) -> None:
        path = expanded(text, "there is no file")
        if path.suffix not in (".md", ".json"):
            raise WrongUsage("/export takes a file that ends with .md or .json")
        write(self.conversation.chat, path)
        self.output.note(f"What was said is in {path}.")

    def do_rename(self, text: str) -> None:
        before, path = self._path, chat_path(text)
        if before is None:
            raise InputError("this chat is not kept yet; /save NAME keeps it")
        self.do_save(text)
        if path != before:
            for old in (before, cache_path(before)):
                old.unlink(missing_ok=True)

    def do_delete(self, text: str) -> None:
        path = chat_path(text)
        if path == self._path:
            raise InputError("this is the chat that you are in; /clear begins another")
        Chat.read(path)
        with alone(path):
            for old in (path, cache_path(path)):
                old.unlink(missing_ok=True)
        self.output.note(f"The chat {text} is removed.")

    def do_file(self, text: str) -> None:
        if text == "-":
            raise InputError("/file takes the path of a text file")
        if text == "off":
            self._files.clear()
        elif text:
            name, room = str(expanded(text, "there is no file")), self.conversation.session.context
            files = self._files | {name: attachment(name)}
            if _exceeds(self.conversation.model, files.values(), room):
                others = " with the files before it" if len(files) > 1 else ""
                raise InputError(f"{text} takes more{others} than the {room} tokens of the context; give a part of it")
            self._files = files
        characters = sum(map(len, self._files.values()))
        names = f" ({', '.join(self._files)})" if len(self._files) > 1 or not text else ""
        self.output.note(
            f"{characters} characters go with the next question{names}."
            if self._files
            else "No file goes with the next question."
        )

    def do_copy(self, text: str) -> None:
        turns = self.conversation.chat.turns
        if not turns:
            raise InputError("there is no answer to copy yet")
        if not sys.stderr.isatty():
            raise InputError("/copy needs a terminal")
        answer = base64.b64encode(turns[-1].trimmed().text.encode()).decode()
        sys.stderr.write(f"\x1b]52;c;{answer}\x07")  # OSC 52: the terminal puts it on its clipboard
        sys.stderr.flush()
        self.output.note("The last answer is copied, if the terminal allows it.")

    def do_stats(self, text: str) -> None:
        stats, session = self.conversation.model.stats(), self.conversation.session
        rows = [
            ("context", f"{session.position} of {session.context} tokens"),
            ("weights", format_bytes(stats["weight_bytes"])),
            ("peak memory", format_bytes(stats["peak_rss_bytes"])),
        ]
        if self._drafts.get("proposed"):
            rows.append(
                ("guesses", "{acceptance:.0%} of {proposed} tokens came in the last answer".format(**self._drafts))
            )
            if gain := self._drafts["gain"]:
                rows.append(("", f"which made it {gain:.2f} times as fast"))
        if experts := stats["experts"]:
            asked = experts["hits"] + experts["misses"]
            rows.append(("experts", f"{experts['hits']} of {asked} were in memory when they were needed"))
            read = f"{format_bytes(experts['bytes_read'])} read from disk, {experts['wait_s']:.3g} s of waiting for it"
            rows.append(("", read))
        self.output.notes(rows)

    def do_model(self, text: str) -> None:
        if text:
            self._open(replace(self.conversation.chat, model=model_name(text)))
            self._keep()
        self.output.note(f"The model is {self.conversation.chat.model}.")

    def do_bye(self, text: str) -> None:
        raise EOFError


def _setting(name: str) -> Setting | None:
    """The setting that a name means: its own, that of its flag, or the engine's."""
    plain = name.lstrip("-").lower().replace("-", "_")
    return next((one for one in _SETTINGS.values() if plain in (one.name, one.field)), None)


def _shown(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, (tuple, list)) else str(value).lower()


def _named(text: str) -> Path:
    """The file that /save and /load mean."""
    if not text:
        raise InputError("give the chat a name, or a file that ends with .json")
    if not text.endswith(".json"):
        return chat_path(text)
    path, folder = expanded(text, "there is no file"), chats_folder()
    parent = os.path.realpath(path.parent)  # a file has one name, by which it is locked
    return (folder if parent == os.path.realpath(folder) else Path(parent)) / path.name


def _cache(path: Path | None) -> Path | None:
    """Where what the session remembers is kept; of a chat in a folder of the user's own, nowhere."""
    return cache_path(path) if path and path.parent == chats_folder() else None


def _exceeds(model: Model, texts: Iterable[str], room: int) -> bool:
    """Whether texts take more tokens than that, found out without reading much more of them."""
    tokens, size = 0, 1 << 16
    for text in texts:
        for start in range(0, len(text), size):
            tokens += len(model.tokenizer.encode(text[start : start + size], special=False))
            if tokens >= room:
                return True
    return False


def model_name(model: str) -> str:
    """A model's name as a chat keeps it: one that means the same in every folder."""
    model = meant(model) or model
    path = expanded(model, "there is no folder or file")
    return str(path.absolute()) if model != TINY and os.path.lexists(path) else model

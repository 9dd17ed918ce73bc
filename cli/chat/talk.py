"""A chat at the terminal: its conversation, its file, and what answers show of themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from numoe.cli.chat.kept import said
from numoe.cli.chat.tools import Commands
from numoe.cli.output import Output
from numoe.cli.reply import Interrupt, Neighbours, drafts, show, statistics
from numoe.cli.setting import May
from numoe.cli.settings import SETTINGS, filled, settings_in, spelled
from numoe.engine import Model, describe
from numoe.engine.chat.answer import Answer
from numoe.engine.chat.conversation import Conversation
from numoe.engine.chat.files import Chat, alone, cache_path, chats_folder, new_path
from numoe.engine.chat.tools.call import Call
from numoe.engine.experts import heat
from numoe.engine.measure.machine import record
from numoe.quant.errors import InputError

SPELLINGS = {one.name: f"{one.flag} of numoe chat" for one in SETTINGS} | {
    name: f"/set {one.name}" for one in settings_in(May.TALK).values() for name in (one.name, one.field)
}
SPELLINGS |= {
    "system": "/system",
    "think": "/think",
    "numoe chat list=true": "/list",
    "numoe run pull=true": "`numoe chat --pull`",
}
"""How settings are given here, for `spelled`."""


class Talk:
    """A chat at the terminal: its conversation, where it is kept, and what is typed but not asked yet.

    draft: what the next prompt begins with, to be asked in place of the last question; None: with nothing.
    path: its file, None: none yet. keeps: it is written there. files: by their names, what is put before the next
    question. guesses: what of guessing ahead came in the last answer.
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
        self.path = path
        self._alone = alone
        self.keeps = keeps
        self.files: dict[str, str] = {}
        self.guesses: dict[str, Any] = {}
        self._neighbours = Neighbours()
        self._answered = False  # since the cache file was written or read
        self._commands: Commands | None = None
        self.conversation = Conversation(load(chat), chat, cache_of(path) if chat.turns else None, prompt_cache)
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

    def ask(self, question: str) -> None:
        """Answer a question, or the last one that was changed; files that wait for it come before it.

        Raises: as `commands.hear`.
        """
        start = self.conversation.ask if self.draft is None else self.conversation.edit
        self.draft = None
        text = "\n\n".join([*self.files.values(), question])
        try:
            self.answer(lambda **options: start(text, **options))
        except InputError as error:
            raise InputError(f"{error}; /file off leaves out the files") if self.files else error from None
        self.files.clear()

    def leave(self) -> None:
        """Keep what the session remembers, so that the chat goes on at once the next time."""
        cache = cache_of(self.path)
        if self.keeps and self._answered and cache and self.conversation.chat.turns:
            self.output.status("saving the chat")
            self.conversation.save_cache(cache)
            self._answered = False
            self.output.clear_status()

    def answer(self, start: Callable[..., Answer]) -> None:
        """Show an answer, of a conversation's method that begins it, and those to what it calls."""
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
                self.keep()
        self._neighbours.end(self.output)
        session = conversation.session
        self.guesses = drafts(answer.generation)
        if answer.turn.finish_reason == "repetition":
            self.output.note("Stopped: the answer repeats itself without end. /more goes on all the same.")
        elif answer.turn.finish_reason == "length":
            full = session.position == session.context
            self.output.note(("The context is full." if full else "Cut off at max_tokens.") + " /more goes on.")
        used = f"context {session.position}/{session.context}"
        now, names = self._experts(), ("hits", "misses", "wait_s", "shed")
        asked: dict[str, Any] = {name: now[name] - before.get(name, 0) for name in names if name in now}
        asked["hit_rate"] = asked.get("hits", 0) / max(1, asked.get("hits", 0) + asked.get("misses", 0))
        self.output.note(f"{statistics(answer.generation, asked)}, {used}")
        record(session.model, len(answer.generation.tokens) - 1, answer.generation.decode_seconds)
        heat.keep(session.model)
        return answer

    def _experts(self) -> dict[str, Any]:
        experts: dict[str, Any] = self.conversation.model.stats()["experts"]
        return experts

    def keep(self) -> None:
        """Write the chat; one that nothing was said in has no file."""
        chat = self.conversation.chat
        if self.keeps and (self.path or chat.turns):
            if self.path is None:
                self.move(new_path(chat.turns[0].question), chat.write)
            else:
                chat.write(self.path)

    def move(self, path: Path | None, begin: Callable[[Path], object] = lambda path: None) -> None:
        """Keep the chat in this file from here on, if `begin` succeeds there, and other processes out of it."""
        with ExitStack() as stack:
            if path is not None:
                if path != self.path:
                    stack.enter_context(alone(path))
                begin(path)
            if path != self.path:
                self._alone.close()
                self._alone.push(stack.pop_all())
                self.path = path

    def keep_in(self, path: Path) -> None:
        """Write the chat to this file, and keep it there from here on."""
        self.move(path, self.conversation.chat.write)
        self.keeps = self._answered = True

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

    def open(self, chat: Chat, cache: Path | None = None) -> None:
        """Go on with another chat, model or context. Where that fails, with what there was.

        Raises:
            InputError: the model cannot be loaded, or has no chat template.
        """
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

    def change(self, values: Mapping[str, Any]) -> None:
        """Set settings of the chat, by names.

        Raises:
            InputError: a value is out of range, or there is no room for so much context.
        """
        chat = self.conversation.chat
        chat = replace(chat, settings=filled(chat.settings, values))
        if "ctx" in values:
            self.open(chat)
        else:
            self.conversation.chat = chat
        self.keep()


def cache_of(path: Path | None) -> Path | None:
    """Where what the session remembers is kept; of a chat in a folder of the user's own, nowhere."""
    return cache_path(path) if path and path.parent == chats_folder() else None

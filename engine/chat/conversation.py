"""Questions and answers on a session, gone on with, changed, and shortened when the context is full."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.engine.chat.prompt import encode
from numoe.engine.layers.rows import ROW_FORMS
from numoe.engine.prompt_cache import known
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.model import Model
    from numoe.engine.session import Session, Snapshot

from numoe.engine.chat.answer import Answer, Turn, answer
from numoe.engine.chat.files import Chat, chats_folder

KEPT_CACHES = 4
"""Session files in the folder of chats; they can take a gigabyte each, and older chats are read again instead."""
KEPT_POINTS = 4
"""Snapshots that a conversation can go back to: before and after the questions of its last two turns."""


class Conversation:
    """A chat, and a session that has read it.

    chat: what is said so far, and how. restored: tokens that were read from a session file instead of by the model.
    reason: why no session file could be used, "" if one was or none was asked for.
    """

    def __init__(self, model: Model, chat: Chat, cache: Path | None = None, prompt_cache: Path | None = None) -> None:
        """
        Args:
            cache: what `save_cache` wrote, used as far as model, context and tokens are the same.
            prompt_cache: what a `PromptCache` wrote, for a session to begin with.

        Raises:
            InputError: the model has no chat template, the context does not fit, or the file is of another model.
        """
        self.model = model
        self.chat = chat
        self.restored, self.reason = 0, ""
        self._format = model.description.chat_format
        self._points: deque[Snapshot] = deque(maxlen=KEPT_POINTS)  # latest first
        restored = self._restore(cache) if cache is not None else None
        if prompt_cache is not None:
            known(prompt_cache, model, model.plan(chat.settings.context))
        self.session: Session = restored or model.session(chat.settings.context)
        if prompt_cache is not None and restored is None:
            self.session.resume(prompt_cache)

    def _restore(self, cache: Path) -> Session | None:
        if not cache.exists():
            self.reason = "nothing was kept that spares it"
            return None
        try:
            session = self.model.restore(cache)
        except InputError:
            self.reason = "what was kept that spares it is damaged, or of another model"
            return None
        if session.context != self.model.plan(self.chat.settings.context).context:
            self.reason = f"what was kept that spares it is for a context of {session.context} tokens"
            return None
        forms, wanted = list(ROW_FORMS), self.model.plan(self.chat.settings.context).kv.name
        if forms.index(session.kv) > forms.index(wanted):
            self.reason = f"it was kept with {session.kv} rows"
            return None
        session.align(self.history())
        self.restored = session.position
        if not self.restored:
            self.reason = "what was kept that spares it is for other turns or settings"
        return session

    def history(self) -> list[int]:
        """The tokens that the prompt of any next question begins with."""
        told = self.chat.turns[self.chat.forgotten :]
        prompts = [self._encode(told, Turn(question))[0] for question in ("a", "b")]
        return [ours for ours, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))]

    def ask(self, question: str, **options: Any) -> Answer:
        """Ask, and get an answer that is made as it is taken. It is part of the chat when it has ended.

        A question that was interrupted before the first token of its answer is forgotten. Turns are dropped, the oldest
        first, when the context has no room for an answer to all.

        Args:
            options: as in `Session.generate`, beside those in `Settings`.

        Raises:
            InputError: the question alone does not fit into the context.
        """
        return self._answer(self.chat.turns, Turn(question), options)

    def go_on(self, results: tuple[str, ...], **options: Any) -> Answer:
        """Go on behind the calls of the last answer, by what the tools said; see `ask`."""
        last = self._last()
        self.chat = replace(self.chat, turns=(*self.chat.turns[:-1], replace(last, results=results)))
        return self._answer(self.chat.turns, Turn(""), options)

    def retry(self, **options: Any) -> Answer:
        """Ask the last question again, in place of its answer.

        Raises:
            InputError: there is none; and see `ask`.
        """
        return self.edit(self._last().question, **options)

    def edit(self, question: str, **options: Any) -> Answer:
        """Ask this in place of the last question and its answer.

        Raises:
            InputError: there is none; and see `ask`.
        """
        self._last()
        return self._answer(self.chat.turns[:-1], Turn(question), options)

    def more(self, **options: Any) -> Answer:
        """Go on with the last answer, which was cut.

        Raises:
            InputError: it was not, or there is none; and see `ask`.
        """
        last = self._last()
        if last.finish_reason == "stop":
            raise InputError("the last answer is whole; ask for more in words of your own")
        return self._answer(self.chat.turns[:-1], last, options)

    def undo(self) -> Turn:
        """Forget the last question and its answer, and return them.

        Raises:
            InputError: there is none.
        """
        last = self._last()
        self._keep(self.chat.turns[:-1], self.chat.forgotten)
        return last

    def save_cache(self, path: Path) -> None:
        """Write what the session remembers, as far as all later questions go on from it; if anything, then whole.

        Raises:
            InputError: the file cannot be written.
        """
        self.session.align(self.history(), self._points)
        if not self.session.position:
            return
        self.session.save(path)
        if path.parent == chats_folder():
            caches = sorted(path.parent.glob("*.kv"), key=lambda cache: cache.stat().st_mtime_ns)
            for cache in caches[:-KEPT_CACHES]:
                cache.unlink(missing_ok=True)

    def _last(self) -> Turn:
        if not self.chat.turns:
            raise InputError("nothing was asked yet; ask something first")
        return self.chat.turns[-1]

    def _keep(self, turns: tuple[Turn, ...], forgotten: int) -> None:
        self.chat = replace(self.chat, turns=turns, forgotten=min(forgotten, len(turns)))

    def _answer(self, earlier: tuple[Turn, ...], turn: Turn, options: dict[str, Any]) -> Answer:
        settings, session = self.chat.settings, self.session
        ids, opened, forgotten = self._fitted(earlier, turn)
        unread = session.align(ids, self._points)
        self._points.appendleft(session.snapshot())
        tell = options.pop("progress", None)

        def progress(done: int, total: int) -> None:
            if tell:
                tell(done, total)
            if done == total:
                self._points.appendleft(session.snapshot())

        made = answer(
            session,
            unread,
            opened,
            settings,
            turn,
            progress=progress,
            ended=lambda turn: self._keep((*earlier, turn), forgotten),
            **options,
        )
        made.dropped = forgotten - min(self.chat.forgotten, len(earlier))
        return made

    def _fitted(self, earlier: tuple[Turn, ...], turn: Turn) -> tuple[list[int], bool, int]:
        """The prompt's tokens, whether it opens a thinking block, and how many of the earlier turns it leaves out.

        Where they do not leave a quarter of the context to the answer, so many are dropped that half of it is free:
        each time the rest is read again, which should be seldom.
        """
        context, most = self.session.context, self.chat.settings.max_tokens
        forgotten = min(self.chat.forgotten, len(earlier))
        ids, opened = self._encode(earlier[forgotten:], turn)
        wanted = context // 4 if most is None else min(most, context // 4)
        if len(ids) > context - wanted:
            every = range(len(earlier))
            fits = bisect_left(
                every, True, lo=forgotten, key=lambda n: len(self._encode(earlier[n:], turn)[0]) <= context // 2
            )
            while 0 < fits < len(earlier) and not earlier[fits].question:
                fits += 1  # what came of a call goes with it
            if fits != forgotten:
                forgotten = fits
                ids, opened = self._encode(earlier[forgotten:], turn)
        if len(ids) >= context:
            raise InputError(
                f"the question takes {len(ids)} tokens with all that comes before it, and the context has room for "
                f"{context}; shorten it or raise `ctx` (this model reads up to {self.model.spec.context})"
            )
        return ids, opened, forgotten

    def _encode(self, earlier: Iterable[Turn], turn: Turn) -> tuple[list[int], bool]:
        """The tokens up to where the answer goes on, and whether it begins with reasoning."""
        settings, tokenizer = self.chat.settings, self.model.tokenizer
        messages: list[dict[str, Any]] = [{"role": "system", "content": settings.system}] if settings.system else []
        unanswered = ""
        for told in earlier:
            question, text = unanswered + told.question, told.trimmed().text
            if told.calls and len(told.results) == len(told.calls):
                messages += _called(question, text, told)
                unanswered = ""
                continue
            # Many templates refuse an answer that is empty, and questions in a row: those are asked as one.
            unanswered = "" if text.strip() else f"{question}\n\n"
            if not unanswered:
                messages += [{"role": "user", "content": question}] if question else []
                messages.append({"role": "assistant", "content": text})
        asked = unanswered + turn.question
        messages += [{"role": "user", "content": asked}] if asked else []
        write = partial(encode, self._format, tokenizer, messages, thinking=settings.think, use=settings.use)
        ids, opened = write()
        if begun := turn.completion(opened, self._format.tags, self._format.lead):
            ids, _ = write(begun=begun)
        return ids, opened


def _called(question: str, text: str, turn: Turn) -> list[dict[str, Any]]:
    """The messages of a turn with calls of tools and what those said."""
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for n, call in enumerate(turn.calls)
    ]
    results = [{"role": "tool", "tool_call_id": f"call_{n}", "content": said} for n, said in enumerate(turn.results)]
    asked = [{"role": "user", "content": question}] if question else []
    return [*asked, {"role": "assistant", "content": text, "tool_calls": calls}, *results]

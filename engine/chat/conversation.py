"""Conversations: questions and answers on a session, kept in files and gone on with later.

NUMOE_HOME/chats/NAME.json    settings and turns, written after every turn
NUMOE_HOME/chats/NAME.kv      what the session remembers of them, written on leaving
"""

from __future__ import annotations

import json
import re
import stat
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from numoe.engine.chat.constrain import with_thinking
from numoe.engine.chat.format import encode
from numoe.engine.chat.thinking import TAGS, Splitter, Tags, ThinkSplitter
from numoe.engine.home import home
from numoe.engine.text.sample import Sampling, StopMatcher
from numoe.quant.documents import read_object
from numoe.quant.errors import InputError
from numoe.quant.files import locked_soon, write_whole

if TYPE_CHECKING:
    from numoe.engine.model import Model
    from numoe.engine.session import Generation, Session, Snapshot

FILE_VERSION = 1
KEPT_CACHES = 4
"""Session files in the folder of chats; they can take a gigabyte each, and older chats are read again instead."""
KEPT_POINTS = 4
"""Snapshots that a conversation can go back to: before and after the questions of its last two turns."""


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    think: ask for reasoning before the answer. think_budget: most tokens of it; None: no limit.
    max_tokens: as in `Session.generate`. stop: strings that end the answer, whatever the reasoning says. context: as
    in `Model.session`.
    """

    system: str | None = None
    think: bool = False
    think_budget: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    context: int | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_tokens", self.max_tokens, 0),
            ("think_budget", self.think_budget, 0),
            ("ctx", self.context, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; give a number from {least} on")
        if not _is_text(self.system or "", *self.stop):
            raise InputError("the instructions or a stop string are not UTF-8; convert them first")


def _is_text(*texts: str) -> bool:
    """Whether these can be written: what comes from outside may hold halves of surrogate pairs, which is no text."""
    return not re.search("[\ud800-\udfff]", "".join(texts))


@dataclass(frozen=True)
class Turn:
    """A question and its answer, reasoning apart, both as the model wrote them.

    finish_reason: "stop", "length" or "cancelled", see `Generation`.
    """

    question: str
    thinking: str = ""
    text: str = ""
    finish_reason: str | None = None

    def trimmed(self) -> Turn:
        """Without the line breaks around thinking tags, which belong to neither text."""
        text = self.text.lstrip("\n") if self.thinking else self.text
        return replace(self, thinking=self.thinking.strip("\n"), text=text)

    def completion(self, opened: bool, tags: Tags = TAGS[0], lead: str = "") -> str:
        """What the model has written in all; `opened`: the prompt ended inside a thinking block.

        tags, lead: those of the model's `ChatFormat`.
        """
        if not opened and not self.thinking:
            return self.text and lead + self.text
        opening, closing = tags
        return ("" if opened else opening) + self.thinking + (closing + self.text if self.text else "")


@dataclass(frozen=True)
class Chat:
    """What a conversation's file holds.

    model: the name that the model was loaded by. forgotten: so many of the first turns are no longer told.
    """

    model: str
    settings: Settings = field(default_factory=Settings)
    turns: tuple[Turn, ...] = ()
    forgotten: int = 0

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; nobody else can read it.

        Raises:
            InputError: it cannot be written.
        """
        text = json.dumps({"numoe": f"chat {FILE_VERSION}", **asdict(self)}, ensure_ascii=False, indent=1)
        try:
            _prepare_folder(path)
            # What is not UTF-8, as the name of a model's folder can be, becomes an escape that JSON knows too.
            write_whole(path, f"{text}\n".encode("utf-8", "backslashreplace"), private=True)
        except OSError as error:
            raise _unwritable(path, error) from error

    @classmethod
    def read(cls, path: Path) -> Chat:
        """The chat of a file.

        Raises:
            InputError: there is no such file, or it is none of this version's chats.
        """
        shown = "`numoe chat --list` shows those that are kept"
        if not path.is_file():
            raise InputError(f"there is no chat {path}; {shown}")
        try:
            document = read_object(path)
        except InputError:
            document = {}
        form = document.pop("numoe", None)
        if not isinstance(form, str) or not re.fullmatch(r"chat \d{1,9}", form):
            raise InputError(f"{path} is not a chat of numoe; {shown}")
        if form != f"chat {FILE_VERSION}":
            raise InputError(f"{path} is a chat of another version of numoe; go on with it there, or name another")
        try:
            chat: Chat = _built(cls, document, "the chat")
            if not 0 <= chat.forgotten <= len(chat.turns):
                raise ValueError(f"forgotten is {chat.forgotten}")
            return chat
        except ValueError as error:
            raise InputError(f"{path} is a damaged chat ({error}); name another, or remove it") from None


def _built(kind: Any, value: Any, name: str) -> Any:
    """The value of a JSON document as the type that a field has. Raises ValueError if it is another."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if type(value) is not dict or value.keys() - hints.keys():
            raise ValueError(f"{name} is something else")
        parts = {key: _built(hints[key], one, key) for key, one in value.items()}
        try:
            return kind(**parts)  # type: ignore[operator]
        except TypeError:
            raise ValueError(f"{name} is not whole") from None
    if get_origin(kind) is tuple:
        if type(value) is not list:
            raise ValueError(f"{name} is not a list")
        return tuple(_built(get_args(kind)[0], one, name) for one in value)
    kinds = get_args(kind) or (kind,)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        raise ValueError(f"{name} is of another kind")
    if type(value) is str and name != "model" and not _is_text(value):
        raise ValueError(f"{name} is not UTF-8")
    return value


def chats_folder() -> Path:
    """Where chats are kept."""
    return home() / "chats"


def chats() -> list[Path]:
    """The files of all chats that are kept, the last used first."""
    found = []
    for path in chats_folder().glob("*.json"):
        with suppress(OSError):  # removed meanwhile, or a link to nothing
            if stat.S_ISREG((kept := path.stat()).st_mode):
                found.append((kept.st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


@contextmanager
def alone(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Keeps other processes from going on with a chat meanwhile, after so many seconds of waiting for one that does.

    Raises:
        InputError: another process goes on with it, or its folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            _prepare_folder(path)
            stack.enter_context(locked_soon(path, f'the chat "{path.stem}"', patience))
        except OSError as error:
            raise _unwritable(path, error) from error
        yield


def _prepare_folder(path: Path) -> None:
    """Make the folder of chats, if the file is to be there, and keep it from others."""
    folder = chats_folder()
    if path.parent == folder:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(OSError):  # a disk without permissions, or another's folder
            folder.chmod(0o700)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"the chat cannot be written to {path} ({error.strerror}); check the folder and its disk")


def chat_path(name: str) -> Path:
    """The file of a chat.

    Raises:
        InputError: the name cannot be a file's everywhere.
    """
    if not re.fullmatch(r"\w[\w .-]*", name) or len(name.encode()) > 200:  # of 255, for it gets endings
        raise InputError(
            f'"{name}" cannot be the name of a chat; use letters, digits, spaces, ".", "-" and "_", at most 200'
        )
    return chats_folder() / f"{name}.json"


def new_path(question: str) -> Path:
    """A file for a chat that begins with a question, named by the time and its first words."""
    words = "-".join(re.findall(r"\w+", question.lower())[:5])[:40]
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{words}".rstrip("-")
    paths = (chat_path(stem + (f"-{n}" if n > 1 else "")) for n in range(1, 1000))
    return next(path for path in paths if not path.exists())


def cache_path(path: Path) -> Path:
    """The file beside a chat's own that keeps what the session remembers."""
    return path.with_suffix(".kv")


class Answer(Iterator[tuple[str, str]]):
    """Pieces of an answer as they are made: ("thinking" | "text", some of it), without line breaks around the tags.

    What turns out to be reasoning after it was given as text is so in `turn` alone.
    generation: counts and times. turn: all of the answer so far. dropped: turns that the model is not told any more
    from this answer on, for they do not fit into the context.
    """

    def __init__(
        self,
        generation: Generation,
        thinking: bool | None,
        turn: Turn | None = None,
        *,
        splitter: Splitter | None = None,
        closing: str = TAGS[0][1],
        stop: Sequence[str] = (),
        think_budget: int | None = None,
        dropped: int = 0,
        ended: Callable[[Turn], None] = lambda turn: None,
    ) -> None:
        """
        Args:
            thinking: whether the text begins inside a thinking block; None: it is plain text, without such blocks.
            turn: what is there already, to be continued.
            splitter: tells reasoning from the answer; None: `ThinkSplitter` with the usual tags.
            closing: what ends reasoning.
            stop: strings that end the answer; they are no part of it.
            think_budget: the block is closed after so many tokens.
            ended: called with the turn when it has ended, however it did, unless no answer began.

        Raises:
            InputError: a stop string is empty.
        """
        self.generation = generation
        self.turn = turn or Turn("")
        self.dropped = dropped
        self._splitter = None if thinking is None else splitter or ThinkSplitter(thinking)
        self._closing = closing
        self._stop = StopMatcher(stop)
        self._think_budget = think_budget
        self._ended = ended
        self._pieces = self._run()

    def __next__(self) -> tuple[str, str]:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()

    def _run(self) -> Generator[tuple[str, str], None, None]:
        generation, splitter = self.generation, self._splitter
        self.turn = replace(self.turn, finish_reason="cancelled")
        try:
            self._end_thinking()
            for piece in generation:
                yield from self._taken(splitter.push(piece) if splitter else [("text", piece)])
                if self._stop.stopped:
                    break
                self._end_thinking()
            if not self._stop.stopped:
                yield from self._taken(splitter.flush() if splitter else [])
                yield from self._added("text", self._stop.flush())
            self.turn = replace(self.turn, finish_reason="stop" if self._stop.stopped else generation.finish_reason)
        finally:
            if generation.tokens or self.turn.finish_reason != "cancelled":
                self._ended(self.turn)

    def _taken(self, parts: Iterable[tuple[str, str]]) -> Generator[tuple[str, str], None, None]:
        for kind, text in parts:
            if kind == "text":
                yield from self._added(kind, self._stop.push(text)[0])
                if self._stop.stopped:
                    return
            elif kind == "thinking":
                yield from self._added(kind, text)
            else:  # all text so far was reasoning, and is told apart from what follows
                yield from self._added("text", self._stop.flush())
                if self.turn.text:
                    yield "text", "\n\n"
                self.turn = replace(self.turn, thinking=self.turn.thinking + self.turn.text, text="")

    def _added(self, kind: str, text: str) -> Generator[tuple[str, str], None, None]:
        so_far = self.turn.thinking if kind == "thinking" else self.turn.text
        self.turn = replace(self.turn, **{kind: so_far + text})
        if not so_far.strip("\n") and (kind == "thinking" or self.turn.thinking):
            text = text.lstrip("\n")
        if text:
            yield kind, text

    def _end_thinking(self) -> None:
        budget = self._think_budget
        if budget is not None and self._splitter and self._splitter.thinking and len(self.generation.tokens) >= budget:
            self._think_budget = None
            self.generation.force(self._closing)


def answer(
    session: Session,
    unread: Sequence[int],
    opened: bool | None,
    settings: Settings,
    turn: Turn | None = None,
    *,
    grammar: str | None = None,
    dropped: int = 0,
    ended: Callable[[Turn], None] = lambda turn: None,
    **options: Any,
) -> Answer:
    """An answer that is made as it is taken.

    Args:
        unread: what the session has not read yet of the prompt.
        opened: whether the prompt ends inside a thinking block; None: it is plain text, which is continued.
        turn: what the prompt ends with of the answer, to be continued.
        grammar: the form of the answer, see `constrain`.
        dropped, ended: as in `Answer`.
        options: as in `Session.generate`, beside those in `Settings`.

    Raises:
        InputError: a value out of range, or a vocabulary that cannot follow the grammar; and as `Session.feed` while
            the answer is made.
    """
    chat = None if opened is None else session.model.description.chat_format
    tags = chat.tags if chat else TAGS[0]
    thinking = opened
    if opened is not None and turn:
        thinking = (opened or bool(turn.thinking)) and not turn.text
    if grammar is not None:
        if not thinking and not (settings.think and opened is not None):
            thinking = None
            if chat and chat.lead and not (turn and turn.text):  # the grammar is of what comes behind it
                unread = [*unread, *session.model.tokenizer.encode(chat.lead)]
        elif chat and chat.lead:
            raise InputError("this model cannot reason before an answer of a given form; leave out think")
        grammar = with_thinking(grammar, bool(thinking), thinking is not None, tags)
    generation = session.generate(
        unread,
        max_tokens=settings.max_tokens,
        grammar=grammar,
        shown=chat.shown if chat and thinking is not None else (),
        **asdict(settings.sampling),
        **options,
    )
    return Answer(
        generation,
        thinking,
        turn,
        splitter=chat.splitter(thinking, formed=grammar is not None) if chat and thinking is not None else None,
        closing=tags[1],
        stop=settings.stop,
        think_budget=settings.think_budget,
        dropped=dropped,
        ended=ended,
    )


class Conversation:
    """A chat, and a session that has read it.

    chat: what is said so far, and how. restored: tokens that were read from a session file instead of by the model.
    reason: why no session file could be used, "" if one was or none was asked for.
    """

    def __init__(self, model: Model, chat: Chat, cache: Path | None = None) -> None:
        """
        Args:
            cache: what `save_cache` wrote, used as far as model, context and tokens are the same.

        Raises:
            InputError: the model has no chat template, or the context does not fit.
        """
        self.model = model
        self.chat = chat
        self.restored, self.reason = 0, ""
        self._format = model.description.chat_format
        self._points: deque[Snapshot] = deque(maxlen=KEPT_POINTS)  # latest first
        restored = self._restore(cache) if cache is not None else None
        self.session: Session = restored or model.session(chat.settings.context)

    def _restore(self, cache: Path) -> Session | None:
        try:
            session = self.model.restore(cache)
        except InputError as error:
            self.reason = str(error)
            return None
        if session.context != self.model.plan(self.chat.settings.context).context:
            self.reason = f"it was kept for a context of {session.context} tokens"
            return None
        session.align(self.history())
        self.restored = session.position
        if not self.restored:
            self.reason = "it was kept for other turns or settings"
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

        return answer(
            session,
            unread,
            opened,
            settings,
            turn,
            progress=progress,
            dropped=forgotten - min(self.chat.forgotten, len(earlier)),
            ended=lambda turn: self._keep((*earlier, turn), forgotten),
            **options,
        )

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
            if fits != forgotten:
                forgotten = fits
                ids, opened = self._encode(earlier[forgotten:], turn)
        if len(ids) >= context:
            raise InputError(
                f"the question takes {len(ids)} tokens with all that comes before it, and the context has room for "
                f"{context}; shorten it or raise --ctx (this model reads up to {self.model.spec.context})"
            )
        return ids, opened, forgotten

    def _encode(self, earlier: Iterable[Turn], turn: Turn) -> tuple[list[int], bool]:
        """The tokens up to where the answer goes on, and whether it begins with reasoning."""
        settings, tokenizer = self.chat.settings, self.model.tokenizer
        messages = [{"role": "system", "content": settings.system}] if settings.system else []
        unanswered = ""
        for told in earlier:
            question, text = unanswered + told.question, told.trimmed().text
            # Many templates refuse an answer that is empty, and questions in a row: those are asked as one.
            unanswered = "" if text.strip() else f"{question}\n\n"
            if not unanswered:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": unanswered + turn.question})
        ids, opened = encode(self._format, tokenizer, messages, thinking=settings.think)
        if begun := turn.completion(opened, self._format.tags, self._format.lead):
            ids, _ = encode(self._format, tokenizer, messages, thinking=settings.think, begun=begun)
        return ids, opened

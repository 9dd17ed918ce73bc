"""One assembly of an answer, for whoever asks: reasoning and text told apart as they come, and where they end."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from numoe.engine.chat.thinking import Splitter, ThinkSplitter
from numoe.engine.chat.tools.call import Call, Use
from numoe.engine.chat.tools.reader import CALLING, CallList, CallSplitter
from numoe.engine.text.sample import Sampling, StopMatcher
from numoe.engine.text.tags import TAGS, Tags
from numoe.quant.errors import WrongUsage

if TYPE_CHECKING:
    from numoe.engine.chat.format import ChatFormat
    from numoe.engine.generation import Generation
    from numoe.engine.session import Session


@dataclass(frozen=True)
class Settings:
    """How questions are answered.

    think: ask for reasoning before the answer. think_budget: most tokens of it; None: no limit.
    use: tools that the model is told of, and how they are called.
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
    use: Use | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_tokens", self.max_tokens, 0),
            ("think_budget", self.think_budget, 0),
            ("ctx", self.context, 1),
        ):
            if value is not None and value < least:
                raise WrongUsage(f"`{name}` is {value}; give a number from {least} on")
        if not is_text(self.system or "", *self.stop):
            raise WrongUsage("the instructions or a stop string are not UTF-8; convert them first")


def is_text(*texts: str) -> bool:
    """Whether these can be written: what comes from outside may hold halves of surrogate pairs, which is no text."""
    return not re.search("[\ud800-\udfff]", "".join(texts))


@dataclass(frozen=True)
class Turn:
    """A question and its answer, reasoning apart, both as the model wrote them.

    finish_reason: "stop", "length" or "cancelled", see `Generation`; or "repetition", see `repeats`.
    calls: the tools that the answer calls; results: what they said. The next turn then has no question.
    """

    question: str
    thinking: str = ""
    text: str = ""
    finish_reason: str | None = None
    calls: tuple[Call, ...] = ()
    results: tuple[str, ...] = ()

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


_LEAST_REPEATED, _LEAST_REPEATS = 512, 8


def repeats(ids: Sequence[int]) -> bool:
    """Whether a text has come to an endless loop: its last 512 tokens are one passage over and over, 8 times or more.

    ids: all of its tokens; only the last are looked at.
    """
    tail = list(ids[-_LEAST_REPEATED:])
    if len(tail) < _LEAST_REPEATED:
        return False
    return any(
        tail[-period - 1] == tail[-1] and tail[period:] == tail[:-period]
        for period in range(1, _LEAST_REPEATED // _LEAST_REPEATS + 1)
    )


class Answer(Iterator[tuple[str, str]]):
    """Pieces of an answer as they are made: ("thinking" | "text", some of it), without line breaks around the tags.

    With tools also ("call", NAME) and what follows it, see `CallReader`.
    What turns out to be reasoning after it was given as text is so in `turn` alone.
    generation: counts and times. turn: all of the answer so far.
    """

    dropped = 0
    """Turns that the model is not told any more from this answer on, for they do not fit into the context."""

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
        ended: Callable[[Turn], None] = lambda turn: None,
    ) -> None:
        """
        Args:
            thinking: whether the text begins inside a thinking block; None: it is plain text, without such blocks.
            turn: what is there already, to be continued.
            splitter: tells reasoning and calls from the answer; None: `ThinkSplitter` with the usual tags.
            closing: what ends reasoning.
            stop: strings that end the answer; they are no part of it.
            think_budget: the block is closed after so many tokens.
            ended: called with the turn when it has ended, however it did, unless no answer began.

        Raises:
            WrongUsage: a stop string is empty.
        """
        self.generation = generation
        self.turn = turn or Turn("")
        self._splitter = splitter if splitter or thinking is None else ThinkSplitter(thinking)
        self._closing = closing
        self._stop = StopMatcher(stop)
        self._think_budget = think_budget
        self._calls = CallList()
        self._ended = ended
        self._pieces = self._run()

    def __next__(self) -> tuple[str, str]:
        return next(self._pieces)

    @property
    def stop(self) -> str:
        """The stop string that ended it, "" if none did."""
        return self._stop.found

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()

    def _run(self) -> Generator[tuple[str, str], None, None]:
        generation, splitter = self.generation, self._splitter
        self.turn = replace(self.turn, finish_reason="cancelled")
        looped = False
        try:
            self._end_thinking()
            for piece in generation:
                yield from self._taken(splitter.push(piece) if splitter else [("text", piece)])
                if len(generation.tokens) >= _LEAST_REPEATED:
                    looped = repeats([token.id for token in generation.tokens[-_LEAST_REPEATED:]])
                if self._stop.stopped or looped:
                    break
                self._end_thinking()
            if not self._stop.stopped:
                yield from self._taken(splitter.flush() if splitter else [])
                yield from self._added("text", self._stop.flush())
            why = "stop" if self._stop.stopped else "repetition" if looped else generation.finish_reason
            self.turn = replace(self.turn, finish_reason=why)
        finally:
            if generation.tokens or self.turn.finish_reason != "cancelled":
                self._ended(self.turn)

    def _taken(self, parts: Iterable[tuple[str, str]]) -> Generator[tuple[str, str], None, None]:
        for kind, text in parts:
            if kind == "text":
                yield from self._added(kind, self._stop.push(text)[0])
                if self._stop.stopped:
                    return
            elif kind in CALLING:
                yield from self._added("text", self._stop.flush())
                self._calls.take(kind, text)
                self.turn = replace(self.turn, calls=tuple(self._calls.whole))
                yield kind, text
            elif kind == "thinking":
                yield from self._added(kind, text)
            else:  # all text so far was reasoning, and is told apart from what follows
                yield from self._added("text", self._stop.flush())
                if self.turn.text:
                    yield "text", "\n\n"
                self.turn = replace(self.turn, thinking=self.turn.thinking + self.turn.text, text="")

    def _added(self, kind: str, text: str) -> Generator[tuple[str, str], None, None]:
        so_far = self.turn.thinking if kind == "thinking" else self.turn.text
        said = so_far + text
        self.turn = replace(self.turn, thinking=said) if kind == "thinking" else replace(self.turn, text=said)
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
    ended: Callable[[Turn], None] = lambda turn: None,
    **options: Any,
) -> Answer:
    """An answer that is made as it is taken.

    Args:
        unread: what the session has not read yet of the prompt.
        opened: whether the prompt ends inside a thinking block; None: it is plain text, which is continued.
        turn: what the prompt ends with of the answer, to be continued.
        grammar: the form of the answer, see `text.grammar`.
        ended: as in `Answer`.
        options: as in `Session.generate`, beside those in `Settings`.

    Raises:
        InputError: a value out of range, or a vocabulary that cannot follow the grammar; and as `Session.feed` while
            the answer is made.
    """
    chat = None if opened is None else session.model.description.chat_format
    thinking = opened
    if opened is not None and turn:
        thinking = (opened or bool(turn.thinking)) and not turn.text
    use = settings.use if chat else None
    formed, spelled = grammar is not None or bool(use and use.formed), frozenset[str]()
    if chat and use:
        spelled = frozenset(chat.syntax.markers if chat.syntax else ())
        grammar = chat.called(use, grammar, bool(thinking), settings.think) if formed else None
    elif grammar is not None and chat:
        if thinking or settings.think:
            grammar = chat.formed(grammar, bool(thinking))
        else:
            thinking = None
            if chat.lead and not (turn and turn.text):  # the grammar is of what comes behind it
                unread = [*unread, *session.model.tokenizer.encode(chat.lead)]
    generation = session.generate(
        unread,
        max_tokens=settings.max_tokens,
        grammar=grammar,
        shown=spelled.union(chat.shown) if chat and thinking is not None else (),
        spelled=spelled,
        **vars(settings.sampling),
        **options,
    )
    return Answer(
        generation,
        thinking,
        turn,
        splitter=_splitter(chat, thinking, formed, use) if chat and thinking is not None else None,
        closing=(chat.tags if chat else TAGS[0])[1],
        stop=settings.stop,
        think_budget=settings.think_budget,
        ended=ended,
    )


def _splitter(chat: ChatFormat, thinking: bool, formed: bool, use: Use | None) -> Splitter:
    splitter = chat.splitter(thinking, formed=formed, use=use)
    reader = chat.reader(use) if use else None
    return CallSplitter(splitter, reader) if reader else splitter

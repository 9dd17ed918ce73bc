"""From messages to a streamed reply: what `run` and `chat` share."""

from __future__ import annotations

import re
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numoe.cli.output import Output
    from numoe.engine import Generation
    from numoe.engine.chat import ChatFormat
    from numoe.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reply:
    """A finished answer, and the reasoning before it ("" if there was none)."""

    text: str
    thinking: str


def encode(
    chat_format: ChatFormat, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], think: bool
) -> tuple[list[int], bool]:
    """(token ids of a conversation up to the answer, whether the answer begins with reasoning).

    Special tokens come from the template alone: what messages spell stays text.

    Raises:
        InputError: the format cannot write the conversation.
    """
    from numoe.engine.chat import opens_thinking

    prompt = chat_format.render(messages, thinking=think)
    if not any(_spells_special(tokenizer, message["content"]) for message in messages):
        return tokenizer.encode(prompt), opens_thinking(prompt)
    # The template writes stand-ins that no one can guess, and the messages take their places.
    key = secrets.token_hex(16)
    stand_ins = [{**message, "content": f"{key}{i}{key}"} for i, message in enumerate(messages)]
    prompt = chat_format.render(stand_ins, thinking=think)
    ids: list[int] = []
    for n, part in enumerate(re.split(f"{key}(\\d+){key}", prompt)):
        if n % 2:  # what the parentheses caught
            ids += tokenizer.encode(messages[int(part)]["content"], special=False)
        else:
            ids += _continued(tokenizer, part, ids)
    return ids, opens_thinking(prompt)


def _spells_special(tokenizer: Tokenizer, text: str) -> bool:
    plain = tokenizer.encode(text, special=False)
    return tokenizer.encode(text)[-len(plain) :] != plain if plain else False


def _continued(tokenizer: Tokenizer, text: str, ids: list[int]) -> list[int]:
    """The ids of a prompt's next part: the tokenizer puts the BOS before every text, where only the first has one."""
    more = tokenizer.encode(text)
    return more[1:] if ids and tokenizer.add_bos else more


def stream(generation: Generation, output: Output | None, thinking: bool | None) -> Reply:
    """Show a reply as it is made, and return it.

    output: None shows nothing.
    thinking: whether the text begins inside a thinking block; None: it is plain text, without such blocks.
    """
    from numoe.engine.chat import ThinkSplitter

    splitter = None if thinking is None else ThinkSplitter(thinking)
    told: dict[str, list[str]] = {"text": [], "thinking": []}

    def show(parts: Sequence[tuple[str, str]]) -> None:
        for kind, text in parts:
            if not told[kind] and (kind == "thinking" or told["thinking"]):
                text = text.lstrip("\n")  # the line breaks around the tags belong to neither
            if not text:
                continue
            told[kind].append(text)
            if output:
                (output.answer if kind == "text" else output.thinking)(text)

    if output:
        output.reading(0, len(generation.prompt))
    for piece in generation:
        show(splitter.push(piece) if splitter else [("text", piece)])
    show(splitter.flush() if splitter else [])
    if output:
        output.end_answer()
    return Reply("".join(told["text"]), "".join(told["thinking"]).rstrip("\n"))


def statistics(generation: Generation) -> str:
    """One line: how many tokens, how fast, and how long the first one took."""
    made = len(generation.tokens)
    parts = [f"{made} token" + ("s" if made != 1 else "")]
    if made > 1 and generation.decode_seconds > 0:
        parts.append(f"{(made - 1) / generation.decode_seconds:.3g} tok/s")
    if made:
        parts.append(f"first after {generation.first_token_seconds:.2g} s")
    return ", ".join(parts)


class Interrupt:
    """While entered, Ctrl-C ends an answer between two tokens.

    Before the first token, and when pressed twice, it raises KeyboardInterrupt at once: a session that is
    interrupted while it reads stays where it was.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._answering = False

    def cancelled(self) -> bool:
        """To be asked before every token."""
        self._answering = True
        return self._pressed

    def __enter__(self) -> Interrupt:
        self._previous: Any = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed or not self._answering:
            raise KeyboardInterrupt
        self._pressed = True

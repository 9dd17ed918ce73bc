"""Reasoning and answers in one stream of text: the tags between them, and which is which."""

import json
import re
from collections.abc import Collection
from typing import Protocol

from numoe.engine.text.grammar import named
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tags import TAGS, Tags

QUOTES = "`'\""


def tags_of(template: str, vocabulary: Collection[str] = ()) -> Tags:
    """The tags of a model: those that its template spells, or else those that are tokens of its own."""
    for spelled in (template, vocabulary):
        for tags in TAGS:
            if any(tag in spelled or tag.replace(":opensource", "{}") in spelled for tag in tags):  # "{}": Hunyuan 3's
                return tags
    return TAGS[0]


_SWITCHES = (
    ("thinking_mode", "disabled", "enabled"),  # MiniMax-M3
    ("reasoning_effort", "no_think", "high"),  # Hunyuan 3
    ("reasoning_effort", "none", "high"),  # Cohere's North, Mistral
    ("reasoning_effort", "minimal", "high"),  # Solar-Open
)
"""What some templates read where others read `enable_thinking`: a variable, and its values without and with it."""
_CODE, _TEXT = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL), re.compile(r"'[^']*'|\"[^\"]*\"")


def asked(template: str, thinking: bool) -> dict[str, str]:
    """The variables by which a template that has another switch for reasoning is asked for it, or not."""
    code = " ".join(_CODE.findall(template))
    bare = _TEXT.sub("", code)
    if re.search(r"\b(enable_thinking|thinking) (is|if)\b|\b(if|not) (enable_)?thinking\b", bare):
        return {}
    for name, off, on in _SWITCHES:
        if re.search(rf"\b{name} is\b", bare) and re.search(rf"[\"']{off}[\"']", code):
            return {name: on if thinking else off}
    return {}


def opens_thinking(prompt: str, tags: Tags = TAGS[0]) -> bool:
    """Whether a rendered prompt ends inside a thinking block, so that the completion begins with reasoning."""
    return prompt.rstrip().endswith(tags[0])


def with_thinking(grammar: str, opened: bool, tags: Tags = TAGS[0]) -> str:
    """A grammar for the answer alone, as one for the answer and the reasoning before it.

    opened: the text begins inside a thinking block, see `opens_thinking`; else it may begin with a whole one.
    """
    opening, closing = map(json.dumps, tags)
    begin = "reasoning" if opened else f"({opening} reasoning)?"
    return (
        f"start: {begin} answer\nreasoning: block /\\n{{1,2}}/?\nblock[suffix={closing}]: /(?s:.*)/\n{named(grammar)}"
    )


class Splitter(Protocol):
    """Tells reasoning from the answer in a completion that comes in pieces."""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as it is settled."""
        ...

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order: ("thinking", text), ("text", text) and perhaps ("closed", "")."""
        ...

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        ...


class ThinkSplitter:
    """Splits a streamed completion into ("thinking", text) and ("text", text), never showing half a tag.

    A block begins in the prompt or with an opening tag at the very start, and ends at the first closing tag, or with
    the completion. A closing tag without an opening one, also a second one, is told as ("closed", ""): all text
    before it was reasoning. It is text itself where it is quoted or ends what was opened in the midst of the text.
    Line breaks after a block that is empty are left out.
    The result joined is the same however the completion is cut into pieces.
    """

    def __init__(self, thinking: bool, tags: Tags = TAGS[0], *, formed: bool = False) -> None:
        """
        Args:
            thinking: the completion begins inside a thinking block, see `opens_thinking`.
            formed: a grammar says that there is one block at most, and that all after it is the answer.
        """
        self._kind = "thinking" if thinking else "text"
        self._tags = tags
        self._formed = formed
        self._at_start = True
        self._empty = True  # nothing but tags so far
        self._after_empty = False
        self._inner = False  # a tag in the midst of the text is open
        self._last = ""
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as it is settled."""
        return self._kind == "thinking"

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order; no empty texts but that of "closed"."""
        text, self._held = self._held + piece, ""
        opening = self._tags[0]
        if self._at_start:
            begun = text.lstrip()
            if len(begun) < len(opening) and opening.startswith(begun):
                self._held = text
                return []
            self._at_start = False
            if begun.startswith(opening):
                self._kind, text = "thinking", begun.removeprefix(opening)
        return self._split(text)

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        text, self._held = self._held, ""
        return self._split(text, ended=True)

    def _split(self, text: str, ended: bool = False) -> list[tuple[str, str]]:
        opening, closing = self._tags
        parts: list[tuple[str, str]] = []
        while True:
            sought = [closing] if self.thinking else [] if self._formed else [opening, closing]
            found = [(text.index(tag), tag) for tag in sought if tag in text]
            if not found:
                cut = len(text) - (0 if ended else partial_match(text, sought))
                self._held = text[cut:]
                return parts + self._taken(text[:cut])
            start, tag = min(found)
            parts += self._taken(text[:start])
            if self.thinking:
                text = text[start + len(tag) :]
                self._kind, self._after_empty = "text", self._empty
                continue
            following = text[start + len(tag) : start + len(tag) + 1]
            quotable = self._last != "" and self._last in QUOTES
            if quotable and not following and not ended:
                self._held = text[start:]
                return parts
            text = text[start + len(tag) :]
            if quotable and following == self._last:
                parts += self._taken(tag)
            elif tag == opening or self._inner:
                self._inner = tag == opening
                parts += self._taken(tag)
            else:
                self._after_empty = self._empty
                parts.append(("closed", ""))

    def _taken(self, text: str) -> list[tuple[str, str]]:
        if self._after_empty:
            text = text.lstrip("\n")
        if not text:
            return []
        self._empty = self._after_empty = False
        self._last = text[-1]
        return [(self._kind, text)]


def split_thinking(completion: str, splitter: ThinkSplitter) -> tuple[str, str]:
    """(reasoning, answer) of a whole completion."""
    reasoning = answer = ""
    for kind, text in splitter.push(completion) + splitter.flush():
        if kind == "thinking":
            reasoning += text
        elif kind == "text":
            answer += text
        else:
            reasoning, answer = reasoning + answer, ""
    return reasoning, answer

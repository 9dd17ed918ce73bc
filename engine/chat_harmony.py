"""gpt-oss's chat format, called harmony: an answer comes as messages, each of a channel.

    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

Prompts are written by the model's own template; here answers are read back. What the channel `analysis` holds is
reasoning; `commentary` is for whoever asked, or with a recipient (to=functions.NAME) a call of a tool
(cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from numoe.engine.sample import partial_match
from numoe.engine.thinking import Tags

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = frozenset({CHANNEL, MESSAGE, START, "<|constrain|>", *_ENDS})
"""Special tokens by which the parts of an answer are told apart."""
TAGS: Tags = (f"{CHANNEL}analysis{MESSAGE}", f"<|end|>{START}assistant{CHANNEL}final{MESSAGE}")
FINAL = f"{CHANNEL}final{MESSAGE}"
"""What comes before an answer without reasoning."""

_BREAK = "\n\n"  # between two messages of one kind


def speaks_harmony(template: str, markers: Collection[str] = ()) -> bool:
    """Whether a template, or the vocabulary that it goes with, is of this format."""
    return CHANNEL in template and MESSAGE in template and (not markers or MESSAGE in markers)


class HarmonySplitter:
    """Splits a streamed completion into ("thinking", text) and ("text", text), never showing a marker or half of one.

    A completion that does not begin with a marker goes on in the midst of a message. A header that never ends is
    shown to nobody. The result joined is the same however the completion is cut into pieces.
    """

    def __init__(self, thinking: bool) -> None:
        """thinking: the completion begins inside a message of the channel `analysis`."""
        self._kind: str | None = "thinking" if thinking else None  # of the message that is read; None in a header
        self._at_start = not thinking
        self._told: set[str] = set()  # kinds that there was text of
        self._parted = False  # a message has ended since the last text
        self._held = ""
        self.calls: list[tuple[str, str]] = []
        """Header and text of each call of a tool."""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as it is settled."""
        return self._kind == "thinking"

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order; no empty texts."""
        text, self._held = self._held + piece, ""
        if self._at_start:
            if any(marker.startswith(text) for marker in (CHANNEL, START)):
                self._held = text
                return []
            self._at_start = False
            if not text.startswith((CHANNEL, START)):
                self._kind = "text"
        return self._split(text)

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        text, self._held = self._held, ""
        if self._at_start and text:
            self._at_start, self._kind = False, "text"
        return [] if self._kind is None else self._taken(text)

    def _split(self, text: str) -> list[tuple[str, str]]:
        parts: list[tuple[str, str]] = []
        while True:
            if self._kind is None:
                header, found, rest = text.partition(MESSAGE)
                if not found:
                    self._held = text
                    return parts
                self._begin(header)
                text = rest
            else:
                ends = [(text.index(end), end) for end in (*_ENDS, START, CHANNEL) if end in text]
                if not ends:
                    cut = len(text) - partial_match(text, (*_ENDS, START, CHANNEL))
                    self._held = text[cut:]
                    return parts + self._taken(text[:cut])
                at, end = min(ends)
                parts += self._taken(text[:at])
                text = text[at + len(end) :] if end in _ENDS else text[at:]
                self._kind, self._parted = None, True

    def _begin(self, header: str) -> None:
        """A message whose header this is."""
        channel = header.rpartition(CHANNEL)[2].split()
        self._kind = "thinking" if channel[:1] == ["analysis"] else "text"
        if re.search(r"\bto=\S", header):
            self._kind = "call"
            self.calls.append((header, ""))

    def _taken(self, text: str) -> list[tuple[str, str]]:
        if not text or self._kind is None:
            return []
        if self._kind == "call":
            header, so_far = self.calls[-1]
            self.calls[-1] = header, so_far + text
        kind = "thinking" if self._kind == "thinking" else "text"
        if self._parted and kind in self._told:
            text = _BREAK + text
        self._parted = False
        self._told.add(kind)
        return [(kind, text)]


def parse(completion: str, *, thinking: bool) -> dict[str, Any]:
    """A completion as {"content": str, "reasoning_content": str, "tool_calls": list}; see `ChatFormat.parse`."""
    splitter = HarmonySplitter(thinking)
    told = {"thinking": "", "text": ""}
    for kind, text in splitter.push(completion) + splitter.flush():
        told[kind] += text
    content = told["text"]
    for _, arguments in splitter.calls:
        content = content.removesuffix(arguments).removesuffix(_BREAK)
    return {
        "content": content,
        "reasoning_content": told["thinking"],
        "tool_calls": [_call(*call) for call in splitter.calls],
    }


def _call(header: str, arguments: str) -> Mapping[str, Any]:
    recipient = re.search(r"\bto=(\S+?)(?=<\||\s|$)", header)
    name = recipient[1].removeprefix("functions.") if recipient else ""
    return {"type": "function", "function": {"name": name, "arguments": arguments.strip()}}

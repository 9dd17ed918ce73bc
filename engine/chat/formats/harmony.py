"""gpt-oss's chat format, called harmony: an answer comes as messages, each of a channel.

    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

Prompts are written by the model's own template; here answers are read back. What the channel `analysis` holds is
reasoning; `commentary` is for whoever asked, or with a recipient (to=functions.NAME) a call of a tool
(cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from numoe.engine.chat.formats.jinja import JinjaChat
from numoe.engine.chat.thinking import Splitter
from numoe.engine.chat.tools.call import Broken, Tool, Use, literal, parsed
from numoe.engine.chat.tools.reader import CallReader
from numoe.engine.text.grammar import named
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tags import Tags
from numoe.engine.text.tokenizer import Tokenizer

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = frozenset({CHANNEL, MESSAGE, START, "<|constrain|>", *_ENDS})
"""Special tokens by which the parts of an answer are told apart."""
TAGS: Tags = (f"{CHANNEL}analysis{MESSAGE}", f"<|end|>{START}assistant{CHANNEL}final{MESSAGE}")
FINAL = f"{CHANNEL}final{MESSAGE}"
"""What comes before an answer without reasoning."""

_HEADS = (CHANNEL, START, MESSAGE, "<|constrain|>")  # what a header may begin with
_LEAD = re.compile(r"\s*(to=[^\s<]+\s*)?")  # and what may come before, for prompts end with <|start|>assistant
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
_BREAK = "\n\n"  # between two messages of one kind


def speaks_harmony(template: str, markers: Collection[str] = ()) -> bool:
    """Whether a template, or the vocabulary that it goes with, is of this format."""
    return CHANNEL in template and MESSAGE in template and (not markers or MESSAGE in markers)


@dataclass
class Message:
    """A message of an answer. kind: "thinking", "text", or "call" of the tool `name`. over: it was told what it is."""

    kind: str
    name: str = ""
    text: str = ""
    over: bool = False


class HarmonySplitter:
    """Splits a streamed completion into ("thinking", text) and ("text", text), never showing a marker or half of one.

    Calls of tools are told apart in `messages`. Text without a header is for whoever asked. A
    header that never ends is shown to nobody.
    The result joined is the same however the completion is cut into pieces.
    """

    def __init__(self, thinking: bool, tools: Mapping[str, Tool] | None = None) -> None:
        """
        Args:
            thinking: the completion begins inside a message of the channel `analysis`.
            tools: calls of these are told as `CallReader` does; None: all are text.
        """
        self._tools = {} if tools is None else tools
        self.messages = [Message("thinking")] if thinking else []
        self._place = "message" if thinking else "between"  # or "header"
        self._told: set[str] = set()  # kinds that there was text of
        self._parted = False  # a message has begun since the last text
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as it is settled."""
        return self._place == "message" and self.messages[-1].kind == "thinking"

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order; no empty texts."""
        text = self._held + piece
        parts: list[tuple[str, str]] = []
        while True:
            if self._place == "between":
                lead = _LEAD.match(text)[0]  # type: ignore[index]  # it matches any text
                begun = text[len(lead) :]
                if any(whole.startswith(begun) and whole != begun for whole in (*MARKERS, "to=NAME")):
                    break
                if begun.startswith(_HEADS):
                    self._place = "header"
                elif begun.startswith(_ENDS) and not lead.strip():
                    text = begun.partition("|>")[2]
                else:
                    parts += self._ended()
                    self._begin(Message("text"))
            elif self._place == "header":
                header, found, rest = text.partition(MESSAGE)
                if not found:
                    break
                parts += self._ended()
                self._begin(_headed(header))
                parts += [("call", self.messages[-1].name)] * self._calls
                text = rest
            else:
                held = (len(text) - partial_match(text, MARKERS), "")
                at, marker = min(((text.index(sought), sought) for sought in MARKERS if sought in text), default=held)
                parts += self._taken(text[:at])
                text = text[at:]
                if not marker:
                    break
                if marker in (START, CHANNEL):
                    self._place = "header"
                    continue
                text = text.removeprefix(marker)
                if marker in _ENDS:
                    self._place = "between"
        self._held = text
        return parts

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        text, self._held = self._held, ""
        if self._place == "between" and not self.messages:
            self._begin(Message("text"))
        return (self._taken(text) if self._place == "message" else []) + self._ended()

    @property
    def _calls(self) -> bool:
        """Whether the last message is a call of a tool that there is."""
        return bool(self.messages) and self.messages[-1].kind == "call" and self.messages[-1].name in self._tools

    def _ended(self) -> list[tuple[str, str]]:
        """What is to say of a call once its message has ended."""
        if not self._calls or self.messages[-1].over:
            return []
        message = self.messages[-1]
        message.over = True
        try:
            if isinstance(parsed(message.text), dict):
                return [("called", "")]
        except Broken:
            pass
        message.kind, text, message.text = "text", message.text, ""
        return [("broken", ""), *self._taken(text)]

    def _begin(self, message: Message) -> None:
        self._place, self._parted = "message", True
        self.messages.append(message)

    def _taken(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        message = self.messages[-1]
        message.text += text
        if self._calls:
            return [("arguments", text)]
        kind = "thinking" if message.kind == "thinking" else "text"
        if self._parted and kind in self._told:
            text = _BREAK + text
        self._parted = False
        self._told.add(kind)
        return [(kind, text)]


def _headed(header: str) -> Message:
    """The message that comes behind a header, without text."""
    if recipient := _RECIPIENT.search(header):
        return Message("call", recipient[1])
    return Message("thinking" if re.match(r"\s*analysis\b", header.rpartition(CHANNEL)[2]) else "text")


def parse(completion: str, *, thinking: bool) -> dict[str, Any]:
    """A completion as {"content": str, "reasoning_content": str, "tool_calls": list}; see `ChatFormat.parse`."""
    splitter = HarmonySplitter(thinking)
    splitter.push(completion)
    splitter.flush()
    content, reasoning = (
        _BREAK.join(message.text for message in splitter.messages if message.kind == kind and message.text)
        for kind in ("text", "thinking")
    )
    calls = [
        {"type": "function", "function": {"name": message.name, "arguments": message.text.strip()}}
        for message in splitter.messages
        if message.kind == "call"
    ]
    return {"content": content, "reasoning_content": reasoning, "tool_calls": calls}


class HarmonyChat(JinjaChat):
    """gpt-oss's: prompts by the model's template, answers in channels."""

    lead = FINAL
    shown = MARKERS

    @classmethod
    def of(cls, model_type: str, template: str, tokenizer: Tokenizer) -> Self | None:
        speaks = speaks_harmony(template, tokenizer.marker_spellings)
        return super().of(model_type, template, tokenizer) if speaks else None

    def __init__(self, template: str, special_tokens: Mapping[str, str], markers: Collection[str] = ()) -> None:
        super().__init__(template, special_tokens, markers)
        self.tags = TAGS

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        return parse(completion, thinking=thinking)

    @cached_property
    def takes_tools(self) -> bool:
        return self.shows_tools

    def splitter(self, thinking: bool, *, formed: bool = False, use: Use | None = None) -> Splitter:
        return HarmonySplitter(thinking, use.named if use else None)

    def reader(self, use: Use) -> CallReader | None:
        return None  # the splitter tells calls apart

    def called(self, use: Use, grammar: str | None, opened: bool, thinks: bool) -> str:
        calls = [
            f'{CHANNEL} {literal(f"commentary to=functions.{tool.name} ")} <|constrain|> "json" {MESSAGE} '
            f"{tool.object_rule()}"
            for tool in use.named.values()
        ]
        parts = [f"({' | '.join(calls)})"]
        if use.choice == "auto":
            parts.append(f'{CHANNEL} "final" {MESSAGE} plain')
        begin = f'{CHANNEL} "analysis" {MESSAGE} reasoning <|end|> {START} "assistant"'
        begin = begin.partition(f"{MESSAGE} ")[2] if opened else f"({begin})?"
        plain = "plain: /(?s:.*)/" if grammar is None else named(grammar, "plain")
        return f"start: {begin} ({' | '.join(parts)})\nreasoning: /(?s:.*)/\n{plain}\n"

    def formed(self, grammar: str, opened: bool) -> str:
        """Markers are named, not spelled: no text can be taken for one, nor one be part of a text."""
        begin = f'{CHANNEL} "analysis" {MESSAGE} reasoning <|end|> {START} "assistant"'
        begin = begin.partition(f"{MESSAGE} ")[2] if opened else f"({begin})?"
        return f'start: {begin} {CHANNEL} "final" {MESSAGE} answer\nreasoning: /(?s:.*)/\n{named(grammar)}'


FORMAT = HarmonyChat

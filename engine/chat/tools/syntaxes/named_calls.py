"""Calls as a name between marks, and the JSON of the arguments behind it.

    [TOOL_CALLS]f[ARGS]{"x": 1}                                                         Mistral since 2025
    <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>
    f
    {"x": 1}                                                                                   GLM-4-0414

The second is Kimi's, the third that of DeepSeek-V3.1, where V3 and R1 have fences of Markdown around the arguments, as
Hunyuan has between tags of its own.
Sources: the models' chat templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from numoe.engine.chat.tools.call import (
    Begun,
    Block,
    Broken,
    Call,
    Tool,
    Use,
    Usual,
    expect,
    known,
    literal,
    object_at,
    repeated,
    skip,
)

_LONGEST_HEAD = 1024


@dataclass(frozen=True)
class NamedCalls(Usual):
    """opening, closing: around a block; without an opening a call comes first in an answer, or not at all. head: what
    comes before the arguments of a call, {name} and {number} in it. tail: what comes behind them. pattern: the head as
    it is read, where it may be written otherwise. sign: what a template has in it beside the opening."""

    opening: str
    head: str
    tail: str = ""
    closing: str = ""
    pattern: str = ""
    sign: str = ""
    ids: str = ""
    """As in `Usual`; or "kimi": functions.f:0, by which calls of a conversation are numbered."""

    @cached_property
    def _head(self) -> re.Pattern[str]:
        plain = re.escape(self.head).replace(r"\{name\}", r"(?P<name>[\w.-]+)").replace(r"\{number\}", r"\d+")
        return re.compile(rf"\s*(?:{self.pattern or plain})\s*")

    @property
    def signs(self) -> Sequence[str]:
        return (self.opening, self.sign) if self.sign else (self.opening,)

    @property
    def markers(self) -> Sequence[str]:
        parts = (self.opening, *re.findall(r"<[^<>{}]+>|\[[A-Z_]+\]", self.head + self.tail), self.closing)
        return [mark for mark in parts if mark]

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        return ((self.opening,), ()) if self.opening else ((), [self._parts(name, 0) for name in tools])

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        block, at = Block(), len(self.opening)
        while True:
            if block.calls:
                if self._alone:
                    block.length = at
                    return block
                at = skip(text, at)
                if at == len(text) or (self.closing and self.closing.startswith(text[at:])):
                    if text.startswith(self.closing, at) and (self.closing or ended):
                        block.length = at + len(self.closing)
                    return block
                if self.closing and text.startswith(self.closing, at):
                    block.length = at + len(self.closing)
                    return block
            head = self._head.match(text, at)
            if head is None and (ended or len(text) - at > _LONGEST_HEAD):
                raise Broken
            if head is None or head.end() == len(text):
                return block
            call = Begun(known(head["name"], tools))
            call.arguments, end = object_at(text, head.end())
            block.calls.append(call)
            if end is not None and self.tail:
                end = expect(text, end, self.tail.strip(), ended)
            if end is None:
                return block
            at = end

    @property
    def _alone(self) -> bool:
        """Whether a block is one call, and ends with its arguments."""
        return not self.closing and not self.tail

    def _parts(self, name: str, number: int) -> str:
        return self.head.replace("{name}", name).replace("{number}", str(number))

    def write(self, calls: Sequence[Call]) -> str:
        written = [self._parts(call.name, n) + call.arguments + self.tail for n, call in enumerate(calls)]
        if self._alone:
            return "".join(self.opening + one for one in written)
        return self.opening + "".join(written) + self.closing

    def grammar(self, use: Use) -> str:
        lines = []
        for number, tool in enumerate(use.named.values()):
            head, _, counted = self.head.replace("{name}", tool.name).partition("{number}")
            digits = f"/[0-9]+/ {literal(counted)}" if "{number}" in self.head else ""
            tail = literal(self.tail) if self.tail else ""
            lines.append(f"call_{number}: {literal(head)} {digits} {tool.object_rule()} {tail}")
        one = "(" + " | ".join(f"call_{number}" for number in range(len(lines))) + ")"
        if self._alone:
            one = f"{literal(self.opening)} {one}" if self.opening else one
            return "\n".join([f"calls: {repeated(one, one, use.several)}", *lines, ""])
        closing = literal(self.closing) if self.closing else ""
        return "\n".join([f"calls: {literal(self.opening)} {repeated(one, one, use.several)} {closing}", *lines, ""])

    def call_id(self, name: str, number: int) -> str:
        return f"functions.{name}:{number}" if self.ids == "kimi" else super().call_id(name, number)

    def told_id(self, known: str, name: str, number: int) -> str:
        return self.call_id(name, number) if self.ids == "kimi" else super().told_id(known, name, number)


SYNTAXES = (
    NamedCalls("", "{name}\n", pattern=r"(?P<name>[\w.-]+)\n", sign="请使用 Json 格式表示调用的参数"),
    NamedCalls(
        "[TOOL_CALLS]",
        "{name}[ARGS]",
        pattern=r"(?P<name>[\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]",
        sign="[ARGS]",
        ids="short",
    ),
    NamedCalls(
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
        pattern=r"<\|tool_call_begin\|>\s*(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
        ids="kimi",
    ),
    NamedCalls(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    NamedCalls(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        pattern=r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[\w.-]+)\s*```json",
        sign="```json",
    ),
    NamedCalls(
        "<tool_calls>",
        "<tool_call>{name}\n```json\n",
        "\n```</tool_call>",
        "</tool_calls>",
        pattern=r"<tool_call>\s*(?P<name>[\w.-]+)\s*```json",
        sign="```json",
    ),
    NamedCalls(
        "<|tool_calls|>",
        "<|tool_call:begin|>{number}<|tool_call:name|>{name}<|tool_call:args|>",
        "<|tool_call:end|>",
        pattern=r"<\|tool_call:begin\|>[^<]*<\|tool_call:name\|>(?P<name>[\w.-]+)<\|tool_call:args\|>",
    ),
)

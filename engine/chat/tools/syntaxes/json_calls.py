"""Calls as JSON objects with a name and arguments, between marks: Hermes', and what is like it.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Qwen, Hermes, Granite 4 and many others; lists of such objects in Granite 3, Mistral 7B and Nemo, Nemotron and Apriel;
lines of one block in MiniMax-M1; without marks in Llama 3. Sources: the models' chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    parsed,
    repeated,
    skip,
    value_end,
)


@dataclass(frozen=True)
class JsonCalls(Usual):
    """opening, closing: around a block. listed: it is a list of calls. lines: it has a call a line. bare: it comes
    first in an answer, or not at all. name, arguments: the keys of a call. sign: what a template that writes calls so
    has in it."""

    opening: str
    closing: str = ""
    listed: bool = False
    lines: bool = False
    bare: bool = False
    name: str = "name"
    arguments: str = "arguments"
    sign: str = ""
    ids: str = ""

    @property
    def signs(self) -> Sequence[str]:
        return (self.sign or self.opening.strip(),)

    @property
    def markers(self) -> Sequence[str]:
        return [mark.strip() for mark in (self.opening, self.closing) if mark.strip()]

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        if not self.bare:
            return (self.opening.strip(),), ()
        return (), [f'{{"{self.name}": "{name}"' for name in tools] + [f'{{"{self.name}":"{name}"' for name in tools]

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        block, at = Block(), 0 if self.bare else len(self.opening.strip())
        if self.listed:
            begun = expect(text, at, "[", ended)
            if begun is None:
                return block
            at = begun
        while True:
            at = skip(text, at)
            end = self._call(text, at, tools, block)
            if end is None:
                return block
            at = skip(text, end)
            if self.listed and at < len(text) and text[at] == ",":
                at += 1
                continue
            if self.lines and text[at : at + 1] == "{":
                continue
            closing = expect(text, at, "]", ended) if self.listed else at
            if closing is not None and self.closing:
                closing = expect(text, closing, self.closing.strip(), ended)
            block.length = closing
            return block

    def _call(self, text: str, at: int, tools: Mapping[str, Tool], block: Block) -> int | None:
        """Read the call at a place, and return where it ends; None: it goes on."""
        if at == len(text):
            return None
        given, end = object_at(text, at)
        if end is not None:
            fields = parsed(given)
            found = fields.get(self.arguments, {})
            values = parsed(found) if isinstance(found, str) else {} if found is None else found
            if not isinstance(values, dict) or not isinstance(fields.get(self.name), str):
                raise Broken
            call = Begun(known(fields[self.name], tools), json.dumps(values, ensure_ascii=False), True)
            if raw := self._raw(given)[1]:
                call.arguments = raw
            block.calls.append(call)
            return end
        name, arguments = self._raw(given)
        if name and arguments:
            block.calls.append(Begun(known(name, tools), arguments))
        return None

    def _raw(self, given: str) -> tuple[str, str]:
        """The name and the arguments of an object as far as they are written, if they are in this order."""
        name, at = "", 1
        while (key_end := value_end(given, at := skip(given, at))) is not None:
            key = given[at:key_end]
            at = skip(given, key_end)
            if given[at : at + 1] != ":":
                break
            at = skip(given, at + 1)
            end = value_end(given, at)
            if name and key == f'"{self.arguments}"' and given[at : at + 1] == "{":
                return name, given[at:end]
            if end is None:
                break
            if key == f'"{self.name}"' and given[at] == '"':
                name = str(parsed(given[at:end]))
            at = skip(given, end)
            if given[at : at + 1] != ",":
                break
            at += 1
        return name, ""

    def _written(self, name: str, arguments: str) -> str:
        return f'{{"{self.name}": {json.dumps(name)}, "{self.arguments}": {arguments}}}'

    def write(self, calls: Sequence[Call]) -> str:
        written = [self._written(call.name, call.arguments) for call in calls]
        if self.listed:
            return f"{self.opening}[{', '.join(written)}]{self.closing}"
        if self.lines:
            return self.opening + "\n".join(written) + self.closing
        return "\n".join(f"{self.opening}{one}{self.closing}" for one in written)

    def grammar(self, use: Use) -> str:
        lines = []
        for number, tool in enumerate(use.named.values()):
            before, after = self._written(tool.name, "\0").split("\0")
            lines.append(f"call_{number}: {literal(before)} {tool.object_rule()} {literal(after)}")
        one = "(" + " | ".join(f"call_{number}" for number in range(len(lines))) + ")"
        opening, closing = (literal(mark) if mark else "" for mark in (self.opening, self.closing))
        if self.listed:
            listed = repeated(one, f'", " {one}', use.several)
            whole = f'{opening} "[" {listed} "]" {closing}'
        elif self.lines:
            listed = repeated(one, f'"\\n" {one}', use.several)
            whole = f"{opening} {listed} {closing}"
        else:
            whole = f"{opening} {one} {closing}"
            whole = whole if self.bare else repeated(whole, f'"\\n" {whole}', use.several)
        return "\n".join([f"calls: {whole}", *lines, ""])


SYNTAXES = (
    JsonCalls("<tool_call>\n", "\n</tool_call>"),
    JsonCalls("<TOOLCALL>", "</TOOLCALL>", listed=True),
    JsonCalls("<tool_calls>", "</tool_calls>", listed=True),
    JsonCalls("<tool_calls>\n", "\n</tool_calls>", lines=True, sign='"arguments": <args-json-object>}'),
    JsonCalls("<|tool_call|>", listed=True),
    JsonCalls("[TOOL_CALLS]", listed=True, ids="short"),
    JsonCalls("<|START_ACTION|>", "<|END_ACTION|>", listed=True, name="tool_name", arguments="parameters"),
    JsonCalls("<|function_call|>"),
    JsonCalls("", bare=True, arguments="parameters", sign='"parameters": dictionary of argument'),
)

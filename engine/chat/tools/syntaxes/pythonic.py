"""Calls as Python's: a list of them, Llama 4's without marks and LFM2's between them, or OLMo 3's lines.

    [f(city="Rome", days=3), g()]
    <|tool_call_start|>[f(city="Rome", days=3)]<|tool_call_end|>
    <function_calls>f(city="Rome", days=3)
    g()</function_calls>

Sources: the models' chat templates, llama.com's prompt format of Llama 4 and vLLM's parser of OLMo 3's calls.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    repeated,
    skip,
)

_HEAD = re.compile(r"([\w.-]+)\s*\(")
_HEAD_BEGINS = re.compile(r"[\w.-]")
_KEY = re.compile(r"\s*(\w+)\s*=(?!=)\s*")
_LONGEST_HEAD = 1024
_PARTS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|['"{}\[\](),]""", re.DOTALL)
_NAMES = {"true": True, "false": False, "null": None}  # as JSON has them


@dataclass(frozen=True)
class PythonicCalls(Usual):
    """opening, closing: around the calls; without them they come first in an answer, or not at all.

    listed: with brackets and commas; else every call has a line.
    """

    opening: str
    closing: str
    signs: tuple[str, ...]
    listed: bool = True

    @property
    def markers(self) -> Sequence[str]:
        return [self.opening, self.closing] if self.opening else []

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        return ((self.opening,), ()) if self.opening else ((), [f"[{name}(" for name in tools])

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        block = Block()
        begun = expect(text, len(self.opening), "[" if self.listed else "", ended)
        if begun is None:
            return block
        at = begun
        while True:
            at = skip(text, at)
            head = _HEAD.match(text, at)
            if head is None:
                if ended or not re.fullmatch(r"[\w.-]*\s*", text[at : at + _LONGEST_HEAD]):
                    raise Broken
                return block
            call = Begun(known(head[1], tools), "{")
            block.calls.append(call)
            end = _arguments(text, head.end(), call)
            if end is None:
                return block
            at = skip(text, end)
            if self.listed and text.startswith(",", at):
                at += 1
                continue
            if not self.listed and _HEAD_BEGINS.match(text, at):
                continue
            closed = expect(text, at, "]", ended) if self.listed else at
            if closed is not None and self.closing:
                closed = expect(text, closed, self.closing, ended)
            block.length = closed
            return block

    def write(self, calls: Sequence[Call]) -> str:
        written = []
        for call in calls:
            given = ", ".join(f"{key}={_written(value)}" for key, value in call.values.items())
            written.append(f"{call.name}({given})")
        return self.opening + (f"[{', '.join(written)}]" if self.listed else "\n".join(written)) + self.closing

    def grammar(self, use: Use) -> str:
        lines = []
        for number, tool in enumerate(use.named.values()):
            keys = list(tool.properties)
            # What may follow when an argument came before, and when none did.
            for place, key in enumerate(keys):
                rule, last = f"call_{number}_{place}", place == len(keys) - 1
                following = ["" if last else f"call_{number}_{place + 1}_{way}" for way in ("more", "first")]
                skips = "" if key in tool.required else "|"
                pair = f"{literal(f'{key}=')} {tool.value_rule(key)} {following[0]}"
                lines.append(f'{rule}_more: ", " {pair} {skips} {following[0] if skips else ""}')
                lines.append(f"{rule}_first: {pair} {skips} {following[1] if skips else ''}")
            first = f"call_{number}_0_first" if keys else ""
            lines.append(f'call_{number}: {literal(f"{tool.name}(")} {first} ")"')
        one = "(" + " | ".join(f"call_{number}" for number in range(len(use.named))) + ")"
        opening, closing = (literal(mark) if mark else "" for mark in (self.opening, self.closing))
        calls = repeated(one, f"{literal(', ' if self.listed else chr(10))} {one}", use.several)
        whole = f'{opening} "[" {calls} "]" {closing}' if self.listed else f"{opening} {calls} {closing}"
        return "\n".join([f"calls: {whole}", *lines, ""])


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_written(key)}: {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _arguments(text: str, at: int, call: Begun) -> int | None:
    """Read the arguments of a call up to its bracket, and return where it ends; None: it goes on."""
    names: set[str] = set()
    while True:
        at = skip(text, at)
        if text.startswith(")", at):
            call.arguments += "}"
            call.whole = True
            return at + 1
        key = _KEY.match(text, at)
        if key is None:
            if re.fullmatch(r"\w*\s*=?", text[at : at + _LONGEST_HEAD]):
                return None
            raise Broken
        end = _value_end(text, key.end())
        if end is None:
            return None
        if key[1] in names:
            raise Broken
        value = json.dumps(_value(text[key.end() : end]), ensure_ascii=False)
        call.arguments += f"{', ' if names else ''}{json.dumps(key[1])}: {value}"
        names.add(key[1])
        at = end + 1 if text[end] == "," else end


def _value_end(text: str, at: int) -> int | None:
    """Where the comma or the bracket behind a value is; None: it has not come."""
    depth = 0
    for part in _PARTS.finditer(text, at):
        if part[0] in ("'", '"'):  # a text that goes on
            return None
        if depth == 0 and part[0] in ",)":
            return part.start()
        depth += (part[0] in "{[(") - (part[0] in "}])") if len(part[0]) == 1 else 0
    return None


def _value(text: str) -> Any:
    try:
        return _plain(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Broken from None


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -_plain(node.operand)
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain(inner) for inner in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(_plain(key)): _plain(value) for key, value in pairs if key is not None}
    raise Broken


SYNTAXES = (
    PythonicCalls("<|tool_call_start|>", "<|tool_call_end|>", ("<|tool_call_start|>",)),
    PythonicCalls("<function_calls>", "</function_calls>", ("<function_calls>",), listed=False),
    PythonicCalls("<|python_start|>", "<|python_end|>", ("<|python_start|>", "[func_name1(", "wrapped")),
    PythonicCalls("", "", ("[func_name1(",)),
)

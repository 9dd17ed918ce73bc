"""Calls whose arguments are elements, and objects and lists in them elements of these: MiniMax-M3's.

    ]<]minimax[>[<tool_call>
    ]<]minimax[>[<invoke name="f">]<]minimax[>[<x>1]<]minimax[>[</x>]<]minimax[>[<y>]<]minimax[>[<item>a
    ]<]minimax[>[</item>]<]minimax[>[</y>]<]minimax[>[</invoke>
    ]<]minimax[>[</tool_call>

A token of its own is before every tag, and line breaks stand where they do in lines 1, 2 and 4 alone. The schema says
which values are texts; where it does not, what is JSON is that. Source: SGLang's parser of MiniMax-M3's calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numoe.engine.chat.tools.call import (
    ANNOTATIONS,
    Begun,
    Block,
    Broken,
    Call,
    Tool,
    Use,
    Usual,
    known,
    listed,
    literal,
    parsed,
    repeated,
    skip,
)
from numoe.engine.chat.tools.syntaxes.tagged_calls import OBJECT, PLAIN, unheld
from numoe.engine.text.sample import partial_match
from numoe.quant.errors import InputError

_MARK = "]<]minimax[>["
_HEAD = re.compile(re.escape(_MARK) + r'\s*<invoke name="([^"]*)">')
_TAG = re.compile(re.escape(_MARK) + r"\s*<([^<>\s/]+)>")
_LONGEST_TAG, _DEEPEST = 1024, 64
_LIST = ANNOTATIONS | {"type", "items"}


@dataclass(frozen=True)
class NestedCalls(Usual):
    """As above; there is one such syntax."""

    opening: str = f"{_MARK}<tool_call>"
    closing: str = f"{_MARK}</tool_call>"
    tail: str = f"{_MARK}</invoke>"
    signs: tuple[str, ...] = (_MARK,)

    @property
    def markers(self) -> Sequence[str]:
        return [_MARK]

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        return (self.opening,), ()

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        block, at = Block(), len(self.opening)
        while True:
            at = skip(text, at)
            if block.calls and text.startswith(self.closing, at):
                block.length = at + len(self.closing)
                return block
            head = _HEAD.match(text, at)
            if head is None:
                if (
                    ended
                    or len(text) - at > _LONGEST_TAG
                    or not _begins(text, at, f'{_MARK}<invoke name="', self.closing)
                ):
                    raise Broken
                return block
            call = Begun(known(head[1], tools), "{")
            block.calls.append(call)
            end = self._arguments(text, head.end(), tools[call.name], call)
            if end is None:
                if ended:
                    raise Broken
                return block
            at = end

    def _arguments(self, text: str, at: int, tool: Tool, call: Begun) -> int | None:
        """Read the arguments and the tail of a call, and return where it ends; None: it goes on."""
        names: set[str] = set()
        while True:
            at = skip(text, at)
            if text.startswith(self.tail, at):
                call.arguments += "}"
                call.whole = True
                return at + len(self.tail)
            tag = _TAG.match(text, at)
            if tag is None:
                if not _begins(text, at, f"{_MARK}<", self.tail) or len(text) - at > _LONGEST_TAG:
                    raise Broken
                return None
            if tag[1] in names:
                raise Broken
            call.arguments += f"{', ' if names else ''}{json.dumps(tag[1], ensure_ascii=False)}: "
            names.add(tag[1])
            found = _element(text, tag.end(), tag[1], tool.properties.get(tag[1]))
            if found is None:
                if tool.is_text(tag[1]):
                    given = text[tag.end() :]
                    given = given[: len(given) - partial_match(given, [f"{_MARK}</{tag[1]}>"])]
                    call.arguments += json.dumps(given, ensure_ascii=False)[:-1]
                return None
            value, at = found
            call.arguments += json.dumps(value, ensure_ascii=False)

    def write(self, calls: Sequence[Call]) -> str:
        written = [f'{_MARK}<invoke name="{call.name}">{_written(call.values)}{self.tail}' for call in calls]
        return "\n".join([self.opening, *written, self.closing])

    def grammar(self, use: Use) -> str:
        lines: list[str] = []
        for number, tool in enumerate(use.named.values()):
            rules = _Rules(tool, f"call_{number}")
            head = literal(f'{_MARK}<invoke name="{tool.name}">')
            arguments = rules.members(tool.parameters)
            lines += [f"call_{number}: {head} {arguments} {literal(self.tail)}", *rules.lines]
        one = "(" + " | ".join(f"call_{number}" for number in range(len(use.named))) + ")"
        between = literal("\n")
        calls = repeated(f"{between} {one}", f"{between} {one}", use.several)
        return "\n".join([f"calls: {literal(self.opening)} {calls} {literal(chr(10) + self.closing)}", *lines, ""])


class _Rules:
    """The rules of a tool's arguments, for a grammar. lines: those that `members` refers to."""

    def __init__(self, tool: Tool, prefix: str) -> None:
        self._tool, self._prefix = tool, prefix
        self.lines: list[str] = []

    def members(self, schema: Mapping[str, Any], what: str = "", depth: int = 0) -> str:
        """Elements for the properties of an object, one behind the other. what: which one it is."""
        self._hold(what or f"the JSON schema of the tool {self._tool.name}", schema.keys() - OBJECT)
        needed = schema.get("required") or ()
        parts = []
        for key, inner in (schema.get("properties") or {}).items():
            rule = self._rule(key, inner, depth + 1)
            parts.append(rule if key in needed else f"{rule}?")
        return " ".join(parts)

    def _hold(self, what: str, keys: Collection[str]) -> None:
        if self._tool.strict and keys:
            raise unheld(what, keys)

    def _rule(self, key: str, given: Any, depth: int) -> str:
        if depth > _DEEPEST:
            raise InputError(f"the JSON schema of the tool {self._tool.name} is nested too deeply")
        place = len(self.lines)
        self.lines.append("")
        rule, what = f"{self._prefix}_{place}", f"the argument {key} of the tool {self._tool.name}"
        opening, closing = literal(f"{_MARK}<{key}>"), literal(f"{_MARK}</{key}>")
        schema: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        kind, values = schema.get("type"), listed(schema)
        if kind == "string" and values:
            self._hold(what, schema.keys() - PLAIN)
            inner = " | ".join(literal(str(one)) for one in values)
        elif kind == "object" and schema.get("properties"):
            inner = self.members(schema, what, depth)
        elif kind == "array" and isinstance(schema.get("items"), Mapping):
            self._hold(what, schema.keys() - _LIST)
            inner = f"{self._rule('item', schema['items'], depth + 1)}*"
        elif kind in ("integer", "number", "boolean", "null"):
            inner = self._tool.schema_rule(schema, {"type": kind})
        else:  # a text, or what the schema does not tell of
            self._hold(what, schema.keys() - PLAIN if kind == "string" else {"no type"})
            self.lines[place] = f"{rule}: {opening} {rule}_value\n{rule}_value[suffix={closing}]: /(?s:.*)/"
            return rule
        self.lines[place] = f"{rule}: {opening} ({inner}) {closing}"
        return rule


def _begins(text: str, at: int, *marks: str) -> bool:
    """Whether one of these begins here, or the beginning of one."""
    return any(text.startswith(mark, at) or mark.startswith(text[at:]) for mark in marks)


def _element(text: str, at: int, key: str, schema: Any, depth: int = 0) -> tuple[Any, int] | None:
    """The value of an element that begins at a place, and where what follows it is; None: it goes on.

    Raises Broken where it is none.
    """
    closing, children = f"{_MARK}</{key}>", list[tuple[str, Any]]()
    if depth > _DEEPEST:
        raise Broken
    mark = text.find(_MARK, at)
    if mark < 0:
        return None
    if text.startswith(closing, mark):
        return _leaf(text[at:mark], schema), mark + len(closing)
    while True:
        mark = skip(text, mark if not children else at)
        if text.startswith(closing, mark):
            return _container(children), mark + len(closing)
        tag = _TAG.match(text, mark)
        if tag is None:
            if not _begins(text, mark, f"{_MARK}<", closing) or len(text) - mark > _LONGEST_TAG:
                raise Broken
            return None
        found = _element(text, tag.end(), tag[1], _inner(schema, tag[1]), depth + 1)
        if found is None:
            return None
        children.append((tag[1], found[0]))
        at = found[1]


def _inner(schema: Any, key: str) -> Any:
    if not isinstance(schema, Mapping):
        return None
    properties = schema.get("properties") or {}
    return properties.get(key) if key in properties or key != "item" else schema.get("items")


def _container(children: Sequence[tuple[str, Any]]) -> Any:
    """A list of items, or an object."""
    if all(key == "item" for key, _ in children):
        return [value for _, value in children]
    found = dict(children)
    if len(found) < len(children):
        raise Broken
    return found


def _leaf(given: str, schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return given
    if not given and kind in ("object", "array"):
        return {} if kind == "object" else []
    try:
        value = parsed(given)
        json.dumps(value, allow_nan=False)
    except (Broken, ValueError):
        return given
    return value


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return "".join(f"{_MARK}<{key}>{_written(inner)}{_MARK}</{key}>" for key, inner in value.items())
    if isinstance(value, list):
        return "".join(f"{_MARK}<item>{_written(inner)}{_MARK}</item>" for inner in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


SYNTAXES = (NestedCalls(),)

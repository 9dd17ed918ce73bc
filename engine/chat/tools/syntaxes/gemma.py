"""Gemma 4's calls: JSON without quotes around keys, and texts between marks of their own.

    <|tool_call>call:f{city:<|"|>Rome<|"|>,days:3,more:{a:[1,true]}}<tool_call|>

Source: the chat template of google/gemma-4-31B-it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
    listed,
    literal,
    parsed,
    repeated,
)
from numoe.engine.chat.tools.syntaxes.tagged_calls import PLAIN, unheld
from numoe.engine.text.grammar import json_rule
from numoe.engine.text.sample import partial_match

_OPENING, _CLOSING, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_HEAD = re.compile(r"\s*call:\s*([\w.-]+)\s*(?=\{)")
_LONGEST_HEAD = 1024
_PART = re.compile(
    r'\s*(?:(?P<mark>[{}\[\],:])|<\|"\|>(?P<text>(?s:.*?))<\|"\|>|(?P<word>[^\s{}\[\],:<]+)(?=[\s{}\[\],:]))'
)
_QUOTED = re.compile(r'\s*<\|"\|>')
_WORDS = {"None": "null", "True": "true", "False": "false"}


class GemmaCalls(Usual):
    signs = (_OPENING,)
    markers = (_OPENING, _CLOSING, _QUOTE)

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        return (_OPENING,), ()

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        head = _HEAD.match(text, len(_OPENING))
        if head is None:
            if ended or len(text) > _LONGEST_HEAD:
                raise Broken
            return Block()
        call = Begun(known(head[1], tools))
        block = Block([call])
        call.arguments, end = _json(text, head.end())
        if end is not None:
            if not isinstance(parsed(call.arguments), dict):
                raise Broken
            call.whole = True
            block.length = expect(text, end, _CLOSING, ended)
        return block

    def write(self, calls: Sequence[Call]) -> str:
        return "".join(f"{_OPENING}call:{call.name}{_written(call.values)}{_CLOSING}" for call in calls)

    def grammar(self, use: Use) -> str:
        lines = []
        for number, tool in enumerate(use.named.values()):
            rules = _Rules(tool, f"call_{number}")
            lines += [f"call_{number}: {literal(f'call:{tool.name}')} {rules.of(tool.parameters)}", *rules.lines]
        one = "(" + " | ".join(f"call_{number}" for number in range(len(use.named))) + ")"
        one = f"{literal(_OPENING)} {one} {literal(_CLOSING)}"
        text = f"text[suffix={literal(_QUOTE)}]: /(?s:.*)/"
        return "\n".join([f"calls: {repeated(one, one, use.several)}", *lines, text, *_ANY, ""])


def _json(text: str, at: int) -> tuple[str, int | None]:
    """The JSON of what is written from a place on, as far as it has come, and where it ends; None: it goes on."""
    made, inside, key = "", "", False
    while part := _PART.match(text, at):
        at, mark, word = part.end(), part["mark"], part["word"]
        if mark is None:
            quoted = part["text"] if word is None else word
            plain = word is not None and not key
            made += _WORDS.get(word, word) if plain else json.dumps(quoted, ensure_ascii=False)
            continue
        made += mark + " " * (mark in ",:")
        if mark in "{[":
            inside += mark
        elif mark in "}]":
            inside = inside[:-1]
            if not inside:
                return made, at
        key = mark in "{," and inside.endswith("{")
    if begun := _QUOTED.match(text, at):
        given = text[begun.end() :]
        made += json.dumps(given[: len(given) - partial_match(given, [_QUOTE])], ensure_ascii=False)[:-1]
    return made, None


def _written(value: Any) -> str:
    if isinstance(value, str):
        return f"{_QUOTE}{value}{_QUOTE}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)


_ANY = (
    f'value: {literal(_QUOTE)} text | word | "[" (value ("," value)*)? "]" | "{{" (pair ("," pair)*)? "}}"',
    'pair: /[A-Za-z0-9_.-]+/ ":" value',
    f"word: {json_rule({'type': ['number', 'boolean', 'null']}, 'a word')}",
)


class _Rules:
    """Rules for the values of a tool's arguments."""

    def __init__(self, tool: Tool, prefix: str) -> None:
        self.lines: list[str] = []
        self._tool, self._prefix = tool, prefix

    def of(self, schema: Any) -> str:
        """An expression for what a schema accepts.

        Raises:
            InputError: it cannot be followed, and the tool is strict.
        """
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        keys = schema.keys() - PLAIN if isinstance(schema, Mapping) else {"true"}
        if kind == "object" and not keys - {"properties", "required", "additionalProperties", "$defs", "definitions"}:
            return self._object(schema)
        if kind == "array" and not keys - {"items"}:
            item = self.of(schema.get("items", True))
            return f'"[" ({item} ("," {item})*)? "]"'
        if isinstance(kind, str) and kind not in ("string", "object", "array") and not keys - {"minimum", "maximum"}:
            return json_rule(schema, f"the JSON schema of the tool {self._tool.name}")
        values = listed(schema) if isinstance(schema, Mapping) else None
        if values and not (keys and self._tool.strict) and all(isinstance(one, str) for one in values):
            return "(" + " | ".join(literal(_written(one)) for one in values) + ")"
        if kind == "string" and not keys:
            return f"{literal(_QUOTE)} text"
        if self._tool.strict:
            raise unheld(f"the JSON schema of the tool {self._tool.name}", keys or {kind or "no type"})
        return '"{" (pair ("," pair)*)? "}"' if kind == "object" else "value"

    def _object(self, schema: Mapping[str, Any]) -> str:
        """The properties in their order; those that are optional may be left out."""
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        number = len(self.lines)
        pairs = [f"{literal(key + ':')} {self.of(inner)}" for key, inner in properties.items()]
        rules = [f"{self._prefix}_{number}_{place}" for place in range(len(pairs))]
        # What may follow when something came before, and when nothing did.
        for place, (key, pair) in enumerate(zip(properties, pairs, strict=True)):
            last = place == len(pairs) - 1
            more = "" if last else f"{rules[place + 1]}_more"
            first = "" if last else f"{rules[place + 1]}_first"
            skipped = "" if key in required else " |"
            self.lines.append(f'{rules[place]}_more: "," {pair} {more}{skipped} {more if skipped else ""}')
            self.lines.append(f"{rules[place]}_first: {pair} {more}{skipped} {first if skipped else ''}")
        return '"{" ' + (f"{rules[0]}_first " if rules else "") + '"}"'


SYNTAXES = (GemmaCalls(),)

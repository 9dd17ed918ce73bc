"""Calls with every argument in marks of its own: texts as they are, all else as JSON.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="f">
    <｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>                                                            DeepSeek-V4, V3.2

    <tool_call>                        <tool_call>f                     <minimax:tool_call>
    <function=f>                       <arg_key>x</arg_key>             <invoke name="f">
    <parameter=x>                      <arg_value>1</arg_value>         <parameter name="x">1</parameter>
    1                                  </tool_call>                     </invoke>
    </parameter>                                                        </minimax:tool_call>
    </function>
    </tool_call>    Qwen3-Coder, 3.5            GLM                                  MiniMax-M2

    <|open|>tools<|sep|><|open|>call tool="f" index="1"<|sep|><|open|>argument key="x" type="number"<|sep|>1
    <|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>, without a line break      Kimi-K3

Where a mark does not say whether a value is a text, the tool's schema does. Sources: the models' chat templates,
the description of the encoding in DeepSeek's repositories, and SGLang's parser of Kimi-K3's.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
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
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tags import DSML
from numoe.quant.errors import InputError

_LONGEST_HEAD = 1024
PLAIN = ANNOTATIONS | {"type", "enum", "const"}  # which a text is held to as it is
_TYPES = ("string", "number", "boolean", "null", "array", "object")
OBJECT = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}


def _pattern(mark: str) -> re.Pattern[str]:
    """A mark as it is read: whitespace in it may be more or less; what is named goes on to what stands behind it."""
    parts = re.split(r"(\{\w+\})", " ".join(mark.split()))
    read = ""
    for part, behind in zip(parts, [*parts[1:], ""], strict=True):
        if not re.fullmatch(r"\{\w+\}", part):
            read += r"\s*".join(map(re.escape, part.split(" ")))
        elif part == "{kind}":
            read += "(?P<kind>true|false)"
        elif part == "{type}":
            read += f"(?P<type>{'|'.join(_TYPES)})"
        elif part == "{index}":
            read += r"\d+"
        else:
            until = f"[^{re.escape(behind.strip()[:1])}]*" if behind.strip() else r"[^\s<]+(?=[\s<])"
            read += f"(?P<{part[1:-1]}>{until})"
    return re.compile(read)


@dataclass(frozen=True)
class TaggedCalls(Usual):
    """How a block is written: opening, head, arguments, tail, closing.

    {name} is in the head, and {index} where calls are numbered; {key} in `before`, which with `after` is around an
    argument, and there {kind} where it says whether it is a text, or {type} what it is. signs: see `Syntax`.

    between: what stands between calls; None: every call has a block. last: nothing but whitespace follows.
    """

    opening: str
    head: str
    before: str
    after: str
    tail: str
    closing: str
    signs: tuple[str, ...]
    between: str | None = None
    lead: str | None = None
    last: bool = False

    @cached_property
    def _head(self) -> re.Pattern[str]:
        return _pattern(self.head)

    @cached_property
    def _before(self) -> re.Pattern[str]:
        return _pattern(self.before)

    @property
    def _tells(self) -> bool:
        """Whether marks say which values are texts."""
        return "{kind}" in self.before or "{type}" in self.before

    @property
    def markers(self) -> Sequence[str]:
        written = self.opening + self.head + self.before + self.after + self.tail + self.closing
        marks = re.findall(r"<[^<>{}=\"\s]+>", written)
        return [self.opening.strip(), *marks, *([DSML] if DSML in self.opening else ())]

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        return (self.opening.strip(),), ()

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        block, at = Block(), skip(text, len(self.opening.strip()))
        while True:
            if block.calls and (self.between is None or self._begins(text, at, self.closing)):
                return self._closed(block, text, at, ended)
            head = self._mark(self._head, text, at, ended)
            if head is None:
                return block
            call = Begun(known(head["name"], tools), "{")
            block.calls.append(call)
            end = self._arguments(text, head.end(), tools[call.name], call, ended)
            if end is None:
                return block
            at = skip(text, end)

    def _begins(self, text: str, at: int, mark: str) -> bool:
        """Whether a mark begins here, or the beginning of one."""
        mark = mark.strip()
        return text.startswith(mark, at) or mark.startswith(text[at:])

    def _closed(self, block: Block, text: str, at: int, ended: bool) -> Block:
        closing = self.closing.strip()
        if not self._begins(text, at, closing):
            raise Broken
        if text.startswith(closing, at):
            end = at + len(closing)
            if self.last:
                end = skip(text, end)
                if end < len(text):
                    raise Broken
            if ended or not self.last:
                block.length = end
        return block

    def _mark(self, pattern: re.Pattern[str], text: str, at: int, ended: bool) -> re.Match[str] | None:
        """What a mark says; None: it has not come as a whole."""
        found = pattern.match(text, at)
        if found is None and (ended or len(text) - at > _LONGEST_HEAD):
            raise Broken
        return found

    def _arguments(self, text: str, at: int, tool: Tool, call: Begun, ended: bool) -> int | None:
        """Read the arguments and the tail of a call, and return where it ends; None: it goes on."""
        names: set[str] = set()
        while True:
            at = skip(text, at)
            if text.startswith(tail := self.tail.strip(), at):
                call.arguments += "}"
                call.whole = True
                return at + len(tail)
            if tail.startswith(text[at:]):
                return None
            before = self._before.match(text, at)
            if before is None:
                begun = self.before.partition("{")[0]
                if ended or len(text) - at > _LONGEST_HEAD or not self._begins(text, at, begun):
                    raise Broken
                return None
            key = before["key"]
            if key in names:
                raise Broken
            call.arguments += f"{', ' if names else ''}{json.dumps(key, ensure_ascii=False)}: "
            names.add(key)
            told = before.groupdict().get("kind") or before.groupdict().get("type")
            is_text = told in ("true", "string") if self._tells else tool.is_text(key)
            end = self._value(text, before.end(), is_text, call)
            if end is None:
                return None
            at = end

    def _value(self, text: str, at: int, is_text: bool | None, call: Begun) -> int | None:
        """Add the value that begins at a place to the arguments; is_text: None where that is not known."""
        end = text.find(self.after.strip(), at)
        given = text[at:] if end < 0 else text[at:end]
        padded = self.after.startswith("\n")
        if padded:
            given = given.removeprefix("\n")
        if end < 0:
            if is_text:
                given = given[: len(given) - partial_match(given, [self.after, self.after.strip()])]
                call.arguments += json.dumps(given, ensure_ascii=False)[:-1]
            return None
        given = given.removesuffix("\n") if padded else given
        call.arguments += _json(given, is_text, exact=self._tells)
        return end + len(self.after.strip())

    def write(self, calls: Sequence[Call]) -> str:
        written = [self._call(call, number) for number, call in enumerate(calls, 1)]
        if self.between is None:
            return "\n".join(self.opening + one + self.closing for one in written)
        return self.opening + self.between.join(written) + self.closing

    def _call(self, call: Call, number: int) -> str:
        arguments = "".join(self._argument(key, value) for key, value in call.values.items())
        return self.head.replace("{name}", call.name).replace("{index}", str(number)) + arguments + self.tail

    def _argument(self, key: str, value: Any) -> str:
        before = self.before.replace("{key}", key).replace("{kind}", "true" if isinstance(value, str) else "false")
        before = before.replace("{type}", _type_of(value))
        return before + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) + self.after

    def grammar(self, use: Use) -> str:
        lines = []
        for number, tool in enumerate(use.named.values()):
            if tool.strict and (keys := tool.parameters.keys() - OBJECT):
                raise unheld(f"the JSON schema of the tool {tool.name}", keys)
            head, numbered, behind = self.head.replace("{name}", tool.name).partition("{index}")
            parts = [literal(head), f"/[1-9][0-9]*/ {literal(behind)}" if numbered else ""]
            for place, key in enumerate(tool.properties):
                rule = f"argument_{number}_{place}"
                parts.append(rule if key in tool.required else f"{rule}?")
                lines += self._argument_rules(rule, tool, key)
            lines.append(f"call_{number}: {' '.join(parts)} {literal(self.tail)}")
        one = "(" + " | ".join(f"call_{number}" for number in range(len(use.named))) + ")"
        opening, closing = literal(self.opening), literal(self.closing) if self.closing else ""
        if self.between is not None:
            between = literal(self.between) if self.between else ""
            whole = f"{opening} {repeated(one, f'{between} {one}', use.several)} {closing}"
        else:
            whole = f"{opening} {one} {closing}"
            whole = repeated(whole, f'"\\n" {whole}', use.several)
        return "\n".join([f"calls: {whole}", *lines, ""])

    def _argument_rules(self, rule: str, tool: Tool, key: str) -> list[str]:
        before = self.before.replace("{key}", key)
        schema, after = tool.properties[key], literal(self.after)
        held = isinstance(schema, Mapping) and bool(schema.keys() - PLAIN)
        if tool.is_text(key) and not (held and self._tells):
            if held and tool.strict:
                raise unheld(f"the argument {key} of the tool {tool.name}", schema.keys() - PLAIN)
            before = literal(before.replace("{kind}", "true").replace("{type}", "string"))
            if values := listed(schema):
                return [f"{rule}: {before} ({' | '.join(literal(str(one)) for one in values)}) {after}"]
            mark = self.after.strip()
            behind = self.after.partition(mark)[2]
            return [
                f"{rule}: {before} {rule}_value {literal(behind) if behind else ''}",
                f"{rule}_value[suffix={literal(mark)}]: /(?s:.*)/",
            ]
        if "{type}" in before:
            return self._typed(rule, tool, key, before, after)
        return [f"{rule}: {literal(before.replace('{kind}', 'false'))} {tool.value_rule(key)} {after}"]

    def _typed(self, rule: str, tool: Tool, key: str, before: str, after: str) -> list[str]:
        """An argument that is no plain text, in marks that say of which type it is."""
        begins, _, behind = before.partition("{type}")
        schema = tool.properties[key]
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        kind = "number" if kind == "integer" else kind
        types = " | ".join(literal(one) for one in _TYPES[1:] if one == kind or kind not in _TYPES)
        return [f"{rule}: {literal(begins)} ({types}) {literal(behind)} {tool.value_rule(key)} {after}"]


def _type_of(value: Any) -> str:
    """The name of a JSON value's type."""
    kinds: dict[type, str] = {str: "string", bool: "boolean", int: "number", float: "number", list: "array"}
    return "null" if value is None else kinds.get(type(value), "object")


def unheld(what: str, keys: Iterable[str]) -> InputError:
    """That a strict schema has keywords which calls cannot be held to."""
    return InputError(
        f"{what} has {', '.join(sorted(keys))}, which the way this model writes calls cannot be held to; leave that "
        "out, or go without strict"
    )


def _json(given: str, is_text: bool | None, *, exact: bool) -> str:
    """A value as JSON. exact: its mark says what it is; else what is not JSON is a text.

    Raises Broken for what is not as the mark says.
    """
    if not is_text:
        try:
            json.dumps(parsed(given), allow_nan=False)
            return given.strip()
        except (Broken, ValueError):
            if exact:
                raise Broken from None
    if is_text is False:  # some templates write lists and objects as Python does
        with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return json.dumps(ast.literal_eval(given.strip()), ensure_ascii=False, allow_nan=False)
    return json.dumps(given, ensure_ascii=False)


SYNTAXES = (
    *(
        TaggedCalls(
            f"<{DSML}{block}>\n",
            f'<{DSML}invoke name="{{name}}">\n',
            f'<{DSML}parameter name="{{key}}" string="{{kind}}">',
            f"</{DSML}parameter>\n",
            f"</{DSML}invoke>",
            f"\n</{DSML}{block}>",
            (DSML, block),
            between="\n",
            lead="\n\n",
            last=True,
        )
        for block in ("tool_calls", "function_calls")
    ),
    TaggedCalls(
        "<|open|>tools<|sep|>",
        '<|open|>call tool="{name}" index="{index}"<|sep|>',
        '<|open|>argument key="{key}" type="{type}"<|sep|>',
        "<|close|>argument<|sep|>",
        "<|close|>call<|sep|>",
        "<|close|>tools<|sep|>",
        ("<|open|>", "<|sep|>", "argument"),
        between="",
    ),
    TaggedCalls(
        "<minimax:tool_call>\n",
        '<invoke name="{name}">\n',
        '<parameter name="{key}">',
        "</parameter>\n",
        "</invoke>",
        "\n</minimax:tool_call>",
        ("<minimax:tool_call>",),
        between="\n",
    ),
    TaggedCalls(
        "<tool_call>\n",
        "<function={name}>\n",
        "<parameter={key}>\n",
        "\n</parameter>\n",
        "</function>",
        "\n</tool_call>",
        ("<tool_call>", "<function="),
    ),
    TaggedCalls(
        "<seed:tool_call>\n",
        "<function={name}>\n",
        "<parameter={key}>",
        "</parameter>\n",
        "</function>",
        "\n</seed:tool_call>",
        ("<seed:tool_call>",),
    ),
    TaggedCalls(
        "<tool_call>",
        "{name}\n",
        "<arg_key>{key}</arg_key>\n<arg_value>",
        "</arg_value>\n",
        "</tool_call>",
        "",
        ("<tool_call>", "<arg_key>"),
    ),
    TaggedCalls(
        "<tool_calls:opensource>\n",
        "<tool_call:opensource>{name}<tool_sep:opensource>\n",
        "<arg_key:opensource>{key}</arg_key:opensource>\n<arg_value:opensource>",
        "</arg_value:opensource>\n",
        "</tool_call:opensource>",
        "\n</tool_calls:opensource>",
        ("<arg_key{}>", "<tool_sep{}>"),
        between="\n",
    ),
)

"""Tools and calls of them in one form, and what every syntax does that models write calls in."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numoe.engine.text.grammar import json_rule
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import shortened

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_DEEPEST = 64  # levels of a schema: those of people have a dozen
_KEYWORDS: Mapping[str, tuple[tuple[type, ...], type | None, str]] = {
    "type": ((str, list), str, "a name or a list of names"),
    "properties": ((dict,), None, "an object of schemas"),
    "required": ((list,), str, "a list of names"),
    "enum": ((list,), None, "a list"),
    "items": ((dict, bool), None, "a schema"),
    "$defs": ((dict,), None, "an object of schemas"),
    "definitions": ((dict,), None, "an object of schemas"),
}
"""What keywords of schemas hold that are looked into here, what that holds in turn, and what it is called."""
ANNOTATIONS = frozenset(
    ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
)
"""Keywords that by JSON Schema hold a value to nothing."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may have called.

    parameters: a JSON Schema of an object. strict: its calls have arguments that the schema accepts.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(_ANY_OBJECT))
    strict: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"a tool has the name {self.name!r:.80}; names are 1 to 128 letters, digits, dots, dashes and "
                "underscores"
            )
        what = f"the JSON schema of the tool {self.name}"
        _check_shape(self.parameters, what)
        if (kind := self.parameters.get("type") or "object") not in ("object", ["object"]):
            raise InputError(f"{what} is of the type {shortened(kind)}, and arguments are an object; give that")

    @property
    def definition(self) -> dict[str, Any]:
        """As OpenAI's API and chat templates write it."""
        described = {"description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": {"name": self.name, **described}}

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of its arguments by name."""
        return self.parameters.get("properties") or {}

    @property
    def required(self) -> Sequence[str]:
        """The arguments that every call has."""
        found = self.parameters.get("required")
        return [name for name in found or () if name in self.properties]

    def is_text(self, argument: str) -> bool | None:
        """Whether an argument is a text by the schema; None: the schema leaves that open."""
        schema = self.properties.get(argument)
        if not isinstance(schema, Mapping):
            return None
        kinds, values = schema.get("type"), listed(schema)
        if kinds is None and values:
            return all(isinstance(value, str) for value in values) or None
        if isinstance(kinds, list):
            return None if "string" in kinds else False
        return None if kinds is None else kinds == "string"

    def object_rule(self) -> str:
        """All arguments as JSON, for a grammar: what the schema accepts, or any object where it cannot be followed.

        Raises:
            InputError: it cannot be followed, and the tool is strict.
        """
        return self.schema_rule(self.parameters, _ANY_OBJECT)

    def value_rule(self, argument: str) -> str:
        """The same of one argument."""
        schema = self.properties[argument]
        shared = {key: self.parameters[key] for key in ("$defs", "definitions") if key in self.parameters}
        return self.schema_rule({**shared, **schema} if isinstance(schema, Mapping) else schema, {})

    def schema_rule(self, schema: Any, otherwise: Mapping[str, Any]) -> str:
        """The same of a part of the schema; otherwise: what is followed where that cannot be."""
        try:
            return json_rule(schema, f"the JSON schema of the tool {self.name}")
        except InputError:
            if self.strict:
                raise
            return json_rule(otherwise, "any JSON")


def listed(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema names one by one; None: it names none."""
    return [schema["const"]] if "const" in schema else schema.get("enum") or None


def _check_shape(schema: Any, what: str) -> None:
    """Raises InputError for what is no JSON Schema in a place that is looked into; what is null or empty is let pass,
    as some clients write it for nothing."""
    levels = [(schema, 0)]
    while levels:
        one, depth = levels.pop()
        if depth > _DEEPEST:
            raise InputError(f"{what} is nested too deeply; use {_DEEPEST} levels at most")
        if not isinstance(one, Mapping):
            continue
        for keyword, (kinds, inner, wanted) in _KEYWORDS.items():
            value = one.get(keyword)
            if not value:
                continue
            if type(value) not in kinds or (inner and not all(isinstance(part, inner) for part in value)):
                raise InputError(f"{what}: {keyword} takes {wanted}, not {shortened(value)}")
            if isinstance(value, dict):
                levels += [(part, depth + 1) for part in (value.values() if keyword != "items" else (value,))]


@dataclass(frozen=True)
class Call:
    """A call of a tool. arguments: a JSON object as text."""

    name: str
    arguments: str
    id: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        found: dict[str, Any] = parse_json(self.arguments, f"the arguments of {self.name}")
        return found


@dataclass(frozen=True)
class Use:
    """The tools of a question, and which of them are called.

    choice: "auto": as the model likes; "required": one at least; or the name of the one that is called.
    several: whether an answer may have more than one call.
    """

    tools: Sequence[Tool]
    choice: str = "auto"
    several: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise InputError(f"two tools have the name {twice}; give each its own")
        if self.choice not in ("auto", "required", *names):
            raise WrongUsage(f"there is no tool {self.choice!r:.80}; there are {', '.join(names)}")

    @property
    def named(self) -> dict[str, Tool]:
        """The tools that can be called, by name."""
        return {tool.name: tool for tool in self.tools if self.choice in ("auto", "required", tool.name)}

    @property
    def formed(self) -> bool:
        """Whether a grammar has to see to it that calls are as asked for."""
        return self.choice != "auto" or not self.several or any(tool.strict for tool in self.tools)


class _AnyTool(Mapping[str, Tool]):
    """Tools of every name, of which nothing else is known."""

    def __getitem__(self, name: str) -> Tool:
        return Tool("any")

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


ANY_TOOL = _AnyTool()


@dataclass
class Begun:
    """A call as far as it has come: the JSON of its arguments up to what is settled."""

    name: str
    arguments: str = ""
    whole: bool = False


@dataclass
class Block:
    """Calls that stand together. length: the characters of the block, once it has ended."""

    calls: list[Begun] = field(default_factory=list)
    length: int | None = None


class Broken(Exception):
    """What was taken for a call is none."""


class Syntax(Protocol):
    """How a model writes calls of tools. A file of `numoe.engine.chat.tools.syntaxes` lists its own in SYNTAXES."""

    lead: str | None
    """The whitespace in front of a block that is a part of it; None: all."""

    @property
    def signs(self) -> Sequence[str]:
        """What a chat template that writes calls so has in it, all of it."""
        ...

    @property
    def markers(self) -> Sequence[str]:
        """What may be special tokens of a vocabulary, of which the first begins a block."""
        ...

    def openings(self, tools: Mapping[str, Tool]) -> tuple[Sequence[str], Sequence[str]]:
        """What a block begins with: anywhere in an answer, and at its beginning alone."""
        ...

    def read(self, text: str, tools: Mapping[str, Tool], ended: bool) -> Block:
        """The calls of a block that a text begins with, as far as it has come.

        What is settled of a text is settled of every longer one. ended: there is no more.
        Raises Broken where it can be no block of calls, whatever follows.
        """
        ...

    def write(self, calls: Sequence[Call]) -> str:
        """A block as the model writes it."""
        ...

    def grammar(self, use: Use) -> str:
        """Rules, the first called `calls`, for a block of calls of these tools.

        Raises:
            InputError: what is asked for cannot be followed.
        """
        ...

    def call_id(self, name: str, number: int) -> str:
        """A new id for the call of this name and number in a conversation."""
        ...

    def told_id(self, known: str, name: str, number: int) -> str:
        """The id by which the model is told of a call of earlier; known: what whoever asks calls it."""
        ...


class Usual:
    """What most syntaxes have in common. ids: "short": of nine letters and digits; else as long as one likes."""

    lead: str | None = None
    ids: str = ""

    def call_id(self, name: str, number: int) -> str:
        return secrets.token_hex(5)[:9] if self.ids == "short" else f"call_{secrets.token_hex(12)}"

    def told_id(self, known: str, name: str, number: int) -> str:
        if self.ids == "short" and not re.fullmatch(r"[A-Za-z0-9]{9}", known):
            return hashlib.sha256(known.encode()).hexdigest()[:9]
        return known


def literal(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False)


def repeated(first: str, again: str, several: bool) -> str:
    """A call and more of them, in a grammar."""
    return f"{first} ({again})*" if several else first


_VALUE_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\]]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}<\[{\"]+")
_SPACE = re.compile(r"\s*")


def skip(text: str, at: int) -> int:
    """The place behind whitespace."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def value_end(text: str, at: int) -> int | None:
    """Where the JSON value that begins at a place ends; None: it goes on.

    Raises Broken where no value begins.
    """
    if at == len(text):
        return None
    if text[at] not in '"{[':
        found = _SCALAR.match(text, at)
        if found is None:
            raise Broken
        return None if found.end() == len(text) else found.end()
    depth = 0
    for part in _VALUE_PARTS.finditer(text, at):
        if part[0] == '"':  # a text that goes on
            return None
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(part[0], 0)
        if depth == 0:
            return part.end()
    return None


def parsed(text: str) -> Any:
    """The value of JSON. Raises Broken where it has none."""
    try:
        return parse_json(text, "it")
    except InputError:
        raise Broken from None


def object_at(text: str, at: int) -> tuple[str, int | None]:
    """The JSON object that begins at a place, as far as it has come, and where it ends; None: it goes on."""
    if at < len(text) and text[at] != "{":
        raise Broken
    end = value_end(text, at)
    if end is not None and not isinstance(parsed(text[at:end]), dict):
        raise Broken
    return text[at:end], end


def expect(text: str, at: int, wanted: str, ended: bool) -> int | None:
    """The place behind a text that has to come, whitespace before it; None: it has not come as a whole.

    Raises Broken where something else comes.
    """
    at = skip(text, at)
    if text.startswith(wanted, at):
        return at + len(wanted)
    if ended or not wanted.startswith(text[at:]):
        raise Broken
    return None


def known(name: str, tools: Mapping[str, Tool]) -> str:
    """A name that a tool has. Raises Broken where none has it."""
    if name not in tools:
        raise Broken
    return name

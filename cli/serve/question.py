"""What is common to the protocols: a question in one form, and what is made of it as it comes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from numoe.cli.request import Request
from numoe.cli.serve.fields import Field, Refused, read
from numoe.cli.settings import Options, in_group, spelled
from numoe.engine.chat.answer import is_text
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.chat.answer import Turn
    from numoe.engine.chat.tools.call import Use
    from numoe.engine.generation import Token
    from numoe.engine.text.tokenizer import Tokenizer

DEEPEST = 64
"""Levels of a JSON document: schemas of people have a dozen."""


@dataclass(frozen=True)
class Piece:
    """Some of an answer: text, thinking, or a part of a call as in `CallReader`.

    tokens: those that it was made of. call_id: that of a call which is begun.
    """

    kind: str
    text: str
    tokens: Sequence[Token] = ()
    call_id: str = ""


@dataclass(frozen=True)
class Begun:
    """An answer is going to be made: nothing of the request is wrong."""

    prompt_tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class Made:
    """An answer that has ended. pieces: all of it. stop: the string that ended it, "" if none did."""

    turn: Turn
    prompt_tokens: int
    reused_tokens: int
    tokens: Sequence[Token]
    thinking_tokens: int
    pieces: Sequence[Piece]
    ids: Sequence[str]
    """Those of the calls."""
    stop: str = ""

    @property
    def called(self) -> bool:
        """Whether it ended with calls of tools."""
        return bool(self.turn.calls) and self.turn.finish_reason == "stop"

    @property
    def cut(self) -> bool:
        """Whether it was cut off."""
        return self.turn.finish_reason in ("length", "repetition")


Write = list[tuple[str, dict[str, Any]]]
"""Events: what they are called, and what they say."""


class Writer(Protocol):
    """Writes one reply, as events while answers come, or whole."""

    def begin(self, begun: Sequence[Begun]) -> Write: ...

    def piece(self, choice: int, piece: Piece) -> Write: ...

    def end(self, choice: int, made: Made) -> Write: ...

    def close(self, made: Sequence[Made]) -> Write: ...

    def whole(self, made: Sequence[Made]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Asked:
    """A request of any protocol as far as it can be read without a model.

    requests: makes what each answer is made of, by the options of the model. writer: of the reply; tokenizer for the
    spelling of tokens.
    """

    model: str
    stream: bool
    requests: Callable[[Options], list[Request]]
    writer: Callable[[Tokenizer], Writer]
    count: int = 1


class Api(Protocol):
    """A protocol: a file of this folder."""

    path: str
    fields: Sequence[Field]

    def read(self, body: Any) -> Asked:
        """Raises Refused for what is wrong with a request."""
        ...

    def error(self, error: Refused) -> dict[str, Any]:
        """As the protocol says what is wrong."""
        ...

    def done(self) -> bytes:
        """What ends a stream of events."""
        ...


def made_request(
    options: Options,
    given: Mapping[str, Any],
    prompt: Any,
    *,
    use: Use | None = None,
    effort: str | None = None,
    schema: Any = None,
    logit_bias: Mapping[str, float] | None = None,
) -> Request:
    """A request by the values of numoe's settings where the client gives others.

    effort: how much reasoning, in the client's words; "none" is no reasoning. schema: that of the answer.

    Raises:
        InputError: a value is out of range, or the form of the answer is not possible.
    """
    values = {**options, "logprobs": 0, "schema": schema, "choices": None, "regex": None, **given}
    if effort is not None:
        values["think"] = effort != "none"
    biased = tuple((int(key), float(value)) for key, value in (logit_bias or {}).items())
    return Request.make(prompt, values, use=use, effort=None if effort == "none" else effort, logit_bias=biased)


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """The text of a message's content: a text, or parts of which all are texts.

    Raises:
        Refused: it holds something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused(400, f"{where} takes a text or a list of parts", where)
    parts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds:
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refused(400, f"{where}[{number}] is of the type {kind!r:.40}; models here read text", where)
        spelled = part.get("refusal" if part["type"] == "refusal" else "text")
        if not isinstance(spelled, str):
            raise Refused(400, f"{where}[{number}] has no text", where)
        parts.append(spelled)
    return "\n\n".join(parts)


def tool_of(given: Any, where: str, parameters: str = "parameters") -> Any:
    """A tool by the object that describes it; parameters: what its schema is called there.

    Raises:
        Refused: it is something else.
    """
    from numoe.engine.chat.tools.call import Tool

    fields = (Field("name", (str,), needed=True), Field("description", (str,)), Field(parameters, (dict,)),
              Field("strict", (bool,)), Field("type", (str,)), Field("cache_control", (dict,)),
              Field("eager_input_streaming", (bool,)), Field("defer_loading", (bool,), only=(False,)))  # fmt: skip
    values = read(fields, given, f"{where}.")
    schema = values.get(parameters) or {"type": "object", "properties": {}}
    try:
        return Tool(values["name"], values.get("description", ""), schema, values.get("strict", False))
    except InputError as error:
        raise Refused(400, sentence(error), where) from None


def told_messages(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages as templates take them: instructions are of the system, and those in front are one.

    Templates begin an answer after a question or a result alone. So instructions that follow a question come before it,
    and those that follow results are told as the user's.
    """
    ordered: list[Mapping[str, Any]] = []
    for message in messages:
        one = {**message, "role": "system"} if message["role"] == "developer" else message
        before = ordered[-1]["role"] if ordered else ""
        if one["role"] == "system" and before == "user":
            ordered.insert(len(ordered) - 1, one)
        else:
            ordered.append({**one, "role": "user"} if one["role"] == "system" and before == "tool" else one)
    told: list[Mapping[str, Any]] = []
    for one in ordered:
        if one["role"] == "system" and len(told) == 1 and told[0]["role"] == "system":
            told[0] = {**one, "content": f"{told[0]['content']}\n\n{one['content']}"}
        else:
            told.append(one)
    return told


def logprobs_of(tokenizer: Tokenizer, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Log-probabilities as OpenAI's chat has them; the token that ended an answer is none of it."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        spelled = tokenizer.token_bytes(token_id)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}

    return [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(i, value) for i, value in token.alternatives]}
        for token in tokens
        if token.id not in tokenizer.eos_ids
    ]


def check_document(value: Any, left: int = DEEPEST) -> None:
    """Raises Refused for what is nested more deeply than any that is meant, and for NaN and halves of characters."""
    if left == 0:
        raise Refused(400, "the request is nested too deeply")
    if isinstance(value, str) and not is_text(value):
        raise Refused(400, "a text of the request is not UTF-8: it holds half of a surrogate pair")
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(400, "NaN and Infinity are no numbers of JSON")
    for inner in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_document(inner, left - 1)


def refused_by(error: InputError) -> Refused:
    """What the engine says is wrong, with the field that it begins with the name of, if it does."""
    said = sentence(error)
    first = said.partition(" ")[0]
    named = first in ("logit_bias", "tools") or any(one.field == first for one in in_group("sampling").values())
    code = "context_length_exceeded" if "do not fit into the context" in said else ""
    return Refused(400, said, first if named else "", code)


def sentence(error: Exception) -> str:
    """What the engine says is wrong, to whoever asks a server."""
    fields = {one.field: one.field for one in in_group("sampling").values()}
    return spelled(str(error), fields | {"tools": "tools", "ctx": "the server's --ctx", "ram": "the server's --ram"})


def event(name: str, said: Mapping[str, Any], named: bool) -> bytes:
    """A server-sent event. named: with its name in front, as Anthropic's and Responses' are."""
    return f"{f'event: {name}' + chr(10) if named else ''}data: {_json(said)}\n\n".encode("utf-8", "backslashreplace")


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

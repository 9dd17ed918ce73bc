"""OpenAI's responses, as far as text and tools go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numoe.cli.request import Request
from numoe.cli.serve import openai_common as common
from numoe.cli.serve.fields import Field, Refused, harmless, read, refused, sampling_fields, sampling_options
from numoe.cli.serve.question import Asked, Begun, Made, Piece, Write, logprobs_of, made_request, text_of, told_messages
from numoe.cli.settings import Options

if TYPE_CHECKING:
    from numoe.engine.text.tokenizer import Tokenizer

FIELDS = (
    Field("model", (str,), "a name that /v1/models lists", needed=True),
    Field("input", (str, list), "texts, reasoning, calls of functions and their results", needed=True),
    Field("instructions", (str,)),
    Field("max_output_tokens", (int,), "reasoning included", least=1),
    *sampling_fields(),
    Field("top_logprobs", (int,), least=0, most=20),
    Field("include", (list,), "`message.output_text.logprobs`"),
    Field("stream", (bool,)),
    Field("stream_options", (dict,), only=({"include_obfuscation": False},)),
    Field("text", (dict,), "`format` of `json_schema` or `json_object`, by a grammar that begins after reasoning"),
    Field("tools", (list,), "functions; with `strict` their arguments are held to the schema by a grammar"),
    Field("tool_choice", (str, dict)),
    Field("parallel_tool_calls", (bool,), "false holds an answer to one call, by a grammar"),
    Field("reasoning", (dict,), "`effort`: `none`, or reasoning, as much as the model's template tells apart"),
    *harmless(*common.NO_EFFECT),
    *harmless("metadata", "client_metadata", kind=dict),
    common.NOT_STORED,
    common.PLAIN_TIER,
    Field("background", (bool,), only=(False,)),
    Field("truncation", (str,), "what does not fit is refused", only=("disabled",)),
    *refused("send the whole conversation as input", "previous_response_id", "conversation"),
    *refused("", "prompt", "max_tool_calls", "access_programs", "background_options", "context_management", "image"),
    *common.LATER,
)
_LOGPROBS = "message.output_text.logprobs"


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation as chat completions have it. Raises Refused for what it cannot hold."""
    told: list[dict[str, Any]] = []
    if instructions := given.get("instructions"):
        told.append({"role": "system", "content": instructions})
    if isinstance(given["input"], str):
        return [*told, {"role": "user", "content": given["input"]}]
    for number, item in enumerate(given["input"]):
        where = f"input[{number}]"
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message" and item.get("role") in ("system", "developer", "user", "assistant"):
            kinds = ("input_text", "output_text", "text", "refusal")
            told.append({"role": item["role"], "content": text_of(item.get("content"), f"{where}.content", kinds)})
        elif kind == "function_call":
            call = common.calls_of([{"id": item.get("call_id"), "function": item}], where)[0]
            call["function"] = {key: item[key] for key in ("name", "arguments")}
            if not told or told[-1]["role"] != "assistant":
                told.append({"role": "assistant", "content": ""})
            told[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            said = text_of(item.get("output"), f"{where}.output", ("input_text", "text"))
            told.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": said})
        elif kind == "reasoning":
            parts = item.get("content") or []
            told.append({"role": "assistant", "content": "",
                         "reasoning_content": text_of(parts, f"{where}.content", ("reasoning_text",))})  # fmt: skip
        else:
            raise Refused(400, f"{where} is of the type {kind!r:.40}, which is not read here", where)
    if not told:
        raise Refused(400, "input is empty", "input")
    return _joined(told)


def _joined(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items of one answer as one message."""
    joined: list[dict[str, Any]] = []
    for one in told:
        last = joined[-1] if joined else {}
        if one["role"] == "assistant" == last.get("role") and "tool_calls" not in last:
            said = [text for text in (last["content"], one["content"]) if text]
            joined[-1] = {**last, **one, "content": "\n\n".join(said)}
        else:
            joined.append(one)
    return joined


class OpenAiResponses:
    path = "/v1/responses"
    fields: Sequence[Field] = FIELDS

    def read(self, body: Any) -> Asked:
        given = read(FIELDS, body)
        messages = _messages(given)
        use = common.use_of(
            given.get("tools"), given.get("tool_choice"), given.get("parallel_tool_calls", True), flat=True
        )
        text = read((Field("format", (dict,)), Field("verbosity", (str,), only=("medium",))), given.get("text", {}),
                    "text.")  # fmt: skip
        schema = common.schema_of(text.get("format"), "text.format", flat=True)
        reasoning = read((Field("effort", (str,), only=common.EFFORTS), Field("summary", (str,), only=("auto",))),
                         given.get("reasoning", {}), "reasoning.")  # fmt: skip
        if wrong := [one for one in given.get("include", ()) if one not in (_LOGPROBS, "reasoning.encrypted_content")]:
            raise Refused(400, f"include {wrong[0]!r:.60} is not honoured here", "include")
        logprobs = max(1, given.get("top_logprobs", 0)) if _LOGPROBS in given.get("include", ()) else 0
        values = {**sampling_options(given), "logprobs": logprobs}
        if "max_output_tokens" in given:
            values["max_tokens"] = given["max_output_tokens"]

        def requests(options: Options) -> list[Request]:
            told = told_messages(messages)
            return [made_request(options, values, told, use=use, schema=schema, effort=reasoning.get("effort"))]

        return Asked(
            given["model"],
            given.get("stream", False),
            requests,
            lambda tokenizer: _Writer(given, tokenizer, logprobs > 0),
        )

    def error(self, error: Refused) -> dict[str, Any]:
        return common.error_document(error)

    def done(self) -> bytes:
        return b""


@dataclass
class _Writer:
    """Items of an answer (reasoning, text, calls) are begun, added to and ended one after the other."""

    given: dict[str, Any]
    tokenizer: Tokenizer
    spells: bool
    id: str = field(default_factory=lambda: common.new_id("resp_"))
    created: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)
    open: str = ""
    number: int = 0

    def _event(self, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
        self.number += 1
        return kind, {"type": kind, "sequence_number": self.number - 1, **more}

    def _document(self, status: str, made: Made | None = None) -> dict[str, Any]:
        cut = made is not None and made.cut
        given = self.given
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": given["model"],
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": given.get("instructions"), "max_output_tokens": given.get("max_output_tokens"),
            "output": list(self.output), "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": None, "reasoning": given.get("reasoning", {"effort": None, "summary": None}),
            "store": False, "temperature": given.get("temperature"), "top_p": given.get("top_p"),
            "text": given.get("text", {"format": {"type": "text"}}), "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []), "truncation": "disabled", "metadata": given.get("metadata", {}),
            "usage": _usage(made) if made else None, "user": given.get("user"),
        }  # fmt: skip

    def begin(self, begun: Sequence[Begun]) -> Write:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._document("in_progress")) for kind in kinds]

    def _place(self) -> dict[str, Any]:
        item = self.output[-1]
        return {"item_id": item["id"], "output_index": len(self.output) - 1}

    def _opened(self, kind: str, item: dict[str, Any]) -> Write:
        events = self._closed()
        self.open = kind
        self.output.append(item)
        shown = {**item, "content": []} if "content" in item else item
        events.append(self._event("response.output_item.added", output_index=len(self.output) - 1, item=shown))
        if kind == "text":
            events.append(self._event("response.content_part.added", **self._place(), content_index=0,
                                      part={**item["content"][0], "text": ""}))  # fmt: skip
        return events

    def _closed(self) -> Write:
        if not self.open:
            return []
        kind, item, self.open = self.open, self.output[-1], ""
        item["status"] = "completed"
        if kind == "call":
            said = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **self._place(), **said)]
        else:
            part = item["content"][0]
            name = "output_text" if kind == "text" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if kind == "text" else {}
            events = [self._event(f"response.{name}.done", **self._place(), content_index=0, text=part["text"], **more)]
            if kind == "text":
                events.append(self._event("response.content_part.done", **self._place(), content_index=0, part=part))
        events.append(self._event("response.output_item.done", output_index=len(self.output) - 1, item=item))
        return events

    def piece(self, choice: int, piece: Piece) -> Write:
        kind = piece.kind
        if kind == "call":
            named = {"call_id": piece.call_id, "name": piece.text, "arguments": ""}
            return self._opened("call", {"type": "function_call", "id": common.new_id("fc_"), **named, **_BEGUN})
        if kind == "broken":  # what was begun is none
            self.open = ""
            self.output.pop()
            return []
        if kind == "called":
            return self._closed()
        events: Write = []
        if kind == "arguments":
            self.output[-1]["arguments"] += piece.text
            return [self._event("response.function_call_arguments.delta", **self._place(), delta=piece.text)]
        if self.open != kind:
            events = self._opened(kind, _item(kind))
        part = self.output[-1]["content"][0]
        part["text"] += piece.text
        more: dict[str, Any] = {}
        if kind == "text":
            more["logprobs"] = logprobs_of(self.tokenizer, piece.tokens) if self.spells else []
            part["logprobs"] += more["logprobs"]
        name = "output_text" if kind == "text" else "reasoning_text"
        return [
            *events,
            self._event(f"response.{name}.delta", **self._place(), content_index=0, delta=piece.text, **more),
        ]

    def end(self, choice: int, made: Made) -> Write:
        events = self._closed()
        kind = "incomplete" if made.cut else "completed"
        return [*events, self._event(f"response.{kind}", response=self._document(kind, made))]

    def close(self, made: Sequence[Made]) -> Write:
        return []

    def whole(self, made: Sequence[Made]) -> dict[str, Any]:
        (one,) = made
        for piece in one.pieces:
            self.piece(0, piece)
        self._closed()
        return self._document("incomplete" if one.cut else "completed", one)


_BEGUN = {"status": "in_progress"}


def _item(kind: str) -> dict[str, Any]:
    if kind == "thinking":
        part = {"type": "reasoning_text", "text": ""}
        return {"type": "reasoning", "id": common.new_id("rs_"), "summary": [], "content": [part], **_BEGUN}
    text = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "message", "id": common.new_id("msg_"), "role": "assistant", "content": [text], **_BEGUN}


def _usage(made: Made) -> dict[str, Any]:
    return {
        "input_tokens": made.prompt_tokens,
        "input_tokens_details": {"cached_tokens": made.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": len(made.tokens),
        "output_tokens_details": {"reasoning_tokens": made.thinking_tokens},
        "total_tokens": made.prompt_tokens + len(made.tokens),
    }


API = OpenAiResponses()

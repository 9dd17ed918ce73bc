"""Anthropic's messages, and how many tokens one would have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numoe.cli.request import Request
from numoe.cli.serve import openai_common as common
from numoe.cli.serve.fields import Field, Refused, harmless, read, refused, sampling_fields, sampling_options
from numoe.cli.serve.question import Asked, Begun, Made, Piece, Write, made_request, text_of, told_messages, tool_of
from numoe.cli.settings import Options

if TYPE_CHECKING:
    from numoe.engine.chat.tools.call import Use

_ASKED = (
    Field("model", (str,), "a name that /v1/models lists", needed=True),
    Field("messages", (list,), "texts, reasoning, calls of tools and their results", needed=True),
    Field("system", (str, list)),
    Field("tools", (list,), "one's own; with `strict` their arguments are held to the schema by a grammar"),
    Field("tool_choice", (dict,), "`disable_parallel_tool_use` by a grammar"),
    Field("thinking", (dict,), "`enabled` with `budget_tokens`, `adaptive` or `disabled`"),
    Field("output_config", (dict,), "`format` of `json_schema`, by a grammar that begins after reasoning; `effort`"),
    Field("context_management", (dict,), "edits that clear nothing: `clear_thinking_20251015` with `keep` `all`"),
    *harmless("cache_control", kind=dict),
    *refused("", "speed", "user_profile_id", "workspace_id"),
)
FIELDS = (
    *_ASKED,
    Field("max_tokens", (int,), "reasoning included", least=1, needed=True),
    Field("stop_sequences", (list,)),
    *sampling_fields(),
    Field("stream", (bool,)),
    *harmless("metadata", kind=dict),
    Field("service_tier", (str,), "there is one", only=("auto", "standard_only")),
    *refused("", "container", "diagnostics", "inference_geo"),
)
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
          429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
_BLOCKS = {"text", "thinking", "redacted_thinking", "tool_use", "tool_result"}


def error_document(error: Refused) -> dict[str, Any]:
    """What is wrong with a request, as Anthropic's API says it."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": common.new_id("req_")}


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form. Raises Refused for what it cannot hold."""
    system = text_of(given.get("system"), "system")
    told: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(given["messages"]):
        where = f"messages[{number}]"
        values = read((Field("role", (str,), needed=True), Field("content", (str, list), needed=True)), message,
                      f"{where}.")  # fmt: skip
        if values["role"] not in ("user", "assistant", "system"):
            raise Refused(400, f"{where}.role is user or assistant, not {values['role']!r:.40}", where)
        content = values["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        told += _turns(values["role"], blocks, f"{where}.content")
    if not given["messages"]:
        raise Refused(400, "messages is empty", "messages")
    return told


def _turns(role: str, blocks: list[Any], where: str) -> list[dict[str, Any]]:
    """A message of blocks as messages: results of tools are ones of their own, before what is said with them."""
    texts, reasoning, calls, results = [], [], [], []
    for number, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str) or kind not in _BLOCKS:
            raise Refused(400, f"{where}[{number}] is of the type {kind!r:.40}; models here read text", where)
        if kind == "text":
            texts.append(text_of([block], where))
        elif kind == "thinking":
            reasoning.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            if not isinstance(block.get("name"), str) or not isinstance(block.get("input"), dict):
                raise Refused(400, f"{where}[{number}] is no call of a tool with a name and an input", where)
            function = {"name": block["name"], "arguments": json.dumps(block["input"], ensure_ascii=False)}
            calls.append({"id": str(block.get("id", "")), "type": "function", "function": function})
        elif kind == "tool_result":
            said = text_of(block.get("content"), f"{where}[{number}].content")
            failed = "Error: " if block.get("is_error") else ""
            results.append(
                {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")), "content": failed + said}
            )
    told: dict[str, Any] = {"role": role, "content": "\n\n".join(texts)}
    if calls:
        told["tool_calls"] = calls
    if reasoning:
        told["reasoning_content"] = "\n".join(reasoning)
    return [*results, *([told] if texts or calls or not results else [])]


def _use(given: dict[str, Any]) -> Use | None:
    from numoe.engine.chat.tools.call import Use

    for number, tool in enumerate(given.get("tools", ())):
        if isinstance(tool, dict) and tool.get("type", "custom") != "custom":
            raise Refused(
                400, f"tools[{number}] is of the type {tool['type']!r:.40}; there are one's own alone", "tools"
            )
    tools = [tool_of(tool, f"tools[{n}]", "input_schema") for n, tool in enumerate(given.get("tools", ()))]
    fields = (Field("type", (str,), needed=True), Field("name", (str,)), Field("disable_parallel_tool_use", (bool,)))
    choice = read(fields, given.get("tool_choice", {"type": "auto"}), "tool_choice.")
    names = {"auto": "auto", "any": "required", "tool": choice.get("name", ""), "none": ""}
    if choice["type"] not in names:
        raise Refused(400, "tool_choice.type is auto, any, tool or none", "tool_choice")
    if choice["type"] == "none" or (not tools and choice["type"] == "auto"):
        return None
    if not tools:
        raise Refused(400, "tool_choice needs tools", "tool_choice")
    return Use(tuple(tools), names[choice["type"]], not choice.get("disable_parallel_tool_use", False))


def _thinking(given: dict[str, Any]) -> dict[str, Any]:
    """Reasoning by numoe's settings."""
    fields = (
        Field("type", (str,), only=("enabled", "disabled", "adaptive"), needed=True),
        Field("budget_tokens", (int,), least=0),
        Field("display", (str,), only=("summarized", "full")),
    )
    if "thinking" not in given:
        return {}
    thinking = read(fields, given["thinking"], "thinking.")
    budget = {"think_budget": thinking["budget_tokens"]} if "budget_tokens" in thinking else {}
    return {"think": thinking["type"] != "disabled", **budget}


def _check_edits(given: dict[str, Any]) -> None:
    """Raises Refused for an edit of the conversation that would clear some of it."""
    managed = read((Field("edits", (list,)),), given.get("context_management", {}), "context_management.")
    fields = (Field("type", (str,), only=("clear_thinking_20251015",), needed=True),
              Field("keep", (str,), only=("all",), needed=True))  # fmt: skip
    for number, edit in enumerate(managed.get("edits", ())):
        read(fields, edit, f"context_management.edits[{number}].")


class AnthropicMessages:
    path = "/v1/messages"
    fields: Sequence[Field] = FIELDS

    def read(self, body: Any) -> Asked:
        given = read(self.fields, body)
        _check_edits(given)
        messages, use, thinking = _messages(given), _use(given), _thinking(given)
        output = read((Field("format", (dict,)), Field("effort", (str,), only=common.EFFORTS)),
                      given.get("output_config", {}), "output_config.")  # fmt: skip
        schema = common.schema_of(output.get("format"), "output_config.format", flat=True)
        values = {**sampling_options(given), **thinking, "max_tokens": given.get("max_tokens")}
        if "stop_sequences" in given:
            values["stop"] = common.stops(given["stop_sequences"])

        def requests(options: Options) -> list[Request]:
            made = made_request(options, values, told_messages(messages), use=use, schema=schema)
            effort = output.get("effort") if made.settings.think else None
            return [Request(made.prompt, made.settings, made.grammar, 0, effort)]

        stream = given.get("stream", False)
        return Asked(given["model"], stream, requests, lambda tokenizer: _Writer(given["model"]))

    def error(self, error: Refused) -> dict[str, Any]:
        return error_document(error)

    def done(self) -> bytes:
        return b""


class CountTokens(AnthropicMessages):
    path = "/v1/messages/count_tokens"
    fields: Sequence[Field] = _ASKED


@dataclass
class _Writer:
    model: str
    id: str = field(default_factory=lambda: common.new_id("msg_"))
    block: int = -1
    open: str = ""

    def _message(
        self, content: list[dict[str, Any]], usage: dict[str, Any], made: Made | None = None
    ) -> dict[str, Any]:
        named: dict[str, Any] = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
        }
        return {**named, **_ending(made), "usage": usage}

    def begin(self, begun: Sequence[Begun]) -> Write:
        usage = _usage(begun[0].prompt_tokens, begun[0].reused_tokens, 0)
        return [("message_start", {"type": "message_start", "message": self._message([], usage)})]

    def _closed(self) -> Write:
        if not self.open:
            return []
        events: Write = []
        if self.open == "thinking":
            delta = {"type": "signature_delta", "signature": ""}
            events.append(("content_block_delta", {"type": "content_block_delta", "index": self.block, "delta": delta}))
        self.open = ""
        return [*events, ("content_block_stop", {"type": "content_block_stop", "index": self.block})]

    def _opened(self, kind: str, block: dict[str, Any]) -> Write:
        events = self._closed()
        self.open = kind
        self.block += 1
        said = {"type": "content_block_start", "index": self.block, "content_block": block}
        return [*events, ("content_block_start", said)]

    def piece(self, choice: int, piece: Piece) -> Write:
        if piece.kind == "call":
            return self._opened("tool_use", {"type": "tool_use", "id": piece.call_id, "name": piece.text, "input": {}})
        if piece.kind in ("called", "broken"):
            return self._closed()
        events: Write = []
        if piece.kind == "arguments":
            delta = {"type": "input_json_delta", "partial_json": piece.text}
        elif piece.kind == "thinking":
            if self.open != "thinking":
                events = self._opened("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            delta = {"type": "thinking_delta", "thinking": piece.text}
        else:
            if self.open != "text":
                events = self._opened("text", {"type": "text", "text": ""})
            delta = {"type": "text_delta", "text": piece.text}
        return [*events, ("content_block_delta", {"type": "content_block_delta", "index": self.block, "delta": delta})]

    def end(self, choice: int, made: Made) -> Write:
        usage = _usage(made.prompt_tokens, made.reused_tokens, len(made.tokens))
        return [*self._closed(), ("message_delta", {"type": "message_delta", "delta": _ending(made), "usage": usage})]

    def close(self, made: Sequence[Made]) -> Write:
        return [("message_stop", {"type": "message_stop"})]

    def whole(self, made: Sequence[Made]) -> dict[str, Any]:
        (one,) = made
        content: list[dict[str, Any]] = []
        if one.turn.thinking:
            content.append({"type": "thinking", "thinking": one.turn.thinking, "signature": ""})
        if one.turn.text:
            content.append({"type": "text", "text": one.turn.text})
        for call_id, call in zip(one.ids, one.turn.calls, strict=True):
            content.append({"type": "tool_use", "id": call_id, "name": call.name, "input": call.values})
        return self._message(content, _usage(one.prompt_tokens, one.reused_tokens, len(one.tokens)), one)


def _ending(made: Made | None) -> dict[str, Any]:
    if made is None:
        return {"stop_reason": None, "stop_sequence": None}
    if made.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": made.stop}
    return {
        "stop_reason": "tool_use" if made.called else "max_tokens" if made.cut else "end_turn",
        "stop_sequence": None,
    }


def _usage(prompt: int, reused: int, completion: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt - reused,
        "cache_read_input_tokens": reused,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion,
    }


API = AnthropicMessages()
COUNT = CountTokens()

"""What clients send to a server: as a whole, and as its headers, pieces and the moment at which they leave."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import finalize

from fuzz.mutate import changed, damaged, either
from serving import application

from numoe.cli.serve.app import App
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError

_USER = {"role": "user", "content": "What colour is a frog?"}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
_TOOL = {"name": "f", "description": "d", "parameters": _SCHEMA, "strict": True}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "b"}]},
]
_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA, "strict": True}}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": [{"role": "system", "content": "b"}, _USER], "max_tokens": 2, "stream": True, "n": 2, "seed": 1,
         "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -3}},
        {"messages": [_USER, {"role": "assistant", "tool_calls": [_CALL]},
                      {"role": "tool", "tool_call_id": "c", "content": "x"}],
         "tools": [{"type": "function", "function": _TOOL}], "max_tokens": 2, "stop": ["x"],
         "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"messages": [_USER], "response_format": _JSON, "max_completion_tokens": 2, "reasoning_effort": "none"},
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "max_tokens": 2, "logprobs": 1, "temperature": 0.5, "top_p": 0.9, "stream": True},
        {"prompt": [[1, 2, 3]], "max_tokens": 2, "stop": "x", "top_k": 3, "min_p": 0.1},
    ],
    "/v1/responses": [
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                   {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                   {"type": "function_call_output", "call_id": "c", "output": "x"}],
         "tools": [{"type": "function", **_TOOL}], "max_output_tokens": 2, "stream": True},
        {"input": "a", "instructions": "b", "max_output_tokens": 2, "include": ["message.output_text.logprobs"],
         "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}}, "reasoning": {"effort": "high"}},
    ],
    "/v1/messages": [
        {"messages": _BLOCKS, "max_tokens": 2, "stream": True,
         "tools": [{"name": "f", "input_schema": _SCHEMA}], "tool_choice": {"type": "auto"}},
        {"messages": [_USER], "max_tokens": 2, "system": [{"type": "text", "text": "b"}], "stop_sequences": ["x"],
         "thinking": {"type": "disabled"}, "output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}}},
    ],
    "/v1/messages/count_tokens": [{"messages": [_USER]}],
}  # fmt: skip
"""Samples that are answered, by the path that takes them."""


def readers() -> list[tuple[str, list[bytes], Callable[[bytes], Any], Any]]:
    """A name, samples, a reader and a mutator for each part of a request."""
    served = _Served()
    bodies = {path: [json.dumps({"model": "tiny", **one}).encode() for one in some] for path, some in BODIES.items()}
    exchanges = [
        {"path": path, "method": "POST", "pieces": [one.decode()], "leaves": leaves,
         "headers": [["host", "127.0.0.1"], ["content-length", str(len(one))], ["authorization", "Bearer x"]]}
        for path, some in bodies.items() for one in some for leaves in (0, 1, 99)
    ]  # fmt: skip
    exchanges += [
        {"path": path, "method": "GET", "pieces": [], "leaves": 99, "headers": [["host", "localhost"]]}
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny")
    ]
    body = either(changed, changed, damaged)
    return [
        *((path, some, lambda data, path=path: served.asked(path, data), body) for path, some in bodies.items()),
        ("request", [json.dumps(one).encode() for one in exchanges], served.exchanged, changed),
    ]


class _Served:
    """A server of `tiny`, without its socket."""

    def __init__(self) -> None:
        self._app: App | None = None

    def asked(self, path: str, body: bytes) -> None:
        """Raises InputError with what a body is refused for."""
        self._exchange(path, "POST", [], [body], 99)

    def exchanged(self, data: bytes) -> None:
        """The same for a request with all that is about it."""
        one = parse_json(data, "x")
        one = one if isinstance(one, dict) else {}
        headers = [pair for pair in _list(one.get("headers")) if isinstance(pair, list) and len(pair) == 2]
        pieces = [str(piece).encode("utf-8", "replace") for piece in _list(one.get("pieces"))]
        leaves = one.get("leaves")
        path, method = str(one.get("path")), str(one.get("method"))
        self._exchange(path, method, headers, pieces, leaves if type(leaves) is int else 99)

    def _exchange(self, path: str, method: str, headers: list[Any], pieces: list[bytes], leaves: int) -> None:
        if self._app is None:
            self._app = application("tiny", ctx=1024, ram="200MB", parallel=4)
            self._runner = asyncio.Runner()
            finalize(self, self._runner.close)
        named = [(_latin(name).lower(), _latin(value)) for name, value in headers or [("host", "localhost")]]
        scope = {"type": "http", "method": method, "path": path, "headers": named}
        sent: list[Any] = []
        self._app.lines.clear()  # type: ignore[attr-defined]
        self._runner.run(asyncio.wait_for(self._app(scope, _client(pieces, sent, leaves), _keeper(sent)), 60))
        log = "\n".join(self._app.lines)  # type: ignore[attr-defined]
        assert "bug in numoe" not in log, log
        said = b"".join(one.get("body", b"") for one in sent[1:])
        assert b"failed in numoe" not in said, said
        status = sent[0]["status"] if sent else 200  # who has left gets none
        assert status < 500 or status == 503, said
        if status >= 400:
            raise InputError(said.decode())


def _latin(text: Any) -> bytes:
    """As the parser of HTTP lets headers through."""
    return str(text).encode("latin-1", "replace").translate(None, b"\r\n\0")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _keeper(sent: list[Any]) -> Callable[[Any], Any]:
    async def send(message: Any) -> None:
        sent.append(message)

    return send


def _client(pieces: list[bytes], sent: list[Any], leaves: int) -> Callable[[], Any]:
    """Sends a body in pieces, and leaves when so many messages have come."""
    last = len(pieces) - 1
    told = deque({"type": "http.request", "body": one, "more_body": i < last} for i, one in enumerate(pieces or [b""]))

    async def receive() -> Any:
        if told:
            return told.popleft()
        while len(sent) < leaves:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    return receive

"""OpenAI's chat completions."""

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
    Field("messages", (list,), "texts, calls of tools and their results; images and sound are refused; "
          "a `name` begins the text where several speak in one role", needed=True),
    Field("max_tokens", (int,), "reasoning included", least=0),
    Field("max_completion_tokens", (int,), "the same", least=0),
    *sampling_fields(),
    Field("logit_bias", (dict,)),
    Field("logprobs", (bool,), "of the answer, not of reasoning"),
    Field("top_logprobs", (int,), least=0, most=20),
    Field("n", (int,), "up to as many as are answered at once", least=1, most=256),
    Field("stop", (str, list), "as many as one likes"),
    Field("stream", (bool,)),
    Field("stream_options", (dict,), "`include_usage`"),
    Field("response_format", (dict,), "`json_schema` and `json_object`, by a grammar that begins after reasoning"),
    Field("tools", (list,), "functions; with `strict` their arguments are held to the schema by a grammar"),
    Field("tool_choice", (str, dict)),
    Field("parallel_tool_calls", (bool,), "false holds an answer to one call, by a grammar"),
    Field("reasoning_effort", (str,), "`none`, or reasoning, as much as the model's template tells apart",
          only=common.EFFORTS),
    *harmless(*common.NO_EFFECT),
    *harmless("metadata", kind=dict),
    common.NOT_STORED,
    common.PLAIN_TIER,
    Field("modalities", (list,), only=(["text"],)),
    Field("verbosity", (str,), only=("medium",)),
    *refused("use tools", "functions", "function_call"),
    *refused("", "audio", "prediction", "web_search_options"),
    *common.LATER,
)  # fmt: skip
_MESSAGE = (
    Field("role", (str,), needed=True),
    Field("content", (str, list)),
    Field("name", (str,)),
    Field("tool_calls", (list,)),
    Field("tool_call_id", (str,)),
    Field("reasoning_content", (str,)),
    Field("reasoning", (str,)),
    Field("refusal", (str,)),
    Field("annotations", (list,)),
    Field("parsed", (dict, list, str, int, float, bool)),  # what a client has read of the content
)


def message_of(given: Any, where: str) -> dict[str, Any]:
    """A message of a conversation.

    Raises:
        Refused: it is none.
    """
    values = read(_MESSAGE, given, f"{where}.")
    role = values["role"]
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise Refused(400, f"{where}.role is system, developer, user, assistant or tool, not {role!r:.40}", where)
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    told = {"role": role, "content": text_of(values.get("content"), f"{where}.content", kinds)}
    if values.get("name") and role != "tool":
        told["name"] = values["name"]
    if role == "assistant":
        if calls := values.get("tool_calls"):
            told["tool_calls"] = common.calls_of(calls, f"{where}.tool_calls")
        if reasoning := values.get("reasoning_content", values.get("reasoning")):
            told["reasoning_content"] = reasoning
    elif "tool_calls" in values:
        raise Refused(400, f"{where}.tool_calls are of an assistant", where)
    if role == "tool":
        if "tool_call_id" not in values:
            raise Refused(400, f"{where}.tool_call_id is missing", where)
        told["tool_call_id"] = values["tool_call_id"]
    return told


def told_apart(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without names: the texts begin with them where several speak in one role, whom names tell apart."""
    speakers: dict[str, set[str]] = {}
    for one in messages:
        speakers.setdefault(one["role"], set()).add(one.get("name", ""))
    told = []
    for one in messages:
        name = one.get("name") if len(speakers[one["role"]]) > 1 and one["content"] else None
        content = f"{name}: {one['content']}" if name else one["content"]
        told.append({key: value for key, value in one.items() if key != "name"} | {"content": content})
    return told


class OpenAiChat:
    path = "/v1/chat/completions"
    fields: Sequence[Field] = FIELDS

    def read(self, body: Any) -> Asked:
        given = read(FIELDS, body)
        if not given["messages"]:
            raise Refused(400, "messages is empty", "messages")
        messages = told_apart([message_of(one, f"messages[{n}]") for n, one in enumerate(given["messages"])])
        use = common.use_of(given.get("tools"), given.get("tool_choice"), given.get("parallel_tool_calls", True))
        schema = common.schema_of(given.get("response_format"), "response_format")
        count, bias = given.get("n", 1), common.biases(given.get("logit_bias"))
        if given.get("top_logprobs") and not given.get("logprobs"):
            raise Refused(400, "top_logprobs needs logprobs", "top_logprobs")
        ending: dict[str, Any] = {"stop": common.stops(given["stop"])} if "stop" in given else {}
        if (most := given.get("max_completion_tokens", given.get("max_tokens"))) is not None:
            ending["max_tokens"] = most
        extras = read((Field("include_usage", (bool,)), Field("include_obfuscation", (bool,), only=(False,))),
                      given.get("stream_options", {}), "stream_options.")  # fmt: skip

        def requests(options: Options) -> list[Request]:
            values = {**sampling_options(given), **ending, "logprobs": _logprobs(given)}
            seed = values.get("seed", options["seed"])
            more = [{"seed": seed + number} if seed is not None else {} for number in range(count)]
            return [
                made_request(options, values | one, told_messages(messages), use=use, schema=schema, logit_bias=bias,
                             effort=given.get("reasoning_effort"))
                for one in more
            ]  # fmt: skip

        return Asked(
            given["model"],
            given.get("stream", False),
            requests,
            lambda tokenizer: _Writer(given["model"], tokenizer, given, extras.get("include_usage", False)),
            count,
        )

    def error(self, error: Refused) -> dict[str, Any]:
        return common.error_document(error)

    def done(self) -> bytes:
        return b"data: [DONE]\n\n"


def _logprobs(given: dict[str, Any]) -> int:
    """As numoe's setting has it: 0 is none, and the token's own comes with any other number."""
    return max(1, given.get("top_logprobs", 0)) if given.get("logprobs") else 0


def finish_reason(made: Made) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "tool_calls" if made.called else "length" if made.cut else "stop"


@dataclass
class _Writer:
    model: str
    tokenizer: Tokenizer
    given: dict[str, Any]
    tells_usage: bool
    id: str = field(default_factory=lambda: common.new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    calls: dict[int, int] = field(default_factory=dict)

    def _document(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **more}

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> Write:
        one = {"index": choice, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
        usage = {"usage": None} if self.tells_usage else {}
        return [("", self._document("chat.completion.chunk", [one], **usage))]

    def _spelled(self, tokens: Sequence[Any]) -> dict[str, Any]:
        if not self.given.get("logprobs"):
            return {}
        content = logprobs_of(self.tokenizer, tokens)
        for one in content:
            one["top_logprobs"] = one["top_logprobs"][: self.given.get("top_logprobs", 0)]
        return {"logprobs": {"content": content, "refusal": None}}

    def begin(self, begun: Sequence[Begun]) -> Write:
        return [one for n in range(len(begun)) for one in self._chunk(n, {"role": "assistant", "content": ""})]

    def piece(self, choice: int, piece: Piece) -> Write:
        if piece.kind == "text":
            return self._chunk(choice, {"content": piece.text}, **self._spelled(piece.tokens))
        if piece.kind == "thinking":
            return self._chunk(choice, {"reasoning_content": piece.text})
        if piece.kind == "call":
            self.calls[choice] = self.calls.get(choice, -1) + 1
            begun = {"id": piece.call_id, "type": "function", "function": {"name": piece.text, "arguments": ""}}
            return self._chunk(choice, {"tool_calls": [{"index": self.calls[choice], **begun}]})
        if piece.kind == "arguments":
            more = {"index": self.calls[choice], "function": {"arguments": piece.text}}
            return self._chunk(choice, {"tool_calls": [more]})
        return []

    def end(self, choice: int, made: Made) -> Write:
        return self._chunk(choice, {}, finish_reason(made))

    def close(self, made: Sequence[Made]) -> Write:
        if not self.tells_usage:
            return []
        return [("", self._document("chat.completion.chunk", [], usage=common.total(made)))]

    def whole(self, made: Sequence[Made]) -> dict[str, Any]:
        choices = [self._choice(number, one) for number, one in enumerate(made)]
        return self._document("chat.completion", choices, usage=common.total(made))

    def _choice(self, number: int, made: Made) -> dict[str, Any]:
        turn = made.turn
        message: dict[str, Any] = {"role": "assistant", "content": turn.text or (None if turn.calls else "")}
        message["refusal"] = None
        if turn.thinking:
            message["reasoning_content"] = turn.thinking
        if turn.calls:
            message["tool_calls"] = [
                {"id": one, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for one, call in zip(made.ids, turn.calls, strict=True)
            ]
        tokens = [token for piece in made.pieces if piece.kind == "text" for token in piece.tokens]
        spelled = self._spelled(tokens) or {"logprobs": None}
        return {"index": number, "message": message, "finish_reason": finish_reason(made), **spelled}


API = OpenAiChat()

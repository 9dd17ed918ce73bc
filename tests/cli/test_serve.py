"""`numoe serve`: the official clients against one server on loopback, and what is refused, in the process."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

import httpx
import pytest
from serving import MODEL, application, on_loopback

from numoe.cli.reply import SHED
from numoe.cli.serve import fields, guard, openai_chat, question
from numoe.cli.serve.app import APIS, App, tables
from numoe.cli.serve.places import Places
from numoe.cli.serve.post import Inbox, Post
from numoe.cli.serve.question import Made, Piece, made_request
from numoe.cli.serve.shelf import KEPT, Shelf
from numoe.engine import InputError, describe, load
from numoe.engine.chat.answer import Turn
from numoe.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # every process of pytest reads this file, and they take a second to import
    import anthropic
    import openai

Run = Callable[..., tuple[int, str, str]]
FROG = [{"role": "user", "content": "What colour is a frog?"}]
SHEEP = [{"role": "user", "content": "What sound does a sheep make?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": CITY, "strict": True}}


@pytest.fixture(scope="module")
def app() -> App:
    return application()


@pytest.fixture(scope="module")
def address(app: App) -> Iterator[str]:
    with on_loopback(app) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(address: str) -> Iterator[anthropic.Anthropic]:
    import anthropic

    with anthropic.Anthropic(base_url=address, api_key="-", max_retries=0) as made:
        yield made


# ------------------------------------------------------------------------------------------------- OpenAI: chat


def test_a_chat_and_its_next_turn(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=FROG)
    assert first.choices[0].message.content == "A frog is green." and first.choices[0].finish_reason == "stop"
    told = [*FROG, {"role": "assistant", "content": "A frog is green."}, *SHEEP]
    second = client.chat.completions.create(model=MODEL, messages=told)
    assert second.choices[0].message.content == "A sheep says baa."
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert reused >= first.usage.total_tokens - 2  # so that its own tokens alone are read


def test_a_chat_that_streams(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=FROG, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, said)) == "A frog is green." and len(said) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 6 and len({chunk.id for chunk in chunks}) == 1


def test_sampling_stops_and_lengths(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model=MODEL, messages=FROG, **more)

    cut = ask(max_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("A frog is", "length")
    assert ask(stop=" is").choices[0].message.content == "A frog"
    hot = {"temperature": 5.0, "top_p": 0.99, "max_tokens": 8}
    warm = [ask(**hot, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    several = ask(**hot, n=3, seed=1).choices
    assert [one.index for one in several] == [0, 1, 2] and several[0].message.content == warm[0]
    assert several[1].message.content == warm[2]
    assert ask(extra_body={"top_k": 1, "min_p": 0.5}, temperature=5.0).choices[0].message.content == "A frog is green."
    said = [
        ask(**hot | {"max_tokens": 60, "seed": 1, **penalty}).choices[0].message.content
        for penalty in ({}, {"presence_penalty": 0}, {"presence_penalty": -2}, {"frequency_penalty": -2})
    ]
    assert said[0] == said[1] and len(set(said)) == 3
    green = load(MODEL).tokenizer.encode(" green")[0]
    assert "green" not in ask(logit_bias={str(green): -100}, max_tokens=8).choices[0].message.content


def test_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": FROG, "logprobs": True, "top_logprobs": 2}
    choice = client.chat.completions.create(**asked).choices[0]
    assert "".join(one.token for one in choice.logprobs.content) == "A frog is green."
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in choice.logprobs.content)
    assert choice.logprobs.content[0].top_logprobs[0].token == "A"
    chunks = client.chat.completions.create(**asked, stream=True)
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [one.token for part in told if part for one in part.content] == [
        one.token for one in choice.logprobs.content
    ]


def test_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "where", "schema": CITY, "strict": True}}
    for think in ("none", "high"):  # the form begins after reasoning
        made = client.chat.completions.create(
            model=MODEL, messages=FROG, response_format=form, reasoning_effort=think, max_tokens=200,
            extra_body={"top_k": 1},
        ).choices[0]  # fmt: skip
        if made.finish_reason == "stop":
            assert json.loads(made.message.content).keys() == {"city", "days"}
        if think == "none":
            assert made.finish_reason == "stop" and not hasattr(made.message, "reasoning_content")


def test_tools_with_a_second_round(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "tools": [TOOL], "parallel_tool_calls": False}
    first = client.chat.completions.create(**asked, messages=FROG, tool_choice="required").choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and call.function.name == "weather" and first.message.content is None
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Rome", "Oslo") and arguments["days"] in (1, 2)

    name = {"type": "function", "function": {"name": "weather"}}
    chunks = list(client.chat.completions.create(**asked, messages=FROG, tool_choice=name, stream=True))
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].id and parts[0].function.name == "weather" and len(parts) > 2
    assert json.loads("".join(part.function.arguments for part in parts)) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    told = [*FROG, first.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(**asked, messages=told).choices[0]
    assert second.message.content and second.finish_reason == "stop"


def test_completions_go_on_with_texts_and_tokens(client: openai.OpenAI) -> None:
    tokens = load(MODEL).tokenizer.encode("A frog is", begins=True)
    made = client.completions.create(model=MODEL, prompt=["A frog is", "A frog is"], max_tokens=2, logprobs=1)
    assert [one.text for one in made.choices] == [" green."] * 2 and made.choices[0].logprobs.tokens == [" green", "."]
    assert client.completions.create(model=MODEL, prompt=tokens, max_tokens=2).choices[0].text == " green."
    pieces = client.completions.create(model=MODEL, prompt="A frog is", max_tokens=2, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == " green."


def test_models_are_listed(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [one.id for one in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).owned_by == "numoe"
    assert [one.id for one in claude.models.list()] == [MODEL]


# -------------------------------------------------------------------------------------------- OpenAI: responses


def test_responses(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="What colour is a frog?", instructions="Be short.")
    assert made.output_text and made.status == "completed" and made.usage.input_tokens > 9
    with client.responses.stream(model=MODEL, input="What colour is a frog?") as stream:
        kinds = [one.type for one in stream]
        assert stream.get_final_response().output_text == "A frog is green."
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 3
    cut = client.responses.create(model=MODEL, input="What colour is a frog?", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    form = {"format": {"type": "json_schema", "name": "where", "schema": CITY, "strict": True}}
    assert (
        json.loads(client.responses.create(model=MODEL, input="x", text=form).output_text).keys()
        == CITY["properties"].keys()
    )


def test_responses_with_tools(client: openai.OpenAI) -> None:
    tool = {"type": "function", **TOOL["function"]}
    asked = {"model": MODEL, "tools": [tool], "parallel_tool_calls": False}
    with client.responses.stream(**asked, input="What colour is a frog?", tool_choice="required") as stream:
        kinds = [one.type for one in stream]
        first = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    said = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    second = client.responses.create(**asked, input=[*FROG, said, result])
    assert second.output_text and second.status == "completed"


# --------------------------------------------------------------------------------------------------- Anthropic


def test_messages(claude: anthropic.Anthropic) -> None:
    made = claude.messages.create(model=MODEL, max_tokens=20, messages=FROG)
    assert made.content[0].text == "A frog is green." and made.stop_reason == "end_turn"
    count = claude.messages.count_tokens(model=MODEL, messages=FROG).input_tokens
    assert count == made.usage.input_tokens + made.usage.cache_read_input_tokens and made.usage.output_tokens == 6
    assert claude.messages.create(model=MODEL, max_tokens=2, messages=FROG).stop_reason == "max_tokens"
    stopped = claude.messages.create(model=MODEL, max_tokens=20, messages=FROG, stop_sequences=["green"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == (
        "stop_sequence",
        "green",
        "A frog is ",
    )
    with claude.messages.stream(model=MODEL, max_tokens=20, messages=FROG) as stream:
        assert "".join(stream.text_stream) == "A frog is green."
        assert stream.get_final_message().usage.output_tokens == 6


def test_messages_with_tools_and_a_second_round(claude: anthropic.Anthropic) -> None:
    tool = {"name": "weather", "description": "d", "input_schema": CITY, "strict": True}
    asked = {"model": MODEL, "max_tokens": 200, "tools": [tool]}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    first = claude.messages.create(**asked, messages=FROG, tool_choice=choice)
    (call,) = first.content
    assert first.stop_reason == "tool_use" and call.input["city"] in ("Rome", "Oslo")
    with claude.messages.stream(**asked, messages=FROG, tool_choice=choice) as stream:
        kinds = [one.type for one in stream]
        assert stream.get_final_message().content[0].input == call.input
    assert kinds.count("content_block_delta") > 1
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    told = [*FROG, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(**asked, messages=told)
    assert second.content[0].type == "text" and second.stop_reason == "end_turn"


@pytest.mark.parametrize("choice", ["thinking", "reasoning"])
def test_reasoning_comes_in_its_own_field(client: openai.OpenAI, claude: anthropic.Anthropic, choice: str) -> None:
    """`tiny` was not taught to reason: what it says in a block that the prompt opens is reasoning all the same."""
    if choice == "thinking":
        made = claude.messages.create(
            model=MODEL, max_tokens=100, messages=FROG, thinking={"type": "enabled", "budget_tokens": 4}
        )
        assert made.content[0].type == "thinking" and "</think>" not in made.to_json()
        return
    message = client.chat.completions.create(
        model=MODEL, messages=FROG, reasoning_effort="high", max_tokens=6
    ).choices[0].message  # fmt: skip
    assert message.reasoning_content and not message.content


# ---------------------------------------------------------------------------------------- errors and what is refused


def test_the_clients_know_errors(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    import anthropic
    import openai

    with pytest.raises(openai.NotFoundError, match="is not served here") as lost:
        client.chat.completions.create(model="../../etc/passwd", messages=FROG)
    assert lost.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="frequency_penalty takes numbers from -2 to 2, not 3"):
        client.chat.completions.create(model=MODEL, messages=FROG, frequency_penalty=3)
    with pytest.raises(openai.BadRequestError, match="do not fit into the context") as full:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a frog " * 5000}])
    assert full.value.code == "context_length_exceeded"
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        claude.messages.create(model="nobody", max_tokens=1, messages=FROG)
    with pytest.raises(anthropic.BadRequestError, match="temperature takes numbers from 0 to 1000000, not -1"):
        claude.messages.create(model=MODEL, max_tokens=1, messages=FROG, extra_body={"temperature": -1})


def refusal(app: App, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """The status and the document of a reply, in the process."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as made:
            content = body if isinstance(body, bytes) else json.dumps(body)
            return await made.post(path, content=content, headers=headers)

    reply = asyncio.run(ask())
    return reply.status_code, reply.json()


CHAT = "/v1/chat/completions"
ASKED = {"model": MODEL, "messages": FROG}


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        (CHAT, {**ASKED, "wizardry": 1}, "there is no field wizardry"),
        (CHAT, {**ASKED, "functions": []}, "functions is not honoured here; use tools"),
        (CHAT, {**ASKED, "store": True}, "store true is not honoured here"),
        (CHAT, {**ASKED, "temperature": "hot"}, "temperature takes a number"),
        (CHAT, {**ASKED, "top_p": 2}, "top_p takes numbers from 0 to 1"),
        (CHAT, {**ASKED, "n": 0}, "n takes numbers from 1"),
        (CHAT, {**ASKED, "max_tokens": -1}, "max_tokens takes numbers from 0 on"),
        (CHAT, {**ASKED, "seed": True}, "seed takes a whole number"),
        (CHAT, {**ASKED, "stop": [""]}, "stop takes"),
        (CHAT, {**ASKED, "logit_bias": {"a": 1}}, "logit_bias takes numbers from -100 to 100 by token ids"),
        (CHAT, {**ASKED, "logit_bias": {"\u0663": 1}}, "logit_bias takes numbers from -100 to 100 by token ids"),
        (CHAT, {**ASKED, "logit_bias": {"1": 101}}, "logit_bias takes numbers from -100 to 100"),
        (CHAT, {**ASKED, "logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias has 5000 tokens"),
        (CHAT, {**ASKED, "logit_bias": {"999999": 1}}, "logit_bias names the token 999999"),
        (CHAT, {**ASKED, "stop": ["a"] * 99}, "99 stop strings"),
        (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (CHAT, b'{"model": "tiny", "temperature": NaN}', "NaN"),
        (CHAT, {**ASKED, "seed": 10**400}, "seed takes numbers from 0 to 9223372036854775807, not 10{79}$"),
        (CHAT, {**ASKED, "reasoning_effort": "low"}, "'low' is not one of DeepSeek-V4's"),
        (CHAT, {**ASKED, "top_logprobs": 3}, "needs logprobs"),
        (CHAT, {**ASKED, "stream_options": {"x": 1}}, "no field stream_options.x"),
        (CHAT, {**ASKED, "tool_choice": "required"}, "tool_choice needs tools"),
        (CHAT, {**ASKED, "tools": [{"type": "custom"}]}, r"tools\[0\] is of the type 'custom'"),
        (CHAT, {**ASKED, "tools": [TOOL, TOOL]}, "two tools have the name weather"),
        (CHAT, {**ASKED, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool 'x'"),
        (CHAT, {**ASKED, "response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"model": MODEL}, "messages is missing"),
        (CHAT, {"model": MODEL, "messages": []}, "messages is empty"),
        (CHAT, {"model": MODEL, "messages": [{"role": "wizard", "content": ""}]}, r"messages\[0\].role"),
        (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "x", "name": 1}]}, "name takes a text, not 1"),
        (CHAT, [1], "not a JSON object"),
        (CHAT, b'{"model": "tiny", "model": "other"}', "the key 'model' is there twice"),
        (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "role": "tool"}]}', "the key 'role' is there twice"),
        (CHAT, b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}", r"value has 5000 digits\); send"),
        (CHAT, {**ASKED, "top_p": 0}, "top_p is 0; give a value above 0"),
        (CHAT, {**ASKED, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "of the tool f is of the type 'string', and arguments are an object"),
        (CHAT, b"{", "not valid JSON"),
        (CHAT, b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--x--\r\n', "not valid JSON"),
        (CHAT, {**ASKED, "tools": [{"type": ["function"]}]}, r"tools\[0\] is of the type \['function'\]"),
        (CHAT, {**ASKED, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": [[1]]}}}]},
         "of the tool f: required takes a list of names"),
        (CHAT, b"[" * 100_000, "nested too deeply"),
        (CHAT, {**ASKED, "metadata": json.loads('{"a":' * 90 + "1" + "}" * 90)}, "nested too deeply"),
        ("/v1/completions", {"model": MODEL, "prompt": []}, "prompt takes"),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "suffix": "b"}, "suffix is not honoured"),
        ("/v1/completions", {"model": MODEL, "prompt": [10**9]}, "a token id is outside"),
        ("/v1/responses", {"model": MODEL, "input": "a", "previous_response_id": "b"}, "send the whole conversation"),
        ("/v1/responses", {"model": MODEL, "input": [{"type": "image"}]}, "'image'"),
        ("/v1/messages", {"model": MODEL, "messages": FROG}, "max_tokens is missing"),
        ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "x"}]}]},
         "'x'"),
        ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": [0]}]}]},
         r"of the type \[0\]"),
        ("/v1/messages", {"model": MODEL, "max_tokens": 1, "messages": FROG, "container": "x"}, "container is not"),
        ("/v1/messages/count_tokens", {"model": MODEL, "messages": FROG, "max_tokens": 1}, "no field max_tokens"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(app: App, path: str, body: Any, sentence: str) -> None:
    status, document = refusal(app, path, body)
    assert status == 400 and re.search(sentence, document["error"]["message"])
    if path.startswith("/v1/messages"):
        assert (document["type"], document["error"]["type"]) == ("error", "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {**ASKED, "logit_bias": {"999999": 1}}, "logit_bias"),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias"),
        (CHAT, {**ASKED, "top_p": 0}, "top_p"),
        (CHAT, {**ASKED, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function"),
        ("/v1/responses", {"model": MODEL, "input": "a", "tools": [{"type": "function", "name": ""}]}, "tools[0]"),
    ],
)  # fmt: skip
def test_what_the_engine_refuses_has_its_field_before_a_stream_begins(
    app: App, path: str, body: dict[str, Any], field: str, stream: bool
) -> None:
    status, document = refusal(app, path, {**body, "stream": stream})
    assert (status, document["error"]["param"]) == (400, field)


CLAUDE_CODE = {
    "model": MODEL,
    "max_tokens": 32000,
    "stream": False,
    "system": [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What colour is a frog?"}]},
        {"role": "system", "content": "There are agents."},
    ],
    "tools": [{"name": "Bash", "description": "d", "input_schema": {"$schema": "x", "type": "object"},
               "eager_input_streaming": True}],
    "metadata": {"user_id": "x"},
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}  # fmt: skip
CODEX = {
    "model": MODEL,
    "stream": False,
    "input": [
        {"type": "message", "id": "m", "role": "developer", "content": [{"type": "input_text", "text": "Be short."}]},
        {"type": "message", "id": "msg_2", "role": "user", "content": [{"type": "input_text", "text": "A frog?"}]},
    ],
    "tools": [{"type": "function", "name": "exec_command", "description": "d", "strict": False,
               "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}}}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "x",
    "client_metadata": {"session_id": "x"},
}  # fmt: skip


AUTOGEN = {
    "model": MODEL,
    "stream": False,
    "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "name": "user", "content": "A frog?"}],
}
OPEN_WEBUI = {
    "model": MODEL,
    "stream": False,
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "The time?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "call_id": "a", "name": "get_current_timestamp", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": '{"current_timestamp": 1}'},
    ],
    "tools": [{"type": "function", "name": "get_current_timestamp", "description": "d", "strict": False,
               "parameters": {"type": "object", "properties": {}}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "most"),
    [
        ("/v1/messages?beta=true", CLAUDE_CODE, "max_tokens"),
        ("/v1/responses", CODEX, "max_output_tokens"),
        ("/v1/responses", OPEN_WEBUI, "max_output_tokens"),
        (CHAT, AUTOGEN, "max_completion_tokens"),
    ],
)
def test_what_agents_send_is_answered(app: App, path: str, body: dict[str, Any], most: str) -> None:
    """Requests of the shape that Claude Code 2.1, Codex 0.171, Open WebUI 0.12 and AutoGen 0.7 send."""
    status, document = refusal(app, path, {**body, most: 4})
    assert status == 200, document
    assert document["usage"].get("output_tokens") or document["usage"]["completion_tokens"]


def test_answers_may_be_sent_back_as_the_client_holds_them(client: openai.OpenAI) -> None:
    asked: Any = client.chat.completions
    plain = asked.create(model=MODEL, messages=FROG).choices[0].message
    dumped = plain.model_dump()
    assert dumped["audio"] is None
    for message in (plain, dumped, {**dumped, "parsed": {"done": True}}):
        again = asked.create(model=MODEL, messages=[*FROG, message, *SHEEP])
        assert again.choices[0].message.content == "A sheep says baa."


def test_names_tell_those_apart_who_speak_in_one_role() -> None:
    def told(*names: str) -> list[str]:
        given = [{"role": "user", "content": "Hi", **({"name": name} if name else {})} for name in names]
        given += [
            {"role": "assistant", "name": "Bot", "content": "Hello"},
            {"role": "user", "name": "Eve", "content": ""},
        ]
        found = openai_chat.told_apart([openai_chat.message_of(one, "") for one in given])
        assert not any("name" in one for one in found)
        return [one["content"] for one in found]

    assert told("Eve") == ["Hi", "Hello", ""]
    assert told("Eve", "Ann") == ["Eve: Hi", "Ann: Hi", "Hello", ""]
    assert told("", "Eve") == ["Hi", "Eve: Hi", "Hello", ""]


def test_edits_that_would_clear_something_are_refused(app: App) -> None:
    for edit in ({"type": "clear_tool_uses_20250919"}, {"type": "clear_thinking_20251015", "keep": "none"}):
        body = {**CLAUDE_CODE, "context_management": {"edits": [edit]}}
        status, document = refusal(app, "/v1/messages", body)
        assert status == 400 and "context_management.edits[0]." in document["error"]["message"]


def test_instructions_that_follow_a_question_or_results() -> None:
    said = [{"role": role, "content": role + str(n)} for n, role in enumerate(("system", "user", "developer"))]
    (first, last) = question.told_messages(said)
    assert (first["role"], first["content"], last["content"]) == ("system", "system0\n\ndeveloper2", "user1")
    turn = [*said[:2], {"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, said[0]]
    assert [one["role"] for one in question.told_messages(turn)] == ["system", "user", "assistant", "tool", "user"]


@pytest.mark.parametrize("api", APIS, ids=lambda api: api.path)
def test_what_a_table_says_is_what_becomes_of_a_field(api: Any) -> None:
    """A field that is refused, or whose only value is another, is refused by its name; its own value is taken."""
    needed = {"model": MODEL, "messages": FROG, "prompt": "a", "input": "a", "max_tokens": 1}
    body = {one.name: needed[one.name] for one in api.fields if one.needed}
    for one in api.fields:
        wrong = [object] if not one.kinds else ["\0"] * bool(one.only) + [[1]] * (list not in one.kinds)
        for value in ("x" if value is object else value for value in wrong):
            with pytest.raises(fields.Refused, match=re.escape(one.name)):
                fields.read(api.fields, {**body, one.name: value})
        for value in one.only:
            assert fields.read(api.fields, {**body, one.name: value})[one.name] == value


def schema(**inner: Any) -> dict[str, Any]:
    return {
        **ASKED,
        "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}},
    }


@pytest.mark.parametrize(
    "inner",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "((a{99}){99}){99}"},
        {"type": "string", "pattern": "^(?:.*a){30}$"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "http://127.0.0.1:1/x"},
        {"type": "object", "additionalProperties": {"not": {}}},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"type": "string", "format": "nobody-knows"},
    ],
)
def test_schemas_that_attack_are_refused_or_answered(app: App, inner: dict[str, Any]) -> None:
    status, document = refusal(app, CHAT, schema(**inner))
    assert status in (200, 400)
    assert (
        status == 200
        or "JSON schema" in document["error"]["message"]
        or "form asked for" in document["error"]["message"]
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:11545"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example."}, 403),
        ({"host": "[::1].evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "127.0.0.1:1@evil.example"}, 403),
        ({"host": ""}, 403),
        ({"content-encoding": "gzip"}, 415),
        ({"host": "LOCALHOST:1"}, 400),
        ({"host": "localhost:1"}, 400),
        ({"host": "[::1]:1"}, 400),
        ({"origin": "https://good.example"}, 400),
    ],
)
def test_foreign_hosts_and_origins(headers: dict[str, str], status: int) -> None:
    app = application(origins=("https://good.example",))
    assert refusal(app, CHAT, {}, **headers)[0] == status


@pytest.mark.parametrize("name", ["host", "origin", "authorization", "x-api-key"])
def test_headers_that_decide_come_once(name: str) -> None:
    """Else the one that is looked at could be another than that which others look at."""
    with pytest.raises(fields.Refused, match=name) as refused:
        guard.once([(name.encode(), b"a"), (b"x", b"1"), (b"x", b"2"), (name.title().encode(), b"b")])
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer key\u00e9"}, 401),
        ({"x-api-key": "key"}, 400),
        ({"authorization": "Bearer key"}, 400),
    ],
)
def test_the_key_is_asked_for(headers: dict[str, str], status: int) -> None:
    given = {name: value.encode("latin-1") for name, value in headers.items()}
    assert refusal(application(key="key"), CHAT, {}, **given)[0] == status


def test_a_body_that_is_too_large_is_not_read(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(app, CHAT, b"{", **{"content-length": str(100 << 20)})[0] == 413
    monkeypatch.setattr(guard, "LARGEST_BODY", 10)
    assert refusal(app, CHAT, b"{" * 11)[0] == 413
    assert refusal(app, "/v1/messages", b"{" * 11)[1]["error"]["type"] == "request_too_large"


def test_slow_clients_are_left(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose body never comes, and one whose headers never do."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    monkeypatch.setattr("numoe.cli.serve.server.HEAD_SECONDS", 0.01)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{{"
    with on_loopback(application()) as address:
        port = int(address.rpartition(":")[2])
        for sent, status in ((head, b" 408 "), ("POST / HTTP/1.1\r\nHo", b"")):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(sent.encode())
                reply = b"".join(iter(lambda connection=connection: connection.recv(4096), b""))
                assert status in reply and (status or not reply)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\r\n b: c\r\n\x00: d\r\n\r\n",
        b"GET /v1/models\r\nX HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
)
def test_broken_requests_are_refused(address: str, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(sent)
        assert connection.recv(4096).startswith(b"HTTP/1.1 40")


def test_no_path_of_a_request_is_looked_up(address: str) -> None:
    for path in (
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
        "/etc/passwd",
        "/v1/models/tiny/x",
        "//x",
    ):
        assert httpx.get(f"{address}{path}", timeout=None).status_code == 404


def test_health_and_metrics_hold_no_prompts(address: str, app: App, client: openai.OpenAI) -> None:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "my secret"}])
    assert httpx.get(f"{address}/health", timeout=None).json() == {"status": "ok"}
    metrics = httpx.get(f"{address}/metrics", timeout=None).text
    assert 'numoe_requests_total{path="/v1/chat/completions",status="200"}' in metrics
    assert re.search(r"numoe_completion_tokens_total [1-9]", metrics)
    assert "secret" not in metrics + "".join(app.lines)  # type: ignore[attr-defined]
    prompts: list[str] = []
    refusal(application(prompts=prompts), CHAT, {"secret": 1})
    assert "secret" in prompts[0]


# ------------------------------------------------------------------------------------------- many at once, and leaving


def test_what_is_too_much_is_refused_at_once() -> None:
    status, document = refusal(application(room=2), CHAT, {**ASKED, "n": 3})
    assert status == 429 and document["error"]["code"] == "rate_limit_exceeded"


def test_many_clients_get_the_answers_that_each_alone_would_get(address: str) -> None:
    questions, said = [FROG, SHEEP] * 8, [""] * 16

    def ask(number: int) -> None:
        body = {"model": MODEL, "messages": questions[number]}
        said[number] = httpx.post(f"{address}{CHAT}", json=body, timeout=None).json()["choices"][0]["message"][
            "content"
        ]

    threads = [threading.Thread(target=ask, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["A frog is green.", "A sheep says baa."] * 8


def test_a_client_that_leaves_frees_its_place() -> None:
    """The next one has the only place as soon as the first is gone, which would have written to the end of time."""
    import openai

    single = application(parallel=1, room=2)
    endless = {
        "model": MODEL,
        "prompt": "A",
        "stream": True,
        "logit_bias": {str(i): -100 for i in load(MODEL).tokenizer.eos_ids},
    }
    with on_loopback(single) as found, openai.OpenAI(base_url=f"{found}/v1", api_key="-", max_retries=0) as client:
        with client.completions.create(**endless) as pieces:
            assert next(iter(pieces)).choices
        assert client.chat.completions.create(**ASKED).choices[0].message.content == "A frog is green."
        assert single.metrics.answering <= 1  # the first is over, or about to be


def test_the_loop_is_woken_for_what_cannot_wait_and_delivers_the_rest_together() -> None:
    """An answer's first piece and its end are sent at once; pieces between them wait for the next delivery."""

    async def told() -> list[tuple[int, list[str]]]:
        loop, post, inbox, woken = asyncio.get_running_loop(), Post(), Inbox(), 0
        timers: list[Any] = []
        usual = loop.call_soon_threadsafe

        def wake(*call: Any) -> Any:
            nonlocal woken
            woken += 1
            return usual(*call)

        loop.call_soon_threadsafe = wake  # type: ignore[assignment, method-assign]
        loop.call_later = lambda seconds, call: timers.append(call) or call  # type: ignore
        tellers, seen = [post.teller(inbox.put, number) for number in range(2)], []
        for passed, text in enumerate("abcd"):
            for number, teller in enumerate(tellers):
                teller(Made(Turn(text), 1, 0, [], 0, [], [])) if text == "d" and number else teller(Piece("text", text))
            post.send()
            if passed == 2:
                timers.pop()()  # the time is up
                assert timers  # and runs anew, for there was something
            await asyncio.sleep(0)
            there, inbox._told = inbox._told, []
            seen.append((woken, ["made" if isinstance(one, Made) else one.text for _, one in there]))  # type: ignore[union-attr]
        timers.pop()()
        post.send()
        return [*seen, (woken, ["idle"] if not timers else [])]

    assert asyncio.run(told()) == [
        (1, ["a", "a"]),
        (1, []),
        (1, ["b", "b", "c", "c"]),
        (2, ["d", "made"]),
        (2, ["idle"]),
    ]


@pytest.mark.parametrize("turns", range(5))
def test_who_leaves_while_a_piece_comes_has_left(turns: int) -> None:
    """However many turns of the loop lie between the two."""

    async def left() -> bool:
        told, post = Inbox(), Post()
        teller = post.teller(told.put, 0)

        def tell(piece: Piece) -> None:
            teller(piece)
            post.send()

        writer: Any = SimpleNamespace(begin=lambda begun: [], piece=lambda number, piece: [("", {})])
        events = App._events(application(), SimpleNamespace(path="/"), writer, [], told, 1)  # type: ignore[arg-type]

        async def read() -> None:
            async for _ in events:
                pass

        reading = asyncio.create_task(read())
        for count in (3, turns, 3):
            for _ in range(count):
                await asyncio.sleep(0)
            tell(Piece("text", "a"))
            if count == turns:
                reading.cancel()
        await asyncio.wait([reading], timeout=0.1)
        return reading.cancelled()

    assert asyncio.run(left())


def test_what_was_asked_before_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that no session has room for is read from its file, also by a server that starts anew."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    model = load(MODEL)
    ids = list(range(100, 200))

    def told(places: Places, prompt: list[int]) -> int:
        with places.taken(prompt, lambda: False) as place:
            unread = place.align(prompt)
            with places.passes.member():
                place.session.feed(unread, last=True)
            return len(unread)

    places = Places(model, 256, 1, True)
    assert told(places, ids) == 100
    assert told(places, list(range(300, 400))) == 100
    assert told(places, [*ids, 7, 8]) == 2
    places.close()
    assert told(Places(model, 256, 1, True), [*ids, 7, 8, 9]) == 1
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "served").iterdir())


def test_conversations_begin_with_what_a_prompt_cache_has(tmp_path: Path) -> None:
    model, path, ids = load(MODEL), tmp_path / "kept", list(range(100, 200))
    with model.session(512) as session:
        session.feed(ids)
        session.save(path)
    places = Places(model, 256, 2, False, path)
    for ends in ([7, 8], [9], [6, 5]):
        with places.taken([*ids, *ends], lambda: False) as place:
            assert place.align([*ids, *ends]) == ends
    with pytest.raises(InputError, match="100 tokens do not fit into the context of 64"):
        Places(model, 64, 2, False, path)
    with pytest.raises(InputError, match="there is no file"):
        Places(model, 256, 2, False, tmp_path / "none")


def test_something_guesses_ahead_where_that_may_pay_and_experts_are_told_of_that_had_to_go() -> None:
    app = application()

    async def ask() -> None:
        async with app.hub.lease(MODEL) as loaded:
            assert loaded.places.drafter is not None
            monkey = SimpleNamespace(stats=lambda: {"shed": True})
            loaded.model.experts = monkey  # type: ignore[assignment]

    asyncio.run(ask())
    asyncio.run(ask())
    assert app.lines.count(SHED) == 1  # type: ignore[attr-defined]
    refused = application(draft="none")

    async def look() -> None:
        async with refused.hub.lease(MODEL) as loaded:
            assert loaded.places.drafter is None

    asyncio.run(look())


def test_what_conversations_share_is_read_once() -> None:
    places = Places(load(MODEL), 256, 4, False)
    shared = list(range(100, 150))
    for end, unread in ((1, 51), (2, 1), (3, 1)):
        with places.taken([*shared, end], lambda: False) as place, places.passes.member():
            rest = place.align([*shared, end])
            assert len(rest) == unread
            place.session.feed(rest, last=True)


def test_what_conversations_share_is_read_once_where_windows_have_gone_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an agent's do, which begin with the same long instructions; and the first one goes on meanwhile."""
    for module in ("numoe.engine.session", "numoe.cli.serve.places"):
        monkeypatch.setattr(f"{module}.CHUNK", 64)
    model = load(MODEL)
    places = Places(model, 512, 2, False)
    first = [100 + n % 700 for n in range(300)]
    with places.taken(first, lambda: False) as place, places.passes.member():
        place.session.feed(place.align(first), last=True, progress=place.read)
        place.session.feed(range(5, 105), last=True)
    other = [*first[:150], *range(20, 50)]
    with places.taken(other, lambda: False) as place, places.passes.member():
        unread = place.align(other)
        assert unread == other[64:]
        logits = place.session.feed(unread, last=True)
        with places.taken([*first, *range(5, 105), 9], lambda: True) as again:
            assert again is not place and again.align([*first, *range(5, 105), 9]) == [9]
    with model.session(512) as session:
        assert (session.feed(other, last=True) == logits).all()


def test_what_is_far_too_long_is_not_cut_into_tokens_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = Tokenizer.encode, list[int]()

    def watched(self: Tokenizer, text: str, **how: Any) -> list[int]:
        seen.append(len(text))
        return encode(self, text, **how)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    description, text = describe(MODEL), "word " * 20_000
    options = application().hub.options_of(description)
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(InputError, match="tokens do not fit into the context of 64"):
            made_request(options, {}, prompt).encode(description, 64)
    assert max(seen) < 1000


def test_files_of_conversations_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path))
    shelf, session = Shelf(load(MODEL), True), load(MODEL).session(128)
    for first in range(KEPT + 3):
        session.rewind(session.position)
        session.feed([first + 10] * 70, last=True)
        shelf.keep(session)
    assert len(list((tmp_path / "served").iterdir())) == KEPT
    assert shelf.find([10] * 70, 0) is None and shelf.find([10 + KEPT + 2] * 70, 0)
    session.feed([1, 2])
    shelf.keep(session)  # goes on with the last, whose file goes
    assert len(list((tmp_path / "served").iterdir())) == KEPT


def test_an_answer_that_takes_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    app = application()
    app.seconds = 0.0
    status, document = refusal(app, CHAT, ASKED)
    assert (status, document["choices"][0]["finish_reason"]) == (200, "length")


def test_models_take_turns(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """One is in memory at a time, and goes when nobody asks for it."""
    other = tmp_path / "other"
    other.symlink_to(Path(load(MODEL).path))
    app = application(MODEL, str(other))
    with on_loopback(app) as address, httpx.Client(base_url=address, timeout=None) as client:
        for name in (MODEL, "tiny", MODEL):
            assert client.post(CHAT, json={"model": name, "messages": FROG}).status_code == 200
    assert app.hub.loaded is None


def test_a_model_that_nobody_asks_for_is_unloaded() -> None:
    app = application(idle_unload=1e-9)

    async def ask() -> None:
        async with app.hub.lease(MODEL):
            await asyncio.wait_for(asyncio.shield(asyncio.create_task(app.hub.rest())), None)
            assert app.hub.loaded is not None  # somebody does
        await app.hub.rest()
        assert app.hub.loaded is None

    asyncio.run(ask())


def test_a_server_that_was_killed_in_mid_stream_leaves_its_port_free() -> None:
    command = [sys.executable, "-m", "numoe.cli", "serve", MODEL, "--port", "0", "--parallel", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as killed:
        assert killed.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:\d+", killed.stderr.readline())
        assert address
        example = shlex.split(killed.stderr.readline())  # as curl would ask
        assert (example[0], example[2]) == ("curl", "-d")
        assert httpx.post(example[1], content=example[3], timeout=None).json()["choices"][0]["message"]["content"]
        body = {"model": MODEL, "prompt": "A", "stream": True}
        with httpx.stream("POST", f"{address[0]}/v1/completions", json=body, timeout=None) as reply:
            assert next(reply.iter_lines()).startswith("data: ")
            killed.kill()
    with on_loopback(application(), int(address[0].rpartition(":")[2])) as again:
        assert httpx.get(f"{again}/health", timeout=None).json() == {"status": "ok"}


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "expected", "sentence"),
    [
        (
            ("--host", "0.0.0.0"),
            2,
            "0.0.0.0 can be reached from other machines, so that an API key is needed; give --api-key",
        ),
        (("--host", "300.1.1.1", "--api-key", "k"), 1, "cannot be listened on"),
        (("--api-key", "@nowhere"), 2, "nowhere cannot be read (No such file or directory); give a text file"),
        (("nobody",), 2, "nobody"),
        (("tiny", "tiny"), 2, "tiny and tiny would both be called tiny"),
        (("tiny", "--ctx", "64k"), 2, "tiny: --ctx 65536 is not possible: this model reads from 1 to 4096 tokens"),
        (("tiny", "--prompt-cache", "nowhere"), 1, "there is no file nowhere for a prompt to begin with"),
        (("tiny", "--prompt-cache", __file__), 1, "is not a session file"),
        (("tiny", "--draft", "nobody"), 2, 'there is no folder or file "nobody"'),
    ],
)
def test_what_cannot_be_served_is_refused(
    command: Run, arguments: tuple[str, ...], expected: int, sentence: str
) -> None:
    code, out, err = command("serve", *arguments)
    assert (code, out) == (expected, "") and sentence in err


def test_the_readme_has_the_tables_that_the_command_prints(command: Run) -> None:
    code, out, _ = command("serve", "--fields")
    assert code == 0 and out.strip() == tables()
    assert tables() in (Path(__file__).parents[2] / "cli" / "serve" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("path", "params"),
    [
        (CHAT, "openai.types.chat.completion_create_params.Completion"),
        ("/v1/completions", "openai.types.completion_create_params.Completion"),
        ("/v1/responses", "openai.types.responses.response_create_params.Response"),
        ("/v1/messages", "anthropic.types.message_create_params.Message"),
    ],
)
def test_every_field_of_the_official_clients_has_its_row(path: str, params: str) -> None:
    (api,) = [one for one in APIS if one.path == path]
    official = set(get_type_hints(resolve_name(f"{params}CreateParamsNonStreaming")))
    assert official <= {field.name for field in api.fields}


def test_a_context_that_one_of_all_models_has_not_is_no_fault_of_the_server() -> None:
    """Where no model is named on the command line, it is told when one is asked for, and not as an error to retry."""
    with on_loopback(application(ctx=65536)) as address:
        reply = httpx.post(f"{address}/v1/completions", json={"model": MODEL, "prompt": "A"})
    assert reply.status_code == 400 and "--ctx 65536 is not possible" in reply.json()["error"]["message"]

"""Conversations to prompts, and completions back to messages: Jinja templates and DeepSeek-V4's own format."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from numoe.engine import chat_deepseek_v4
from numoe.engine.chat_deepseek_v4 import END_THINK, THINK
from numoe.engine.sample import partial_match
from numoe.engine.tokenizer import Tokenizer
from numoe.quant.errors import InputError


class ChatFormat(Protocol):
    """How a model writes conversations."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for OpenAI-style messages, BOS included where the format has one.

        tools: OpenAI-style function schemas. thinking: ask for reasoning before the answer.
        add_generation_prompt: end with the beginning of the next answer.
        Raises InputError when the format cannot write the conversation.
        """

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        """A completion as {"content": str, "reasoning_content": str, "tool_calls": list}.

        thinking: the completion begins inside a thinking block, see `opens_thinking`.
        """


def chat_format(model_type: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format of a model: its chat template, or DeepSeek-V4's for `deepseek_v4` models without one.

    Raises InputError for a model with neither, and for a template that is not valid Jinja.
    """
    if tokenizer.chat_template is not None:
        return JinjaChat(tokenizer.chat_template, tokenizer.special_tokens)
    if model_type == "deepseek_v4":
        return DeepSeekV4Chat()
    raise InputError(
        "The model has no chat template, so it may be a base model; continue plain text with `numoe run --raw`."
    )


def encode(
    chat: ChatFormat, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, thinking: bool, begun: str = ""
) -> tuple[list[int], bool]:
    """The token ids of a conversation up to the answer, and whether the answer begins with reasoning.

    begun: what the model has written of the answer already, to be continued.

    Special tokens come from the template alone: what messages spell stays text.
    Raises InputError when the format cannot write the conversation.
    """
    prompt = chat.render(messages, thinking=thinking)
    if not any(_spells_special(tokenizer, message["content"]) for message in messages):
        return tokenizer.encode(prompt + begun), opens_thinking(prompt)
    # The template writes stand-ins that no one can guess, and the messages take their places.
    key = secrets.token_hex(16)
    stand_ins = [{**message, "content": f"{key}{i}{key}"} for i, message in enumerate(messages)]
    prompt = chat.render(stand_ins, thinking=thinking)
    ids: list[int] = []
    for n, part in enumerate(re.split(f"{key}(\\d+){key}", prompt + begun)):
        if n % 2:  # what the parentheses caught
            ids += tokenizer.encode(messages[int(part)]["content"], special=False)
        else:
            ids += tokenizer.encode(part)
    return ids, opens_thinking(prompt)


def _spells_special(tokenizer: Tokenizer, text: str) -> bool:
    return tokenizer.encode(text) != tokenizer.encode(text, special=False)


class DeepSeekV4Chat:
    """DeepSeek-V4's format, see `chat_deepseek_v4`."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return chat_deepseek_v4.encode(
            messages,
            tools=tools,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            add_generation_prompt=add_generation_prompt,
        )

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        reasoning, answer = _split_thinking(completion.removesuffix(chat_deepseek_v4.EOS), thinking)
        content, tool_calls = chat_deepseek_v4.split_tool_calls(answer)
        return {"content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


class JinjaChat:
    """A Hugging Face chat template, run in a sandbox, for templates come from strangers.

    Templates get what transformers gives them (huggingface.co/docs/transformers/chat_templating): messages, tools,
    add_generation_prompt, the special tokens by name, raise_exception, strftime_now, tojson, loop controls and the
    `generation` block; and enable_thinking and thinking, which are the two names in use for the same switch.
    Tool calls in completions are left in the content: every model writes its own.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise InputError(
                f"The model's chat template is not valid ({error}); pass --raw to go without it."
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        variables: dict[str, Any] = {**self._special_tokens, "messages": messages, "tools": tools or None}
        variables |= {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinking}
        variables |= {"thinking": thinking}
        if reasoning_effort is not None:
            variables["reasoning_effort"] = reasoning_effort
        try:
            return self._template.render(variables)
        except Exception as error:  # a template can fail in any way Python can
            raise InputError(
                f"The model's chat template refused the conversation: {error}; change it or pass --raw."
            ) from error

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        reasoning, answer = _split_thinking(completion, thinking)
        if reasoning:  # templates write line breaks around the two
            reasoning, answer = reasoning.strip("\n"), answer.lstrip("\n")
        return {"content": answer, "reasoning_content": reasoning, "tool_calls": []}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model writes; a prompt needs only the text in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thinking block, so that the completion begins with reasoning."""
    return prompt.rstrip().endswith(THINK)


class ThinkSplitter:
    """Splits a streamed completion into ("thinking", text) and ("text", text), never showing half a tag.

    thinking: the completion begins inside a thinking block, see `opens_thinking`. Otherwise one begins only with
    a `<think>` at the very start. A block ends at the first `</think>`, or with the completion.
    The result joined is the same however the completion is cut into pieces.
    """

    def __init__(self, thinking: bool) -> None:
        self._kind = "thinking" if thinking else "text"
        self._at_start = True
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as it is settled."""
        return self._kind == "thinking"

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order; no empty texts."""
        text, self._held = self._held + piece, ""
        if self._at_start:
            begun = text.lstrip()
            if len(begun) < len(THINK) and THINK.startswith(begun):
                self._held = text
                return []
            self._at_start = False
            if begun.startswith(THINK):
                self._kind, text = "thinking", begun.removeprefix(THINK)
        if self._kind == "text":
            return _nonempty([("text", text)])
        reasoning, tag, rest = text.partition(END_THINK)
        if tag:
            self._kind = "text"
            return _nonempty([("thinking", reasoning), ("text", rest)])
        cut = len(text) - partial_match(text, [END_THINK])
        self._held = text[cut:]
        return _nonempty([("thinking", text[:cut])])

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        text, self._held = self._held, ""
        return _nonempty([(self._kind, text)])


def _nonempty(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [part for part in parts if part[1]]


def _split_thinking(completion: str, thinking: bool) -> tuple[str, str]:
    """(reasoning, answer) of a whole completion."""
    splitter = ThinkSplitter(thinking)
    parts = splitter.push(completion) + splitter.flush()
    reasoning = "".join(text for kind, text in parts if kind == "thinking")
    return reasoning, "".join(text for kind, text in parts if kind == "text")

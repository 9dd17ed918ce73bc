"""Chat templates in Jinja, as most models come with one."""

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Self

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.thinking import ThinkSplitter, split_thinking, tags_of
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.errors import InputError


class JinjaChat(ChatFormat):
    """A Hugging Face chat template, run in a sandbox, for templates come from strangers.

    Templates get what transformers gives them (huggingface.co/docs/transformers/chat_templating): messages, tools,
    add_generation_prompt, the special tokens by name, raise_exception, strftime_now, tojson, loop controls and the
    `generation` block; and enable_thinking and thinking, which are the two names in use for the same switch.
    Tool calls in completions are left in the content: every model writes its own.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], markers: Collection[str] = ()) -> None:
        """`markers`: the texts of the vocabulary's chat markers, of which some may be the tags of reasoning."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        for toy in ("lipsum", "cycler"):
            del environment.globals[toy]
        try:
            with warnings.catch_warnings(action="ignore"):  # of the compiler, about the template's code
                self._template = environment.from_string(template.removeprefix("\ufeff"))
        except Exception as error:  # a template can fail in any way Python can
            raise InputError(
                f"The model's chat template is not valid ({_reason(error)}); go without it by `numoe run raw=true`."
            ) from error
        self._special_tokens = dict(special_tokens)
        self.tags = tags_of(template, markers)

    @classmethod
    def of(cls, model_type: str, template: str, tokenizer: Tokenizer) -> Self | None:
        return cls(template, tokenizer.special_tokens, tokenizer.marker_spellings) if template.strip() else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        given = [_aliased(message) for message in messages]
        variables: dict[str, Any] = {**self._special_tokens, "messages": given, "tools": tools or None}
        variables |= {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinking}
        variables |= {"thinking": thinking}
        if reasoning_effort is not None:
            variables["reasoning_effort"] = reasoning_effort
        try:
            return self._template.render(variables)
        except Exception as error:  # a template can fail in any way Python can
            raise InputError(
                f"The model's chat template refused the conversation: {_reason(error)}; change it, or continue plain "
                "text with `numoe run raw=true`."
            ) from error

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        reasoning, answer = split_thinking(completion, ThinkSplitter(thinking, self.tags))
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


def _reason(error: Exception) -> str:
    """What an error says, in a line that can be printed; some say nothing, and some go on without end."""
    said = "".join(c if c.isprintable() else "?" for c in " ".join(str(error)[:200].split())).rstrip(".")
    said = said.replace("`", "'")  # which are around parameters of ours
    return said or type(error).__name__


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _aliased(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: nothing where there is nothing, and reasoning by both names that they read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model writes; a prompt needs only the text in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


FORMAT = JinjaChat

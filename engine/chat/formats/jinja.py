"""Chat templates in Jinja, as most models come with one."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Self

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.template import TemplateError, renderer
from numoe.engine.chat.thinking import ThinkSplitter, asked, split_thinking, tags_of
from numoe.engine.chat.tools.call import Call, Syntax, Tool
from numoe.engine.chat.tools.syntaxes import syntax_of
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.errors import InputError


class JinjaChat(ChatFormat):
    """A Hugging Face chat template, run by itself and within limits, for templates come from strangers.

    Templates get what transformers gives them (huggingface.co/docs/transformers/chat_templating): messages, tools,
    add_generation_prompt, the special tokens by name, raise_exception, strftime_now, tojson, loop controls and the
    `generation` block; and enable_thinking and thinking, which are the usual names of one switch, or what stands
    for it (`asked`).
    Tool calls in completions are left in the content: every model writes its own.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str], markers: Collection[str] = ()) -> None:
        """`markers`: the texts of the vocabulary's chat markers, of which some may be the tags of reasoning."""
        self._template = template.removeprefix("\ufeff")
        try:
            renderer().render(self._template, None)
        except TemplateError as error:
            raise InputError(
                f"The model's chat template is not valid ({error}); go without it by `numoe run raw=true`."
            ) from error
        self._special_tokens = dict(special_tokens)
        self.tags = tags_of(template, markers)
        self.syntax = syntax_of(self._template, markers)

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
        variables |= {"thinking": thinking, **asked(self._template, thinking)}
        if reasoning_effort is not None:
            variables["reasoning_effort"] = reasoning_effort
        try:
            return self._rendered(variables)
        except TemplateError as error:
            raise InputError(
                f"The model's chat template refused the conversation: {error}; change it, or continue plain "
                "text with `numoe run raw=true`."
            ) from error

    def _rendered(self, variables: dict[str, Any]) -> str:
        """What the template makes of them.

        Some templates read the arguments of calls as text, some read calls only of messages whose text is none, and
        some leave calls out: then they are written into the text.
        """

        def rendered(change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> str:
            messages = [change(message) for message in variables["messages"]]
            return renderer().render(self._template, {**variables, "messages": messages})

        if not any("tool_calls" in message for message in variables["messages"]):
            return rendered(dict)
        refusal: TemplateError | None = None
        for change in (dict, _as_texts, _saying_nothing, lambda message: _saying_nothing(_as_texts(message))):
            try:
                text = rendered(change)
            except TemplateError as error:
                refusal = refusal or error
                continue
            if self.syntax is None:
                return text
            try:
                left_out = text == rendered(partial(_changed_without_calls, change))
            except TemplateError:  # it needs them
                left_out = False
            if not left_out:
                return text
        if self.syntax is None and refusal:
            raise refusal
        return rendered(partial(_without_calls, syntax=self.syntax))

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        arguments = {"type": "object", "properties": {"x": {"type": "string", "description": "d"}}, "required": ["x"]}
        tool = Tool("numoe_probe", "d", arguments).definition
        try:
            return "numoe_probe" in self.render([{"role": "user", "content": "q"}], tools=[tool])
        except InputError:
            return False

    @cached_property
    def takes_tools(self) -> bool:
        return self.syntax is not None and self.shows_tools

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        reasoning, answer = split_thinking(completion, ThinkSplitter(thinking, self.tags))
        if reasoning:  # templates write line breaks around the two
            reasoning, answer = reasoning.strip("\n"), answer.lstrip("\n")
        return {"content": answer, "reasoning_content": reasoning, "tool_calls": []}


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _aliased(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: nothing where there is nothing, and reasoning by both names that they read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _as_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as the JSON that they are."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls} if calls else dict(message)


def _saying_nothing(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of calls that has no text, with nothing for one."""
    return {"content": None, **message} if "tool_calls" in message else dict(message)


def _without_calls(message: Mapping[str, Any], syntax: Syntax | None) -> dict[str, Any]:
    """A message without calls, or with them in its text as the model writes them."""
    given = {key: value for key, value in message.items() if key != "tool_calls"}
    if syntax and "tool_calls" in message:
        functions = [call["function"] for call in message["tool_calls"]]
        calls = [Call(one["name"], json.dumps(one["arguments"], ensure_ascii=False)) for one in functions]
        given["content"] = f"{given.get('content') or ''}{syntax.write(calls)}"
    return given


def _changed_without_calls(change: Callable[[Mapping[str, Any]], Mapping[str, Any]], message: Mapping[str, Any]) -> Any:
    return _without_calls(change(message), None)


FORMAT = JinjaChat

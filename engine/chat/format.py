"""Conversations to prompts, and completions back to messages: Jinja templates and DeepSeek-V4's own format."""

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import accumulate, count
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from numoe.engine.chat import deepseek_v4, harmony
from numoe.engine.chat.harmony import HarmonySplitter, speaks_harmony
from numoe.engine.chat.thinking import TAGS, Splitter, Tags, ThinkSplitter, opens_thinking, split_thinking, tags_of
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "latest_reminder")
"""Those that are no template's own, which may be parts of markers."""


class ChatFormat(Protocol):
    """How a model writes conversations. `tags`: those around its reasoning."""

    tags: Tags
    lead: str = ""
    """What comes before an answer without reasoning; one that needs it has no reasoning before a given form."""
    shown: Collection[str] = ()
    """Special tokens that `splitter` has to see."""

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

    def splitter(self, thinking: bool, *, formed: bool = False) -> Splitter:
        """What tells reasoning from the answer in a stream; arguments as in `ThinkSplitter`."""
        return ThinkSplitter(thinking, self.tags, formed=formed)


def chat_format(model_type: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format of a model: its chat template, or DeepSeek-V4's for `deepseek_v4` models without one.

    Raises InputError for a model with neither, and for a template that is not valid Jinja.
    """
    template = (tokenizer.chat_template or "").removeprefix("\ufeff")
    if template.strip():
        kind = HarmonyChat if speaks_harmony(template, tokenizer.marker_spellings) else JinjaChat
        return kind(template, tokenizer.special_tokens, tokenizer.marker_spellings)
    if model_type == "deepseek_v4":
        return DeepSeekV4Chat()
    raise InputError(
        "The model has no chat template, so it may be a base model; continue plain text with `numoe run --raw`."
    )


def encode(
    chat: ChatFormat, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, thinking: bool, begun: str = ""
) -> tuple[list[int], bool]:
    """The token ids of a conversation up to the answer, and whether the answer begins with reasoning.

    begun: what the model has written of the answer already, to be continued.

    Special tokens come from the template alone: what messages spell stays text.
    Raises InputError when the format cannot write the conversation, or leaves out what was asked last.
    """
    spellings = tokenizer.marker_spellings
    _check_roles(messages, spellings)
    messages, prompt = _rendered(chat, messages, thinking)
    marks = _Marks(messages, spellings | tokenizer.marker_variants(prompt), prompt)
    if marks.messages == messages:
        return tokenizer.encode(prompt + begun), opens_thinking(prompt, chat.tags)
    pieces = list(marks.pieces(chat.render(marks.messages, thinking=thinking)))
    opened = opens_thinking(pieces[-1][0], chat.tags)
    pieces[-1] = (pieces[-1][0] + begun, False)
    ids = tokenizer.encode(pieces[0][0])
    # Text in the midst of a prompt is encoded after a line break, for SentencePiece puts a space before a beginning.
    for text, spelled in pieces[1:]:
        lead, piece = (tokenizer.encode(part, special=not spelled) for part in ("\n", "\n" + text))
        if piece[: len(lead)] == lead:
            ids += piece[len(lead) :]
        else:  # the line break has joined with what follows it
            ids += tokenizer.encode(text, special=not spelled)
    return ids, opened


def _check_roles(messages: Sequence[Mapping[str, Any]], spellings: Collection[str]) -> None:
    """Templates write roles between their markers: one that is not known is a plain word, and part of no marker."""
    for message in messages:
        role = message.get("role")
        if role in ROLES:
            continue
        if not isinstance(role, str) or not re.fullmatch(r"[a-z][a-z_]*", role) or any(role in s for s in spellings):
            raise InputError(f"A message has the role {role!r:.80}; roles are {', '.join(ROLES)}.")


def _rendered(
    chat: ChatFormat, messages: Sequence[Mapping[str, Any]], thinking: bool
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The messages as the template reads them, and the prompt: some read only texts that are lists of parts."""
    asked = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    for shape in (str, lambda text: [{"type": "text", "text": text}]):
        shaped = [
            {**message, "content": shape(message["content"])} if isinstance(message.get("content"), str) else message
            for message in messages
        ]
        prompt = chat.render(shaped, thinking=thinking)
        if asked is None:
            return shaped, prompt
        word = next(word for n in count() if (word := f"question{n}") not in prompt.lower())
        probe = [{**message, "content": shape(word)} if n == asked else message for n, message in enumerate(shaped)]
        if word in chat.render(probe, thinking=thinking).lower():  # some templates write in capitals
            return shaped, prompt
    raise InputError(
        "The model's chat template leaves out the question, so the model has no chat template that numoe can use; "
        "continue plain text with `numoe run --raw`."
    )


def _solid(text: str) -> str:
    return "".join(text.split())


class _Marks:
    """Marks around the markers that messages spell, by which those are told from a template's own.

    A template is a program on the text of messages: it cuts, trims and looks for tags. So the text stays, and its
    markers are put between two characters that occur nowhere else (transformers' `sanitize_control_tokens` does so).

    messages: those given, marked. prompt: what the template makes of them without marks.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]], spellings: Collection[str], prompt: str) -> None:
        self._spellings = [spelling for spelling in spellings if spelling.strip()]
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        given = prompt + json.dumps(messages, ensure_ascii=False, default=str)
        private = map(chr, range(0xF0000, 0x10FFFE))
        self._open, self._close = (next(c for c in private if c not in given) for _ in range(2))
        self._prompt = prompt
        self.messages = [{**self._marked(message), "role": message["role"]} for message in messages]

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            body = value.rstrip()
            text = self._pattern.sub(rf"{self._open}\g<0>{self._close}", body)
            if partial_match(body, self._spellings):  # the next text may go on with it
                text += self._close
            return text + value[len(body) :]
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(inner) for inner in value]
        return value

    def pieces(self, marked: str) -> Iterator[tuple[str, bool]]:
        """The prompt in pieces: (text, whether it is a marker that messages spell). The last is none.

        marked: what the template makes of the marked messages. Where that differs in more than space, for it looks
        at how a text begins or ends, it is the prompt, without the marks.
        """
        prompt, marks = self._prompt, (self._open, self._close)
        bare = marked.replace(self._open, "").replace(self._close, "")
        if _solid(bare) != _solid(prompt):
            prompt = bare
        places = [place for place, c in enumerate(marked) if not c.isspace() and c not in marks]
        solid_before = list(accumulate((not c.isspace() for c in prompt), initial=0))
        done = 0
        for found in self._pattern.finditer(prompt):
            first, end = places[solid_before[found.start()]], places[solid_before[found.end()] - 1] + 1
            around = marked[first - 1 : first], marked[end : end + 1]
            if marked[first:end] != found[0].strip() or around == marks:
                yield prompt[done : found.start()], False
                yield found[0], True
                done = found.end()
        yield prompt[done:], False


class DeepSeekV4Chat(ChatFormat):
    """DeepSeek-V4's format, see `deepseek_v4`."""

    tags = TAGS[0]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return deepseek_v4.encode(
            messages,
            tools=tools,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            add_generation_prompt=add_generation_prompt,
        )

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        splitter = ThinkSplitter(thinking, self.tags)
        reasoning, answer = split_thinking(completion.removesuffix(deepseek_v4.EOS), splitter)
        content, tool_calls = deepseek_v4.split_tool_calls(answer)
        return {"content": content, "reasoning_content": reasoning, "tool_calls": tool_calls}


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
                f"The model's chat template is not valid ({_reason(error)}); go without it by `numoe run --raw`."
            ) from error
        self._special_tokens = dict(special_tokens)
        self.tags = tags_of(template, markers)

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
                "text with `numoe run --raw`."
            ) from error

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        reasoning, answer = split_thinking(completion, ThinkSplitter(thinking, self.tags))
        if reasoning:  # templates write line breaks around the two
            reasoning, answer = reasoning.strip("\n"), answer.lstrip("\n")
        return {"content": answer, "reasoning_content": reasoning, "tool_calls": []}


class HarmonyChat(JinjaChat):
    """gpt-oss's: prompts by the model's template, answers in channels."""

    lead = harmony.FINAL
    shown = harmony.MARKERS

    def __init__(self, template: str, special_tokens: Mapping[str, str], markers: Collection[str] = ()) -> None:
        super().__init__(template, special_tokens, markers)
        self.tags = harmony.TAGS

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        return harmony.parse(completion, thinking=thinking)

    def splitter(self, thinking: bool, *, formed: bool = False) -> Splitter:
        return HarmonySplitter(thinking)


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

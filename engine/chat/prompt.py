"""From messages to token ids: what messages spell stays text, whatever the template makes of it."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, count
from typing import Any

from numoe.engine.chat.format import ChatFormat
from numoe.engine.chat.thinking import opens_thinking
from numoe.engine.chat.tools.call import Use
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tokenizer import Tokenizer
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "latest_reminder")
"""Those that are no template's own, which may be parts of markers."""


def encode(
    chat: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool,
    begun: str = "",
    use: Use | None = None,
    effort: str | None = None,
    look: Callable[[str], None] = lambda prompt: None,
) -> tuple[list[int], bool]:
    """The token ids of a conversation up to the answer, and whether the answer begins with reasoning.

    begun: what the model has written of the answer already, to be continued. use: the tools that it is told of.
    effort: how much reasoning is asked for, in the words of the model's template. look: called with the text of the
    prompt, before it is cut into tokens.

    Special tokens come from the template alone: what messages spell stays text.
    Raises InputError when the format cannot write the conversation, or leaves out what was asked last; and for what is
    no text, such as images.
    """
    spellings = tokenizer.marker_spellings
    _check_roles(messages, spellings)
    _check_parts(messages)
    if use and not chat.takes_tools:
        raise InputError("`tools` are not possible: the model's chat template tells of none, or it is not known how it "
                         "calls them; leave them out or take another model")  # fmt: skip
    tools = [tool.definition for tool in use.tools] if use else None
    render = partial(chat.render, thinking=thinking, tools=tools, reasoning_effort=effort)
    messages, prompt = _rendered(render, _with_calls(chat, messages))
    look(prompt)
    marks = _Marks(messages, spellings | tokenizer.marker_variants(prompt), prompt)
    marked_tools = marks.marked(tools)
    if marks.messages == messages and marked_tools == tools:
        return tokenizer.encode(prompt + begun), opens_thinking(prompt, chat.tags)
    pieces = list(marks.pieces(render(marks.messages, tools=marked_tools)))
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


def _with_calls(chat: ChatFormat, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages whose calls have arguments as objects and ids as the model writes them, and results the tool's name."""
    told: list[Mapping[str, Any]] = []
    ids: dict[str, tuple[str, str]] = {}
    for message in messages:
        if calls := message.get("tool_calls"):
            written = []
            for call in calls:
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                known = call.get("id") or ""
                ids[known] = (chat.syntax.told_id(known, name, len(ids)) if chat.syntax else known, name)
                function = {"name": name, "arguments": _object(name, arguments)}
                written.append({"id": ids[known][0], "type": "function", "function": function})
            message = {**message, "tool_calls": written}
        elif message.get("role") == "tool" and (known := message.get("tool_call_id", "")) in ids:
            message = {**message, "tool_call_id": ids[known][0], "name": ids[known][1]}
        told.append(message)
    return told


def _object(name: str, arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}", "what it has")
        except InputError as error:
            raise InputError(f"the arguments of the tool call {name!r:.80} are not valid JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise InputError(f"the arguments of the tool call {name!r:.80} are not a JSON object")
    return arguments


def _check_roles(messages: Sequence[Mapping[str, Any]], spellings: Collection[str]) -> None:
    """Templates write roles between their markers: one that is not known is a plain word, and part of no marker."""
    for message in messages:
        role = message.get("role")
        if role in ROLES:
            continue
        if not isinstance(role, str) or not re.fullmatch(r"[a-z][a-z_]*", role) or any(role in s for s in spellings):
            raise InputError(f"A message has the role {role!r:.80}; roles are {', '.join(ROLES)}.")


def _check_parts(messages: Sequence[Mapping[str, Any]]) -> None:
    """Templates write a marker for an image, which nothing would stand behind."""
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text":
                raise InputError(
                    f"A message has a part of the type {kind!r:.80}; numoe reads text alone, so leave it out."
                )


def _rendered(
    render: Callable[[Sequence[Mapping[str, Any]]], str], messages: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The messages as the template reads them, and the prompt: some read only texts that are lists of parts."""
    asked = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    for shape in (str, lambda text: [{"type": "text", "text": text}]):
        shaped = [
            {**message, "content": shape(message["content"])} if isinstance(message.get("content"), str) else message
            for message in messages
        ]
        prompt = render(shaped)
        if asked is None:
            return shaped, prompt
        word = next(word for n in count() if (word := f"question{n}") not in prompt.lower())
        probe = [{**message, "content": shape(word)} if n == asked else message for n, message in enumerate(shaped)]
        if word in render(probe).lower():  # some templates write in capitals
            return shaped, prompt
    raise InputError(
        "The model's chat template leaves out the question, so the model has no chat template that numoe can use; "
        "continue plain text with `numoe run raw=true`."
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
        self.messages = [{**self.marked(message), "role": message["role"]} for message in messages]

    def marked(self, value: Any) -> Any:
        """A value with the markers in its texts marked."""
        if isinstance(value, str):
            body = value.rstrip()
            text = self._pattern.sub(rf"{self._open}\g<0>{self._close}", body)
            if partial_match(body, self._spellings):  # the next text may go on with it
                text += self._close
            return text + value[len(body) :]
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.marked(inner) for inner in value]
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

"""Solar-Open's chat format: an answer comes as messages, each of a kind.

    <|think|>REASONING<|end|><|begin|>assistant<|content|>ANSWER<|end|>

Prompts are written by the model's own template, and end with the role; here answers are read back
(huggingface.co/upstage/Solar-Open-100B, chat_template.jinja).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

from numoe.engine.chat.formats.jinja import JinjaChat
from numoe.engine.chat.thinking import Splitter
from numoe.engine.chat.tools.call import Use
from numoe.engine.text.grammar import named
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tags import Tags
from numoe.engine.text.tokenizer import Tokenizer

THINK, CONTENT, CALLS, BEGIN, END = "<|think|>", "<|content|>", "<|tool_calls|>", "<|begin|>", "<|end|>"
_KINDS = {THINK: "thinking", CONTENT: "text", CALLS: "text", BEGIN: "", END: ""}
_OF_CALLS = ("<|calls|>", *(f"<|tool_call:{part}|>" for part in ("begin", "name", "args", "end")))
TAGS: Tags = (THINK, f"{END}{BEGIN}assistant{CONTENT}")


class SolarSplitter:
    """Splits a streamed completion into ("thinking", text) and ("text", text), never showing a marker or half of one.

    What stands between messages, their role, is shown to nobody; text without any marker is the answer.
    The result joined is the same however the completion is cut into pieces.
    """

    def __init__(self, thinking: bool, calls: bool = False) -> None:
        """thinking: the completion begins inside a message of reasoning. calls: their mark is text, to be read."""
        self._calls = calls
        self._kind = "thinking" if thinking else None
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as it is settled."""
        return self._kind == "thinking"

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order; no empty texts."""
        text = self._held + piece
        parts: list[tuple[str, str]] = []
        while True:
            held = (len(text) - partial_match(text, _KINDS), "")
            at, marker = min(((text.index(one), one) for one in _KINDS if one in text), default=held)
            parts += self._taken(text[:at])
            text = text[at + len(marker) :]
            if not marker:
                self._held = text
                return parts
            self._kind = _KINDS[marker]
            if marker == CALLS and self._calls:
                parts.append(("text", CALLS))

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        text, self._held = self._held, ""
        return self._taken(text)

    def _taken(self, text: str) -> list[tuple[str, str]]:
        if self._kind is None and text:
            self._kind = "text"
        return [(self._kind, text)] if self._kind and text else []


class SolarChat(JinjaChat):
    """Prompts by the model's template, answers in messages."""

    lead = CONTENT
    shown = frozenset({*_KINDS, *_OF_CALLS})

    @classmethod
    def of(cls, model_type: str, template: str, tokenizer: Tokenizer) -> Self | None:
        speaks = all(marker in template for marker in (THINK, CONTENT, f"{BEGIN}assistant"))
        return super().of(model_type, template, tokenizer) if speaks else None

    def __init__(self, template: str, special_tokens: Mapping[str, str], markers: Collection[str] = ()) -> None:
        super().__init__(template, special_tokens, markers)
        self.tags = TAGS

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        splitter = SolarSplitter(thinking)
        said = {"thinking": "", "text": ""}
        for kind, text in splitter.push(completion) + splitter.flush():
            said[kind] += text
        return {"content": said["text"], "reasoning_content": said["thinking"], "tool_calls": []}

    def splitter(self, thinking: bool, *, formed: bool = False, use: Use | None = None) -> Splitter:
        return SolarSplitter(thinking, calls=use is not None)

    def formed(self, grammar: str, opened: bool) -> str:
        """Markers are named, not spelled, as in harmony."""
        begin = f'{THINK} reasoning {END} {BEGIN} "assistant"'
        begin = begin.partition(" ")[2] if opened else f"({begin})?"
        return f"start: {begin} {CONTENT} answer\nreasoning: /(?s:.*)/\n{named(grammar)}"


FORMAT = SolarChat

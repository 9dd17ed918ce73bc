"""Answers between tags of their own, as those of Hunyuan, ERNIE's thinking models and Granite 3.3 are.

    <think>REASONING</think>
    <answer>
    ANSWER
    </answer>

Sources: the templates of tencent/Hunyuan-A13B-Instruct and ibm-granite/granite-3.3-2b-instruct, and the model card of
baidu/ERNIE-4.5-21B-A3B-Thinking.
"""

from __future__ import annotations

from typing import Any, Self

from numoe.engine.chat.formats.jinja import JinjaChat
from numoe.engine.chat.thinking import Splitter
from numoe.engine.chat.tools.call import Use
from numoe.engine.text.sample import partial_match
from numoe.engine.text.tags import Tags
from numoe.engine.text.tokenizer import Tokenizer

_ANSWERS: tuple[Tags, ...] = (("<answer>", "</answer>"), ("<response>", "</response>"))
_OF_MODELS = {"hunyuan_v1_moe": _ANSWERS[0]}
"""Of those whose templates do not spell them."""
_OF_RESULTS = "]~b]tool"
"""In the templates of MiniMax, which write the second pair around what tools return."""


class AnswerSplitter:
    """Leaves out the tags around an answer from what another splitter tells: those that it begins and ends with.

    The result joined is the same however the completion is cut into pieces.
    """

    def __init__(self, inner: Splitter, tags: Tags) -> None:
        self._inner, self._tags = inner, tags
        self._begin()

    def _begin(self) -> None:
        self._state = "before"  # then "inside" and "behind" the tags; or "bare", without any
        self._held = ""

    @property
    def thinking(self) -> bool:
        """As that of the other splitter."""
        return self._inner.thinking

    def push(self, piece: str) -> list[tuple[str, str]]:
        """What this piece settles, in order."""
        return self._told(self._inner.push(piece))

    def flush(self) -> list[tuple[str, str]]:
        """What is still held back, once the completion has ended."""
        return self._told(self._inner.flush()) + self._text("", ended=True)

    def _told(self, parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
        told: list[tuple[str, str]] = []
        for kind, text in parts:
            if kind == "text":
                told += self._text(text)
                continue
            if kind == "closed":  # all of it was reasoning
                told += self._text("", ended=True)
                self._begin()
            told.append((kind, text))
        return told

    def _text(self, piece: str, ended: bool = False) -> list[tuple[str, str]]:
        text, self._held = self._held + piece, ""
        if self._state == "before":
            opening, begun = self._tags[0], text.lstrip()
            if len(begun) < len(opening) and opening.startswith(begun) and not ended:
                self._held = text
                return []
            self._state = "opened" if begun.startswith(opening) else "bare"
            text = begun.removeprefix(opening) if self._state == "opened" else text
        if self._state == "opened":
            text = text.lstrip("\n")
            self._state = "inside" if text else "opened"
        said = self._inside(text, ended) if self._state == "inside" else text
        return [("text", said)] if said else []

    def _inside(self, text: str, ended: bool) -> str:
        """What is settled of the text behind the opening tag; a closing tag that text follows is text."""
        closing, said = self._tags[1], ""
        while (at := text.find(closing)) >= 0:
            behind = text[at + len(closing) :]
            following = behind.lstrip()
            if not following and not ended:
                break
            if not following or following.startswith("<"):
                self._state = "behind"
                return said + text[:at].rstrip("\n") + following
            said, text = said + text[: at + len(closing)], behind
        cut = at if at >= 0 else len(text) - (0 if ended else partial_match(text, [closing]))
        kept = len(text[:cut].rstrip("\n"))
        self._held = "" if ended else text[kept:]
        return said + text[:kept]


class AnsweredChat(JinjaChat):
    """Prompts by the model's template, answers without the tags around them."""

    answer: Tags

    @classmethod
    def of(cls, model_type: str, template: str, tokenizer: Tokenizer) -> Self | None:
        spelled = (tags for tags in _ANSWERS if all(tag in template for tag in tags) and _OF_RESULTS not in template)
        tags = next(spelled, _OF_MODELS.get(model_type))
        chat = super().of(model_type, template, tokenizer) if tags else None
        if chat and tags:
            chat.answer = tags
        return chat

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        parsed = super().parse(completion, thinking=thinking)
        splitter = AnswerSplitter(_Whole(), self.answer)
        parts = splitter.push(parsed["content"]) + splitter.flush()
        return {**parsed, "content": "".join(text for _, text in parts)}

    def splitter(self, thinking: bool, *, formed: bool = False, use: Use | None = None) -> Splitter:
        inner = super().splitter(thinking, formed=formed, use=use)
        return inner if formed else AnswerSplitter(inner, self.answer)


class _Whole:
    """Takes all for the answer."""

    thinking = False

    def push(self, piece: str) -> list[tuple[str, str]]:
        return [("text", piece)]

    def flush(self) -> list[tuple[str, str]]:
        return []


FORMAT = AnsweredChat

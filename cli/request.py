"""One prompt with all that says how it is answered: what `run` and its batches share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from numoe.cli.settings import filled, in_group
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Description, Session
    from numoe.engine.chat.answer import Answer, Settings
    from numoe.engine.chat.tools.call import Use

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """What is asked, and how.

    prompt: text or tokens that are continued as they are, or the messages of a conversation.
    grammar: the form of the answer, see `numoe.engine.text.grammar`.
    """

    prompt: str | list[int] | Messages
    settings: Settings
    grammar: str | None
    logprobs: int
    effort: str | None = None

    @classmethod
    def make(
        cls,
        prompt: str | list[int] | Messages,
        options: Mapping[str, Any],
        *,
        use: Use | None = None,
        effort: str | None = None,
        logit_bias: tuple[tuple[int, float], ...] = (),
    ) -> Request:
        """A request by the values of `numoe run`'s settings, under their names.

        use: tools. effort: how much reasoning is asked for. logit_bias: as in `Sampling`.

        Raises:
            InputError: a value is out of range, or the form of the answer is not possible.
        """
        from numoe.engine.chat.answer import Settings

        settings = filled(Settings(), options)
        if use or logit_bias:
            settings = replace(settings, use=use, sampling=replace(settings.sampling, logit_bias=logit_bias))
        if settings.system and not _is_plain(prompt) and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": settings.system}, *prompt]
        return cls(prompt, settings, _grammar(options), options["logprobs"], effort)

    def cut(self, finish_reason: str | None) -> bool:
        """Whether an answer that ended so is not the whole of the form that was asked for."""
        return self.grammar is not None and finish_reason in ("length", "repetition")

    def encode(self, description: Description) -> tuple[list[int], bool | None]:
        """The token ids of the prompt, and whether the answer begins with reasoning; None: it is plain text."""
        from numoe.engine.chat.prompt import encode

        tokenizer = description.tokenizer
        if isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt, begins=True), None
        if _is_plain(self.prompt):
            return list(self.prompt), None
        settings, chat = self.settings, description.chat_format
        return encode(chat, tokenizer, self.prompt, thinking=settings.think, use=settings.use, effort=self.effort)

    def ask(self, session: Session, unread: Sequence[int], opened: bool | None, **hooks: Any) -> Answer:
        """The answer, made as it is taken.

        Args:
            unread: what the session has not read yet of the ids that `encode` gave.
            opened: what it gave beside them.
            hooks: `cancelled` and `progress` of `Session.generate`.

        Raises:
            InputError: the vocabulary cannot follow the grammar; and as `Session.feed` while the answer is made.
        """
        from numoe.engine.chat.answer import answer

        return answer(session, unread, opened, self.settings, grammar=self.grammar, logprobs=self.logprobs, **hooks)


def _is_plain(prompt: str | list[int] | Messages) -> TypeGuard[str | list[int]]:
    return isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)


def _grammar(options: Mapping[str, Any]) -> str | None:
    from numoe.engine.text import grammar

    if re.search("[\\ud800-\\udfff]", json.dumps([options[name] for name in in_group("form")], ensure_ascii=False)):
        raise InputError("the form of the answer is not UTF-8; convert it first")
    if options["schema"] is not None:
        return grammar.json_grammar(options["schema"])
    if options["choices"] is not None:
        return grammar.choice_grammar(options["choices"])
    if options["regex"] is not None:
        return grammar.regex_grammar(options["regex"])
    return None

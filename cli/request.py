"""One prompt with all that says how it is answered: what `run` and its batches share."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numoe.cli.text import read_text
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Description, Session
    from numoe.engine.chat.answer import Answer, Settings
    from numoe.engine.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
SETTINGS = (
    "system", "think", "think_budget", "max_tokens", "stop",
    "temp", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "ctx",
)  # fmt: skip
"""The options that say how answers are made, in conversations too."""
FORMS = ("schema", "choices", "regex")
"""Those that give the form of the answer; one of them at a time."""


@dataclass(frozen=True)
class Request:
    """What is asked, and how.

    prompt: text that is continued as it is, or the messages of a conversation.
    grammar: the form of the answer, see `numoe.engine.chat.constrain`.
    """

    prompt: str | Messages
    settings: Settings
    grammar: str | None
    logprobs: int

    @classmethod
    def make(cls, prompt: str | Messages, options: Mapping[str, Any]) -> Request:
        """A request by the values of `numoe run`'s options, under their names.

        Raises:
            InputError: a value is out of range, or the form of the answer is not possible.
        """
        from numoe.cli.chat.commands import changed
        from numoe.engine.chat.answer import Settings

        settings = changed(Settings(), {name: options[name] for name in SETTINGS})
        if not isinstance(prompt, str) and settings.system and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": settings.system}, *prompt]
        return cls(prompt, settings, _grammar(options), options["logprobs"])

    def encode(self, description: Description) -> tuple[list[int], bool | None]:
        """The token ids of the prompt, and whether the answer begins with reasoning; None: it is plain text."""
        from numoe.engine.chat.prompt import encode

        tokenizer = description.tokenizer
        if isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt, begins=True), None
        return encode(description.chat_format, tokenizer, self.prompt, thinking=self.settings.think)

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


def _grammar(options: Mapping[str, Any]) -> str | None:
    from numoe.engine.chat import constrain

    if re.search("[\\ud800-\\udfff]", json.dumps([options[name] for name in FORMS], ensure_ascii=False)):
        raise InputError("the form of the answer is not UTF-8; convert it first")
    if options["schema"] is not None:
        return constrain.json_grammar(options["schema"])
    if options["choices"] is not None:
        return constrain.choice_grammar(options["choices"])
    if options["regex"] is not None:
        return constrain.regex_grammar(options["regex"])
    return None


def read_schema(value: str) -> Any:
    """The JSON schema that --schema gives, as it is or as the name of a file.

    Raises:
        InputError: it is neither.
    """
    given = value.lstrip().startswith("{")
    return parse_json(value if given else read_text(value), "--schema" if given else value, "give a JSON schema")


def document(answer: Answer, prompt_tokens: int, reused_tokens: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is known of an answer that has ended, as JSON.

    reused_tokens: those of the prompt that were not read for it. tokenizer: for the log-probabilities of its tokens;
    None leaves them out.
    """
    generation, turn = answer.generation, answer.turn.trimmed()
    return {
        "text": turn.text,
        "thinking": turn.thinking,
        "finish_reason": turn.finish_reason,
        "prompt_tokens": prompt_tokens,
        "reused_tokens": reused_tokens,
        "completion_tokens": len(generation.tokens),
        "timings": {
            "prompt_s": generation.prompt_seconds,
            "first_token_s": generation.first_token_seconds,
            "decode_s": generation.decode_seconds,
        },
        "seed": generation.seed,
    } | ({"logprobs": _logprobs(answer, tokenizer)} if tokenizer else {})


def _logprobs(answer: Answer, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"id": token_id, "token": text, "logprob": logprob}

    return [
        entry(token.id, token.logprob) | {"top": [entry(i, value) for i, value in token.alternatives]}
        for token in answer.generation.tokens
    ]

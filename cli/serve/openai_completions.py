"""OpenAI's completions: texts that are continued as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numoe.cli.request import Request
from numoe.cli.serve import openai_common as common
from numoe.cli.serve.fields import Field, Refused, harmless, read, refused, sampling_fields, sampling_options
from numoe.cli.serve.question import Asked, Begun, Made, Piece, Write, made_request
from numoe.cli.settings import Options

if TYPE_CHECKING:
    from numoe.engine.generation import Token
    from numoe.engine.text.tokenizer import Tokenizer

FIELDS = (
    Field("model", (str,), "a name that /v1/models lists", needed=True),
    Field("prompt", (str, list), "a text, texts, tokens, or lists of tokens", needed=True),
    Field("max_tokens", (int,), "else until the model ends or the context is full", least=0),
    *sampling_fields(),
    Field("logit_bias", (dict,)),
    Field("logprobs", (int,), least=0, most=20),
    Field("n", (int,), "up to as many as are answered at once", least=1, most=256),
    Field("stop", (str, list), "as many as one likes"),
    Field("stream", (bool,)),
    Field("stream_options", (dict,), "`include_usage`"),
    *harmless("user"),
    Field("echo", (bool,), only=(False,)),
    Field("best_of", (int,), only=(1,)),
    *refused("", "suffix"),
)


class OpenAiCompletions:
    path = "/v1/completions"
    fields: Sequence[Field] = FIELDS

    def read(self, body: Any) -> Asked:
        given = read(FIELDS, body)
        prompts, count = _prompts(given["prompt"]), given.get("n", 1)
        bias = common.biases(given.get("logit_bias"))
        values = {**sampling_options(given), "logprobs": given.get("logprobs", 0)}
        if "stop" in given:
            values["stop"] = common.stops(given["stop"])
        if "max_tokens" in given:
            values["max_tokens"] = given["max_tokens"]
        extras = read((Field("include_usage", (bool,)), Field("include_obfuscation", (bool,), only=(False,))),
                      given.get("stream_options", {}), "stream_options.")  # fmt: skip

        def requests(options: Options) -> list[Request]:
            seed = values.get("seed", options["seed"])
            more = [{"seed": seed + number} if seed is not None else {} for number in range(count)]
            plain = Options({**options, "system": None})
            return [made_request(plain, values | one, prompt, logit_bias=bias) for prompt in prompts for one in more]

        return Asked(
            given["model"],
            given.get("stream", False),
            requests,
            lambda tokenizer: _Writer(
                given["model"], tokenizer, given.get("logprobs"), extras.get("include_usage", False)
            ),
            count * len(prompts),
        )

    def error(self, error: Refused) -> dict[str, Any]:
        return common.error_document(error)

    def done(self) -> bytes:
        return b"data: [DONE]\n\n"


def _prompts(given: Any) -> list[str | list[int]]:
    """The texts or tokens of every answer.

    Raises:
        Refused: they are something else.
    """
    if isinstance(given, str):
        return [given]
    if given and all(type(one) is int for one in given):
        return [given]
    if given and all(isinstance(one, str) for one in given):
        return list(given)
    if given and all(isinstance(one, list) and one and all(type(i) is int for i in one) for one in given):
        return list(given)
    raise Refused(400, "prompt takes a text, texts, tokens, or lists of tokens, none of them empty", "prompt")


@dataclass
class _Writer:
    model: str
    tokenizer: Tokenizer
    logprobs: int | None
    tells_usage: bool
    id: str = field(default_factory=lambda: common.new_id("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    written: dict[int, int] = field(default_factory=dict)

    def _document(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        named = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return {**named, "choices": choices, **more}

    def _choice(self, number: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        spelled = None if self.logprobs is None or not tokens else self._spelled(tokens, self.written.get(number, 0))
        self.written[number] = self.written.get(number, 0) + len(text)
        return {"index": number, "text": text, "logprobs": spelled, "finish_reason": reason}

    def _spelled(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        def spelling(token_id: int) -> str:
            return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

        kept = [token for token in tokens if token.id not in self.tokenizer.eos_ids]
        offsets = []
        for token in kept:
            offsets.append(offset)
            offset += len(spelling(token.id))
        return {
            "tokens": [spelling(token.id) for token in kept],
            "token_logprobs": [token.logprob for token in kept],
            "top_logprobs": [{spelling(i): value for i, value in token.alternatives} for token in kept],
            "text_offset": offsets,
        }

    def begin(self, begun: Sequence[Begun]) -> Write:
        return []

    def piece(self, choice: int, piece: Piece) -> Write:
        more: dict[str, Any] = {"usage": None} if self.tells_usage else {}
        return [("", self._document([self._choice(choice, piece.text, piece.tokens, None)], **more))]

    def end(self, choice: int, made: Made) -> Write:
        more: dict[str, Any] = {"usage": None} if self.tells_usage else {}
        return [("", self._document([self._choice(choice, "", (), _reason(made))], **more))]

    def close(self, made: Sequence[Made]) -> Write:
        return [("", self._document([], usage=_total(made)))] if self.tells_usage else []

    def whole(self, made: Sequence[Made]) -> dict[str, Any]:
        choices = [
            self._choice(number, one.turn.text, [token for piece in one.pieces for token in piece.tokens], _reason(one))
            for number, one in enumerate(made)
        ]
        return self._document(choices, usage=_total(made))


def _reason(made: Made) -> str:
    return "length" if made.cut else "stop"


def _total(made: Sequence[Made]) -> dict[str, Any]:
    """Every answer has a prompt of its own, or one that was read before."""
    return common.usage(
        sum(one.prompt_tokens for one in made),
        sum(one.reused_tokens for one in made),
        sum(len(one.tokens) for one in made),
        0,
    )


API = OpenAiCompletions()

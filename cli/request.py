"""One prompt with all that says how it is answered: what `run` and its batches share."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from numoe.cli.settings import filled, in_group
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.cli.settings import Options
    from numoe.engine import Description, Model, Session
    from numoe.engine.chat.answer import Answer, Settings
    from numoe.engine.chat.tools.call import Use

Messages = Sequence[Mapping[str, Any]]

_TOKENS_ARE_SHORTER = 8
"""Characters: so many for every token of a context are looked at, before a text of more is cut into tokens as a whole,
which takes seconds for megabytes."""


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
    _kept: list[tuple[array[int], bool | None]] = field(default_factory=list, init=False, repr=False, compare=False)
    """What `encode` gave, until it is asked again: four bytes a token, as batches have many."""

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
            WrongUsage: a value is out of range, or the form of the answer is not possible.
        """
        from numoe.engine.chat.answer import Settings

        settings = filled(Settings(), options)
        if use or logit_bias:
            settings = replace(settings, use=use, sampling=replace(settings.sampling, logit_bias=logit_bias))
        talk = _messages(prompt)
        if settings.system and talk and talk[0]["role"] != "system":
            prompt = [{"role": "system", "content": settings.system}, *talk]
        return cls(prompt, settings, _grammar(options), options["logprobs"], effort)

    def cut(self, finish_reason: str | None) -> bool:
        """Whether an answer that ended so is not the whole of the form that was asked for."""
        return self.grammar is not None and finish_reason in ("length", "repetition")

    def encode(
        self, description: Description, context: int | None = None, *, keep: bool = False
    ) -> tuple[list[int], bool | None]:
        """The token ids of the prompt, and whether the answer begins with reasoning; None: it is plain text.

        context: most tokens of it. keep: they are asked for once more, of the same model.

        Raises:
            InputError: it has more tokens, or as `engine.chat.prompt.encode`.
        """
        from numoe.engine.session import require_room

        def look(text: str) -> None:
            begins = text[: _TOKENS_ARE_SHORTER * (context or 0)]
            if context is not None and len(begins) < len(text):
                require_room(len(description.tokenizer.encode(begins)), context, description.spec.context)

        if self._kept:
            kept, opened = self._kept.pop()
            ids = kept.tolist()
        else:
            ids, opened = self._encoded(description, look)
        if context is not None:
            require_room(len(ids), context, description.spec.context)
        if keep:
            self._kept.append((array("i", ids), opened))
        return ids, opened

    def _encoded(self, description: Description, look: Callable[[str], None]) -> tuple[list[int], bool | None]:
        from numoe.engine.chat.prompt import encode

        tokenizer = description.tokenizer
        if isinstance(self.prompt, str):
            look(self.prompt)
            return tokenizer.encode(self.prompt, begins=True), None
        talk = _messages(self.prompt)
        if talk is None:
            return [token for token in self.prompt if isinstance(token, int)], None
        settings, chat = self.settings, description.chat_format
        return encode(chat, tokenizer, talk, thinking=settings.think, use=settings.use, effort=self.effort, look=look)

    def ask(self, session: Session, unread: Sequence[int], opened: bool | None, **hooks: Any) -> Answer:
        """The answer, made as it is taken.

        Args:
            unread: what the session has not read yet of the ids that `encode` gave.
            opened: what it gave beside them.
            hooks: `cancelled`, `progress` and `drafter` of `Session.generate`.

        Raises:
            InputError: the vocabulary cannot follow the grammar; and as `Session.feed` while the answer is made.
        """
        from numoe.engine.chat.answer import answer

        return answer(session, unread, opened, self.settings, grammar=self.grammar, logprobs=self.logprobs, **hooks)


def load_drafted(
    described: Description,
    ctx: int,
    options: Options,
    tell: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model for contexts of so many tokens, for which something guesses ahead where that may pay.

    tell, progress: as in `load`.

    Raises:
        InputError: it does not fit, or the model of --draft does not go with it.
    """
    from numoe.engine import describe, load
    from numoe.engine.drafting import drafting

    memory, draft = options.memory, options["draft"]
    model = load(described, ram=memory, ctx=ctx, progress=progress, tell=tell, **options.loading)
    if draft == "none":
        return model
    small = None
    if draft is not None:
        own = describe(draft)
        small = load(own, ram=memory, threads=options["threads"], ctx=min(ctx, own.spec.context), kv=options["kv"])
    model.drafter = drafting(model, small, ctx)
    return model


def _messages(prompt: str | list[int] | Messages) -> list[Mapping[str, Any]] | None:
    """The messages of a conversation; None: the prompt is text or tokens."""
    talk = [] if isinstance(prompt, str) else [one for one in prompt if isinstance(one, Mapping)]
    return talk or None


def tools_of(given: Any, choice: str | None) -> Use | None:
    """Tools by what describes them: OpenAI's objects, or their functions alone. None: there are none.

    Raises:
        WrongUsage: they are something else, or none is called so.
    """
    from numoe.engine.chat.tools.call import Tool, Use

    if given is None:
        return None
    tools = []
    for number, tool in enumerate(given, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise WrongUsage(f'tool {number} is not {{"type": "function", "function": {{"name": TEXT, ...}}}}')
        schema = function.get("parameters", {"type": "object", "properties": {}})
        if not isinstance(schema, dict):
            raise WrongUsage(f"tool {number} has parameters that are no JSON schema of an object")
        described = str(function.get("description", ""))
        tools.append(Tool(function["name"], described, schema, function.get("strict") is True))
    return Use(tuple(tools), choice or "auto")


def _grammar(options: Mapping[str, Any]) -> str | None:
    try:
        return _made_grammar(options)
    except InputError as error:
        raise WrongUsage(str(error)) from None


def _made_grammar(options: Mapping[str, Any]) -> str | None:
    from numoe.engine.text import grammar

    if re.search("[\\ud800-\\udfff]", json.dumps([options[name] for name in in_group("form")], ensure_ascii=False)):
        raise InputError("the form of the answer is not UTF-8; convert it first")
    if options["schema"] is not None:
        return grammar.json_grammar(options["schema"])
    if options["choices"] is not None:
        return grammar.choice_grammar(options["choices"])
    if options["regex"] == "":
        raise InputError("--regex is empty, which only an empty answer matches; give a pattern")
    if options["regex"] is not None:
        return grammar.regex_grammar(options["regex"])
    return None

"""Text as it is made: one token after the other, from a session's logits through a sampler to pieces of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from numoe.engine.layers.ops import Floats
from numoe.engine.speculation import Drafter, Pass, Paying, usable
from numoe.engine.text.sample import Sampler, StopMatcher, logprob, logprobs
from numoe.engine.text.tags import SHOWN
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.text.tokenizer import Tokenizer


class Reader(Protocol):
    """What tokens are read with: a session."""

    context: int

    @property
    def position(self) -> int: ...

    @property
    def tokens(self) -> list[int]: ...

    def feed(
        self, token_ids: Sequence[int], *, last: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Floats: ...

    def read_ahead(self, token: int, propose: Callable[[], Sequence[int]]) -> Floats: ...

    def take(self, token: int) -> Floats | None: ...


class Form(Protocol):
    """The form that a text must have, and where in it the text is."""

    def mask(self, logits: Floats) -> Floats:
        """A copy of logits (V,) with minus infinity for every token that may not come next."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take a token, and say whether the text is complete: nothing can follow it."""
        ...

    def forced(self) -> list[int]:
        """The tokens that have to come next, as far as only one text can: they are read in one pass."""
        ...


@dataclass(frozen=True)
class Options:
    """What is asked of a text beside its sampling and its form, see `Session.generate`."""

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    logprobs: int = 0
    cancelled: Callable[[], bool] = lambda: False
    progress: Callable[[int, int], None] | None = None
    shown: Collection[str] = ()
    spelled: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise InputError(f"`max_tokens` must be 0 or more, not {self.max_tokens}")


@dataclass
class Token:
    """A generated token, with log-probabilities if they were asked for."""

    id: int
    logprob: float | None = None
    alternatives: list[tuple[int, float]] = field(default_factory=list)


class Generation(Iterator[str]):
    """Pieces of text as they are made, without special tokens. After the last `finish_reason` says why it ended.

    tokens: the generated tokens, the one that ended the text included.
    finish_reason: "stop" (a stop token or string, or nothing can follow), "length" (max_tokens or a full context),
    "cancelled", or None.
    prompt_seconds, decode_seconds: time spent reading the prompt and making tokens; first_token_seconds: until the
    first token was there. seed: what `Sampling.seed` was, or was drawn.
    passes: through the model after the prompt's. proposed: tokens of a drafter that were read in them; accepted: those
    that came, so that reading them took no pass.
    """

    def __init__(
        self,
        session: Reader,
        tokenizer: Tokenizer,
        prompt: list[int],
        sampler: Sampler,
        options: Options,
        form: Form | None = None,
        drafter: Drafter | None = None,
    ):
        self.prompt = prompt
        self.seed = sampler.seed
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.prompt_seconds = self.decode_seconds = self.first_token_seconds = 0.0
        self.passes = self.proposed = self.accepted = 0
        self._session = session
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._options = options
        self._form = form
        self._drafter = drafter
        self._pass: Pass | None = None  # the last one, of which it is not yet known what came
        self._stop = StopMatcher(options.stop)
        self._asked = 0.0  # seconds that the last proposal took; 0: nobody was asked
        self._forced: list[int] = []
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def single_seconds(self) -> float | None:
        """How long a pass of one token takes, as far as a drafter has measured it."""
        return self._drafter.single_seconds if isinstance(self._drafter, Paying) else None

    def force(self, text: str) -> None:
        """Go on with this text, whatever the logits say."""
        self._forced += self._tokenizer.encode(text)

    def close(self) -> None:
        """End the text here."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        """At every piece the session has read what is before the last token, whatever it has read ahead."""
        session, tokenizer, options = self._session, self._tokenizer, self._options
        text = tokenizer.stream(keep_space=self._form is not None)
        shown = SHOWN.union(tag.encode() for tag in options.shown)
        unseen = {i for i in tokenizer.special_ids if tokenizer.token_bytes(i) not in shown}
        begun = time.perf_counter()
        logits = session.feed(self.prompt, last=True, progress=options.progress)[0]
        self.prompt_seconds = time.perf_counter() - begun
        history = session.tokens
        if self._form and not self._forced:
            self._forced += self._form.forced()
        while True:
            if options.cancelled():
                self.finish_reason = "cancelled"
            elif len(self.tokens) == options.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason:
                break
            chosen = self._forced.pop(0) if self._forced else self._choose(logits, history)
            self.tokens.append(self._record(chosen, logits))
            history.append(chosen)
            if len(self.tokens) == 1:
                self.first_token_seconds = time.perf_counter() - begun
            if chosen in tokenizer.eos_ids:
                self.finish_reason = "stop"
                break
            piece, stopped = self._stop.push("" if chosen in unseen else text.push(chosen))
            if piece:
                yield piece
            if stopped:
                self.finish_reason = "stop"
                return
            if self._form and self._form.accept(chosen):
                self.finish_reason = "stop"
                break
            if self._form and not self._forced:
                self._forced += self._form.forced()
            if session.position == session.context:
                self.finish_reason = "length"
                break
            if len(self.tokens) != options.max_tokens:
                step = time.perf_counter()
                logits = self._read(chosen, history, len(logits))
                self.decode_seconds += time.perf_counter() - step
        self._tell()
        piece, _ = self._stop.push(text.flush())
        if tail := piece + self._stop.flush():
            yield tail

    def _choose(self, logits: Floats, history: list[int]) -> int:
        return self._sampler.choose(self._form.mask(logits) if self._form else logits, history, len(self.tokens))

    def _record(self, chosen: int, logits: Floats) -> Token:
        if not self._options.logprobs:
            return Token(chosen)
        return Token(chosen, logprob(logits, chosen), logprobs(logits, self._options.logprobs))

    def _read(self, chosen: int, history: list[int], vocab: int) -> Floats:
        """The logits (V,) after the chosen token, by a pass or from an earlier one."""
        logits = self._session.take(chosen)
        if logits is not None:
            self.accepted += 1
            if self._pass:
                self._pass = replace(self._pass, accepted=self._pass.accepted + 1)
            return logits
        self._tell()
        self.passes += 1
        before, self._asked = self.proposed, 0.0
        begun = time.perf_counter()
        logits = self._session.read_ahead(chosen, lambda: self._proposed(history, vocab))
        seconds = time.perf_counter() - begun - self._asked
        self._pass = Pass(self.proposed - before, 0, seconds, again=not self._asked)
        return logits

    def _tell(self) -> None:
        """Tell the drafter of the last pass, of which now all is known."""
        told = getattr(self._drafter, "told", None)
        if told and self._pass:
            told(self._pass)
        self._pass = None

    def _proposed(self, history: list[int], vocab: int) -> list[int]:
        """What may follow, as far as it would be read without a drafter."""
        begun = time.perf_counter()
        try:
            return self._guess(history, vocab)
        finally:
            self._asked = time.perf_counter() - begun

    def _guess(self, history: list[int], vocab: int) -> list[int]:
        if self._drafter is None and not (self._form and self._forced):
            return []
        most = self._session.context - self._session.position - 1
        if self._options.max_tokens is not None:  # of which the last is not read
            most = min(most, self._options.max_tokens - len(self.tokens) - 1)
        if most < 1:
            return []
        expected = self._forced or (self._drafter.propose(history, most) if self._drafter else [])
        proposed = usable(expected, most, vocab, self._tokenizer.eos_ids)
        self.proposed += len(proposed)
        return proposed

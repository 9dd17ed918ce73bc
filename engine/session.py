"""A conversation with a model: feed tokens, go back, generate, save and resume."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from numoe.engine.budget import Reservation
from numoe.engine.chat.formats.deepseek_v4 import DSML
from numoe.engine.chat.thinking import TAGS
from numoe.engine.layers import state
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK, Cache
from numoe.engine.text.sample import Sampler, Sampling, StopMatcher, logprob, logprobs
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError
from numoe.quant.stored.arrays import fill, listing, pieces, write_arrays

if TYPE_CHECKING:
    from numoe.engine.chat.constrain import Matcher
    from numoe.engine.text.tokenizer import Tokenizer

FILE_VERSION = 2


def require_room(tokens: int, context: int, limit: int) -> None:
    """Refuse more tokens than a context has room for. `limit`: the longest context that the model has.

    Raises:
        InputError: they do not fit.
    """
    if tokens > context:
        raise InputError(
            f"{tokens} tokens do not fit into the context of {context}; "
            f"shorten the prompt or raise `ctx` (this model reads up to {limit})"
        )


class Runs(Protocol):
    """What a session is one of: a model in memory."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def decoder(self) -> Decoder: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def identity(self) -> str: ...

    def session(self, ctx: int | None = None) -> Session: ...


@dataclass(frozen=True)
class Snapshot:
    """A point that `Session.restore` can go back to."""

    tokens: tuple[int, ...]
    cache: state.Snapshot


_Model = TypeVar("_Model", bound=Runs)


class Session(Generic[_Model]):
    """The tokens that a model has read, and what it remembers of them. Made by `Model.session`.

    A context manager: what it remembers is given up at the end, and the memory free for others.
    """

    def __init__(self, model: _Model, context: int, memory: Reservation):
        """memory: what was reserved for the cache."""
        self.model = model
        self.context = context
        self._memory = memory
        self._open: Cache | None = model.decoder.cache(context)
        # All tokens whose rows are in the cache, also those behind the position after going back.
        self._written: list[int] = []

    def __enter__(self) -> Session[_Model]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything and give the memory back. What is not closed is when nobody has it any more."""
        self._open = None
        self._memory.release()

    @property
    def _cache(self) -> Cache:
        if self._open is None:
            raise InputError("this session is closed; start a new one")
        return self._open

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self._cache.position

    @property
    def tokens(self) -> list[int]:
        """The tokens read so far."""
        return self._written[: self.position]

    def feed(
        self,
        token_ids: Sequence[int],
        *,
        last: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Floats:
        """Read tokens and give the logits after each: float32 (T, vocab), or only the last's (1, vocab) with `last`.

        Long inputs go through the layers in chunks. `progress(done, total)` is called after each; what it raises
        ends the reading there, with the chunks so far read.

        Raises:
            InputError: no tokens, an id outside the vocabulary, or more tokens than the context has room for.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError("there is nothing to read: the prompt is empty")
        vocab = self.model.spec.vocab
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab:
            raise InputError(f"a token id is outside 0..{vocab - 1}; the tokens are not this model's")
        require_room(self.position + len(ids), self.context, self.model.spec.context)
        ids = ids.astype(np.int64)
        parts: list[Floats] = []
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            at, end = self.position, start + len(chunk)
            self._written[at:] = chunk.tolist()  # whose rows may be there, however the pass ends
            logits = self.model.decoder.forward(chunk, self._cache, last=last)
            parts = [logits] if last else [*parts, logits]
            if progress:
                progress(end, len(ids))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens.

        As far as the caches reach (always where attention is full; 64 tokens at least where it has windows) this
        is immediate; beyond that the remaining tokens are read again, from the first or, where states are recurrent,
        from the end of the last prompt.

        Raises:
            InputError: there are fewer tokens.
        """
        if not 0 <= count <= self.position:
            raise InputError(f"cannot go back {count} tokens of {self.position}")
        self._go_to(self.position - count)

    def _go_to(self, position: int) -> None:
        reached = self._cache.reach(position)
        unread = self._written[reached:position]
        self._cache.rewind(reached)
        if unread:
            self.feed(unread, last=True)

    def snapshot(self) -> Snapshot:
        """Remember this point; small, since only the rows of sliding windows are copied."""
        return Snapshot(tuple(self.tokens), self._cache.snapshot())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or forward) to a snapshot of this session.

        Raises:
            InputError: its tokens were overwritten by others since.
        """
        if not self._holds(snapshot):
            raise InputError("this snapshot is gone: other tokens were read over its own; feed its tokens again")
        self._cache.restore(snapshot.cache)

    def _holds(self, snapshot: Snapshot) -> bool:
        return tuple(self._written[: snapshot.cache.position]) == snapshot.tokens

    def align(self, token_ids: Sequence[int], points: Iterable[Snapshot] = ()) -> list[int]:
        """Go back to the longest common beginning with `token_ids` and return what is left to feed.

        Where the caches do not reach so far back, `points` are tried in turn, from which they may; where they do not
        either, more or all is forgotten and left to feed. At least one token is left, so that there are logits to
        continue from.
        """
        ids = list(token_ids)
        for point in (None, *points):
            if point is not None:
                if not self._holds(point):
                    continue
                self._cache.restore(point.cache)
            pairs = enumerate(zip(self.tokens, ids[:-1], strict=False))
            common = next((i for i, (ours, theirs) in pairs if ours != theirs), min(self.position, len(ids) - 1))
            if self._cache.reach(common) == common:
                break
        reached = self._cache.reach(common)
        self._cache.rewind(reached)
        return ids[reached:]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int = 0,
        grammar: str | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] | None = None,
        shown: Collection[str] = (),
        **sampling: Any,
    ) -> Generation:
        """Continue from `prompt`: text to be read after the tokens so far, or token ids.

        Args:
            max_tokens: at most so many; None: until the model stops or the context is full.
            stop: strings that end the text; they are not part of it.
            logprobs: record the log-probabilities of each token and of so many best alternatives.
            grammar: the form of the text, see `constrain`; the text ends when nothing can follow.
            cancelled: asked before every token; True ends the text.
            progress: called as `feed` does while the prompt is read.
            shown: special tokens that are part of the text, beside the tags of reasoning.
            sampling: temperature, top_k, top_p, min_p, repetition_penalty, repeat_last_n, seed; see `Sampling`.

        Returns:
            An iterator over pieces of text, which also carries what is known of the run.

        Raises:
            InputError: a value out of range, a prompt that `feed` refuses, or a grammar that needs tokens which the
                vocabulary lacks.
        """
        if isinstance(prompt, str):
            prompt = self.model.tokenizer.encode(prompt, begins=self.position == 0)
        if max_tokens is not None and max_tokens < 0:
            raise InputError(f"`max_tokens` must be 0 or more, not {max_tokens}")
        sampler = Sampler(Sampling(**sampling))
        matcher = None
        if grammar is not None:
            from numoe.engine.chat.constrain import Matcher

            matcher = Matcher(grammar, self.model.tokenizer, self.model.spec.vocab)
        stops = StopMatcher(stop)
        return Generation(self, list(prompt), sampler, stops, matcher, max_tokens, logprobs, cancelled, progress, shown)

    def save(self, path: str | Path) -> None:
        """Write the session to a file, whole or not at all, which nobody else may read.

        Raises:
            InputError: the file cannot be written.
        """
        path = Path(path)
        arrays = self._cache.arrays()
        header = {
            "numoe": f"session {FILE_VERSION}",
            "model": self.model.identity,
            "context": str(self.context),
            "tokens": json.dumps(self.tokens),
            "rows": _digest(pieces(arrays)),
        }
        try:
            write_arrays(path, arrays, header | _proof(header))
        except OSError as error:
            raise InputError(f"the session cannot be written to {path} ({error.strerror or error})") from error


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _proof(header: Mapping[str, str]) -> dict[str, str]:
    """The entry by which damage to the other entries is seen."""
    return {"header": _digest([json.dumps(header, sort_keys=True).encode()])}


def restore(model: Runs, path: Path) -> Session:
    """The session that `Session.save` wrote; see `Model.restore`."""
    if not path.exists():
        raise InputError(f"there is no session file {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a session file; give another name")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read; check its permissions")
    try:
        stored, header = listing(path)
    except InputError:
        raise InputError(f"{path} is not a session file, or is damaged; start a new session") from None
    if header.get("numoe") != f"session {FILE_VERSION}":
        raise InputError(
            f"{path} is not a session file of this version of numoe, or is damaged; start a new session, which reads "
            "the conversation anew"
        )
    damaged = InputError(f"{path} is damaged; start a new session, which reads the conversation anew")
    proof = {"header": header.pop("header", "")}
    if proof != _proof(header):
        raise damaged
    if header.get("model") != model.identity:
        raise InputError(f"{path} is a session of another model; load that model, or start a new session")
    tokens = _numbers(header.get("tokens", ""), model.spec.vocab)
    contexts = _numbers(f"[{header.get('context')}]", model.spec.context + 1)
    if tokens is None or contexts is None or len(contexts) != 1 or not len(tokens) <= contexts[0] > 0:
        raise damaged
    session = model.session(contexts[0])
    arrays = session._cache.prepare(len(tokens))
    wanted = {name: ("F32", rows.shape) for name, rows in arrays.items()}
    if wanted != {name: (info.dtype, info.shape) for name, info in stored.items()}:
        raise damaged
    fill(arrays, stored)
    if header.get("rows") != _digest(pieces(arrays)):
        raise damaged
    session._written = tokens
    return session


def _numbers(text: str, end: int) -> list[int] | None:
    """A JSON list of whole numbers in 0..end-1; None for something else."""
    try:
        values = parse_json(text, "tokens")
    except InputError:
        return None
    if isinstance(values, list) and all(type(value) is int and 0 <= value < end for value in values):
        return values
    return None


@dataclass
class Token:
    """A generated token, with log-probabilities if they were asked for."""

    id: int
    logprob: float | None = None
    alternatives: list[tuple[int, float]] = field(default_factory=list)


_SHOWN = {DSML.encode(), *(tag.encode() for tags in TAGS for tag in tags)}
"""Special tokens that are part of the text, for what stands around them is told apart by them."""


class Generation(Iterator[str]):
    """Pieces of text as they are made, without special tokens. After the last `finish_reason` says why it ended.

    tokens: the generated tokens, the one that ended the text included.
    finish_reason: "stop" (a stop token or string, or nothing can follow), "length" (max_tokens or a full context),
    "cancelled", or None.
    prompt_seconds, decode_seconds: time spent reading the prompt and making tokens; first_token_seconds: until the
    first token was there. seed: what `Sampling.seed` was, or was drawn.
    """

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        sampler: Sampler,
        stop: StopMatcher,
        matcher: Matcher | None,
        max_tokens: int | None,
        logprobs: int,
        cancelled: Callable[[], bool],
        progress: Callable[[int, int], None] | None,
        shown: Collection[str] = (),
    ):
        self.prompt = prompt
        self._shown = _SHOWN | {text.encode() for text in shown}
        self.seed = sampler.seed
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.prompt_seconds = self.decode_seconds = self.first_token_seconds = 0.0
        self._session = session
        self._sampler = sampler
        self._stop = stop
        self._matcher = matcher
        self._limit = max_tokens
        self._logprobs = logprobs
        self._cancelled = cancelled
        self._progress = progress
        self._forced: list[int] = []
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def force(self, text: str) -> None:
        """Go on with this text, whatever the logits say."""
        self._forced += self._session.model.tokenizer.encode(text)

    def close(self) -> None:
        """End the text here."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        tokenizer = self._session.model.tokenizer
        text = tokenizer.stream(keep_space=self._matcher is not None)
        unseen = {i for i in tokenizer.special_ids if tokenizer.token_bytes(i) not in self._shown}
        begun = time.perf_counter()
        logits = self._session.feed(self.prompt, last=True, progress=self._progress)[0]
        self.prompt_seconds = time.perf_counter() - begun
        history = self._session.tokens
        while True:
            if self._cancelled():
                self.finish_reason = "cancelled"
            elif len(self.tokens) == self._limit:
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
            if self._matcher and self._matcher.accept(chosen):
                self.finish_reason = "stop"
                break
            if self._session.position == self._session.context:
                self.finish_reason = "length"
                break
            if len(self.tokens) != self._limit:
                step = time.perf_counter()
                logits = self._session.feed([chosen], last=True)[0]
                self.decode_seconds += time.perf_counter() - step
        piece, _ = self._stop.push(text.flush())
        if tail := piece + self._stop.flush():
            yield tail

    def _choose(self, logits: Floats, history: list[int]) -> int:
        return self._sampler.choose(self._matcher.mask(logits) if self._matcher else logits, history)

    def _record(self, chosen: int, logits: Floats) -> Token:
        if not self._logprobs:
            return Token(chosen)
        return Token(chosen, logprob(logits, chosen), logprobs(logits, self._logprobs))

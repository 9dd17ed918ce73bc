"""A conversation with a model: feed tokens, go back, generate, save and resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from numoe.engine import session_file
from numoe.engine.budget import Reservation
from numoe.engine.generation import Generation, Options
from numoe.engine.layers.cache import Cache
from numoe.engine.layers.cache import Snapshot as CacheSnapshot
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Floats, Ids
from numoe.engine.layers.rows import RowForm
from numoe.engine.layers.spec import ModelSpec
from numoe.engine.layers.state import CHUNK
from numoe.engine.speculation import Drafter
from numoe.engine.text.grammar import Matcher
from numoe.engine.text.sample import Sampler, Sampling
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine.text.tokenizer import Tokenizer


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


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


class Passing(Protocol):
    """What takes tokens through the layers: a `Decoder`, or `Passes` of several sessions together."""

    def cache(self, context: int, form: RowForm | None = None) -> Cache: ...

    def forward(self, ids: Ids, cache: Cache, *, last: bool = False) -> Floats: ...


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

    @property
    def drafter(self) -> Drafter | None: ...

    def session(self, ctx: int | None = None, *, kv: str | None = None) -> Session: ...


@dataclass(frozen=True)
class Snapshot:
    """A point that `Session.restore` can go back to."""

    tokens: tuple[int, ...]
    cache: CacheSnapshot


_Model = TypeVar("_Model", bound=Runs)


class Session(Generic[_Model]):
    """The tokens that a model has read, and what it remembers of them. Made by `Model.session`.

    A context manager: what it remembers is given up at the end, and the memory free for others.
    """

    def __init__(
        self,
        model: _Model,
        context: int,
        memory: Reservation,
        decoder: Passing | None = None,
        form: RowForm | None = None,
    ):
        """memory: what was reserved for the cache. decoder: what takes its tokens through the layers; None: model's.
        form: that of rows; None: the model's."""
        self.model = model
        self.context = context
        self._memory = memory
        self._decoder: Passing = decoder or model.decoder
        self._open: Cache | None = self._decoder.cache(context, form)
        # All tokens whose rows are in the cache, also those behind the position after going back.
        self._written: list[int] = []
        self._position = 0
        # The first token that was read ahead of the position, and the logits (n, vocab) after it and those behind it.
        self._ahead: tuple[int, Floats] | None = None

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
        return self._position

    @property
    def kv(self) -> str:
        """The form of its rows, see `rows.ROW_FORMS`."""
        return self._cache.form.name

    @property
    def tokens(self) -> list[int]:
        """The tokens read so far."""
        return self._written[: self._position]

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
        self._settle()
        return self._read(ids.tolist(), self._position + len(ids), last=last, progress=progress)

    def _read(
        self,
        ids: list[int],
        position: int,
        *,
        last: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> Floats:
        """Read tokens where the cache is, of which those up to a position count."""
        parts: list[Floats] = []
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            at = self._cache.position
            if self._written[at : at + len(chunk)] != chunk:
                self._written[at:] = chunk  # whose rows may be there, however the pass ends
            logits = self._decoder.forward(np.array(chunk, np.int64), self._cache, last=last)
            self._position = max(self._position, min(position, self._cache.position))
            parts = [logits] if last else [*parts, logits]
            if progress:
                progress(start + len(chunk), len(ids))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_ahead(self, token: int, propose: Callable[[], Sequence[int]]) -> Floats:
        """Read one token of an answer, and in the same pass those that are proposed: they count when `take` takes them.

        Where recurrent states cannot go back so far, they read some tokens again, and `propose` is not asked.

        Returns:
            The logits (vocab,) after the token.

        Raises:
            InputError: as `feed`.
        """
        unread = self._go_back()
        proposed = [] if unread else list(propose())
        position = self._position + 1
        require_room(position + len(proposed), self.context, self.model.spec.context)
        self._cache.end_prompt()
        logits = self._read([*unread, token, *proposed], position, last=not proposed)
        self._cache.prompted = False
        if proposed:
            self._ahead = position, logits[1:]
        return logits[0]

    def take(self, token: int) -> Floats | None:
        """The logits (vocab,) after a token that comes next and was read ahead; None where none was, or another."""
        if self._ahead is None:
            return None
        first, logits = self._ahead
        at = self._position
        if at - first == len(logits) or self._written[at] != token:
            return None
        self._position = at + 1
        taken: Floats = logits[at - first]
        return taken

    def _go_back(self) -> list[int]:
        """Take the cache to the position, from where it has read ahead, or to where it reaches before it.

        Returns:
            The tokens from there to the position, which are to be read again.
        """
        self._ahead = None
        if self._cache.position == self._position:
            return []
        reached = self._cache.reach(min(self._position, self._cache.position))
        self._cache.rewind(reached)
        return self._written[reached : self._position]

    def _settle(self) -> None:
        """Take the cache to the position, wherever it is."""
        prompted = self._cache.prompted
        if unread := self._go_back():
            again = self._cache.position > 0
            self._read(unread, self._position, last=True)
            if again:  # what was read again is no prompt of its own
                self._cache.prompted = prompted

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens.

        As far as the caches reach (always where attention is full; 64 tokens at least where it has windows) this
        is immediate; beyond that the remaining tokens are read again, from the first or, where states are recurrent,
        from the end of the last prompt or the beginning of the last pass.

        Raises:
            InputError: there are fewer tokens.
        """
        if not 0 <= count <= self.position:
            raise InputError(f"cannot go back {count} tokens of {self.position}")
        self._position -= count
        self._settle()

    def snapshot(self) -> Snapshot:
        """Remember this point; small, since only the rows of sliding windows are copied."""
        self._settle()
        return Snapshot(tuple(self.tokens), self._cache.snapshot())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or forward) to a snapshot of this session.

        Raises:
            InputError: its tokens were overwritten by others since.
        """
        if not self._holds(snapshot):
            raise InputError("this snapshot is gone: other tokens were read over its own; feed its tokens again")
        self._restore(snapshot)

    def _restore(self, snapshot: Snapshot) -> None:
        self._ahead = None
        self._cache.restore(snapshot.cache)
        self._position = snapshot.cache.position

    def _holds(self, snapshot: Snapshot) -> bool:
        return tuple(self._written[: snapshot.cache.position]) == snapshot.tokens

    def fork(self, other: Session[_Model]) -> None:
        """Be where another session of the same model is, without reading its tokens.

        Raises:
            InputError: it has read more tokens than this one's context, or holds rows in another form.
        """
        if other.kv != self.kv:
            raise InputError(
                f"a session of {self.kv} rows cannot go on from one of {other.kv}; give both the same `kv`"
            )
        other._settle()
        require_room(other.position, self.context, self.context)
        kept = other._cache.arrays()
        for name, rows in self._cache.prepare(other.position).items():
            np.copyto(rows, kept[name])
        self._written, self._position, self._ahead = other.tokens, other.position, None

    def resume(self, path: str | Path) -> None:
        """Be where a session was that `save` wrote, of the same model; what was here is forgotten in any case.

        Raises:
            InputError: the file is none of this model's, is damaged, or has more tokens than this one's context.
        """
        self._written, self._position, self._ahead = [], 0, None
        self._cache.clear()
        kept = session_file.read(Path(path), self.model.identity, self.model.spec.vocab, self.model.spec.context)
        require_room(len(kept.tokens), self.context, self.context)
        if kept.kv != self.kv:
            raise InputError(f"{path} holds {kept.kv} rows, and this session {self.kv} ones; give the same `kv`")
        try:
            kept.fill(self._cache.prepare(len(kept.tokens), kept.back))
        except BaseException:
            self._cache.clear()
            raise
        self._written, self._position = kept.tokens, len(kept.tokens)

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
                self._restore(point)
            common = shared_length(self.tokens, ids[:-1])
            if self._cache.reach(common) == common:
                break
        self._position = min(common, self._cache.position)
        self._go_back()
        self._position = self._cache.position
        return ids[self._position :]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int = 0,
        grammar: str | None = None,
        drafter: Drafter | None = None,
        **options: Any,
    ) -> Generation:
        """Continue from `prompt`: text to be read after the tokens so far, or token ids.

        Args:
            max_tokens: at most so many; None: until the model stops or the context is full.
            stop: strings that end the text; they are not part of it.
            logprobs: record the log-probabilities of each token and of so many best alternatives.
            grammar: the form of the text, see `text.grammar`; the text ends when nothing can follow.
            drafter: guesses what comes next, which saves passes; see `speculation`. The text is the same without. None:
                the model's, if it has one, unless passes are shared with other sessions.
            options: of the sampling temperature, top_k, top_p, min_p, repetition_penalty, repeat_last_n and seed, see
                `Sampling`; cancelled(), asked before every token: True ends the text; progress, called as `feed` does
                while the prompt is read; shown: special tokens that are part of the text, beside tags (`text.tags`);
                spelled: those that the grammar spells.

        Returns:
            An iterator over pieces of text, which also carries what is known of the run.

        Raises:
            InputError: a value out of range, a prompt that `feed` refuses, or a grammar that needs tokens which the
                vocabulary lacks.
        """
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, begins=self.position == 0)
        hooks = {name: options.pop(name) for name in ("cancelled", "progress", "shown", "spelled") if name in options}
        asked = Options(max_tokens, stop, logprobs, **hooks)
        sampling = Sampling(**options)
        sampling.require_tokens(self.model.spec.vocab)
        if drafter is None and self._decoder is self.model.decoder:
            drafter = self.model.drafter
        form = None if grammar is None else Matcher(grammar, tokenizer, self.model.spec.vocab, asked.spelled)
        return Generation(self, tokenizer, list(prompt), Sampler(sampling), asked, form, drafter)

    def save(self, path: str | Path) -> None:
        """Write the session to a file, whole or not at all, which nobody else may read.

        Raises:
            InputError: the file cannot be written.
        """
        self._settle()
        kept = session_file.Header(self.model.identity, self.context, self.kv, self._cache.back)
        session_file.write(Path(path), kept, self.tokens, self._cache.arrays(kept.back))


def restore(model: Runs, path: Path) -> Session:
    """The session that `Session.save` wrote, in the form that it had; see `Model.restore`."""
    kept = session_file.read(path, model.identity, model.spec.vocab, model.spec.context)
    session = model.session(kept.context, kv=kept.kv)
    session.resume(path)
    return session

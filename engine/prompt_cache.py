"""A file that a long prompt is read into once: the next one that begins so goes on from there.

It is a session's file (`session_file`). While a prompt is read it is written now and then, at the end of a chunk, so
that reading which was interrupted or killed goes on with the same chunks, and to the same digits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from numoe.engine import session_file
from numoe.engine.layers.state import CHUNK
from numoe.engine.session import require_room, shared_length
from numoe.quant.errors import InputError
from numoe.quant.files import require_folder

if TYPE_CHECKING:
    from numoe.engine.description import Description
    from numoe.engine.model import Model
    from numoe.engine.plan import Plan
    from numoe.engine.session import Session


SHARE = 0.1
"""Of the time that reading takes, what writing the file meanwhile may take at most."""
_LEAST_SECONDS = 2.0


class PromptCache:
    """Begins a session with what the file has, and keeps what is read in it.

    restored: tokens that did not have to be read.
    """

    def __init__(self, path: Path):
        """Raises WrongUsage where there is no folder for the file."""
        require_folder(path)
        self.path = path
        self.restored = 0
        self._kept: list[int] = []  # the file's tokens
        self._written = time.perf_counter()
        self._took = 0.0
        self._over = False  # whatever is read from here on is not kept
        self._session: Session | None = None
        self._prompt: list[int] = []

    def open(self, model: Model, ctx: int | None = None) -> Session:
        """A session for so many tokens, which has read those of the file, if that is there already.

        Raises:
            InputError: the file is no session of this model, or its tokens do not fit.
        """
        context = model.plan(ctx).context
        if not self.path.exists():
            return model.session(context)
        self._kept = known(self.path, model, model.plan(ctx))
        session = model.session(context)
        session.resume(self.path)
        return session

    def begin(self, session: Session, prompt: list[int]) -> list[int]:
        """Take a session to where it has read what a prompt begins with; returns what is left to be read."""
        unread = session.align(prompt)
        self.restored = session.position
        self._session, self._prompt = session, prompt
        self._written = time.perf_counter()
        return unread

    def reading(self, progress: Callable[[int, int], None] | None = None) -> Callable[[int, int], None]:
        """What to give as `progress` of reading: it keeps what was read, when that is due."""

        def report(done: int, total: int) -> None:
            if progress:
                progress(done, total)
            waited = time.perf_counter() - self._written
            if done == total or self._at_fork() or waited > max(_LEAST_SECONDS, self._took / SHARE):
                self.keep()

        return report

    def _fork(self) -> int | None:
        """Where the prompt goes on otherwise than the file's, if they share what is worth to be kept: only that is."""
        shared = shared_length(self._kept, self._prompt)
        return shared if CHUNK <= shared < min(len(self._kept), len(self._prompt)) else None

    def _at_fork(self) -> bool:
        """Whether the next chunk goes beyond what the prompts share: caches with windows cannot go back there later."""
        fork = self._fork()
        return fork is not None and self._position <= fork < self._position + CHUNK

    @property
    def _position(self) -> int:
        return self._session.position if self._session else 0

    def keep(self) -> None:
        """Write what was read, if the file has less of it.

        Raises:
            InputError: the file cannot be written.
        """
        session, fork = self._session, self._fork()
        if session is None or self._over or not 0 < session.position <= len(self._prompt):
            return
        read, has = session.tokens, shared_length(self._kept, session.tokens)
        # Not for little more: another question about the same text would begin behind what it shares with this one.
        little = has == len(read) or (self._kept and has == len(self._kept) > len(read) - CHUNK)
        if not self._at_fork() and (fork is not None or little):
            return
        self._over = self._at_fork()
        begun = time.perf_counter()
        session.save(self.path)
        self._written = time.perf_counter()
        self._took, self._kept = self._written - begun, read

    def close(self) -> None:
        """Keep what was read of a prompt that is not read to its end."""
        if self._session is not None and self._session.position < len(self._prompt):
            self.keep()


def known(path: Path, model: Model | Description, planned: Plan) -> list[int]:
    """The tokens of a file that sessions of a model, which are planned so, can begin with.

    Raises:
        InputError: there is no such file, it is none of this model, or its rows are held otherwise or do not fit.
    """
    if not path.exists():
        raise InputError(
            f"there is no file {path} for a prompt to begin with; `numoe run` with `prompt_cache` writes it"
        )
    kept = session_file.read(path, model.identity, model.spec.vocab, model.spec.context)
    if kept.kv != planned.kv.name:
        raise InputError(f"{path} holds {kept.kv} rows; give `kv` {kept.kv}, or another file")
    require_room(len(kept.tokens), planned.context, model.spec.context)
    return kept.tokens

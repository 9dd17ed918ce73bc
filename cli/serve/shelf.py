"""Conversations that no session has room for any more, in files: the next turn reads only its own tokens all the same.

NUMOE_HOME/served/MODEL-NAME.session    the latest few of all models
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from numoe.engine.session import shared_length
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Model, Session

KEPT = 8
"""Files, of all models; each can take a gigabyte."""
_LEAST = 64  # tokens; fewer are read again as fast


def _written(path: Path) -> int:
    """When a file was written, as far as it is still there: another server may remove it."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


class Shelf:
    """The files of one model. From several threads."""

    def __init__(self, model: Model, keeps: bool, given: Mapping[Path, Sequence[int]] = {}) -> None:
        """keeps: False keeps nothing, and has nothing but what is given: files that stay, and their tokens."""
        from numoe.engine.home import home

        self._folder = home() / "served"
        self._prefix = model.identity[:16]
        self._keeps = keeps
        self._lock = threading.Lock()
        self._known: dict[Path, Sequence[int]] = {}
        self._given = dict(given)
        if keeps:
            self._look(model)

    def _look(self, model: Model) -> None:
        from numoe.engine import session_file

        found = self._folder.glob(f"{self._prefix}-*.session")
        for path in sorted(found, key=_written):
            with suppress(InputError):  # of another version of numoe, or damaged: it goes when there are more
                kept = session_file.read(path, model.identity, model.spec.vocab, model.spec.context)
                self._known[path] = kept.tokens

    def keep(self, session: Session) -> None:
        """Write what a session has read, where that is worth it."""
        from numoe.engine.home import make

        if not self._keeps or session.position < _LEAST:
            return
        path = self._folder / f"{self._prefix}-{secrets.token_hex(8)}.session"
        try:
            make(self._folder)
            session.save(path)
        except (InputError, OSError):  # a full disk: the conversation is read anew
            return
        with self._lock:
            tokens = session.tokens
            gone = [one for one, kept in self._known.items() if shared_length(kept, tokens) == len(kept)]
            self._known[path] = tokens
            files = self._folder.glob("*.session")  # of other models too
            latest = sorted((one for one in files if one not in gone), key=_written)
            for one in (*gone, *latest[:-KEPT]):
                self._known.pop(one, None)
                one.unlink(missing_ok=True)

    def find(self, ids: Sequence[int], more_than: int) -> Path | None:
        """The file that most of a prompt can be taken from; None: none has so many more tokens of it than a session."""
        with self._lock:
            shared = {path: shared_length(tokens, ids) for path, tokens in (self._given | self._known).items()}
            best = max(shared, key=shared.__getitem__, default=None)
            return best if best is not None and shared[best] >= more_than + _LEAST else None

    def forget(self, path: Path) -> None:
        """Leave out a file that cannot be read."""
        with self._lock:
            self._known.pop(path, None)
            self._given.pop(path, None)

"""Files of sessions: the rows that a cache keeps, and the tokens that they are of, with what proves them whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from numoe.engine.layers.rows import FLOAT32, ROW_FORMS
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import TensorInfo
from numoe.quant.stored.arrays import dtype_of, fill, listing, pieces, write_arrays

FILE_VERSION = 3
_EARLIER = 2
"""Whose rows are float32."""


@dataclass(frozen=True)
class Header:
    """What a file says of a session. model: the identity of the one whose it is. kv: the form of its rows.

    back: how many tokens it can go back by from where it is.
    """

    model: str
    context: int
    kv: str
    back: int


def write(path: Path, kept: Header, tokens: list[int], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a file, whole or not at all, which nobody else may read.

    arrays: as `Cache.arrays` gives them.

    Raises:
        InputError: it cannot be written.
    """
    header = {
        "numoe": f"session {FILE_VERSION}",
        "model": kept.model,
        "context": str(kept.context),
        "kv": kept.kv,
        "back": str(kept.back),
        "tokens": json.dumps(tokens),
        "rows": _digest(pieces(arrays)),
    }
    try:
        write_arrays(path, arrays, header | proof(header))
    except OSError as error:
        raise InputError(
            f"the session cannot be written to {path} ({error.strerror or error}); choose another file"
        ) from error


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in parts:
        digest.update(piece)
    return digest.hexdigest()


def proof(header: Mapping[str, str]) -> dict[str, str]:
    """The entry by which damage to the other entries is seen."""
    return {"header": _digest([json.dumps(header, sort_keys=True).encode()])}


@dataclass(frozen=True)
class Kept:
    """A file of a session whose header was read."""

    path: Path
    context: int
    kv: str
    back: int
    tokens: list[int]
    _rows: str
    _stored: Mapping[str, TensorInfo]

    def fill(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Read the rows into arrays, which are as `Cache.prepare` gives them.

        Raises:
            InputError: the file is damaged.
        """
        wanted = {name: (dtype_of(rows), rows.shape) for name, rows in arrays.items()}
        if wanted != {name: (info.dtype, info.shape) for name, info in self._stored.items()}:
            raise _damaged(self.path)
        fill(arrays, self._stored)
        if self._rows != _digest(pieces(arrays)):
            raise _damaged(self.path)


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged; start a new session, which reads the conversation anew")


def read(path: Path, model: str, vocab: int, limit: int) -> Kept:
    """The file of a session of the model with this identity, vocabulary and longest context.

    Raises:
        InputError: it is none, is another model's, or is damaged.
    """
    if not path.exists():
        raise InputError(f"there is no session file {path}")
    if not path.is_file():
        raise WrongUsage(f"{path} is not a session file; give another name")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read; check its permissions")
    try:
        stored, header = listing(path)
    except InputError:
        raise InputError(f"{path} is not a session file, or is damaged; start a new session") from None
    if header.get("numoe") not in (f"session {FILE_VERSION}", f"session {_EARLIER}"):
        raise InputError(
            f"{path} is not a session file of this version of numoe, or is damaged; start a new session, which reads "
            "the conversation anew"
        )
    proved = {"header": header.pop("header", "")}
    if proved != proof(header):
        raise _damaged(path)
    if header.get("model") != model:
        raise InputError(f"{path} is a session of another model; load that model, or start a new session")
    tokens = _numbers(header.get("tokens", ""), vocab)
    contexts = _numbers(f"[{header.get('context')}]", limit + 1)
    if header["numoe"] == f"session {_EARLIER}":
        header |= {"kv": FLOAT32.name, "back": "0"}
    kv, backs = header.get("kv", ""), _numbers(f"[{header.get('back')}]", 1 + len(tokens or ()))
    if (
        kv not in ROW_FORMS
        or not backs
        or len(backs) != 1
        or tokens is None
        or contexts is None
        or len(contexts) != 1
        or not len(tokens) <= contexts[0] > 0
    ):
        raise _damaged(path)
    return Kept(path, contexts[0], kv, backs[0], tokens, header.get("rows", ""), stored)


def _numbers(text: str, end: int) -> list[int] | None:
    """A JSON list of whole numbers in 0..end-1; None for something else."""
    try:
        values = parse_json(text, "tokens")
    except InputError:
        return None
    if isinstance(values, list) and all(type(value) is int and 0 <= value < end for value in values):
        return values
    return None

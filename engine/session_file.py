"""Files of sessions: the rows that a cache keeps, and the tokens that they are of, with what proves them whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from numoe.engine.layers.ops import Floats
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError
from numoe.quant.files import Files, write_whole
from numoe.quant.stored.safetensors import TensorInfo, file_start, read_header

FILE_VERSION = 2


def write(path: Path, model: str, context: int, tokens: list[int], arrays: Mapping[str, Floats]) -> None:
    """Write a file, whole or not at all, which nobody else may read.

    model: the identity of the one whose session it is. arrays: as `Cache.arrays` gives them.

    Raises:
        InputError: it cannot be written.
    """
    header = {
        "numoe": f"session {FILE_VERSION}",
        "model": model,
        "context": str(context),
        "tokens": json.dumps(tokens),
        "rows": _digest(_pieces(arrays)),
    }
    start = file_start(((name, "F32", rows.shape) for name, rows in arrays.items()), header | proof(header))
    try:
        write_whole(path, chain([start], _pieces(arrays)), private=True)
    except OSError as error:
        raise InputError(f"the session cannot be written to {path} ({error.strerror or error})") from error


def _pieces(arrays: Mapping[str, Floats]) -> Iterator[memoryview]:
    """The bytes of all rows, without a copy: those of a group lie side by side."""
    return (group.reshape(-1).view(np.uint8).data for rows in arrays.values() for group in rows)


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
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
    tokens: list[int]
    _rows: str
    _stored: Mapping[str, TensorInfo]

    def fill(self, arrays: Mapping[str, Floats]) -> None:
        """Read the rows into arrays, which are as `Cache.prepare` gives them.

        Raises:
            InputError: the file is damaged.
        """
        wanted = {name: ("F32", rows.shape) for name, rows in arrays.items()}
        if wanted != {name: (info.dtype, info.shape) for name, info in self._stored.items()}:
            raise _damaged(self.path)
        with closing(Files()) as files:
            for name, rows in arrays.items():
                at = self._stored[name].offset
                for group in rows:
                    files.read_range(self.path, at, group.nbytes, group.reshape(-1).view(np.uint8))
                    at += group.nbytes
        if self._rows != _digest(_pieces(arrays)):
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
        raise InputError(f"{path} is not a session file; give another name")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read; check its permissions")
    try:
        stored, header = read_header(path)
    except InputError:
        raise InputError(f"{path} is not a session file, or is damaged; start a new session") from None
    if header.get("numoe") != f"session {FILE_VERSION}":
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
    if tokens is None or contexts is None or len(contexts) != 1 or not len(tokens) <= contexts[0] > 0:
        raise _damaged(path)
    return Kept(path, contexts[0], tokens, header.get("rows", ""), stored)


def _numbers(text: str, end: int) -> list[int] | None:
    """A JSON list of whole numbers in 0..end-1; None for something else."""
    try:
        values = parse_json(text, "tokens")
    except InputError:
        return None
    if isinstance(values, list) and all(type(value) is int and 0 <= value < end for value in values):
        return values
    return None

"""JSON and TOML that others wrote: read in one way everywhere, and refused in one sentence.

What editors add is let pass (a byte order mark, UTF-16); what would break or stall a reader is an InputError: nesting
without end, numbers of thousands of digits, files that are no documents (pipes, devices, gigabytes).
"""

from __future__ import annotations

import codecs
import json
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numoe.quant.errors import InputError, shown

LARGEST_DOCUMENT = 256 << 20
"""Bytes. The largest tokenizer.json that people use has about 35 MB, the index of the largest model 10 MB."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def parse_json(data: bytes | str, name: str | Path, remedy: str = "fetch it again", *, alike: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
        name: what to call it in an error.
        remedy: the next step that an error tells.
        alike: an object may have a key twice, of which the last counts.

    Raises:
        InputError: it is not JSON, or nested too deeply.
    """

    def decode() -> Any:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        return json.loads(text, object_pairs_hook=None if alike else _once)

    return _parsed(decode, data, name, "JSON", remedy)


def parse_toml(data: bytes, name: str | Path, remedy: str = "correct or remove it") -> dict[str, Any]:
    """The table of a TOML text; see `parse_json`."""
    table: dict[str, Any] = _parsed(
        lambda: tomllib.loads(data.removeprefix(codecs.BOM_UTF8).decode("utf-8")), data, name, "TOML", remedy
    )
    return table


def read_object(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        InputError: it is not there, cannot be read, or holds something else.
    """
    value = parse_json(read_document(path), path, remedy)
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; {remedy}")
    return value


def is_there(path: Path) -> bool:
    """Whether a folder has a file by this name, which may be left out: also one that cannot be read, for to leave that
    out would change the model. A link into a cache that has lost its file is one."""
    return os.path.lexists(path)


def read_document(path: Path, largest: int = LARGEST_DOCUMENT) -> bytes:
    """The bytes of a small file.

    Raises:
        InputError: it is not there, is no ordinary file, has more than `largest` bytes, or cannot be read.
    """
    try:
        # Opened without waiting: a pipe by this name would wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InputError(f"{path} is not an ordinary file; put the model's own file there")
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read(largest + 1)
        finally:
            os.close(handle)
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"{path} is a link to a file that is not there; download the model again") from None
        raise InputError(f"there is no file {path}; add it, or download the model again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if len(data) > largest:
        raise InputError(f"{path} has more than {largest >> 20} MiB, and no such file needs so much; fetch it again")
    return data


def refuse_lfs_pointer(
    data: bytes,
    name: str | Path,
    remedy: str = "run `git lfs pull` in its folder, or get the model with `numoe pull`",
) -> None:
    """Raises InputError when a file's beginning is that of the note which git leaves in place of a large file."""
    if data.startswith(_LFS_POINTER):
        raise InputError(f"{name} is a Git LFS pointer in place of the file itself; {remedy}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(max(keys, key=keys.count))} is there twice")
    return found


def _parsed(decode: Callable[[], Any], data: bytes | str, name: str | Path, kind: str, remedy: str) -> Any:
    try:
        return decode()
    except RecursionError:
        raise InputError(f"{name} is nested too deeply for any {kind} that is meant; {remedy}") from None
    except ValueError as error:
        if isinstance(data, bytes):
            refuse_lfs_pointer(data, name)
        raise InputError(f"{name} is not valid {kind} ({str(error).partition(';')[0]}); {remedy}") from None

"""Texts from arguments, files and pipes."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError, WrongUsage

_PATIENCE = 2.0  # seconds of silence on a pipe before we say what we wait for
LARGEST = 256 << 20
"""Bytes of a text that somebody asks about; no context holds as many. Devices such as /dev/zero never end."""


def typed() -> bool:
    """Whether standard input is a terminal; it is nothing at all where the shell closed it."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_text(name: str, largest: int = LARGEST) -> str:
    """The text of a file, or of standard input for "-".

    Raises:
        InputError: it cannot be read, has more than `largest` bytes, or is not UTF-8.
    """
    if name == "-" and sys.stdin is None:
        raise WrongUsage("standard input is closed; pipe a text in, or give a file instead of -")
    what = "standard input" if name == "-" else name
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb") as file:
            data = file.read(largest + 1)
        if len(data) > largest:
            raise InputError(f"{what} has more than {largest >> 20} MiB of text; give a part of it")
        return data.decode("utf-8-sig")  # Windows editors put a mark before the text
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        kind = WrongUsage if isinstance(error, FileNotFoundError | IsADirectoryError) else InputError
        raise kind(f"{name} cannot be read ({error.strerror}); give a text file") from None
    except ValueError as error:  # an InputError, or a name that no file can have
        raise InputError(str(error)) from None


def read_count(text: str) -> int:
    """A number of tokens: 32768, 32k or 1M, as models count, in thousands of 1024. Raises ValueError."""
    power = " kKmM".find(text[-1:] or " ") + 1 >> 1
    return int(text[:-1]) << 10 * power if power else int(text)


def read_schema(value: str) -> Any:
    """The JSON schema that --schema gives, as it is or as the name of a file.

    Raises:
        InputError: the file is none.
        WrongUsage: it is neither.
    """
    return _read_json(value, "{", "--schema", "give a JSON schema")


def read_tools(value: str) -> Any:
    """The list of tools that --tools gives, as it is or as the name of a file.

    Raises:
        InputError: the file is none.
        WrongUsage: it is neither.
    """
    tools = _read_json(value, "[{", "--tools", "give a list of tools")
    if tools == []:
        raise WrongUsage("--tools lists none; give one at least, or leave it out")
    return tools if isinstance(tools, list) else [tools]


def _read_json(value: str, opening: str, flag: str, wanted: str) -> Any:
    """What an option gives as JSON, which begins with one of these characters, or as the name of a file."""
    if value.lstrip()[:1] not in tuple(opening):
        return parse_json(read_text(value), value, wanted)
    try:
        return parse_json(value, flag, wanted)
    except InputError as error:
        raise WrongUsage(str(error)) from None


def attachment(name: str) -> str:
    """A file's text under its name, to be put before a question about it. Raises as `read_text` does."""
    return read_text(name) if name == "-" else f"File {name}:\n\n{read_text(name)}"


def whole_prompt(
    argument: str | None,
    option: str | None,
    file: str | None,
    attached: Sequence[str],
    note: Callable[[str], None],
    needed: bool = True,
) -> str:
    """Attached files, then piped text, then the prompt, with an empty line between them.

    note: told what we wait for, when that takes long. needed: refuse it where it is empty.

    Raises:
        InputError: a text cannot be read.
        WrongUsage: all of it is empty, there are several prompts, or standard input is to be two of the texts.
    """
    given = [prompt for prompt in (argument, option) if prompt is not None]
    if len(given) + (file is not None) > 1:
        raise WrongUsage("the prompt is given twice; give it once, as an argument, with -p or --prompt-file")
    if [*given, file, *attached].count("-") > 1:
        raise WrongUsage("- stands for standard input and can be given once")
    parts = [attachment(name) for name in attached]
    if "-" not in [*given, file, *attached]:
        parts.append(_piped(note if given or file or attached else None))
    parts += [read_text("-") if prompt == "-" else prompt for prompt in given]
    if file is not None:
        parts.append(read_text(file))
    parts = [part for part in parts if part.strip()]
    if not parts:
        if not needed:
            return ""
        raise WrongUsage("the prompt is empty; give it with -p or pipe it in")
    return "\n\n".join([*(part.rstrip("\n") for part in parts[:-1]), parts[-1]])


def _piped(note: Callable[[str], None] | None) -> str:
    """What is piped in, up to its end: a writer that is slow cannot be told from one that will never write.

    note: None where nothing else is given, so that the user knows of the pipe.
    """
    if sys.stdin is None or typed():
        return ""
    if note and not _ready():
        note("waiting for what is piped in; < /dev/null goes without")
    return read_text("-")


def _ready() -> bool:
    """Whether standard input has something to read, or has ended, within our patience."""
    try:
        return bool(select.select([sys.stdin], [], [], _PATIENCE)[0])
    except (OSError, ValueError):  # not a pipe, or a system that cannot tell
        return True

"""The file of answers to a file of prompts, which can be gone on with.

    {"key": KEY, "id": ID, "model": MODEL, "text": ...}      a line of answers
    {"key": KEY, "id": ID, "model": MODEL, "error": ...}     of a prompt that failed

The key is a hash of all that the answer comes from: an answer is found again by it wherever its prompt stands by then.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from numoe.cli.output import Output
from numoe.cli.request import Request
from numoe.quant.documents import parse_json
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import locked, require_folder, write_whole

Lines = Generator[dict[str, Any], None, None]
"""What is said of one answer after another."""


@dataclass(frozen=True)
class Item:
    """A line of a batch. `id` is the line's own, or its number. `key` is a hash of the model, the prompt and all that
    an answer depends on."""

    id: Any
    key: str
    request: Request


class Answers:
    """The answers to a batch: lines of a file, or of standard output. A context manager.

    lines: the answer to each item; None where there is none yet. What failed is not there: it is asked again.
    """

    def __init__(self, items: Sequence[Item], output: Output, out: Path | None = None, batch: str = "-") -> None:
        """
        Args:
            out: a file that may have some of the answers already; None: standard output.
            batch: the name of the file of prompts, which is not to be written over.

        Entering raises InputError when the file has something else, is none that answers can be added to, or another
        process adds its own.
        """
        self.lines: list[dict[str, Any] | None] = [None] * len(items)
        self._items, self._output, self._batch = items, output, batch
        self._out = None if out is None else Path(os.path.realpath(out))
        self._kept = 0  # bytes of whole lines that the file had
        self._ordered = True
        self._file: FileIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Answers:
        if self._out is not None:
            with self._writing(), ExitStack() as stack:
                self._refuse_other_files(self._out)
                stack.enter_context(locked(self._out, f"the file of answers {self._out}"))
                self._read(self._out)
                stack.callback(self._close, self._out)
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._writing():
            self._stack.close()

    @property
    def missing(self) -> list[int]:
        """The items that have no answer."""
        return [number for number, line in enumerate(self.lines) if line is None]

    @property
    def asked(self) -> list[Request]:
        """What they are asked."""
        return [self._items[number].request for number in self.missing]

    def add_all(self, lines: Lines, name: str) -> None:
        """Write the answers to all items that have none, in order, as they come.

        name: the model's.
        """
        for number in self.missing:
            self._output.status(f"answer {number + 1} of {len(self._items)}")
            item = self._items[number]
            self.add(number, {"key": item.key, "id": item.id, "model": name} | next(lines))

    def add(self, number: int, line: dict[str, Any]) -> None:
        """Write the answer to an item, safe on disk.

        Raises:
            InputError: the file cannot be written.
        """
        self.lines[number] = line
        if self._out is None:
            self._output.line(line)
            return
        with self._writing():
            if self._file is None:
                self._file = self._out.open("ab", buffering=0)
                self._file.truncate(self._kept)
            data = _encoded(line)
            while data:  # the last of a disk takes a part
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())

    def _close(self, out: Path) -> None:
        if self._file is not None:
            self._file.close()
        if not self._ordered:
            mode = stat.S_IMODE(out.stat().st_mode)
            write_whole(out, b"".join(_encoded(line) for line in self.lines if line), private=True)
            out.chmod(mode)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self._out} cannot be written ({error.strerror}); see to that, and the same command goes on from here"
            ) from None

    def _refuse_other_files(self, out: Path) -> None:
        if not out.exists():
            require_folder(out)
            return
        if not out.is_file():
            raise WrongUsage(f"--out {out} is not an ordinary file; name another, or leave --out out and use >")
        prompts = os.fstat(0) if self._batch == "-" else Path(self._batch).stat()
        if os.path.samestat(prompts, out.stat()):
            raise WrongUsage(f"--out {out} is the file of the prompts itself; name another")

    def _read(self, out: Path) -> None:
        """Find the answers that the file has. Raises InputError where it has something else."""
        if not out.exists():
            return
        with out.open("rb") as file:
            begin = file.read(len(_BEGIN))  # of what else it may be, and however long, no more is read
            data = begin + file.read() if begin == _BEGIN[: len(begin)] else b"\n"
        *ended, half = data.split(b"\n")
        found: dict[str, deque[tuple[int, dict[str, Any]]]] = {}
        for number, text in enumerate(ended, 1):
            line = _parsed(text)
            if line is None:
                raise self._foreign(number)
            if "error" not in line:
                found.setdefault(line["key"], deque()).append((number, line))
        # A line that was not finished is ours by its key: of any form, or where it is the only line, of a prompt.
        keys = [half[9:41].decode("latin-1")] if ended else [item.key for item in self._items]
        begun = [f'{{"key": "{key}", "id": '.encode() for key in keys if re.fullmatch("[0-9a-f]*", key)]
        if half and not any(half.startswith(text[: len(half)]) for text in begun):
            raise self._foreign(len(ended) + 1)
        for number, item in enumerate(self._items):
            if lines := found.get(item.key):
                self.lines[number] = lines.popleft()[1] | {"id": item.id}
        if strange := sorted(number for lines in found.values() for number, _ in lines):
            raise InputError(
                f"{out} line {strange[0]} answers nothing that is asked now ({len(strange)} such in all): its prompt, "
                "a setting or the model was another; name another --out, or remove what is to be answered anew"
            )
        self._kept = len(data) - len(half)
        done = [line for line in self.lines if line is not None]
        self._ordered = self.lines[: len(done)] == done and data == b"".join(map(_encoded, done)) + half
        self._ordered &= not half or bool(self.missing)

    def _foreign(self, number: int) -> InputError:
        return InputError(f"{self._out} line {number} is not an answer of numoe; name another --out")


_BEGIN = b'{"key":'


def _encoded(line: dict[str, Any]) -> bytes:
    # Half of a surrogate pair, which an id may have, becomes JSON's own escape.
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of answers; None: it is something else."""
    try:
        line = parse_json(text, "a line")
    except InputError:
        return None
    ours = isinstance(line, dict) and isinstance(line.get("key"), str) and ("text" in line) != ("error" in line)
    return line if ours else None


def count(items: Sequence[Item], lines: Sequence[Mapping[str, Any] | None]) -> tuple[int, int]:
    """How many answers failed, and how many were cut short of their form."""
    failed = cut = 0
    for item, line in zip(items, lines, strict=True):
        failed += line is not None and "error" in line
        cut += line is not None and item.request.cut(line.get("finish_reason"))
    return failed, cut

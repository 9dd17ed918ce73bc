"""The one way to the screen: the answer or one JSON document on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

_DIM, _RESET = "\x1b[2m", "\x1b[0m"
# What a terminal could take for commands: C0 without tab and newline, DEL, C1.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}


def printable(text: str) -> str:
    """Text without control characters, except tabs and newlines."""
    return text.translate(_CONTROLS)


def print_error(message: str) -> None:
    """One line on stderr; names that come from files may hold anything."""
    sys.stdout.flush()
    print("error:", printable(re.sub(r"\s*[\r\n]\s*", " ", message)), file=sys.stderr)


class Output:
    """What a command shows. Leaving it as a context puts the cursor on a fresh line, whatever happened.

    quiet: nothing but answers and documents.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._cleans = sys.stdout.isatty()  # a pipe gets what the model wrote, byte for byte
        live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._live = live and not quiet
        self._dims = live and not os.environ.get("NO_COLOR")
        self._status = False  # a status line is on the screen
        self._thought = ""  # the last piece of an open thinking block
        self._answering = False  # an answer has begun and not ended
        self._held = ""  # newlines that end the answer so far

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self.settle()

    def settle(self) -> None:
        """End what an error or Ctrl-C cut short."""
        self.clear_status()
        if self._answering or self._thought:
            self.end_answer()

    def answer(self, text: str) -> None:
        """A piece of the answer, shown at once."""
        self.clear_status()
        if self._thought:
            self._note("" if self._thought.endswith("\n") else "\n")
            self._thought = ""
        self._answering = True
        if self._cleans:
            text = printable(text)
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        sys.stdout.write(shown)
        sys.stdout.flush()

    def end_answer(self) -> None:
        """Exactly one newline ends an answer."""
        self.answer("")
        self._answering, self._held = False, ""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def document(self, value: Any) -> None:
        """The one JSON document of a command."""
        self.clear_status()
        sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
        sys.stdout.flush()

    def table(self, rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """Rows of as many cells, folded into the width of the screen; `numbers` are the columns to align right."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for column in range(len(rows[0])):
            table.add_column(justify="right" if column in numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console = Console(file=sys.stdout, no_color=True)
        with console.capture() as page:
            console.print(table)
        for line in page.get().splitlines():
            print(line.rstrip())  # Rich fills columns with spaces

    def thinking(self, text: str) -> None:
        """A piece of the model's reasoning."""
        self._note(text)
        self._thought = text

    def note(self, text: str) -> None:
        """A line about what goes on."""
        self._note(text + "\n")

    def status(self, text: str) -> None:
        """What takes time just now, on a line that the next output replaces. Only on a terminal."""
        if self._live:
            self._status = True
            width = shutil.get_terminal_size().columns - 1  # a second line would not be replaced
            sys.stderr.write(f"\r\x1b[K{printable(text)[:width]}")
            sys.stderr.flush()

    def reading(self, done: int, total: int) -> None:
        """How much of a prompt is read; the face of `Session.feed`'s progress."""
        if done < total:
            filled = 20 * done // total
            self.status(f"reading [{'#' * filled}{'.' * (20 - filled)}] {done}/{total}")
        else:
            self.clear_status()

    def clear_status(self) -> None:
        if self._status:
            self._status = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _note(self, text: str) -> None:
        self.clear_status()
        text = printable(text)
        if not self._quiet and text:
            sys.stderr.write(f"{_DIM}{text}{_RESET}" if self._dims else text)
            sys.stderr.flush()

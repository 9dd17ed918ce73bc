"""The one way to the screen: the answer or one JSON document on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
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
    """What a command shows.

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
        self._held = ""  # newlines that end the answer so far

    def answer(self, text: str) -> None:
        """A piece of the answer, shown at once."""
        self.clear_status()
        if self._thought:
            self._note("" if self._thought.endswith("\n") else "\n")
            self._thought = ""
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
        self._held = ""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def document(self, value: Any) -> None:
        """The one JSON document of a command."""
        self.clear_status()
        sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
        sys.stdout.flush()

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
            sys.stderr.write(f"\r\x1b[K{printable(text)}")
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

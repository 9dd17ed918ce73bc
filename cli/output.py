"""The one way to the screen: the answer or one JSON document on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from numoe.cli.settings import spelled
from numoe.quant.errors import InputError

_DIM, _RESET = "\x1b[2m", "\x1b[0m"
# What a terminal could take for commands: C0 without tab and newline, DEL, C1; and what turns the direction of text.
_TURNS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), *_TURNS)}
del _CONTROLS[0x09], _CONTROLS[0x0A]
_LONGEST_ERROR = 2000
_SOON = 0.5  # seconds that nobody wonders about
_PAUSE = 0.1  # seconds between two pictures of a bar
_WIDEST = 10_000  # columns of a table that is not folded
_FEWEST = 6  # columns that words are folded into, so that figures beside them stay whole


def printable(text: str) -> str:
    """Text with control characters in letters, such as \\x1b, but for tabs and ends of lines."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def decimal(value: float) -> str:
    """Three significant digits, without an exponent where more are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def billions(count: int) -> str:
    """284_331_000_000 -> "284 B"."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    """A span of time as people say it: 0.8 s, 12 s, 3 min, 1 h 20 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _seconds_left(read: Sequence[tuple[int, float]], total: int) -> float:
    """How long the rest of a prompt takes, of which each token takes evenly longer than the one before.

    read: tokens, and when they were read.
    """
    (first, begun), (half, then), (done, now) = read[0], read[len(read) // 2], read[-1]
    each, grows = (now - begun) / max(1, done - first), 0.0
    if first < half < done:
        grows = max(0.0, (each - (then - begun) / (half - first)) / (done - half))
    return (total - done) * (each + grows * (total - first))


Segment = tuple[str, str, str]
"""A piece of a picture: its text, that in ASCII, and the colour or style it has on a terminal."""


def bar(parts: Sequence[tuple[int, str, str, str]], width: int) -> list[Segment]:
    """A bar of amounts, each (amount, sign, its ASCII form, colour), that are as long as they are large."""
    total, done, filled = sum(part[0] for part in parts) or 1, 0, 0
    segments = []
    for amount, sign, plain, style in parts:
        done += amount
        upto = round(width * done / total)
        segments.append((sign * (upto - filled), plain * (upto - filled), style))
        filled = upto
    return segments


def _narrow(stream: TextIO) -> bool:
    """Whether a stream takes few letters beside ASCII."""
    return (stream.encoding or "").lower().replace("-", "") not in ("utf8", "utf16", "utf32")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON without anything that a terminal or a narrow encoding could change: that is escaped, as JSON does it."""
    text = json.dumps(value, ensure_ascii=_narrow(sys.stdout), indent=indent)
    return re.sub(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def print_error(message: str) -> None:
    """One line on stderr, folded at words on a terminal, settings by their flags.

    Names that come from files may hold anything, any amount of it.
    """
    with suppress(InputError, OSError):  # what went wrong first is told
        sys.stdout.flush()
    text = printable(re.sub(r"\s*[\r\n]\s*", " ", spelled(message)))
    if len(text) > _LONGEST_ERROR:  # the next step is at the end
        text = f"{text[: _LONGEST_ERROR // 2]} [...] {text[-_LONGEST_ERROR // 2 :]}"
    text = f"error: {text}"
    if sys.stderr.isatty():
        text = "\n".join(_wrapped(text, shutil.get_terminal_size().columns))
    print(text, file=sys.stderr)


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]]


class Output:
    """What a command shows. Leaving it as a context puts the cursor on a fresh line, whatever happened.

    quiet: nothing but answers and documents. folds: of reasoning, only how long it took; may be changed at any time.
    """

    folds = False

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._cleans = sys.stdout.isatty()  # a pipe gets what the model wrote, byte for byte
        live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._live = live and not quiet
        self._dims = live and not os.environ.get("NO_COLOR")
        self._status = False  # a status line is on the screen
        self._read: list[tuple[int, float]] = []  # tokens of the prompt that is being read, and when
        self._thinking_since: float | None = None  # when the open thinking block was begun
        self._thought = ""  # its last piece
        self._answering = False  # an answer has begun and not ended
        self._held = ""  # newlines that end the answer so far

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self.settle()

    def settle(self) -> None:
        """End what an error or Ctrl-C cut short."""
        self.clear_status()
        if self._answering or self._thinking_since is not None:
            self.end_answer()

    def answer(self, text: str) -> None:
        """A piece of the answer, shown at once."""
        self.clear_status()
        self._end_thinking()
        self._answering = True
        if self._cleans:
            text = printable(text)
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        sys.stdout.write(shown)
        sys.stdout.flush()

    def go_on(self, text: str) -> None:
        """The next answer goes on where this text, which was shown, was cut."""

    def call(self, call: dict[str, Any]) -> None:
        """A call of a tool that is part of the answer, as a line of JSON."""
        self.answer(("\n" if self._answering else "") + as_json(call) + "\n")

    def end_answer(self) -> None:
        """Exactly one newline ends an answer."""
        self.answer("")
        self._answering, self._held = False, ""
        sys.stdout.write("\n")
        sys.stdout.flush()

    def document(self, value: Any) -> None:
        """The one JSON document of a command."""
        self.clear_status()
        sys.stdout.write(as_json(value, indent=2) + "\n")
        sys.stdout.flush()

    def text(self, text: str = "") -> None:
        """A line on stdout as it is, however long."""
        self.clear_status()
        print(printable(text))

    def line(self, value: Any) -> None:
        """One of many JSON documents, on a line of its own."""
        self.clear_status()
        sys.stdout.write(as_json(value) + "\n")
        sys.stdout.flush()

    def table(self, rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> None:
        """Rows of as many cells; `numbers` are the columns to align right, which are whole wherever there is room.

        They are folded into the width of the screen; in a pipe only where COLUMNS tells one, or a row is a paragraph.
        """
        self.clear_status()
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        whole = not self._cleans and len(rows[0]) > 1 and "COLUMNS" not in os.environ
        console = Console(file=sys.stdout, no_color=True, width=_WIDEST if whole else None)
        solid = sum(max(len(row[column]) for row in rows) for column in numbers)
        solid += _FEWEST * (len(rows[0]) - len(numbers)) + len(rows[0]) - 1
        table = Table(box=None, show_header=False, pad_edge=False)
        for column in range(len(rows[0])):
            right = column in numbers
            table.add_column(
                justify="right" if right else "left", overflow="fold", no_wrap=right and solid <= console.width
            )
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        with console.capture() as page:
            console.print(table)
        for line in page.get().splitlines():
            print(line.rstrip())  # Rich fills columns with spaces

    def bar(self, segments: Sequence[Segment]) -> None:
        """A line of a picture on stdout, in colour where that is a terminal that shows it."""
        self.clear_status()
        text = [plain if _narrow(sys.stdout) else wide for wide, plain, _ in segments]
        if not self._cleans or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            print("".join(text).rstrip())
            return
        from rich.console import Console
        from rich.text import Text

        styled = Text.assemble(*((piece, style) for piece, (_, _, style) in zip(text, segments, strict=True)))
        styled.rstrip()
        Console(file=sys.stdout, highlight=False).print(styled, soft_wrap=True)

    def thinking(self, text: str) -> None:
        """A piece of the model's reasoning."""
        if self._thinking_since is None:
            self._thinking_since = time.perf_counter()
        if self.folds:
            self.status("thinking ...")
        else:
            self._note(text)
            self._thought = text

    def _end_thinking(self) -> None:
        if self._thinking_since is None:
            return
        if self.folds:
            self.note(self._folded())
        else:
            self._note("" if self._thought.endswith("\n") else "\n")
        self._thinking_since = None

    def _folded(self) -> str:
        assert self._thinking_since is not None
        return f"Thought for {duration(time.perf_counter() - self._thinking_since)}. /think show unfolds it."

    def note(self, text: str) -> None:
        """A line about what goes on, or several; folded between words where they are shown on a terminal."""
        if self._live:
            text = "\n".join(_wrapped(text, shutil.get_terminal_size().columns))
        self._note(text + "\n")

    def recall(self, text: str) -> None:
        """What was said earlier, where a person reads it."""
        if self._live:
            self.note(text)

    def notes(self, rows: Sequence[tuple[str, str]]) -> None:
        """Two columns, the second folded into the width of the screen."""
        left = max((len(first) for first, _ in rows), default=0) + 2
        width = max(20, shutil.get_terminal_size().columns - left)
        for first, second in rows:
            lines = _wrapped(second, width)
            self.note("\n".join(f"{first if i == 0 else '':{left}}{line}".rstrip() for i, line in enumerate(lines)))

    def ask(self, question: str) -> bool:
        """Whether the line that is typed says yes."""
        self.clear_status()
        print(printable(question), "[y/N]", end=" ", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def status(self, text: str) -> None:
        """What takes time just now, on a line that the next output replaces. Only on a terminal."""
        if self._live:
            self._status = True
            width = shutil.get_terminal_size().columns - 1  # a second line would not be replaced
            sys.stderr.write(f"\r\x1b[K{printable(text)[:width]}")
            sys.stderr.flush()

    def gauge(self, done: int, total: int, width: int) -> str:
        """A bar for `status` of so many columns, full to where something is done."""
        filled = min(width, width * done // max(total, 1))
        full, empty = ("#", ".") if _narrow(sys.stderr) else ("█", "░")
        return full * filled + empty * (width - filled)

    def milestone(self, text: str) -> None:
        """A line about what has been reached, where no status line shows it."""
        if not self._live:
            self.note(text)

    def trouble(self, text: str) -> None:
        """What goes wrong and is tried again: on the status line, and where there is none on a line of its own."""
        self.milestone(text)
        self.status(text)

    def loading(self, name: str) -> Callable[[int, int], None]:
        """Tell that a model is loaded, and from half a second on how much of it is: the face of `load`'s progress."""
        begun = shown = time.perf_counter()
        self.status(f"loading {name}")

        def progress(done: int, total: int) -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - begun >= _SOON and now - shown >= _PAUSE:
                shown = now
                left = f"{duration((total - done) * (now - begun) / done)} left" if done else ""
                self._bar("loading", done, total, f"{100 * done // max(1, total)}% of {name} {left}".rstrip())

        return progress

    def reading(self, done: int, total: int) -> None:
        """How much of a prompt is read; the face of `Session.feed`'s progress. The first call begins the time."""
        now = time.perf_counter()
        if done >= total:
            self._read = []
            self.clear_status()
        elif done == 0 or not self._read:
            self._read = [(done, now)]
            self._bar("reading", done, total, f"{done}/{total}")
        else:
            self._read.append((done, now))
            rate = done / max(now - self._read[0][1], 1e-6)
            left = duration(_seconds_left(self._read, total))
            self._bar("reading", done, total, f"{done}/{total} {decimal(rate)} tok/s, {left} left")

    def _bar(self, what: str, done: int, total: int, text: str) -> None:
        width = min(20, shutil.get_terminal_size().columns - len(f"{what} []  {text}"))
        filled = width * min(done, total) // max(1, total)
        self.status(f"{what} [{'#' * filled}{'.' * (width - filled)}] {text}" if width >= 5 else f"{what} {text}")

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

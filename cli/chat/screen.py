"""Answers on a terminal: Markdown while it streams, and reasoning that folds when it is over."""

from __future__ import annotations

import re
import sys
import time
from itertools import pairwise

from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.text import Text

from numoe.cli.output import Output, printable

_STYLE = re.compile(r"\x1b\[[\d;]*m")
_PAUSE = 0.05  # seconds between two paintings, at least
_SHARE = 5  # and so many times what the last one took, for a long table can take a while


class Screen(Output):
    """An Output whose answers are rendered as Markdown; stdout must be a terminal."""

    folds = True

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self._page = _Page()
        self._markdown = ""  # of the answer, what is not final yet
        self._reasoning = ""
        self._begun = False  # a block of this answer is final

    def answer(self, text: str) -> None:
        self.clear_status()
        self._end_thinking()
        self._answering = True
        self._markdown += printable(text)
        if self._page.rested:
            self._paint()

    def _paint(self) -> None:
        *final, self._markdown = _blocks(self._markdown)
        for block in final:  # each on its own, so that the lines between them do not depend on the time they came
            self._page.paint(_markdown(block), apart=self._begun)
            self._page.keep()
            self._begun = True
        self._page.paint(_markdown(self._markdown), apart=self._begun)

    def end_answer(self) -> None:
        self.answer("")
        self._paint()
        self._page.keep()
        self._answering, self._markdown, self._begun = False, "", False

    def thinking(self, text: str) -> None:
        self.clear_status()
        if self._thinking_since is None:
            self._thinking_since = time.perf_counter()
        self._reasoning += printable(text)
        if not self._quiet and self._page.rested:
            self._page.paint(Text(self._reasoning, "dim"))

    def _end_thinking(self) -> None:
        if self._thinking_since is None:
            return
        folded = self._folded() if self.folds else self._reasoning.rstrip()
        self._page.paint(Text("" if self._quiet else folded, "dim"))
        self._page.keep()
        self._thinking_since, self._reasoning = None, ""


class _Page:
    """The last lines of the screen, painted over while they change. Only what differs is written, so nothing flickers.

    What does not fit on the screen is left out at the top until the lines are kept.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self._shown: list[str] = []
        self._all: list[str] = []
        self._next = 0.0

    @property
    def rested(self) -> bool:
        """Whether the last painting was long enough ago."""
        return time.perf_counter() >= self._next

    def paint(self, page: RenderableType, apart: bool = False) -> None:
        """Show this in place of what is shown; `apart` from what is above by an empty line."""
        begun = time.perf_counter()
        with self._console.capture() as captured:
            self._console.print(page)
        lines = [line.rstrip(" ") for line in captured.get().split("\n")]
        said = [i for i, line in enumerate(lines) if _STYLE.sub("", line).strip()]
        self._all = [""] * apart + lines[said[0] : said[-1] + 1] if said else []
        self._write(self._all[-max(1, self._console.height - 1) :])
        now = time.perf_counter()
        self._next = now + max(_PAUSE, _SHARE * (now - begun))

    def keep(self) -> None:
        """Leave what was painted on the screen, all of it, and go on below."""
        self._write(self._all)
        self._shown, self._all = [], []

    def _write(self, lines: list[str]) -> None:
        pairs = zip(self._shown, lines, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._shown), len(lines)))
        up = len(self._shown) - same
        sys.stdout.write((f"\x1b[{up}A\x1b[J" if up else "") + "".join(f"{line}\n" for line in lines[same:]))
        sys.stdout.flush()
        self._shown = lines


def _markdown(text: str) -> Markdown:
    """Markdown in the terminal's own colours, in which no line break and no tag of the model's gets lost."""
    page = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
    for token in page.parsed:
        if token.type == "html_block":
            token.type, token.info = "fence", "html"
        for part in token.children or ():
            if part.type == "softbreak":
                part.type = "hardbreak"
            elif part.type == "html_inline":
                part.type = "text"
    return page


def _blocks(text: str) -> list[str]:
    """The blocks of Markdown in turn, of which no further text can change any but the last."""
    starts = [token.map[0] for token in _markdown(text).parsed if token.level == 0 and token.map]
    lines = text.split("\n")
    bounds = [0, *sorted(set(starts[1:]) - {0}), len(lines)]
    return ["\n".join(lines[a:b]) for a, b in pairwise(bounds)]

"""Answers on a terminal: Markdown while it streams, and reasoning that folds when it is over."""

from __future__ import annotations

import os
import re
import sys
import time
from itertools import pairwise
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.escape import escape
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from numoe.cli.output import Output, printable
from numoe.cli.setting import Background

_STYLE = re.compile(r"\x1b\[[\d;]*m")
_MATH = re.compile(r"\\\(.*?\\\)|\\\[.*?\\\]|\\[()\[\]]", re.DOTALL)
_CODE_STYLES = {Background.DARK: "bold cyan", Background.LIGHT: "bold blue"}  # in the terminal's own colours
_PAUSE = 0.05  # seconds between two paintings, at least
_SHARE = 5  # and so many times what the last one took, for a long table can take a while


class Screen(Output):
    """An Output whose answers are rendered as Markdown; stdout must be a terminal."""

    folds = True

    def __init__(self, quiet: bool = False, background: Background = Background.AUTO) -> None:
        super().__init__(quiet)
        if background is Background.AUTO:
            background = _background()
        self._page = _Page(_CODE_STYLES[background])
        self._code_theme = f"ansi_{background.value}"
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

    def go_on(self, text: str) -> None:
        block = _blocks(printable(text))[-1]
        fence = _fence(block)
        lines = block.rstrip("\n").split("\n")
        if fence and not (len(lines) > 1 and re.fullmatch(rf"\s*{fence.markup}+\s*", lines[-1])):
            # A fence that is open, and the line that the cut went through, so that all of it is code.
            last = block.split("\n")[-1] if len(lines) > 1 else ""
            self._markdown = f"{lines[0]}\n{last}"

    def _paint(self) -> None:
        *final, self._markdown = _blocks(self._markdown)
        for block in final:  # each on its own, so that the lines between them do not depend on the time they came
            self._page.paint(self._rendered(block), apart=self._begun)
            self._page.keep()
            self._begun = True
        self._page.paint(self._rendered(self._markdown), apart=self._begun)

    def _rendered(self, block: str) -> RenderableType:
        """A block as it is shown: code just as it is to be copied, without anything before or after its lines."""
        fence = _fence(block)
        if fence is None:
            return _markdown(block, self._code_theme)
        words = fence.info.split()
        syntax = Syntax("", words[0] if words else "text", theme=self._code_theme, background_color="default")
        code = syntax.highlight(fence.content.rstrip("\n"))
        code.rstrip()
        code.no_wrap = True  # the terminal folds it, so that a copy has it in one
        return code

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

    What does not fit on the screen is left out at the top until the lines are kept. Lines that are longer than the
    screen is wide, as code can be and all can when it gets narrower, are folded by the terminal: as many rows count.
    """

    def __init__(self, code_style: str) -> None:
        table = code_style.removeprefix("bold ")
        names = {"code": code_style, "code_block": code_style, "table.header": table, "table.border": table}
        theme = Theme({f"markdown.{name}": style for name, style in names.items()})
        self._console = Console(file=sys.stdout, highlight=False, theme=theme)
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
            self._console.print(page, soft_wrap=isinstance(page, Text) and bool(page.no_wrap))
        lines = [line.rstrip(" ") for line in captured.get().split("\n")]
        said = [i for i, line in enumerate(lines) if _STYLE.sub("", line).strip()]
        self._all = [""] * apart + lines[said[0] : said[-1] + 1] if said else []
        self._write(self._last(self._all))
        now = time.perf_counter()
        self._next = now + max(_PAUSE, _SHARE * (now - begun))

    def keep(self) -> None:
        """Leave what was painted on the screen, all of it, and go on below."""
        self._write(self._all)
        self._shown, self._all = [], []

    def _write(self, lines: list[str]) -> None:
        pairs = zip(self._shown, lines, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._shown), len(lines)))
        up = sum(map(self._rows, self._shown[same:]))
        sys.stdout.write((f"\x1b[{up}A\x1b[J" if up else "") + "".join(f"{line}\n" for line in lines[same:]))
        sys.stdout.flush()
        self._shown = lines

    def _last(self, lines: list[str]) -> list[str]:
        """The last lines, as many as the screen has room for."""
        rows, start = 0, len(lines)
        while start and (start == len(lines) or rows + self._rows(lines[start - 1]) < self._console.height):
            start -= 1
            rows += self._rows(lines[start])
        return lines[start:]

    def _rows(self, line: str) -> int:
        """The rows that a line takes on the screen as wide as it is now."""
        return max(1, -(-cell_len(_STYLE.sub("", line)) // self._console.width))


def _background() -> Background:
    """What the terminal says of its background; most say nothing, and are dark."""
    return Background.LIGHT if os.environ.get("COLORFGBG", "").endswith((";7", ";15")) else Background.DARK


def _literal_math(state: StateInline, silent: bool) -> bool:
    """Of \\( ... \\) and \\[ ... \\] nothing is taken for Markdown; other backslashes escape."""
    found = _MATH.match(state.src, state.pos)
    if found is None:
        return escape(state, silent)
    if not silent:
        state.pending += found[0]
    state.pos = found.end()
    return True


_PARSER = MarkdownIt().enable(["strikethrough", "table"])
_PARSER.inline.ruler.at("escape", _literal_math)


class _Heading(Heading):
    """A heading on the left, where the text begins."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.text


class _Markdown(Markdown):
    elements: ClassVar = Markdown.elements | {"heading_open": _Heading}


def _markdown(text: str, code_theme: str = "ansi_dark") -> Markdown:
    """Markdown in the terminal's own colours, in which no line break and no tag of the model's gets lost."""
    page = _Markdown("", code_theme=code_theme, hyperlinks=False)
    page.parsed = _PARSER.parse(text)
    for token in page.parsed:
        if token.type == "html_block":
            token.type, token.info = "fence", "html"
        for part in token.children or ():
            if part.type == "softbreak":
                part.type = "hardbreak"
            elif part.type == "html_inline":
                part.type = "text"
    return page


def _fence(block: str) -> Token | None:
    """The code of a block that is nothing else."""
    tokens: list[Any] = _markdown(block).parsed
    return tokens[0] if len(tokens) == 1 and tokens[0].type == "fence" and not block.startswith(" ") else None


def _blocks(text: str) -> list[str]:
    """The blocks of Markdown in turn, of which no further text can change any but the last."""
    starts = [token.map[0] for token in _markdown(text).parsed if token.level == 0 and token.map]
    lines = text.split("\n")
    bounds = [0, *sorted(set(starts[1:]) - {0}), len(lines)]
    return ["\n".join(lines[a:b]) for a, b in pairwise(bounds)]

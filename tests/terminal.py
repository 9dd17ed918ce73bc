"""`numoe chat` at a terminal of fixed size, with answers that a test wants."""

import json
import os
import re
import signal
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

pexpect = pytest.importorskip("pexpect", exc_type=ImportError)
pyte = pytest.importorskip("pyte", exc_type=ImportError)
if not hasattr(pexpect, "spawn"):
    pytest.skip("pexpect has no pseudo-terminals here", allow_module_level=True)

# `numoe` with a model that says what the test wants, one answer after the other; "..." at an end goes on for ever.
SCRIPTED = """
import itertools, json, sys
from numoe.cli.main import main
from numoe.engine.measure import busy
from numoe.engine.text import sample
from numoe.engine.home import locate
from numoe.engine.text.tokenizer import load_tokenizer

answers = iter(json.loads(sys.argv.pop(1)))
tokenizer = load_tokenizer(locate("tiny"))

def choose(self, logits, recent_ids=(), *rest):
    if not hasattr(self, "script"):
        answer = next(answers)
        after = itertools.cycle(tokenizer.encode(" on and on")) if answer.endswith("...") else tokenizer.eos_ids
        self.script = itertools.chain(tokenizer.encode(answer.removesuffix("...")), after)
    return next(self.script)

sample.Sampler.choose = choose
busy.taken_by_others = lambda *samples: 0.0
main(sys.argv[1:])
"""


class Terminal:
    """A screen, and `numoe chat` on it. `raw` is all that was ever written to it."""

    def __init__(
        self,
        home: Path,
        *arguments: str,
        answers: list[str] | None = None,
        columns: int = 80,
        before: str = "",
        **env: str,
    ):
        """`before`: what the program does first."""
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "NUMOE_HOME": str(home)}
        environment.pop("COLUMNS", None)
        program = ["-m", "numoe.cli"] if answers is None else ["-c", before + SCRIPTED, json.dumps(answers)]
        self.process = pexpect.spawn(
            sys.executable,
            [*program, "chat", *arguments],
            cwd=str(home),
            env=environment | env,
            dimensions=(24, columns),
            encoding="utf-8",
        )
        self.raw = ""
        self._screen = pyte.Screen(columns, 24)
        self._stream = pyte.Stream(self._screen)
        self.wait(r"/help lists\s+the\s+commands\.[\s\S]*\n>$")

    @property
    def screen(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def styled(self) -> str:
        return styled(self._screen)

    def wait(self, pattern: str) -> "Terminal":
        """Read until the screen matches."""
        while not re.search(pattern, self.screen):
            try:
                text = self.process.read_nonblocking(65536, timeout=60)
            except (pexpect.TIMEOUT, pexpect.EOF):
                raise AssertionError(f"{pattern!r} did not appear on\n{self.screen}") from None
            self.raw += text
            self._stream.feed(text)
        return self

    def send(self, keys: str) -> "Terminal":
        self.process.send(keys)
        return self

    def clear(self) -> None:
        """Forget what the screen shows."""
        self._screen.reset()
        self.raw = ""

    def paste(self, text: str) -> "Terminal":
        return self.send(f"\x1b[200~{text}\x1b[201~")

    def ask(self, line: str, until: str = r"context \d+/\d+\n>$") -> str:
        """Put in a line on a cleared screen, and give the screen after its answer."""
        self.clear()
        return self.paste(line).send("\r").wait(until).screen

    def left(self) -> int | None:
        """The exit code."""
        self.process.expect(pexpect.EOF, timeout=60)
        self.process.wait()
        return self.process.exitstatus


def styled(screen: Any) -> str:
    """A screen with the style of each stretch of text that has one: {bold cyan|words}."""
    lines = []
    for y in range(screen.lines):
        row = [screen.buffer[y][x] for x in range(screen.columns)]
        runs = groupby(row, lambda cell: _style(cell) if cell.data.strip() else "")
        parts = ((style, "".join(cell.data for cell in cells)) for style, cells in runs)
        lines.append("".join(f"{{{style}|{text}}}" if style else text for style, text in parts).rstrip())
    return "\n".join(lines).rstrip()


def _style(cell: Any) -> str:
    colours = [cell.fg] * (cell.fg != "default") + [f"on {cell.bg}"] * (cell.bg != "default")
    names = ("bold", "italics", "underscore", "reverse")
    return " ".join([*(name for name in names if getattr(cell, name)), *colours])


def end(process: pexpect.spawn) -> None:
    """Kill a process and wait until it is gone, which `close` alone does for a tenth of a second."""
    process.kill(signal.SIGKILL)
    process.wait()
    process.close()

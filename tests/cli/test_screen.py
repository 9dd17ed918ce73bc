"""Markdown as it streams: the screen in the end is the same, however the answer came."""

import io
import re
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.cli.chat import screen as screens
from numoe.cli.chat.screen import Screen
from numoe.cli.output import Output
from numoe.cli.pull import _Display
from numoe.cli.setting import Background
from numoe.engine.pull import Progress

pyte = pytest.importorskip("pyte", exc_type=ImportError)

ANSWER = """Some *words* that are
on two lines, with <b>tags</b> and a [link](http://x.y).

## A heading

| a | b |
|---|---|
| 1 | a cell of several words |
| 2 | x |

1. first
2. second
   - inner

```python
for i in range(3):
    print(i)
```

> A quotation \u2028 with a strange break.

<div>
html
</div>

The last."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(
    pieces: list[str],
    thoughts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    goes_on: str = "",
    height: int = 8,
    **options: Any,
) -> str:
    """What a terminal of so many lines and 40 columns gets; `goes_on`: of the answer, what was shown before."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(screens, "_PAUSE", 0.0)
        patch.setattr(screens, "_SHARE", 0)
        patch.setattr("time.perf_counter", lambda: 1.0)
        patch.setenv("COLUMNS", "40")
        patch.setenv("LINES", str(height))
        with Screen(**options) as output:
            if goes_on:
                output.go_on(goes_on)
            for thought in thoughts:
                output.thinking(thought)
            for piece in pieces:
                output.answer(piece)
            output.end_answer()
    return terminal.getvalue()


def shown(pieces: list[str], thoughts: list[str], monkeypatch: pytest.MonkeyPatch, goes_on: str = "") -> list[str]:
    """All lines that ever were on that terminal."""
    screen = pyte.HistoryScreen(40, 8, history=1000)
    pyte.Stream(screen).feed(written(pieces, thoughts, monkeypatch, goes_on).replace("\n", "\r\n"))
    above = ["".join(line[x].data for x in range(40)) for line in screen.history.top]
    return [line.rstrip() for line in (*above, *screen.display)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(0, len(ANSWER)), max_size=40))
def test_the_same_lines_however_the_answer_is_cut(cuts: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [0, *sorted(cuts), len(ANSWER)]
    pieces = [ANSWER[a:b] for a, b in pairwise(ends)]
    lines = [line for line in shown(pieces, [], monkeypatch) if line]
    assert lines == [line for line in shown([ANSWER], [], monkeypatch) if line]
    assert lines[0] == "Some words that are"
    assert "link (http://x.y)" in " ".join(lines) and "<b>tags</b>" in " ".join(lines) and "<div>" in " ".join(lines)
    assert lines[-1] == "The last."


def test_reasoning_longer_than_the_screen_leaves_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    thoughts = [f"thought {n}\n" for n in range(30)]
    lines = [line for line in shown(["yes"], thoughts, monkeypatch) if line]
    assert lines == ["Thought for 0 s. /think show unfolds it.", "yes"]
    monkeypatch.setattr(Screen, "folds", False)
    assert [line for line in shown(["yes"], thoughts, monkeypatch) if line] == [*map(str.strip, thoughts), "yes"]


def test_control_characters_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line for line in shown(["a\x1b[2Jb\x9b1mc"], [], monkeypatch) if line] == [r"a\x1b[2Jb\x9b1mc"]


CODE = """for x in y:
    if x:
        print("a line that is longer than the screen is wide")  # so the terminal folds it

# no heading
    done"""


@pytest.mark.parametrize("fence", ["```python", "```", "~~~~ sh -e"])
def test_code_is_what_a_copy_of_it_runs(fence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"So:\n\n{fence}\n{CODE}\n{fence[:4].rstrip('p')}\n\nThat is all."
    plain = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", written([text], [], monkeypatch))
    assert f"\n{CODE}\n" in plain


@pytest.mark.parametrize("cut", range(len("```python\n"), len(f"```python\n{CODE}"), 7))
def test_an_answer_that_was_cut_within_code_goes_on_as_code(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"```python\n{CODE}\n```\n\n# A heading"
    after = re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", written([text[cut:]], [], monkeypatch, goes_on=text[:cut], height=40))
    *lines, heading = (line for line in after.split("\n") if line)
    assert heading.strip() == "A heading"
    # The line that the cut went through is there again, as a whole.
    assert lines == [line for line in CODE[text[:cut].rfind("\n") + 1 - len("```python\n") :].split("\n") if line]


@pytest.mark.parametrize("text", ["Words.", "```\ncode\n```\n", "", "```x"])
def test_an_answer_that_was_cut_elsewhere_goes_on_as_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.strip() for line in shown(["**bold**"], [], monkeypatch, goes_on=text) if line]
    assert lines == (["**bold**"] if text == "```x" else ["bold"])


@pytest.mark.parametrize(
    "math", [r"\(a_1 * b * c_1\)", r"\[ \frac{1}{2} \]", r"\(", r"a \] b", r"\[x\](y)", r"\( <b> \)"]
)
def test_formulas_stay_as_they_are(math: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line for line in shown([f"So {math} is, and \\*this\\* too."], [], monkeypatch) if line] == [
        f"So {math} is, and *this* too."
    ]


def test_a_window_that_gets_narrower_leaves_no_line_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terminals fold what they show anew: a paragraph of 4 lines takes 6 rows of half the width, and 1 is the same."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(screens, "_PAUSE", 0.0)
    monkeypatch.setattr(screens, "_SHARE", 0)
    monkeypatch.setenv("LINES", "30")
    monkeypatch.setenv("COLUMNS", "40")
    output = Screen()
    output.answer("word " * 20)
    first = terminal.getvalue().split("\n")[:-1]
    output._page._console.width = 20
    output.answer("more ")
    rows = sum(max(1, -(-len(line) // 20)) for line in first)
    assert len(first) < rows and f"\x1b[{rows}A\x1b[J" in terminal.getvalue()


@pytest.mark.parametrize(
    ("options", "environment", "style"),
    [
        ({}, "", "1;36"),
        ({}, "0;15", "1;34"),
        ({}, "15;0", "1;36"),
        ({"background": Background.LIGHT}, "15;0", "1;34"),
        ({"background": Background.DARK}, "0;15", "1;36"),
    ],
)
def test_colours_are_those_of_the_terminal_without_a_background(
    options: dict[str, Any], environment: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORFGBG", environment)
    text = written(["A `word`.\n\n```python\nx = 1\n```\n"], [], monkeypatch, **options)
    assert f"\x1b[{style}mword\x1b[0m" in text
    assert not re.search(r"\x1b\[[\d;]*\b(4[0-7]|48|10[0-7])\b", text)  # no backgrounds


@pytest.mark.parametrize("level", range(1, 7))
def test_headings_stand_on_the_left(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    assert "Sheep" in re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", written([f"{'#' * level} Sheep\n"], [], monkeypatch)).split(
        "\n"
    )


def test_a_pull_tells_its_speed_once_it_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 5.0, 6.0])
    monkeypatch.setattr("numoe.cli.pull.time.monotonic", lambda: next(seconds))
    lines: list[str] = []
    output = Output()
    monkeypatch.setattr(output, "status", lines.append)
    display = _Display(output)
    for received in (10**6, 3 * 10**6):
        display.show(Progress(0, 1, received, 10**7, 0, 10**7, arriving=1))
    first, second = lines
    assert first.endswith("1 of 10 MB") and "3 of 10 MB, 2 MB/s" in second


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (80, "shard 12/46, 57.2 of 160 GB, 1.1 GB/s, 13 min left, converting 11"),
        (60, "shard 12/46, 57.2 of 160 GB, 1.1 GB/s, 13 min left"),
        (40, "57.2 of 160 GB, 13 min left"),
        (20, "57.2 of 160 GB"),
    ],
)
def test_a_pull_has_a_bar_at_every_width(monkeypatch: pytest.MonkeyPatch, columns: int, told: str) -> None:
    display = _Display(Output())
    display._first, display._since = Progress(0, 46, 0, 160 * 10**9, 0, 160 * 10**9, arriving=1), 0.0
    monkeypatch.setattr(display, "_speed", lambda *_: 1.1e9)
    at = Progress(11, 46, 572 * 10**8, 160 * 10**9, 5 * 10**10, 160 * 10**9, arriving=12, converting=11)
    bar, _, line = display._line(at, 432.0, columns - 1).partition(" ")
    assert line == told and 4 <= len(bar) < columns - len(line) - 1 and set(bar) <= set("█░#.")

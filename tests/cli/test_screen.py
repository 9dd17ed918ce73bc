"""Markdown as it streams: the screen in the end is the same, however the answer came."""

import io
import sys
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.cli.chat import screen as screens
from numoe.cli.chat.screen import Screen

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


def shown(pieces: list[str], thoughts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All lines that ever were on a terminal of 8 lines and 40 columns."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(screens, "_PAUSE", 0.0)
        patch.setattr(screens, "_SHARE", 0)
        patch.setattr("time.perf_counter", lambda: 1.0)
        patch.setenv("COLUMNS", "40")
        patch.setenv("LINES", "8")
        with Screen() as output:
            for thought in thoughts:
                output.thinking(thought)
            for piece in pieces:
                output.answer(piece)
            output.end_answer()
    screen = pyte.HistoryScreen(40, 8, history=1000)
    pyte.Stream(screen).feed(terminal.getvalue().replace("\n", "\r\n"))
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

"""Pictures: of memory and speed, and of what caches make of a trace; on the screen, as SVG and as PNG."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from machines import a_machine, keep

from numoe.cli.charts import Chart, Heat, Line
from numoe.cli.output import bar
from numoe.cli.settings import with_bare

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A trace of two layers, in a NUMOE_HOME with a measured machine."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    keep(replace(a_machine(), read_bytes_per_s={str(1 << power): 1e9 for power in range(16, 25)}))
    lines = ["# 8 routed experts", *(f"{at} {layer} {at % 2} 3" for at in range(9) for layer in (1, 2))]
    (tmp_path / "trace").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "trace")


@pytest.mark.parametrize("way", ["fit", "replay"])
@pytest.mark.parametrize("width", ["80", "40"])
def test_charts_are_on_the_screen(
    way: str, width: str, trace: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    asked = ["fit", "tiny", "--ram", "1GB"] if way == "fit" else ["bench", "--replay", trace]
    plain = command(*asked)
    for options in (["--chart"], ["--chart", "-"]):
        code, out, err = command(*asked, *options)
        drawn = out.removeprefix(plain[1])
        assert (code, err) == (0, "") and out.startswith(plain[1])
        assert max(map(len, drawn.splitlines())) <= int(width)
        wanted = ("memory", "tokens a second", "--ram allows", "tokens of context", "at best")
        for words in wanted if way == "fit" else ("requests that find", "how often", "lru", "belady", "layer 2│▓▒ █"):
            assert words in drawn
        assert drawn.count("●") > 10 or way == "replay"


@pytest.mark.parametrize("kind", ["svg", "PNG"])
def test_charts_are_files_by_their_ending(kind: str, trace: str, command: Run, tmp_path: Path) -> None:
    for number, asked in enumerate((["fit", "tiny", "--json", "--ram", "1GB"], ["bench", "--replay", trace])):
        path = tmp_path / f"{number}.{kind}"
        code, out, err = command(*asked, "--chart", str(path))
        assert (code, out) == (0, command(*asked)[1]) and str(path) in err
        if kind == "svg":
            root = ET.fromstring(path.read_text())
            texts = "".join(root.itertext())
            assert ("tokens a second" if number == 0 else "belady") in texts
            assert len(root.findall("{*}polyline")) > 10
        else:
            from PIL import Image

            with Image.open(path) as image:
                assert image.format == "PNG" and len(image.getcolors(1 << 24) or []) > 3


def test_charts_that_cannot_be_drawn_are_refused_first(
    trace: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (["fit", "tiny"], ["bench", "--replay", trace]):
        code, out, err = command(*asked, "--chart", str(tmp_path / "x.jpg"))
        assert code and out == "" and "end it in .svg or .png" in " ".join(err.split())
        code, out, err = command(*asked, "--json", "--chart")
        assert (code, out) == (2, "") and "--chart a file" in " ".join(err.split())
        code, _, err = command(*asked, "--chart", str(tmp_path / "none" / "x.svg"))
        assert code == 2 and "/none to put x.svg into; make it first" in err and err.count("\n") == 1
        monkeypatch.setitem(__import__("sys").modules, "PIL", None)
        code, _, err = command(*asked, "--chart", str(tmp_path / "x.png"))
        assert code == 1 and "pip install pillow" in err
    assert command("bench", "tiny", "--chart")[0] == 2


def test_points_lie_where_their_figures_say() -> None:
    chart = Chart("", "", [Line("a", [(1, 0), (100, 8)]), Line("b", [(10, 4)])], log=True)
    assert [chart.at(*point) for line in chart.lines for point in line.points] == [(0, 0), (1, 1), (0.5, 0.5)]
    assert chart.tick(0.5) == pytest.approx(10)
    flat = Chart("", "", [Line("a", [(3, 0)])])
    assert flat.at(3, 0) == (0, 0)
    assert Heat("", "", []).rows == []


def test_a_bar_is_as_long_as_its_parts_are_large() -> None:
    parts = [(amount, sign, sign, "") for amount, sign in ((50, "a"), (25, "b"), (1, "c"), (24, "d"))]
    assert "".join(wide for wide, _, _ in bar(parts, 20)) == "a" * 10 + "b" * 5 + "d" * 5
    assert bar([], 20) == [] and "".join(wide for wide, _, _ in bar([(0, "a", "a", "")], 20)) == ""


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        ("fit m --chart", "fit m --chart -"),
        ("fit --chart m", "fit --chart - m"),
        ("fit --chart x.svg m", "fit --chart x.svg m"),
        ("fit m --chart - --json", "fit m --chart - --json"),
        ("run m -- --chart x", "run m -- --chart x"),
        ("run -- -- --chart", "run -- -- --chart"),
        ("run m --ray", "run m --ray local"),
        ("run --ray m:int4 What?", "run --ray local m:int4 What?"),
        ("run --ray ray://head:10001 m", "run --ray ray://head:10001 m"),
        ("run m --ray 10.0.0.1:6379", "run m --ray 10.0.0.1:6379"),
    ],
)
def test_options_that_need_no_value_have_one(args: str, meant: str) -> None:
    assert with_bare(args.split()) == meant.split()


@pytest.mark.parametrize("width", ["80", "40"])
def test_colours_are_for_terminals_that_show_them(
    width: str, trace: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["fit", "tiny", "--ram", "1GB", "--chart"]
    monkeypatch.setenv("COLUMNS", width)
    plain = command(*asked)[1]
    assert "\x1b" not in plain
    monkeypatch.setattr("_pytest.capture.CaptureIO.isatty", lambda stream: True, raising=False)
    for terminal, none, shows in (("xterm-256color", "", True), ("xterm-256color", "1", False), ("dumb", "", False)):
        monkeypatch.setenv("TERM", terminal)
        monkeypatch.setenv("NO_COLOR", none)
        out = command(*asked)[1]
        assert ("\x1b[34m█" in out) == shows
        if terminal != "dumb":  # whose width Rich does not believe
            assert re.sub(r"\x1b\[[\d;]*m", "", out) == plain


def test_a_narrow_encoding_gets_other_signs(trace: str, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numoe.cli.output._narrow", lambda stream: True)
    for asked in (["fit", "tiny", "--ram", "1GB", "--chart"], ["bench", "--replay", trace, "--chart"]):
        assert command(*asked)[1].isascii()

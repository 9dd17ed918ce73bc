"""Pictures of figures: on the screen in letters, or in a file as SVG or PNG."""

from __future__ import annotations

import html
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numoe.cli.output import Output, Segment, decimal
from numoe.quant.errors import InputError, WrongUsage
from numoe.quant.files import require_folder, write_whole

SCREEN = "-"
_ROWS, _COLUMNS = 10, 64  # of a chart on the screen, at most
_MARKS = (("●", "*", "cyan"), ("+", "+", "magenta"), ("○", "o", "yellow"), ("▪", "#", "green"))
_COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7"  # which also those tell apart who see few
_SHADES = " ░▒▓█", " .:*#"
_WIDTH, _HEIGHT = 640, 300  # of a chart in a file, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 44, 58, 48
_LEGEND = 180  # pixels from one line's name to the next
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """Points (x, y) from left to right."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over one quantity."""

    title: str
    over: str
    lines: Sequence[Line]
    log: bool = False
    """Whether each step to the right is a factor."""

    @property
    def lowest(self) -> tuple[float, float]:
        return min(x for line in self.lines for x, _ in line.points), 0.0

    @property
    def highest(self) -> tuple[float, float]:
        points = [point for line in self.lines for point in line.points]
        return max(x for x, _ in points), max(y for _, y in points) or 1.0

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies, from 0 to 1 to the right and up."""
        (left, low), (right, high) = self.lowest, self.highest
        if self.log:
            x, left, right = math.log(x), math.log(left), math.log(right)
        return (x - left) / ((right - left) or 1.0), (y - low) / ((high - low) or 1.0)

    def tick(self, share: float) -> float:
        """What is so far to the right."""
        left, right = self.lowest[0], self.highest[0]
        return left * (right / left) ** share if self.log else left + share * (right - left)


@dataclass(frozen=True)
class Heat:
    """How much there is of something in rows of cells."""

    title: str
    over: str
    rows: Sequence[tuple[str, Sequence[float]]]


def check(where: str | None, json: bool) -> None:
    """Refuse a chart that there is no place for; None: none is asked for.

    Raises:
        WrongUsage: the file is of another kind, there is no folder for it, or standard output has one JSON document
            and no room for it.
    """
    if where == SCREEN and json:
        raise WrongUsage("--json prints one document and no chart; give --chart a file")
    if where not in (None, SCREEN) and Path(str(where)).suffix.lower() not in _SHEETS:
        raise WrongUsage(f"{where} names no kind of picture that numoe draws; end it in .svg or .png")
    if where not in (None, SCREEN):
        require_folder(Path(where))


def draw(output: Output, pictures: Sequence[Chart | Heat], where: str) -> None:
    """Draw all pictures, one below the other; `where` is `SCREEN`, or a file that `check` takes.

    Raises:
        InputError: it cannot be written, or there is nothing to draw PNG with.
    """
    if where == SCREEN:
        for picture in pictures:
            output.text()
            _on_screen(output, picture)
        return
    path = Path(where)
    sheet = _SHEETS[path.suffix.lower()](_WIDTH, _HEIGHT * len(pictures))
    for number, picture in enumerate(pictures):
        _on_sheet(sheet, picture, number * _HEIGHT)
    try:
        write_whole(path, sheet.data())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); choose another place") from None
    output.note(f"The chart is in {path}.")


# ---------------------------------------------------------------------------------------------------- the screen


def _on_screen(output: Output, picture: Chart | Heat) -> None:
    output.table([(picture.title,)])
    width = min(_COLUMNS, shutil.get_terminal_size().columns - 10)
    if isinstance(picture, Heat):
        _heat_on_screen(output, picture, width)
        return
    grid: list[list[Segment]] = [[(" ", " ", "")] * width for _ in range(_ROWS)]
    for number, line in reversed(list(enumerate(picture.lines))):
        for x, y in line.points:
            right, up = picture.at(x, y)
            grid[_ROWS - 1 - round(up * (_ROWS - 1))][round(right * (width - 1))] = _MARKS[number % len(_MARKS)]
    high = picture.highest[1]
    for row, cells in enumerate(grid):
        label = decimal(high * (_ROWS - 1 - row) / (_ROWS - 1)) if row % 3 == 0 else ""
        output.bar([(f"{label:>8}", f"{label:>8}", "dim"), ("│", "|", "dim"), *cells])
    output.bar([(" " * 8 + "└" + "─" * width, " " * 8 + "+" + "-" * width, "dim")])
    output.text(f"{'':9}{_axis(picture, width)}")
    output.text(f"{'':9}{picture.over}")
    for number, line in enumerate(picture.lines):
        output.bar([("  ", "  ", ""), _MARKS[number % len(_MARKS)], (f" {line.name}", f" {line.name}", "")])


def _axis(chart: Chart, width: int) -> str:
    """The figures below a chart."""
    first, middle, last = (_figure(chart.tick(share)) for share in (0, 0.5, 1))
    gap = width - len(first) - len(middle) - len(last)
    return f"{first}{' ' * (gap // 2)}{middle}{' ' * (gap - gap // 2)}{last}" if gap > 1 else f"{first} to {last}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else decimal(value)


def _heat_on_screen(output: Output, heat: Heat, width: int) -> None:
    most = max((value for _, values in heat.rows for value in values), default=0) or 1
    for name, values in heat.rows:
        step = max(1, -(-len(values) // width))  # a cell shows the most of those that it stands for
        cells = [max(values[at : at + step]) / most for at in range(0, len(values), step)]
        levels = [min(4, math.ceil(4 * cell)) for cell in cells]
        wide, plain = ("".join(signs[level] for level in levels) for signs in _SHADES)
        output.bar([(f"{name[:8]:>8}", f"{name[:8]:>8}", "dim"), ("│", "|", "dim"), (wide, plain, "")])
    output.text(f"{'':9}{heat.over}")


# ------------------------------------------------------------------------------------------------------- files


class _Sheet(Protocol):
    """What is drawn on, in pixels from the upper left."""

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None: ...

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None: ...

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """anchor: start, middle or end is at x."""

    def data(self) -> bytes: ...


class _Svg:
    """A sheet that is written as SVG."""

    def __init__(self, width: int, height: int):
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self._parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">']
        self.box(0, 0, width, height, "#ffffff")

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>')

    def data(self) -> bytes:
        return "\n".join([*self._parts, "</svg>", ""]).encode()


class _Png:
    """A sheet that Pillow draws, at twice the size."""

    def __init__(self, width: int, height: int):
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError:
            raise InputError("PNG takes Pillow: `pip install pillow`, or end the file in .svg") from None
        self._image = Image.new("RGB", (2 * width, 2 * height), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._font: Any = ImageFont.load_default(26)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        self._draw.line([(2 * x, 2 * y) for x, y in points], fill=colour, width=2 * width, joint="curve")

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._draw.rectangle((2 * x, 2 * y, 2 * (x + width), 2 * (y + height)), fill=colour)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        at = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        self._draw.text((2 * x, 2 * y), text, fill="black", font=self._font, anchor=at)

    def data(self) -> bytes:
        from io import BytesIO

        made = BytesIO()
        self._image.save(made, "PNG")
        return made.getvalue()


_SHEETS: dict[str, type[_Svg | _Png]] = {".svg": _Svg, ".png": _Png}


def _on_sheet(sheet: _Sheet, picture: Chart | Heat, top: float) -> None:
    """A picture in its strip of a sheet."""
    sheet.text(_LEFT, top + 22, picture.title, "start")
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bottom = top + _TOP + height
    sheet.text(_LEFT + width / 2, bottom + 38, picture.over, "middle")
    if isinstance(picture, Heat):
        _heat_on_sheet(sheet, picture, top + _TOP, width, height)
        return
    for number in range(_TICKS):
        share = number / (_TICKS - 1)
        x, y = _LEFT + share * width, bottom - share * height
        sheet.line([(_LEFT, y), (_LEFT + width, y)], "#dddddd", 1)
        sheet.text(_LEFT - 8, y + 4, decimal(share * picture.highest[1]), "end")
        sheet.text(x, bottom + 18, _figure(picture.tick(share)), "middle")
    for number, line in enumerate(picture.lines):
        colour = _COLOURS[number % len(_COLOURS)]
        at = [picture.at(x, y) for x, y in line.points]
        sheet.line([(_LEFT + right * width, bottom - up * height) for right, up in at], colour, 2)
        x, y = _LEFT + _LEGEND * number, top + 44
        sheet.line([(x, y - 4), (x + 24, y - 4)], colour, 2)
        sheet.text(x + 30, y, line.name, "start")


def _heat_on_sheet(sheet: _Sheet, heat: Heat, top: float, width: float, height: float) -> None:
    most = max((value for _, values in heat.rows for value in values), default=0) or 1
    tall = height / max(1, len(heat.rows))
    every = max(1, -(-16 * len(heat.rows) // int(height)))  # names that have room
    for number, (name, values) in enumerate(heat.rows):
        y, wide = top + number * tall, width / max(1, len(values))
        if number % every == 0:
            sheet.text(_LEFT - 8, y + tall / 2 + 4, name, "end")
        for at, value in enumerate(values):
            shade = [round(255 + (full - 255) * value / most) for full in (0, 0x72, 0xB2)]
            sheet.box(_LEFT + at * wide, y, wide, tall, f"#{bytes(shade).hex()}")

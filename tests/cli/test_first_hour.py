"""The first hour of three users is what it was; `python tests/first_hour.py` writes it anew, for somebody to read."""

from pathlib import Path

import pytest
from first_hour import CASES, GOLDEN

_FAST = {"chatting_80", "chatting_40_no_color", "scripting_80"}


@pytest.mark.parametrize(
    "name", [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_first_hour(name: str, tmp_path: Path) -> None:
    assert CASES[name](tmp_path) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")

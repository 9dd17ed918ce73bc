"""Damaged inputs to every reader: a result, or an InputError of bounded length. `python tests/fuzz` tries many more."""

from pathlib import Path

import pytest
from fuzz.mutate import seeded
from fuzz.targets import targets

from numoe.quant.errors import InputError

CASES, MANY = 60, 2000


def try_all(folder: Path, monkeypatch: pytest.MonkeyPatch, cases: int) -> None:
    monkeypatch.setenv("NUMOE_HOME", str(folder / "home"))
    for target in targets(folder):
        for number in range(cases):
            data = seeded(target.mutate, target.seeds, number)
            try:
                target.read(data)
            except InputError as error:
                assert 0 < len(str(error)) < 2000, (target.name, number)
            except BaseException as error:
                raise AssertionError(f"python tests/fuzz +{number} '{target.name}'") from error


def test_seeds_are_read_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else damage would be tried on nothing."""
    monkeypatch.setenv("NUMOE_HOME", str(tmp_path / "home"))
    for target in targets(tmp_path):
        for seed in target.seeds:
            target.read(seed)  # raises InputError where it is not


def test_damage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_all(tmp_path, monkeypatch, CASES)


@pytest.mark.slow
def test_much_damage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_all(tmp_path, monkeypatch, MANY)

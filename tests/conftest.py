"""Fixtures that several test modules use."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny

from numoe.engine import Model, load


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a golden case, written once."""

    @cache
    def write(case: str) -> Path:
        return tiny.write_checkpoint(case, tmp_path_factory.mktemp("checkpoints") / case)

    return write


@pytest.fixture(scope="session")
def model(checkpoint: Callable[[str], Path]) -> Callable[[str], Model]:
    """A golden case as a loaded model, loaded once; its sessions are the tests' own."""
    return cache(lambda case: load(checkpoint(case)))

"""Two minutes of `python tests/soak.py`. The time of a round is not compared: machines are busy."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_grows() -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert " rounds; " in done.stdout and "grew" not in done.stdout, done.stdout + done.stderr

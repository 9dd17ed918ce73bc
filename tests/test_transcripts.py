"""What the READMEs show is what the commands say."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyte", exc_type=ImportError)
if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals here", allow_module_level=True)

from reference.transcripts import READMES, alike, blocks, made, surroundings

ROOT, TESTS = READMES


@pytest.mark.parametrize(
    "readme", [ROOT, pytest.param(TESTS, marks=pytest.mark.slow)], ids=lambda path: path.parent.name
)
def test_transcripts_are_what_the_commands_say(readme: Path) -> None:
    with surroundings() as environment:
        for found in blocks(readme.read_text(encoding="utf-8")):
            assert alike(found[1]) == alike(made(found[1], environment, READMES[readme]))


def test_the_example_in_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", ROOT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert len(capsys.readouterr().out.split()) > 9

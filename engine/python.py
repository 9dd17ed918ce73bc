"""Python processes of our own that run nothing but what they are meant to."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def isolated(code: str) -> list[str]:
    """The command of a process that runs code, for which the caller chooses a folder that is not the user's.

    It imports what this process can, but nothing out of the folder in which the user stands: a model's folder may hold
    a json.py of strangers. Nor do variables such as PYTHONPATH and PYTHONSTARTUP lead it there.
    """
    paths = sys.path
    with suppress(FileNotFoundError):  # a folder that is gone holds nothing
        here = Path.cwd().resolve()
        paths = [path for path in sys.path if Path(path).resolve() != here or path.endswith("-packages")]
    return [sys.executable, "-EBPc", f"import sys\nsys.path[:] = sys.argv[1:]\n{code}", *paths]

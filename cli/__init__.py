"""The terminal."""

import sys
from contextlib import suppress
from pathlib import Path

# `python -m` and an empty part of PYTHONPATH have Python look for modules in the folder where the user stands, which
# may be a model's and hold a json.py of strangers.
with suppress(FileNotFoundError):  # a folder that is gone holds nothing
    _here = Path.cwd().resolve()
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != _here or path.endswith("-packages")]

"""`python -m numoe.cli` is `numoe`."""

import sys
from pathlib import Path

# Python looks for modules in the folder where the user stands, which may be a model's and hold a json.py of strangers.
if not sys.flags.safe_path and sys.path[0] in ("", str(Path.cwd())):
    del sys.path[0]

from numoe.cli.main import main

main()

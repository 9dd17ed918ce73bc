"""Where `numoe` begins."""

import sys


def start() -> None:
    """Run one command and exit. Ctrl-C ends it in silence, also while the commands are imported."""
    try:
        from numoe.cli.main import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)

"""`python -m numoe.cli` is `numoe`."""

from numoe.cli.start import start

start()

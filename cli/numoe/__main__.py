"""`python -m numoe` is `numoe`."""

from numoe.cli.start import start

start()

"""`python -m numoe.cli` is `numoe`."""

from numoe.cli.main import main

main()

"""`python -m numoe` is `numoe`."""

from numoe.cli.main import main

main()

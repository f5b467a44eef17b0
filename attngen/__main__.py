"""`python -m attngen` is the `attngen` command."""

from attngen.cli import main

main()

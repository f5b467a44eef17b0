"""`python -m attngen` is the `attngen` command."""

from attngen.cli.main import main

main()

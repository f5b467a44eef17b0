"""The command line."""

from attngen.cli.main import main

__all__ = ["main"]

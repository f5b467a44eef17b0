"""What is computed: expressions, specs, patterns, key sets' declarations, and what a call gives them."""

from attngen.language import spec
from attngen.language.keysets import cached, listed, sorted, tiles, union  # register themselves

__all__ = ["cached", "listed", "sorted", "spec", "tiles", "union"]

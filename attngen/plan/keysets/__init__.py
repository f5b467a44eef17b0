"""One planner per family of key sets. Importing this package registers all of them with `attngen.plan.planner`."""

from attngen.plan.keysets import (
    graph,
    hyper,
    layouts,
    listed,
    paged,
    permuted,
    prefix,
    pruned,
    ragged,
    shapes,
    slashes,
    sparse_k,
    tiles,
    union,
)

__all__ = [
    "graph",
    "hyper",
    "layouts",
    "listed",
    "paged",
    "permuted",
    "prefix",
    "pruned",
    "ragged",
    "shapes",
    "slashes",
    "sparse_k",
    "tiles",
    "union",
]

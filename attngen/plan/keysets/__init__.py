"""One planner per family of key sets. Importing a module registers it with `attngen.plan.planner`, which asks for all of them when
it meets a key set that it does not know.
"""

MODULES = (
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
)

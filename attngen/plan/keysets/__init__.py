"""The key sets that are found at run time, one file per family. `attngen.plan.keysets.base` says what a key set is."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields
from typing import Any

from attngen.errors import SpecError
from attngen.plan.keysets.base import KeyPlan, KeySet

__all__ = ["KINDS", "KeyPlan", "KeySet", "parse"]

# name in text -> (module, class); the module loads when the name is first used
KINDS = {
    "qk_sparse": ("attngen.plan.keysets.permuted", "QKSparse"),
    "hash_sparse": ("attngen.plan.keysets.permuted", "HashSparse"),
    "hyper": ("attngen.plan.keysets.hyper", "Hyper"),
    "codebook": ("attngen.plan.keysets.listed", "Codebook"),
    "graph": ("attngen.plan.keysets.graph", "Graph"),
    "paged": ("attngen.plan.keysets.paged", "Paged"),
    "shared_prefix": ("attngen.plan.keysets.prefix", "SharedPrefix"),
    "gather": ("attngen.plan.keysets.listed", "Gather"),
    "sparse_k": ("attngen.plan.keysets.sparse_k", "SparseK"),
    "union": ("attngen.plan.keysets.union", "Union"),
    "block_sparse": ("attngen.plan.keysets.tiles", "BlockSparse"),
    "block_cluster": ("attngen.plan.keysets.tiles", "BlockCluster"),
    "butterfly": ("attngen.plan.keysets.layouts", "Butterfly"),
    "big_bird": ("attngen.plan.keysets.layouts", "BigBird"),
    "longformer": ("attngen.plan.keysets.shapes", "Longformer"),
    "a_shape": ("attngen.plan.keysets.shapes", "AShape"),
    "vertical_slash": ("attngen.plan.keysets.slashes", "VerticalSlash"),
    "adaptive": ("attngen.plan.keysets.slashes", "Adaptive"),
    "pruned": ("attngen.plan.keysets.pruned", "Pruned"),
}

_HEAD = re.compile(r"([a-z_][a-z0-9_]{0,63})\s*\(")
_FIELD = re.compile(r"\s*([a-z_][a-z0-9_]{0,63})\s*=\s*")


def parse(text: str) -> KeySet:
    """Read `KeySet.text`: a known name, and fields of that key set with JSON values. Nothing is evaluated. SpecError."""
    head = _HEAD.match(text.strip())
    if not head or head[1] not in KINDS:
        raise SpecError("not a key set", text=text, fix=f"the key sets are {', '.join(KINDS)}")
    module, name = KINDS[head[1]]
    kind = getattr(importlib.import_module(module), name)
    known = {f.name for f in fields(kind)}
    body, place, values = text.strip(), head.end(), dict[str, Any]()
    while body[place:].strip() != ")":
        found = _FIELD.match(body, place)
        if not found or found[1] not in known or found[1] in values:
            raise SpecError(
                f"{head[1]}: expected one of {', '.join(sorted(known))}, once each", text=text, column=place
            )
        try:
            value, place = json.JSONDecoder().raw_decode(body, found.end())
        except (json.JSONDecodeError, RecursionError):
            raise SpecError(f"{head[1]}: {found[1]} takes a JSON value", text=text, column=found.end()) from None
        values[found[1]] = tuple(value) if isinstance(value, list) else value
        rest = body[place:].lstrip()
        if rest.startswith(","):
            place = len(body) - len(rest) + 1
        elif rest != ")":
            raise SpecError(f"{head[1]}: expected `,` or `)`", text=text, column=place)
    missing = [f.name for f in fields(kind) if f.name not in values and f.default is f.default_factory]
    if missing:
        raise SpecError(f"{head[1]}: {missing[0]} is missing", text=text)
    return kind(**values)

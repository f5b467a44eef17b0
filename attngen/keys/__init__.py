"""The key sets that are found at run time, one file per family. `attngen.keys.base` says what a key set is."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields
from typing import Any

from attngen.errors import SpecError
from attngen.keys.base import KeyPlan, KeySet

__all__ = ["KINDS", "KeyPlan", "KeySet", "parse"]

# name in text -> (module, class); the module loads when the name is first used
KINDS = {
    "qk_sparse": ("attngen.keys.permuted", "QKSparse"),
    "hash_sparse": ("attngen.keys.permuted", "HashSparse"),
    "hyper": ("attngen.keys.hyper", "Hyper"),
    "codebook": ("attngen.keys.listed", "Codebook"),
    "graph": ("attngen.keys.graph", "Graph"),
    "paged": ("attngen.keys.paged", "Paged"),
    "shared_prefix": ("attngen.keys.prefix", "SharedPrefix"),
    "gather": ("attngen.keys.listed", "Gather"),
    "sparse_k": ("attngen.keys.sparse_k", "SparseK"),
    "union": ("attngen.keys.union", "Union"),
    "block_sparse": ("attngen.keys.tiles", "BlockSparse"),
    "block_cluster": ("attngen.keys.tiles", "BlockCluster"),
    "butterfly": ("attngen.keys.layouts", "Butterfly"),
    "big_bird": ("attngen.keys.layouts", "BigBird"),
    "longformer": ("attngen.keys.shapes", "Longformer"),
    "a_shape": ("attngen.keys.shapes", "AShape"),
    "vertical_slash": ("attngen.keys.slashes", "VerticalSlash"),
    "adaptive": ("attngen.keys.slashes", "Adaptive"),
    "pruned": ("attngen.keys.pruned", "Pruned"),
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

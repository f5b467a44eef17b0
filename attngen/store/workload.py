"""A call that somebody wants ready before it is made: what is tuned, asked of the database, or built into a pack ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attngen.language.spec import Spec
from attngen.store.record import Shape


@dataclass(frozen=True, eq=False)
class Workload:
    """name: for people. dtype: of q, k, v, as "bfloat16"; "" for the device's usual one. captures: values for what the spec captures,
    and lengths (`k_len=`, ...), by name; what is not given is made up. directions: "forward", "backward".
    """

    name: str
    spec: Spec
    shape: Shape
    dtype: str = ""
    captures: Mapping[str, Any] = field(default_factory=dict)
    directions: tuple[str, ...] = ("forward", "backward")


def specs_of(workloads: Iterable[Workload]) -> dict[str, tuple[Spec, list[Shape], list[str]]]:
    """By name: a spec, its shapes and dtypes, each once. What packs are built from."""
    found: dict[str, tuple[Spec, list[Shape], list[str]]] = {}
    for one in workloads:
        _, shapes, dtypes = found.setdefault(one.name, (one.spec, [], []))
        shapes += [one.shape] if one.shape not in shapes else []
        dtypes += [one.dtype] if one.dtype not in dtypes else []
    return found

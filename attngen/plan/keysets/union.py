"""Unions of disjoint pieces: the steps of every piece, and one merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.keysets.union import Union
from attngen.plan.planner import FAMILIES, Family, Planner, bound, family_of
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


def plan_union(keys: Union, planner: Planner) -> Result:
    """Each piece's steps under its own prefix."""
    results = []
    for number, spec in enumerate(keys.specs):
        piece = planner.piece(spec, f"piece {number} ")
        if spec.keys is None:
            result = piece.attend("attention", None, None, "q", "k", "v", offset=True, looks=True)
        else:
            result = family_of(spec.keys).plan(spec.keys, piece)
            if spec.sink is not None:
                result = piece.merge(result, sink=piece.sink(), name="with the sink")
        results.append(result)
    return planner.merge(*results)


def read_union(keys: Union, given: Mapping[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """Each piece's captures, read by its own rule."""
    found = dict(given)
    for spec in keys.specs:
        if spec.keys is None or family_of(spec.keys).read is None:
            continue
        names = spec.keys.captures()
        own = {name: found.pop(name) for name in names if name in found}
        found |= family_of(spec.keys).read(spec.keys, own, q, k)  # type: ignore[misc]
    return found


def bind_union(
    keys: Union,
    spec: Spec,
    q: Any,
    k: Any,
    v: Any,
    q_offset: Any,
    captures: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Call:
    """The checked call, with captures as large as the pieces read them; pieces whose k and v have a layout of their own check
    theirs. InputError.
    """
    expanded = dict(captures)
    for piece in keys.specs:
        named = {name: captures[name] for name in (*piece.tensors, *piece.call_params) if name in captures}
        if piece.keys is not None and family_of(piece.keys).bind is not None:
            bound(piece, piece.keys, q, k, v, q_offset, named, given)
            continue
        for name, value in bind(piece, q, k, v, q_offset=q_offset, captures=named, values=False).captures.items():
            if value.shape != captures[name].shape and expanded[name].shape not in (captures[name].shape, value.shape):
                wanted = f"{list(expanded[name].shape)} for one piece and {list(value.shape)} for another"
                raise InputError(name, wanted, f"shape {list(captures[name].shape)}", "expand it to what both read")
            expanded[name] = value if value.shape != captures[name].shape else expanded[name]
    return bound(spec, None, q, k, v, q_offset, expanded, given)


FAMILIES[Union] = Family(plan_union, bind=bind_union, read=read_union)

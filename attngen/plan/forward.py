"""The plan of a forward call, and the call that it is a plan of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.keyset import KeySet
from attngen.plan.plan import Plan, Sizes
from attngen.plan.planner import Planner, bound, family_of

if TYPE_CHECKING:
    from attngen.language.spec import Spec


__all__ = ["bound", "family_of", "forward_plan", "split"]


def forward_plan(spec: Spec, keys: KeySet | None, sizes: Sizes, backend: str) -> Plan:
    """A closed-form mask is one `Attend`; a key set's planner writes its own steps. keys: the spec's, or the lengths of a
    ragged call. backend: what runs it.
    """
    planner = Planner(spec, sizes, backend)
    if keys is None:
        result = planner.attend("attention", None, None, "q", "k", "v", offset=True)
    else:
        result = family_of(keys).plan(keys, planner)
        if spec.sink is not None and spec.keys is not None:
            result = planner.merge(result, sink=planner.sink(), name="with the sink")
    return Plan.ordered(spec, sizes, planner.steps, result)


def split(
    spec: Spec, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any]
) -> tuple[Call, dict[str, Any]]:
    """The checked call of a spec with a key set, and the key set's captures, both as given and as read. InputError."""
    keys = spec.keys
    assert keys is not None
    own = set(keys.captures())
    known = {*own, *spec.tensors, *spec.params}
    for name in captures:
        if name not in known and name not in spec.call_params:
            names = ", ".join(sorted(known)) or "it has none"
            raise InputError(name, f"one of this spec's captures ({names})", "an unknown name")
    given = {name: value for name, value in captures.items() if name in own}
    read = family_of(keys).read
    found = given if read is None else read(keys, given, q, k)
    rest = {name: value for name, value in captures.items() if name not in own}
    return bound(spec, keys, q, k, v, q_offset, rest, found), {**given, **found}

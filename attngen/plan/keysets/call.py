"""A call with a key set, from arguments to (out, lse): check, prepare or take the given plan, run the pieces, add the sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from attngen import debug
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.expression import evaluate, tensor_of
from attngen.plan.keysets import base
from attngen.plan.keysets.base import KeyPlan, Pieces, Result
from attngen.state.merging import merge

if TYPE_CHECKING:
    from attngen.language.spec import Spec
    from attngen.runtime.attention import CompiledAttention


def plan(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: int | torch.Tensor,
    captures: Mapping[str, Any],
) -> KeyPlan:
    """Prepare the key set of a call. Captures that only the mask or the score read may be left out, unless the key set sorts
    tiles by the mask: then it says which one is missing.
    """
    from attngen.language.spec import Spec

    spec = attention.spec
    if spec.keys is None:
        raise InputError("plan", "a spec with keys=", "a spec without", "there is nothing to prepare")
    known = {*spec.keys.captures(), *spec.tensors, *spec.params}
    _check_names(spec, captures, known)
    call = spec.keys.bind(Spec(), q, k, v, q_offset, {}, captures)
    named = {name: value for name, value in captures.items() if value is not None}
    call = replace(
        call,
        captures={name: value for name, value in named.items() if name in spec.tensors},
        params={name: value for name, value in named.items() if name in spec.params},
    )
    return _prepare(spec, call, captures)


def run(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: int | torch.Tensor,
    given_plan: KeyPlan | None,
    captures: Mapping[str, Any],
) -> Result:
    """out and lse of a call."""
    spec = attention.spec
    keys = spec.keys
    assert keys is not None
    call, given = split(spec, q, k, v, q_offset, captures)
    if given_plan is None:
        # Nobody else gets to see this plan, so it holds what this call needs.
        given_plan = _prepare(spec, replace(call, wants_grad=_wants_grad(call, given)), given)
    elif not isinstance(given_plan, KeyPlan):
        raise InputError("plan", "what attn.plan(...) returns", type(given_plan).__name__)
    else:
        given_plan.check(spec, call)
        for name in (name for name in given if name in keys.prepared and name not in keys.used):
            raise InputError(name, "nothing next to a plan, which holds what was made from it", "a value")
    result = keys.run(Pieces(attention, call), given_plan.values, given)
    if spec.sink is not None:
        sink = _sink(call, result[1])
        result = merge(result, (result[0].new_zeros(()).expand(result[0].shape), sink))
    return result


def split(
    spec: Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: Any, captures: Mapping[str, Any]
) -> tuple[Call, dict[str, Any]]:
    """The checked call, and the captures of the key set."""
    keys = spec.keys
    assert keys is not None
    own = set(keys.captures())
    _check_names(spec, captures, {*own, *spec.tensors, *spec.params})
    rest = {name: value for name, value in captures.items() if name not in own}
    given = {name: value for name, value in captures.items() if name in own}
    return keys.bind(spec, q, k, v, q_offset, rest, given), given


def explain(attention: CompiledAttention, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any]) -> str:
    """The spec, what the plan holds, and the explanation of every piece that the call runs."""
    given_plan = plan(attention, q, k, v, q_offset, captures)
    lines = [str(attention.spec), f"key {attention.spec.key[:16]}", "", f"plan: {given_plan.nbytes:,} bytes"]
    for name, value in given_plan.values.items():
        shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else value
        lines.append(f"  {name}: {shown}")
    for number, (role, piece, *inputs, offset, named) in enumerate(recorded(attention, q, k, v, q_offset, captures)):
        lines += ["", f"piece {number + 1}: {role}"]
        lines += ["  " + line for line in piece.explain(*inputs, q_offset=offset, **named).split("\n")]
    return "\n".join(lines)


def recorded(
    attention: CompiledAttention, q: Any, k: Any, v: Any, q_offset: Any, captures: Mapping[str, Any]
) -> list[Any]:
    """The pieces that a call runs: (role, compiled piece, q, k, v, q_offset, captures) of each."""
    before, base.RECORD = base.RECORD, []
    try:
        with torch.no_grad():
            run(attention, q, k, v, q_offset, None, captures)
        return base.RECORD
    finally:
        base.RECORD = before


def _prepare(spec: Spec, call: Call, given: Mapping[str, Any]) -> KeyPlan:
    keys = spec.keys
    assert keys is not None
    with torch.no_grad(), debug.timed(f"preparing {keys.name}"):
        return KeyPlan.of(spec, call, keys.prepare(spec, call, given))


def _wants_grad(call: Call, given: Mapping[str, Any]) -> bool:
    """Whether autograd records the call."""
    tensors = [call.q, call.k, call.v, *call.captures.values()]
    for value in given.values():
        tensors += value if isinstance(value, (tuple, list)) else [value]
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _sink(call: Call, lse: torch.Tensor) -> torch.Tensor:
    """The sink's logits, of lse's shape [B, Hq, Nq] and dtype."""
    batch, heads, rows = lse.shape
    env: dict[str, Any] = {**call.captures, **call.params}
    env |= {"b": torch.arange(batch, device=lse.device).view(-1, 1, 1)}
    env |= {"h": torch.arange(heads, device=lse.device).view(1, -1, 1)}
    offset = base.offset_column(call)
    env |= {"i": torch.arange(rows, device=lse.device) + offset, "q_offset": offset}
    value = tensor_of(evaluate(call.spec.sink, env, real=lse.dtype), lse.device)
    return value.to(lse.dtype).expand(lse.shape)


def _check_names(spec: Spec, captures: Mapping[str, Any], known: set[str]) -> None:
    for name in captures:
        if name not in known:
            names = ", ".join(sorted(known)) or "it has none"
            raise InputError(name, f"one of this spec's captures ({names})", "an unknown name")

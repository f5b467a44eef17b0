"""Whether the loads of a call stay inside its captured tensors: the same rule for every backend.

An index has to be in range wherever its value matters: for pairs that the mask keeps, in the branch that `where` takes, in
the part of a mask that the others leave open. Mostly that is proved from the sizes of the call and the mask's own bounds, at
no cost. Else the index is looked at: on the CPU exactly; on a GPU the device asserts it later, where that needs no table of
more than `LARGEST_TABLE` pairs. Loads out of range read the nearest element, so nothing outside is ever read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import sympy
import torch

from attngen.errors import InputError
from attngen.language.checks import checked, require
from attngen.language.expression import (
    LARGEST_ROUNDED,
    Q_OFFSET,
    ROW,
    Absolute,
    B,
    BitAnd,
    Floor,
    FloorDiv,
    H,
    I,
    J,
    Load,
    Maximum,
    Minimum,
    PyMod,
    Round,
    Where,
    conjunction,
    evaluate,
    is_flag,
    linear_terms,
    negate,
    tensor_of,
    to_text,
)
from attngen.language.listed_pairs import as_log_weight

Call = Any  # `attngen.language.call.Call`, which calls this module

LARGEST_TABLE = 2**20  # pairs that a GPU looks at
CHUNK = 2**22  # pairs that the CPU looks at together

Bounds = tuple[float, float]
Box = tuple[tuple[Any, Bounds], ...]  # of each symbol the least and the largest value

ANY: Bounds = (-math.inf, math.inf)


def check_indices(call: Call) -> None:
    """InputError for a load outside its tensor whose value matters. `ATTNGEN_CHECK=0` turns it off."""
    spec, shape = call.spec, (*call.q.shape[:3], call.n_k)
    if spec.keys is not None or not checked() or 0 in shape or call.q.device.type == "meta":
        return
    loads = doubtful_loads(call)
    if not loads:
        return
    box = _box(call)
    for load, used in loads:
        for dim, (index, size) in enumerate(zip(load.indices, call.captures[load.name].shape, strict=True)):
            if index in (B, H, J, ROW) or _stays_inside(index, used, box, size):
                continue
            look = _look if call.q.device.type == "cpu" else _assert
            look(call, load, dim, index, used)


def doubtful_loads(call: Call) -> tuple[tuple[Load, Any], ...]:
    """Those loads of a call's spec whose range its shapes do not tell, see `checked_loads`."""
    spec = call.spec
    return checked_loads(spec.mask, spec.score, spec.sink, isinstance(call.q_offset, torch.Tensor))


@lru_cache(maxsize=256)
def checked_loads(mask: Any, score: Any, sink: Any, by_offset: bool) -> tuple[tuple[Load, Any], ...]:
    """The loads whose range the shapes do not tell, each with the condition under which its value matters. `by_offset`: the
    query's position depends on a tensor.
    """
    plain = {B, H, J, ROW} if by_offset else {B, H, I, J, ROW}
    found: dict[tuple[Load, Any], None] = {}

    def doubtful(node: Any) -> bool:
        return any(index not in plain for load in node.atoms(Load) for index in load.indices)

    def visit(node: Any, used: Any) -> None:
        if not doubtful(node):
            return
        if isinstance(node, Where):
            condition, yes, no = node.args
            visit(condition, used)
            visit(yes, conjunction([used, condition]))
            visit(no, conjunction([used, negate(condition)]))
            return
        if isinstance(node, (sympy.And, sympy.Or)):
            for arg in node.args:
                others = [other for other in node.args if other is not arg]
                visit(arg, conjunction([used, *(others if isinstance(node, sympy.And) else map(negate, others))]))
            return
        if isinstance(node, Load) and any(index not in plain for index in node.indices):
            found[node, used] = None
        for arg in node.args:
            visit(arg, used)

    visit(mask, sympy.true)
    visit(score, mask)
    if sink is not None:
        visit(sink, sympy.true)
    return tuple(found)


# -- proofs -----------------------------------------------------------------------------------------------------------


def _box(call: Call) -> Box:
    (batch, heads, n_q, _), offset = call.q.shape, call.q_offset
    if not isinstance(offset, torch.Tensor):
        low, high = float(offset), float(offset)
    else:
        low, high = (float(x) for x in offset.aminmax()) if offset.device.type == "cpu" else ANY
    box: dict[Any, Bounds] = {B: (0, batch - 1), H: (0, heads - 1), J: (0, call.n_k - 1)}
    box |= {I: (low, high + n_q - 1), Q_OFFSET: (low, high)}
    box |= {call.spec.call_params[name].sym: (float(value), float(value)) for name, value in call.params.items()}
    return tuple(box.items())


@lru_cache(maxsize=4096)
def _stays_inside(index: Any, used: Any, box: Box, size: int) -> bool:
    """Whether `index` is proved to be in 0 .. size - 1 where `used` holds."""
    numbers = {symbol: sympy.Integer(int(low)) for symbol, (low, high) in box if low == high and symbol.is_integer}
    low, high = _bounds(index.xreplace(numbers), used.xreplace(numbers), dict(box))
    return low >= 0 and high < size


def _bounds(e: Any, used: Any, box: dict[Any, Bounds]) -> Bounds:
    """Bounds on an integer expression where `used` holds: of its parts, and those that `used` itself states."""
    low, high = _bounds_of_parts(e, used, box)
    terms, constant = linear_terms(e)
    for atom in used.args if isinstance(used, sympy.And) else (used,):
        if not isinstance(atom, (sympy.Ge, sympy.Eq)):
            continue
        own, rest = linear_terms(atom.args[0])
        if own == terms:  # e - constant + rest >= 0
            low = max(low, constant - rest)
            high = min(high, constant - rest) if isinstance(atom, sympy.Eq) else high
        elif own == {term: -factor for term, factor in terms.items()}:
            high = min(high, constant + rest)
            low = max(low, constant + rest) if isinstance(atom, sympy.Eq) else low
    return low, high


def _bounds_of_parts(e: Any, used: Any, box: dict[Any, Bounds]) -> Bounds:
    if e.is_Integer:
        return int(e), int(e)
    if e.is_Symbol:
        return box.get(e, ANY)
    if isinstance(e, Load):
        return (0, 1) if is_flag(e) else ANY
    if isinstance(e, Where):
        condition, yes, no = e.args
        parts = [
            _bounds(yes, conjunction([used, condition]), box),
            _bounds(no, conjunction([used, negate(condition)]), box),
        ]
        return min(low for low, _ in parts), max(high for _, high in parts)
    if isinstance(e, (Floor, Round)):
        return -LARGEST_ROUNDED, LARGEST_ROUNDED
    if isinstance(e, BitAnd):  # with a number that is not negative
        return (0, int(e.args[0])) if e.args[0].is_Integer and e.args[0] >= 0 else ANY
    parts = [_bounds(arg, used, box) for arg in e.args]
    if e.is_Add:
        return sum(low for low, _ in parts), sum(high for _, high in parts)
    if isinstance(e, (Minimum, Maximum)):
        pick = min if isinstance(e, Minimum) else max
        return pick(low for low, _ in parts), pick(high for _, high in parts)
    if e.is_Mul:
        first, *rest = parts
        for low, high in rest:
            ends = [0 if 0 in (x, y) else x * y for x in first for y in (low, high)]  # 0 * inf is 0 here
            first = min(ends), max(ends)
        return first
    (low, high), divisor = parts[0], e.args[-1]
    if isinstance(e, Absolute):
        return (0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
    if isinstance(e, (FloorDiv, PyMod)) and divisor.is_Integer and divisor > 0:
        number = int(divisor)
        if isinstance(e, PyMod):
            return (low, high) if low >= 0 and high < number else (0, number - 1)
        return low if math.isinf(low) else low // number, high if math.isinf(high) else high // number
    return ANY


# -- looks ------------------------------------------------------------------------------------------------------------


def _look(call: Call, load: Load, dim: int, index: Any, used: Any) -> None:
    """InputError if the index leaves its dimension for some pair for which it matters."""
    size, listed = call.captures[load.name].shape[dim], None
    for env in _scopes(call, rows=I in index.free_symbols):
        values = tensor_of(evaluate(index, env), call.q.device)
        if not ((values < 0) | (values >= size)).any():
            continue
        if call.spec.lists is not None and listed is None:
            listed = as_log_weight(call)
        for part in _scopes(call, rows=True) if env["i"].shape[2] == call.q.shape[2] else [env]:
            values = tensor_of(evaluate(index, part), call.q.device)
            matters = tensor_of(evaluate(used, part), call.q.device)
            if listed is not None:
                first = int(part["row"])
                matters = matters & ~listed[:, :, first : first + part["i"].shape[2]].isneginf()
            wrong = ((values < 0) | (values >= size)) & matters
            if wrong.any():
                value = values.expand(wrong.shape)[wrong][0].item()
                raise InputError(load.name, _wanted(index, dim, size), value, _FIX)


def _assert(call: Call, load: Load, dim: int, index: Any, used: Any) -> None:
    """The same by the device, later; nothing where it would need a large table."""
    name, size, offset = load.name, call.captures[load.name].shape[dim], call.q_offset
    if index == I:
        assert isinstance(offset, torch.Tensor)
        end = offset + call.q.shape[2]
        require(name, end <= size, f"as many positions as q_offset and q reach, at most {size}", end, "in row")
        return
    lengths = dict(zip((B, H, I, J), (*call.q.shape[:3], call.n_k), strict=True))
    read = index.free_symbols | used.free_symbols
    if call.spec.lists is not None or math.prod(n for axis, n in lengths.items() if axis in read) > LARGEST_TABLE:
        return
    (env,) = _scopes(call, rows=False)
    values, matters = (tensor_of(evaluate(e, env), call.q.device) for e in (index, used))
    right = ((values >= 0) & (values < size)) | ~matters
    require(name, right, _wanted(index, dim, size), values.expand(right.shape))


_FIX = "clamp the index with min and max, mask these pairs out, or pass a larger tensor"


def _wanted(index: Any, dim: int, size: int) -> str:
    return f"`{to_text(index)}`, its index {dim}, in 0 .. {size - 1} for every pair that the mask keeps"


def _scopes(call: Call, rows: bool) -> Iterator[dict[str, Any]]:
    """What expressions read, to broadcast over [B, H, rows, Nk]; `rows`: some query rows at a time, else all together."""
    (batch, heads, n_q, _), device = call.q.shape, call.q.device
    offset = tensor_of(call.q_offset, device).reshape(-1, 1, 1, 1)
    env: dict[str, Any] = {
        **{name: t.detach() for name, t in call.captures.items()},
        **call.params,
        "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1, 1),
        "j": torch.arange(call.n_k, device=device).view(1, 1, 1, -1),
        "q_offset": offset,
    }
    step = max(1, CHUNK // (batch * heads * call.n_k)) if rows else n_q
    for first in range(0, n_q, step):
        row = torch.arange(first, min(first + step, n_q), device=device).view(1, 1, -1, 1)
        yield {**env, "row": first, "i": row + offset}

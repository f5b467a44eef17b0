"""Whether the loads of a call stay inside its captured tensors: the same rule for every backend.

An index has to be in range wherever its value matters: for pairs that the mask keeps, in the branch that `where` takes, in
the part of a mask that the others leave open. Mostly that is proved from the sizes of the call and the mask's own bounds, at
no cost. Else the index is looked at: on the CPU exactly; on a GPU the device asserts it later, where that needs no table of
more than `LARGEST_TABLE` pairs. Loads out of range read the nearest element, so nothing outside is ever read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.checks import checked, require
from attngen.language.listed_pairs import as_log_weight
from attngen.language.programs import INDEX, LARGEST_ROUNDED, ROW, Node, evaluate, names_in, negative, tensor_of

Call = Any  # `attngen.language.call.Call`, which calls this module

LARGEST_TABLE = 2**20  # pairs that a GPU looks at
CHUNK = 2**22  # pairs that the CPU looks at together

Bounds = tuple[float, float]
Box = tuple[tuple[str, Bounds], ...]  # of each symbol the least and the largest value
Linear = tuple[dict[Node, int], int]  # factors of terms, and a constant

ANY: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Doubtful:
    """A load whose range the shapes of a call do not tell: the captured tensor's name, its indices, those as text, and the condition
    under which its value matters.
    """

    name: str
    indices: tuple[Node, ...]
    texts: tuple[str, ...]
    used: Node


def check_indices(call: Call) -> None:
    """InputError for a load outside its tensor whose value matters. `ATTNGEN_CHECK=0` turns it off."""
    spec, shape = call.spec, (*call.q.shape[:3], call.n_k)
    if spec.keys is not None or not checked() or 0 in shape or call.q.device.type == "meta":
        return
    loads = doubtful_of(call)
    if not loads:
        return
    box = _box(call)
    for load in loads:
        for dim, (index, size) in enumerate(zip(load.indices, call.captures[load.name].shape, strict=True)):
            if index in _PLAIN or _stays_inside(index, load.used, box, size):
                continue
            look = _look if call.q.device.type == "cpu" else _assert
            look(call, load, dim)


_PLAIN = (INDEX["b"], INDEX["h"], INDEX["j"], ROW)  # which the shapes tell


def doubtful_of(call: Call) -> tuple[Doubtful, ...]:
    """Those loads of a call's spec whose range its shapes do not tell."""
    found: tuple[Doubtful, ...] = call.spec.doubtful(isinstance(call.q_offset, torch.Tensor))
    return found


# -- proofs -----------------------------------------------------------------------------------------------------------


def _box(call: Call) -> Box:
    (batch, heads, n_q, _), offset = call.q.shape, call.q_offset
    if not isinstance(offset, torch.Tensor):
        low, high = float(offset), float(offset)
    else:
        low, high = (float(x) for x in offset.aminmax()) if offset.device.type == "cpu" else ANY
    box: dict[str, Bounds] = {"b": (0, batch - 1), "h": (0, heads - 1), "j": (0, call.n_k - 1)}
    box |= {"i": (low, high + n_q - 1), "q_offset": (low, high)}
    box |= {name: (float(value), float(value)) for name, value in call.params.items()}
    return tuple(box.items())


@lru_cache(maxsize=4096)
def _stays_inside(index: Node, used: Node, box: Box, size: int) -> bool:
    """Whether `index` is proved to be in 0 .. size - 1 where `used` holds."""
    low, high = _Proof(dict(box)).bounds(index, (used,))
    return low >= 0 and high < size


class _Proof:
    """Bounds on integer programs within a box."""

    def __init__(self, box: dict[str, Bounds]):
        self.box = box

    def bounds(self, e: Node, used: tuple[Node, ...]) -> Bounds:
        """Bounds where all of `used` hold: of its parts, and those that `used` itself states."""
        low, high = self._of_parts(e, used)
        terms, constant = self._linear(e)
        for atom in _conjuncts(used):
            if atom.op not in (">=", "=="):
                continue
            own, rest = self._linear(atom.args[0])  # >= 0, or == 0
            if own == terms:  # e - constant + rest >= 0
                low = max(low, constant - rest)
                high = min(high, constant - rest) if atom.op == "==" else high
            elif own == {term: -factor for term, factor in terms.items()}:
                high = min(high, constant + rest)
                low = max(low, constant + rest) if atom.op == "==" else low
        return low, high

    def _number(self, e: Node) -> int | None:
        """The one value that a program can have, if that is plain."""
        if e.op == "int":
            return int(e.value)
        if e.op == "integer":
            low, high = self.box.get(e.value, ANY)
            return int(low) if low == high else None
        return None

    def _linear(self, e: Node) -> Linear:
        number = self._number(e)
        if number is not None:
            return {}, number
        if e.op == "add":
            terms: dict[Node, int] = {}
            constant = 0
            for arg in e.args:
                own, rest = self._linear(arg)
                constant += rest
                for term, factor in own.items():
                    terms[term] = terms.get(term, 0) + factor
            return {term: factor for term, factor in terms.items() if factor}, constant
        if e.op == "mul":
            numbers = [self._number(arg) for arg in e.args]
            others = [arg for arg, number in zip(e.args, numbers, strict=True) if number is None]
            factor = math.prod(number for number in numbers if number is not None)
            if len(others) <= 1:
                own, rest = self._linear(others[0]) if others else ({}, 1)
                return ({term: factor * x for term, x in own.items()} if factor else {}), factor * rest
        return {e: 1}, 0

    def _of_parts(self, e: Node, used: tuple[Node, ...]) -> Bounds:
        number = self._number(e)
        if number is not None:
            return number, number
        if e.op == "integer":
            return self.box.get(e.value, ANY)
        if e.op == "load":
            return (0, 1) if e.kind == "bool" else ANY
        if e.op == "where":
            condition, yes, no = e.args
            parts = [self.bounds(yes, (*used, condition)), self.bounds(no, (*used, *_negated(condition)))]
            return min(low for low, _ in parts), max(high for _, high in parts)
        if e.op in ("floor", "round"):
            return -LARGEST_ROUNDED, LARGEST_ROUNDED
        if e.op == "bit and":  # with a number that is not negative
            mask = self._number(e.args[0])
            return (0, mask) if mask is not None and mask >= 0 else ANY
        parts = [self.bounds(arg, used) for arg in e.args]
        if e.op == "add":
            return sum(low for low, _ in parts), sum(high for _, high in parts)
        if e.op in ("min", "max"):
            pick = min if e.op == "min" else max
            return pick(low for low, _ in parts), pick(high for _, high in parts)
        if e.op == "mul":
            first, *rest = parts
            for low, high in rest:
                ends = [0 if 0 in (x, y) else x * y for x in first for y in (low, high)]  # 0 * inf is 0 here
                first = min(ends), max(ends)
            return first
        if e.op == "abs":
            low, high = parts[0]
            return (0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
        if e.op in ("floordiv", "mod") and (divisor := self._number(e.args[1]) or 0) > 0:
            low, high = parts[0]
            if e.op == "mod":
                return (low, high) if low >= 0 and high < divisor else (0, divisor - 1)
            return low if math.isinf(low) else low // divisor, high if math.isinf(high) else high // divisor
        return ANY


def _conjuncts(conditions: tuple[Node, ...]) -> Iterator[Node]:
    for condition in conditions:
        yield from _conjuncts(condition.args) if condition.op == "and" else (condition,)


def _negated(condition: Node) -> tuple[Node, ...]:
    """What holds where a condition on integers does not, as far as that is a conjunction."""
    if condition.op == "or":
        return tuple(atom for arg in condition.args for atom in _negated(arg))
    if condition.op == ">=":  # x >= 0
        return (Node(">=", (_minus(condition.args[0], -1), Node("int", (), 0))),)
    if condition.op == "!=":
        return (Node("==", condition.args),)
    return ()


def _minus(e: Node, shift: int) -> Node:
    return Node("add", (Node("int", (), shift), negative(e)))


# -- looks ------------------------------------------------------------------------------------------------------------


def _look(call: Call, load: Doubtful, dim: int) -> None:
    """InputError if the index leaves its dimension for some pair for which it matters."""
    size, listed, index, used = call.captures[load.name].shape[dim], None, load.indices[dim], load.used
    for env in _scopes(call, rows="i" in names_in(index)):
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
                raise InputError(load.name, _wanted(load, dim, size), value, _FIX)


def _assert(call: Call, load: Doubtful, dim: int) -> None:
    """The same by the device, later; nothing where it would need a large table."""
    name, size, offset = load.name, call.captures[load.name].shape[dim], call.q_offset
    index, used = load.indices[dim], load.used
    if index is INDEX["i"]:
        assert isinstance(offset, torch.Tensor)
        end = offset + call.q.shape[2]
        require(name, end <= size, f"as many positions as q_offset and q reach, at most {size}", end, "in row")
        return
    lengths = dict(zip("bhij", (*call.q.shape[:3], call.n_k), strict=True))
    read = names_in(index) | names_in(used)
    if call.spec.lists is not None or math.prod(n for axis, n in lengths.items() if axis in read) > LARGEST_TABLE:
        return
    (env,) = _scopes(call, rows=False)
    values, matters = (tensor_of(evaluate(e, env), call.q.device) for e in (index, used))
    right = ((values >= 0) & (values < size)) | ~matters
    require(name, right, _wanted(load, dim, size), values.expand(right.shape))


_FIX = "clamp the index with min and max, mask these pairs out, or pass a larger tensor"


def _wanted(load: Doubtful, dim: int, size: int) -> str:
    return f"`{load.texts[dim]}`, its index {dim}, in 0 .. {size - 1} for every pair that the mask keeps"


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

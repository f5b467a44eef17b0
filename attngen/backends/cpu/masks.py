"""Masks of query tiles on the CPU: which pairs are attended, as caps on their logits."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cached_property, lru_cache, reduce
from typing import Any

import sympy
import torch

from attngen.backends.cpu.scopes import axis_scopes, offsets_of, positions
from attngen.backends.cpu.tiles import Chunks
from attngen.language.call import Call
from attngen.language.expression import B, H, I, J, is_int, linear_terms
from attngen.language.programs import evaluate

KEPT_BYTES = 2**26  # of masks that a job keeps


class Blocked:
    """A mask on one tile and column range, [rows, columns] or [heads, rows, columns]. cap: +inf and -inf."""

    def __init__(self, cap: torch.Tensor):
        self.cap = cap

    @cached_property
    def keep(self) -> torch.Tensor:
        """All bits set where the pair is attended, none elsewhere, as integers as wide as the logits."""
        return (self.cap > 0).to(torch.int64 if self.cap.dtype == torch.float64 else torch.int32).neg_()


class Masks:
    """Masks of the tiles that one job visits. Each is evaluated once for all heads it holds for, and once for all tiles
    at one distance from the diagonal when it depends on i - j alone; then all threads may share one of these.
    """

    def __init__(self, call: Call, env: dict[str, Any], real: torch.dtype, like: Masks | None = None):
        """like: another job's masks of the same call."""
        self.mask, self.env, self.real = call.spec.mask, env, real
        self.by_batch = B in self.mask.free_symbols or isinstance(call.q_offset, torch.Tensor)
        self.by_head = H in self.mask.free_symbols
        self.by_distance = _depends_on_distance(self.mask)
        self.apart: Allowed | None = (
            like.apart if like is not None else None if self.by_distance else apart(call, env, real)
        )
        self.offsets = offsets_of(call)
        self._known: dict[Any, Blocked] = {}
        self._tile: Any = None
        self._bytes = 0

    def blocked(self, b: int, heads: range, first: int, rows: int, start: int, stop: int) -> Blocked:
        """For queries at positions first .. first + rows - 1 and keys start .. stop - 1."""
        if not self.by_distance and self._tile != (b, first):
            self._tile = (b, first)
            self._forget()
        place = first - start if self.by_distance else (first, start)
        key = (place, rows, stop - start, b if self.by_batch else 0, heads if self.by_head else None)
        block = self._known.get(key)
        if block is None:
            if self._bytes > KEPT_BYTES:
                self._forget()
            if self.apart is not None:
                allowed = self.apart(
                    b, heads, slice(first - self.offsets[b], first - self.offsets[b] + rows), slice(start, stop)
                )
            else:
                env = {**self.env, **positions(b, heads, first, rows, start, stop), "q_offset": self.offsets[b]}
                allowed = torch.as_tensor(evaluate(self.mask, env, real=self.real))
            allowed = allowed.expand(*allowed.shape[:-2], rows, stop - start)
            # 0 and 1 to -inf and +inf: masked_fill_ and where branch per element.
            cap = allowed.to(self.real).sub(0.5).mul_(torch.inf)
            block = self._known[key] = Blocked(cap)
            self._bytes += 2 * cap.numel() * cap.element_size()
        return block

    def of(self, chunks: Chunks, x: int, b: int, heads: range, first: int, rows: int) -> Blocked:
        """The x-th mask that a tile needs."""
        begin = chunks.start[chunks.owner[x]]
        return self.blocked(b, heads, first, rows, begin + chunks.low[x], begin + chunks.high[x])

    def _forget(self) -> None:
        self._known.clear()
        self._bytes = 0


# b, heads, rows, keys -> [heads or nothing, rows or 1, keys or 1]
Allowed = Callable[[int, range, slice, slice], torch.Tensor]


def apart(call: Call, env: dict[str, Any], real: torch.dtype) -> Allowed | None:
    """The mask of a tile, 1 where attended and 0 elsewhere, from parts that were evaluated once for all queries and once for
    all keys, where every integer comparison in it is a sum of such parts; None for other masks.
    """
    by_query, by_key = axis_scopes(call, env)

    def build(node: Any) -> Allowed | None:
        if isinstance(node, (sympy.And, sympy.Or)):
            parts = [build(arg) for arg in node.args]
            join = operator.mul if isinstance(node, sympy.And) else torch.maximum
            if any(part is None for part in parts):
                return None
            return lambda *at: reduce(join, (part(*at) for part in parts if part is not None))
        compare = _COMPARISONS.get(type(node))
        if compare is None or not is_int(node.args[0]):
            return None
        terms, constant = linear_terms(node.args[0])
        keyed = [term for term in terms if J in term.free_symbols]
        if any(I in term.free_symbols for term in keyed):
            return None
        rest = constant + sum(terms[term] * term for term in terms if term not in keyed)
        left = _by_place(evaluate(rest, by_query))
        right = _by_place(evaluate(-sum((terms[term] * term for term in keyed), sympy.Integer(0)), by_key))

        def allowed(b: int, heads: range, rows: slice, keys: slice) -> torch.Tensor:
            sides = _part(left, b, heads, rows).unsqueeze(-1), _part(right, b, heads, keys).unsqueeze(-2)
            shape = torch.broadcast_shapes(*(side.shape for side in sides))
            return compare(*sides, out=torch.empty(shape, dtype=real))  # in bool it would take three times as long

        return allowed

    return build(call.spec.mask)


_COMPARISONS: dict[Any, Any] = {
    sympy.GreaterThan: torch.ge,
    sympy.StrictGreaterThan: torch.gt,
    sympy.Equality: torch.eq,
    sympy.Unequality: torch.ne,
}


def _by_place(value: Any) -> torch.Tensor:
    """[B or 1, H or 1, N or 1]: what is the same at all places stays one number, which costs a comparison nothing."""
    value = torch.as_tensor(value)
    return value.view((1,) * (3 - value.ndim) + tuple(value.shape))


def _part(values: torch.Tensor, b: int, heads: range, places: slice) -> torch.Tensor:
    """[B or 1, H or 1, N or 1] -> [n], or [heads, n] for several heads that differ; n is 1 where the places don't differ."""
    own = values[b if values.shape[0] > 1 else 0]
    own = own if own.shape[1] == 1 else own[:, places]
    if own.shape[0] == 1:
        return own[0]
    return own[heads.start] if len(heads) == 1 else own[heads.start : heads.stop]


@lru_cache(maxsize=256)
def _depends_on_distance(mask: Any) -> bool:
    """Whether moving query and key by one same amount changes nothing, as far as the form shows it."""
    step = sympy.Dummy("step", integer=True)
    return bool(mask.xreplace({I: I + step, J: J + step}) == mask)

"""Proofs of `a <= b` between symbolic bounds, from what every call guarantees.

Known: FIRST <= LAST (a tile has a row), BEGIN <= END, params that divide are positive, and the facts handed in. A
proof that is not found costs an extra min or max in a kernel, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sympy

from attngen.language.expression import FloorDiv, Maximum, Minimum, Position, Where, linear_terms

# The names cannot be written in a spec, so they never meet a captured name.
FIRST = Position("tile.first", integer=True)  # original position of the tile's first row, on the tile axis
LAST = Position("tile.last", integer=True)  # original position of its last row (inclusive)
BEGIN = Position("walk.begin", integer=True)  # first original position of the walked axis
END = Position("walk.end", integer=True)  # one past its last
BLOCK = sympy.Symbol("walk.block", integer=True)  # rows in a tile of the walked axis

INFINITY = sympy.oo
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


class Down(sympy.Function):
    """Index of the walked tile that holds an offset (>= 0) from BEGIN."""


class Up(sympy.Function):
    """Number of walked tiles that touch the offsets below the argument (>= 0)."""


def direction(expr: Any, symbol: Any, is_positive: Callable[[Any], bool]) -> int | None:
    """+1 if `expr` never falls as `symbol` grows, -1 if it never rises, 0 if it is constant, None if unknown."""
    if symbol not in expr.free_symbols:
        return 0
    if expr == symbol:
        return 1
    if isinstance(expr, FloorDiv):
        return direction(expr.args[0], symbol, is_positive) if is_positive(expr.args[1]) else None
    if expr.is_Add or isinstance(expr, (Minimum, Maximum)):
        signs = {direction(arg, symbol, is_positive) for arg in expr.args} - {0}
        return signs.pop() if len(signs) == 1 else None
    if expr.is_Mul:
        moving = [arg for arg in expr.args if symbol in arg.free_symbols]
        factor = sympy.Mul(*[arg for arg in expr.args if symbol not in arg.free_symbols])
        slope = direction(moving[0], symbol, is_positive) if len(moving) == 1 else None
        if slope is None:
            return None
        return slope if is_positive(factor) else -slope if is_positive(-factor) else None
    return None


class Order:
    """Cheap, sound proofs of order.

    `positive`: symbols that are at least 1. `given`: expressions that are >= 0. `begin`: what END is never below.
    """

    def __init__(self, positive: Iterable[Any] = (), given: Iterable[Any] = (), begin: Any = BEGIN):
        self.positive = frozenset(positive)
        self.given = tuple(given)
        self.begin = begin
        self.definitions: dict[Any, Any] = {}  # a line's symbol -> its expression
        self._known: dict[tuple[Any, Any], bool] = {}

    def assuming(self, given: Iterable[Any]) -> Order:
        """The same order with more facts."""
        return Order(self.positive, (*self.given, *given), self.begin)

    def is_positive(self, expr: Any) -> bool:
        """Whether `expr` is at least 1 by its form."""
        if expr.is_Integer:
            return bool(expr > 0)
        if expr.is_Mul:
            return all(self.is_positive(arg) for arg in expr.args)
        return expr in self.positive or expr == BLOCK

    def less_equal(self, a: Any, b: Any) -> bool:
        """Whether a <= b is proved."""
        if a == b or a == -INFINITY or b == INFINITY:
            return True
        if a == INFINITY or b == -INFINITY:
            return False
        if (a, b) not in self._known:
            self._known[a, b] = False  # a cycle proves nothing
            self._known[a, b] = self._less_equal(a, b)
        return self._known[a, b]

    def assume(self, a: Any, b: Any) -> None:
        """Note that a <= b, which the caller knows by construction."""
        self._known[a, b] = True

    def less(self, a: Any, b: Any) -> bool:
        """Whether a < b is proved, over the integers."""
        if a == -INFINITY or b == INFINITY:
            return a != b
        return self.less_equal(_plus_one(a), b)

    def largest(self, *values: Any) -> Any:
        """The maximum, without arguments that another one is proved to reach."""
        return self._pick(values, lambda a, b: self.less_equal(a, b), Maximum)

    def smallest(self, *values: Any) -> Any:
        """The minimum, without arguments that another one is proved not to exceed."""
        return self._pick(values, lambda a, b: self.less_equal(b, a), Minimum)

    def _pick(self, values: tuple[Any, ...], beaten: Callable[[Any, Any], bool], join: Any) -> Any:
        kept: list[Any] = []
        for value in values:
            if any(beaten(value, other) for other in kept):
                continue
            kept = [other for other in kept if not beaten(other, value)] + [value]
        return kept[0] if len(kept) == 1 else join(*kept)

    def _less_equal(self, a: Any, b: Any) -> bool:
        a, b = self.definitions.get(a, a), self.definitions.get(b, b)
        if isinstance(a, Maximum):
            return all(self.less_equal(x, b) for x in a.args)
        if isinstance(b, Minimum):
            return all(self.less_equal(a, y) for y in b.args)
        if isinstance(a, Where):
            return self.less_equal(a.args[1], b) and self.less_equal(a.args[2], b)
        if isinstance(b, Where):
            return self.less_equal(a, b.args[1]) and self.less_equal(a, b.args[2])
        if isinstance(a, Minimum) and any(self.less_equal(x, b) for x in a.args):
            return True
        if isinstance(b, Maximum) and any(self.less_equal(a, y) for y in b.args):
            return True
        if isinstance(a, (Down, Up)) or isinstance(b, (Down, Up)):
            return self._less_equal_tiles(a, b)
        return self.is_nonnegative(b - a)

    def _less_equal_tiles(self, a: Any, b: Any) -> bool:
        if isinstance(a, Up) and isinstance(b, Down):
            return False
        sides = [x.args[0] if isinstance(x, (Down, Up)) else ZERO if x == 0 else None for x in (a, b)]
        return None not in sides and self.less_equal(*sides)

    def is_nonnegative(self, d: Any) -> bool:
        """Whether d >= 0 is proved: by itself, or as one of the given facts plus something nonnegative."""
        return any(self._has_lower_bound_zero(d - fact) for fact in (ZERO, *self.given))

    def _has_lower_bound_zero(self, d: Any) -> bool:
        d = sympy.expand_mul(d)
        for high, low in ((LAST, FIRST), (END, self.begin)):
            if high in d.free_symbols:
                parts = sympy.Add.make_args(d)
                if any(
                    (direction(part, high, self.is_positive) or 0) <= 0 for part in parts if high in part.free_symbols
                ):
                    return False
                d = sympy.expand_mul(d.xreplace({high: low}))
        terms, least = linear_terms(d)
        for term, coefficient in terms.items():
            if coefficient < 0 or not self.is_positive(term):
                return False
            least += coefficient
        return bool(least >= 0)


def _plus_one(a: Any) -> Any:
    if isinstance(a, (Minimum, Maximum)):
        return a.func(*[_plus_one(arg) for arg in a.args])
    return Where(a.args[0], _plus_one(a.args[1]), _plus_one(a.args[2])) if isinstance(a, Where) else a + 1

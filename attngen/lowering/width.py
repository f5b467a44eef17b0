"""Whether a kernel's integers fit 32 bits: positions, params and what is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sympy.core.relational import Relational

from attngen.language.call import LARGEST_PARAM, LARGEST_POSITION
from attngen.language.expression import (
    LARGEST_ROUNDED,
    LARGEST_SHIFT,
    BitAnd,
    BitOr,
    BitXor,
    Floor,
    FloorDiv,
    J,
    Load,
    PyMod,
    Round,
    ShiftLeft,
    ShiftRight,
    is_int,
    linear_terms,
)

LIMIT = 2**31 - 1


def needs_64_bits(expressions: Iterable[Any], params: frozenset[Any]) -> bool:
    """Whether some integer in these expressions can pass 32 bits, given the limits on positions and params."""
    return any(_largest(expr, params)[1] > LIMIT for expr in expressions)


@lru_cache(maxsize=4096)
def _largest(expr: Any, params: frozenset[Any]) -> tuple[int, int]:
    """Bounds on |expr|, and on every integer that is computed on the way to it."""
    if expr.is_Integer:
        return abs(int(expr)), abs(int(expr))
    if expr.is_Symbol:
        size = LARGEST_PARAM - 1 if expr in params else LARGEST_POSITION - 1
        return size, size
    if isinstance(expr, Load):
        inside = [_largest(index, params)[1] for index in expr.indices]
        return LIMIT, max([LIMIT, *inside])  # as wide as the tensor is: no arithmetic yet
    if isinstance(expr, Relational):
        return 0, _comparison(expr, params)
    # A number among reals is printed as one.
    bounds = [_largest(arg, params) for arg in expr.args if not (arg.is_Integer and not is_int(expr))]
    inside_ = max((b for _, b in bounds), default=0)
    sizes = [a for a, _ in bounds]
    if not is_int(expr):
        return 0, inside_
    if expr.is_Add:
        own = sum(sizes)
    elif expr.is_Mul:
        own = 1
        for size in sizes:
            own *= max(size, 1)
    elif expr.is_Pow:
        own = sizes[0] ** int(expr.exp)
    elif isinstance(expr, FloorDiv):
        own = sizes[0]
    elif isinstance(expr, PyMod):
        own = sizes[1]
    elif isinstance(expr, (Floor, Round)):
        own = LARGEST_ROUNDED
    elif isinstance(expr, (BitAnd, BitOr, BitXor)):
        own = 2 ** max(size.bit_length() for size in sizes)
    elif isinstance(expr, ShiftLeft):
        own = sizes[0] << LARGEST_SHIFT
    elif isinstance(expr, ShiftRight):
        own = sizes[0]
    else:  # min, max, abs, where
        own = max(sizes, default=0)
    return own, max(own, inside_)


def _comparison(expr: Any, params: frozenset[Any]) -> int:
    """The sum against zero is printed with its terms on two sides, by sign or by axis."""
    e = expr.args[0]
    if not is_int(e):
        return _largest(e, params)[1]
    terms, constant = linear_terms(e)
    worst = 0
    for on_left in (lambda t, c: c > 0, lambda t, c: J not in t.free_symbols):
        sides = [abs(int(constant)), abs(int(constant))]
        for term, coefficient in terms.items():
            size, inside = _largest(term, params)
            worst = max(worst, inside)
            sides[bool(on_left(term, coefficient))] += abs(int(coefficient)) * size
        plain = all(abs(c) == 1 and isinstance(t, Load) for t, c in terms.items()) and len(terms) == 2 and constant == 0
        worst = max([worst, *([LIMIT] if plain else sides)])
    return worst

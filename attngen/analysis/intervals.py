"""Projection: the walked positions that some row of a tile may attend, as a few intervals.

A conjunction of linear constraints is projected along the tile axis by Fourier-Motzkin elimination: every constraint
against the tile's own bounds, and every pair of constraints that bound the row from both sides. Over the integers that
is exact when the row's coefficients are 1, and sound always (Pugh, "The Omega test", Supercomputing 1991, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import sympy

from attngen.analysis.normal import Bounds, Constraint, Gate, Linear, Reader, disjunctive
from attngen.analysis.order import BEGIN, END, FIRST, INFINITY, LAST, ONE, ZERO, Order, direction
from attngen.language.expression import FloorDiv, Maximum, PyMod, Where, conjunction, disjunction, negate, to_text

MAX_INTERVALS = 4  # per set; more are covered by joining neighbours


@dataclass(frozen=True)
class Interval:
    """low <= position < high on the walked axis (original positions), empty unless `when` holds."""

    low: Any
    high: Any
    when: Any = sympy.true

    def __str__(self) -> str:
        text = f"[{_bound_text(self.low)}, {_bound_text(self.high)})"
        return text if self.when == sympy.true else f"{text} if {to_text(self.when)}"


@dataclass(frozen=True)
class Cover:
    """Intervals whose union covers a condition's positions for every tile; `exact` when it is known to be no larger."""

    intervals: tuple[Interval, ...]
    exact: bool


def cover(condition: Any, reader: Reader) -> Cover:
    """Cover the walked positions for which `condition` holds at some row of the tile."""
    terms, exact = disjunctive(condition)
    found: list[Interval] = []
    for term in terms:
        for constraints, term_exact in _constraints(term, reader):
            interval, projected = _project(constraints, reader)
            exact = exact and term_exact and projected
            if interval is not None:
                found.append(interval)
    intervals = merge(found, reader.order())
    if len(intervals) > MAX_INTERVALS:
        intervals, exact = join_neighbours(intervals, MAX_INTERVALS, reader.order()), False
    return Cover(tuple(intervals), exact)


def _constraints(term: Iterable[Any], reader: Reader) -> list[tuple[list[Constraint], bool]]:
    """A conjunction of atoms as alternatives of conjunctions of constraints."""
    choices: list[tuple[list[Constraint], bool]] = [([], True)]
    for atom in sorted(term, key=sympy.default_sort_key):
        options, exact = reader.alternatives(atom)
        if len(options) * len(choices) > MAX_INTERVALS * MAX_INTERVALS:
            options, exact = [[]], False
        choices = [([*have, *option], known and exact) for have, known in choices for option in options]
    return choices


# -- projection -------------------------------------------------------------------------------------------------------


def _project(constraints: list[Constraint], reader: Reader) -> tuple[Interval | None, bool]:
    """The interval of one conjunction (None if it is never satisfied), and whether it is exact."""
    linear = [c for c in constraints if isinstance(c, Linear)]
    for constraint in linear:
        for term, _ in constraint.tile:
            reader.require_positive_divisors(term)
    order = reader.order()
    exact = len({term for c in linear for term, _ in c.tile}) <= 1

    bounds: list[tuple[Any, Any]] = []  # slope * position + rest >= 0
    for constraint in linear:
        rest, tight = constraint.rest, True
        for term, coefficient in constraint.tile:
            peak, term_tight = _largest(term, coefficient, reader, order)
            rest, tight = rest + peak, tight and term_tight
        bounds.append((constraint.slope, rest))
        exact = exact and tight
    for one, two in combinations([c for c in linear if len(c.tile) == 1], 2):
        pair = _eliminate(one, two, order)
        if pair is not None:
            bounds.append(pair[:2])
            exact = exact and pair[2]

    gates = [c.condition for c in constraints if isinstance(c, Gate)]
    facts: list[Any] = []
    lows = [c.low for c in constraints if isinstance(c, Bounds)]
    highs = [c.high for c in constraints if isinstance(c, Bounds)]
    for slope, rest in bounds:
        rest = sympy.expand_mul(rest)
        if slope == 0:
            if order.less(rest, ZERO):
                return None, exact
            if not order.less_equal(ZERO, rest):
                gates.append(sympy.Ge(rest, 0, evaluate=False))
                facts.append(rest)
        elif slope > 0:
            lows.append(-FloorDiv(rest, slope))
        else:
            highs.append(FloorDiv(rest, -slope) + 1)
    order = order.assuming(facts)
    low, high, when = order.largest(-INFINITY, *lows), order.smallest(INFINITY, *highs), conjunction(gates)
    if when == sympy.false or order.less_equal(high, low):
        return None, exact
    return Interval(low, high, when), exact


def _largest(term: Any, coefficient: Any, reader: Reader, order: Order) -> tuple[Any, bool]:
    """The largest coefficient * term over the tile's rows, and whether it is attained."""
    tile, tight = reader.tile, True
    slope = direction(term, tile, order.is_positive)
    if slope is not None:
        low, high = (term.xreplace({tile: end}) for end in ((FIRST, LAST) if slope >= 0 else (LAST, FIRST)))
    elif isinstance(term, PyMod) and order.is_positive(term.args[1]):
        low, high, tight = ZERO, term.args[1] - 1, False
    else:
        low, high = reader.tables.extent(term)
        tight = False
    if order.is_positive(coefficient):
        return coefficient * high, tight
    if order.is_positive(-coefficient):
        return coefficient * low, tight
    return Maximum(coefficient * low, coefficient * high), tight


def _eliminate(one: Linear, two: Linear, order: Order) -> tuple[Any, Any, bool] | None:
    """a * x + e >= 0 and -c * x + f >= 0 imply c * e + a * f >= 0 (a, c > 0); exact if a or c is 1 and x takes every
    value.
    """
    (term, a), (other, c) = one.tile[0], two.tile[0]
    if term != other:
        return None
    if a == -c:  # also for a symbolic coefficient of any sign
        unit = abs(a) == 1 if a.is_Integer else False
        weights = (ONE, ONE)
    elif a.is_Integer and c.is_Integer and a * c < 0:
        unit = abs(a) == 1 or abs(c) == 1
        weights = (abs(c), abs(a))
    else:
        return None
    slope = weights[0] * one.slope + weights[1] * two.slope
    rest = sympy.expand_mul(weights[0] * one.rest + weights[1] * two.rest)
    return slope, rest, unit and term.is_Symbol


# -- sets of intervals ------------------------------------------------------------------------------------------------


def merge(intervals: Iterable[Interval], order: Order) -> list[Interval]:
    """The same union with fewer intervals: one per open end, absorbed, touching and alternative ones joined.

    The union is the same between BEGIN and END, where walks clip it.
    """
    merged = list(dict.fromkeys(intervals))
    if Interval(-INFINITY, INFINITY) in merged:
        return [Interval(-INFINITY, INFINITY)]
    changed = True
    while changed:
        changed = False
        for x, y in combinations(merged, 2):
            joined = _join(x, y, order)
            if joined is not None:
                merged = [joined if z is x else z for z in merged if z is not y]
                changed = True
                break
    return sorted(merged, key=lambda x: (x.low != -INFINITY) + (x.high == INFINITY))


def _choose(condition: Any, x: Interval, y: Interval) -> Interval:
    """x where the condition holds, y elsewhere."""

    def pick(a: Any, b: Any) -> Any:
        if a == b:
            return a
        a, b = ({INFINITY: END, -INFINITY: BEGIN}.get(bound, bound) for bound in (a, b))
        return Where(condition, a, b)

    return Interval(pick(x.low, y.low), pick(x.high, y.high))


def _join(x: Interval, y: Interval, order: Order) -> Interval | None:
    """The union as one interval, when that is proved: one contains the other, or they always touch."""
    for a, b in ((x, y), (y, x)):
        inside = order.less_equal(b.low, a.low) and order.less_equal(a.high, b.high)
        if inside and b.when in (sympy.true, a.when):
            return b
    if x.when == y.when and order.less_equal(x.low, y.high) and order.less_equal(y.low, x.high):
        # Two intervals whose ends interleave like this have no gap, also when one of them is empty.
        return Interval(order.smallest(x.low, y.low), order.largest(x.high, y.high), x.when)
    if x.when != sympy.true and x.when == negate(y.when):
        return _choose(x.when, x, y)
    for a, b in ((x, y), (y, x)):
        if a.when == sympy.true:
            continue
        if (a.low, a.high) == (-INFINITY, INFINITY):  # everything if the gate holds, and b in any case
            everything = _choose(a.when, Interval(a.low, a.high), Interval(b.low, b.high))
            if b.when == sympy.true:
                return everything
            return Interval(everything.low, everything.high, disjunction([a.when, b.when]))
        if b.low == a.low == -INFINITY or b.high == a.high == INFINITY:
            empty = Interval(-INFINITY, BEGIN) if a.low == -INFINITY else Interval(END, INFINITY)
            return _join(_choose(a.when, a, empty), b, order)
    return None


def join_neighbours(intervals: list[Interval], limit: int, order: Order) -> list[Interval]:
    """At most `limit` intervals that cover the given ones; open-ended ones are kept apart as long as possible."""
    kept = sorted(intervals, key=lambda x: (x.low == -INFINITY) + (x.high == INFINITY))
    while len(kept) > limit:
        x, y = kept[:2]
        when = x.when if x.when == y.when else sympy.true
        kept = [Interval(order.smallest(x.low, y.low), order.largest(x.high, y.high), when), *kept[2:]]
    return kept


def _bound_text(bound: Any) -> str:
    if bound in (INFINITY, -INFINITY):
        return "inf" if bound == INFINITY else "-inf"
    return to_text(bound)

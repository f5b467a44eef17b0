"""Masks as alternatives of constraints that one axis can be projected out of.

A condition becomes a disjunction of conjunctions. Each atom of a conjunction is turned into one of

- `Linear`: a sum of tile-axis terms + c * walked + rest >= 0 over the integers, solved in closed form;
- `Gate`:   a condition on params, b and h only;
- `Bounds`: a separable condition on captured data, decided by per-tile tables made at run time;

or is dropped, which is sound for what it is used for: finding a set that covers everything the condition allows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy

from attngen.analysis.order import INFINITY, ZERO, Order
from attngen.analysis.tables import Tables
from attngen.language.expression import FloorDiv, Load, PyMod, is_int
from attngen.language.expression.functions import is_flag

MAX_TERMS = 24  # conjunctions kept apart; a formula with more is covered by "anything"


@dataclass(frozen=True)
class Linear:
    """sum(coefficient * term for tile) + slope * walked position + rest >= 0, over the integers."""

    tile: tuple[tuple[Any, Any], ...]  # (term in the tile axis, coefficient free of both axes)
    slope: Any  # an integer; 0 when the walked axis does not occur
    rest: Any  # free of both axes


@dataclass(frozen=True)
class Gate:
    """A condition that is the same for the whole tile."""

    condition: Any


@dataclass(frozen=True)
class Bounds:
    """low <= walked position < high, where both are read from a table of the tile."""

    low: Any
    high: Any


Constraint = Linear | Gate | Bounds


def disjunctive(condition: Any) -> tuple[list[frozenset[Any]], bool]:
    """Conjunctions of atoms whose union covers `condition`, and whether the union is exactly it."""
    if condition == sympy.true:
        return [frozenset()], True
    if condition == sympy.false:
        return [], True
    if isinstance(condition, sympy.Or):
        parts = [disjunctive(arg) for arg in condition.args]
        terms = _absorb(term for part, _ in parts for term in part)
        if len(terms) > MAX_TERMS:
            return [frozenset()], False
        return terms, all(exact for _, exact in parts)
    if isinstance(condition, sympy.And):
        terms, exact = [frozenset[Any]()], True
        for part, part_exact in sorted((disjunctive(arg) for arg in condition.args), key=lambda p: len(p[0])):
            product = _absorb(a | b for a in terms for b in part)
            if len(product) > MAX_TERMS:
                exact = False  # the rest of this conjunction is taken as true
                continue
            terms, exact = product, exact and part_exact
        return terms, exact
    return [frozenset([condition])], True


def _absorb(terms: Iterable[frozenset[Any]]) -> list[frozenset[Any]]:
    kept: list[frozenset[Any]] = []
    for term in sorted(dict.fromkeys(terms), key=len):
        if not any(other <= term for other in kept):
            kept.append(term)
    return kept


class Reader:
    """Turns atoms into constraints, for one tile axis and one walked axis.

    `divisors` collects the params that a closed form needs to be positive because they divide.
    """

    def __init__(self, tile: Any, walked: Any, tables: Tables):
        self.tile, self.walked, self.tables = tile, walked, tables
        self.divisors: dict[Any, None] = {}

    def alternatives(self, atom: Any) -> tuple[list[list[Constraint]], bool]:
        """The atom as alternatives of conjunctions of constraints that cover it; whether they are exactly it."""
        e = atom.args[0]
        if not e.free_symbols & {self.tile, self.walked}:
            return [[Gate(atom)]], True
        if not is_int(e):
            return self._from_floor(atom) or self._from_tables(atom)
        if isinstance(atom, (sympy.Ge, sympy.Gt)):
            bound = self._linear(e - 1 if isinstance(atom, sympy.Gt) else e)
            return ([[bound]], True) if bound else self._from_tables(atom)
        if is_flag(e):  # a load from a boolean tensor is 0 or 1: one inequality says it
            return self.alternatives(sympy.Ge(e - 1 if isinstance(atom, sympy.Ne) else -e, 0, evaluate=False))
        shift = 0 if isinstance(atom, sympy.Eq) else 1
        above, below = self._linear(e - shift), self._linear(-e - shift)
        if above is None or below is None:
            return self._from_tables(atom)
        if isinstance(atom, sympy.Eq):
            return [[above, below]], True
        return [[above], [below]], True

    def _from_floor(self, atom: Any) -> tuple[list[list[Constraint]], bool] | None:
        """An inequality of integer terms in both axes and a real rest: the rest is rounded, one position to the safe
        side.

        The position is for float32: adding a large position to the rest may round past the next integer.
        """
        parts = self._split(atom.args[0]) if isinstance(atom, (sympy.Ge, sympy.Gt)) else None
        if parts is None:
            return None
        sides = sympy.Add(*[c * term for part in parts[:2] for term, c in part.items()])
        bound = self._linear(sides + self.tables.floor(parts[2]) + 1) if is_int(sides) else None
        return ([[bound]], False) if bound else None

    def _from_tables(self, atom: Any) -> tuple[list[list[Constraint]], bool]:
        parts = self._split(atom.args[0])
        if parts is None or not any(term.has(Load) for term in parts[1]):
            return [[]], False
        tile, walked = (sympy.Add(*[c * t for t, c in terms.items()]) for terms in parts[:2])
        rest = parts[2]
        if isinstance(atom, (sympy.Eq, sympy.Ne)) and not is_int(atom.args[0]) and rest != 0:
            return [[]], False  # a float sum of three parts depends on the order of summation
        if isinstance(atom, (sympy.Eq, sympy.Ne)):
            first, stop, run_first, run_stop = self.tables.match(tile + rest, walked)
            if isinstance(atom, sympy.Eq):
                return [[Bounds(first, stop)]], False
            return [[Bounds(-INFINITY, run_first)], [Bounds(run_stop, INFINITY)]], False
        first, stop = self.tables.order(tile + rest, walked, strict=isinstance(atom, sympy.Gt))
        return [[Bounds(first, stop)]], False

    def _split(self, e: Any) -> tuple[dict[Any, Any], dict[Any, Any], Any] | None:
        """(tile-axis terms, walked terms, rest) with coefficients free of both; None if a term mixes the axes."""
        tile: dict[Any, Any] = {}
        walked: dict[Any, Any] = {}
        rest = ZERO
        for part in sympy.Add.make_args(sympy.expand_mul(e)):
            has_tile, has_walked = self.tile in part.free_symbols, self.walked in part.free_symbols
            if has_tile and has_walked:
                return None
            if not has_tile and not has_walked:
                rest += part
                continue
            symbol, terms = (self.tile, tile) if has_tile else (self.walked, walked)
            factors = sympy.Mul.make_args(part)
            term = sympy.Mul(*[f for f in factors if symbol in f.free_symbols])
            terms[term] = terms.get(term, ZERO) + sympy.Mul(*[f for f in factors if symbol not in f.free_symbols])
        return tile, walked, rest

    def _linear(self, e: Any) -> Linear | None:
        """e >= 0 in closed form, or None if the walked position can't be isolated."""
        solved = self._invert(e)
        parts = self._split(solved) if solved is not None else None
        if parts is None:
            return None
        tile, walked, rest = parts
        slope = walked.pop(self.walked, ZERO)
        if walked or not slope.is_Integer:
            return None
        return Linear(tuple(tile.items()), slope, rest)

    def _invert(self, e: Any) -> Any:
        """Rewrite e >= 0 so that the walked position is outside of every floor division.

        x // d + r >= 0 is x + d * r >= 0, and r - x // d >= 0 is d * r + d - 1 - x >= 0, for integers and d > 0.
        """
        for _ in range(4):
            parts = sympy.Add.make_args(sympy.expand_mul(e))
            found = next(
                (p for p in parts if self.walked in p.as_coeff_Mul()[1].free_symbols and p.has(FloorDiv)), None
            )
            if found is None:
                return e
            factor, quotient = found.as_coeff_Mul()
            if not isinstance(quotient, FloorDiv) or not self._divides(quotient.args[1]):
                return None
            x, d = quotient.args
            rest = sympy.Add(*[p for p in parts if p is not found])
            if abs(factor) != 1:
                rest = FloorDiv(rest, abs(factor))
            e = x + d * rest if factor > 0 else d * rest + d - 1 - x
        return None

    def _divides(self, d: Any) -> bool:
        """Whether `d` may be taken as positive: a number is, a param is required to be."""
        if d.is_Integer:
            return bool(d > 0)
        if d.is_Symbol and d.is_integer and d not in (self.tile, self.walked) and d.name not in ("b", "h"):
            self.divisors[d] = None
            return True
        return False

    def require_positive_divisors(self, expr: Any) -> None:
        """Note the params that divide inside `expr`, so that its floor divisions are monotone."""
        for node in expr.atoms(FloorDiv, PyMod):
            self._divides(node.args[1])

    def order(self) -> Order:
        """Proofs that may use the signs of the divisors met so far."""
        return Order(self.divisors)

"""One form for each mask: negation normal form over atoms against zero.

Atoms are Ge(e, 0), Eq(e, 0), Ne(e, 0), and Gt(e, 0) for real e only: an integer `a < b` is `b - a - 1 >= 0`. Linear
integer atoms are divided by the gcd of their coefficients; parallel bounds keep the strongest (in an And) or the
weakest (in an Or); abs, min, max and where inside a comparison become And / Or of simpler comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import gcd
from typing import Any

import sympy
from sympy.core.sorting import default_sort_key

from attngen.language.expression.functions import Absolute, Maximum, Minimum, Where, is_int, rounded

TRUE, FALSE = sympy.true, sympy.false


def greater_equal(a: Any, b: Any) -> Any:
    """a >= b."""
    return _compare(a - b, _greater_equal_zero)


def greater(a: Any, b: Any) -> Any:
    """a > b."""
    return _compare(a - b, _greater_zero)


def equal(a: Any, b: Any) -> Any:
    """a == b."""
    return _compare(a - b, _equal_zero)


def not_equal(a: Any, b: Any) -> Any:
    """a != b."""
    return negate(equal(a, b))


def negate(condition: Any) -> Any:
    """The canonical negation of a canonical condition."""
    if condition == TRUE:
        return FALSE
    if condition == FALSE:
        return TRUE
    if isinstance(condition, sympy.And):
        return _build(sympy.Or, [negate(arg) for arg in condition.args])
    if isinstance(condition, sympy.Or):
        return _build(sympy.And, [negate(arg) for arg in condition.args])
    e = condition.args[0]
    if isinstance(condition, sympy.Ge):
        return _greater_zero(-e)
    if isinstance(condition, sympy.Gt):
        return _greater_equal_zero(-e)
    if isinstance(condition, sympy.Eq):
        return sympy.Ne(e, 0, evaluate=False)
    return sympy.Eq(e, 0, evaluate=False)


def conjunction(conditions: Iterable[Any]) -> Any:
    """The canonical And of canonical conditions."""
    parts: dict[Any, None] = {}
    for condition in conditions:
        for part in condition.args if isinstance(condition, sympy.And) else (condition,):
            if part == FALSE:
                return FALSE
            if part != TRUE:
                parts[part] = None
    atoms = _merge_bounds([part for part in parts if not isinstance(part, sympy.Or)])
    if atoms is None:
        return FALSE
    known = set(atoms)
    clauses: list[Any] = []
    for clause in (part for part in parts if isinstance(part, sympy.Or)):
        if known & set(clause.args):
            continue  # a & (a | x) = a
        open_args = [arg for arg in clause.args if negate(arg) not in known]
        if not open_args:
            return FALSE
        clauses.append(clause if len(open_args) == len(clause.args) else _build(sympy.Or, open_args))
    if any(not isinstance(clause, sympy.Or) for clause in clauses):
        return conjunction([*atoms, *clauses])  # a clause shrank to an atom: it may merge with the others
    return _build(sympy.And, [*atoms, *clauses])


def disjunction(conditions: Iterable[Any]) -> Any:
    """The canonical Or of canonical conditions: the dual of the And."""
    return negate(conjunction([negate(condition) for condition in conditions]))


def truth(value: Any) -> Any:
    """The condition `value != 0`."""
    return not_equal(value, sympy.Integer(0))


def linear_terms(e: Any) -> tuple[dict[Any, Any], Any]:
    """Split a sum into {term: rational coefficient} and its rational constant."""
    terms: dict[Any, Any] = {}
    constant = sympy.Integer(0)
    for part in sympy.Add.make_args(e):
        coefficient, term = part.as_coeff_Mul()
        if term == 1:
            constant += coefficient
        else:
            terms[term] = coefficient
    return terms, constant


# -- atoms ------------------------------------------------------------------------------------------------------------


def _compare(e: Any, close: Callable[[Any], Any]) -> Any:
    """Expand where / min / max / abs at the top of the sum `e`, then close each simple sum into an atom."""
    e = sympy.expand_mul(e)
    for part in sympy.Add.make_args(e):
        coefficient, term = part.as_coeff_Mul()
        rest = e - part
        if isinstance(term, Where):
            condition, a, b = term.args
            yes, no = _compare(coefficient * a + rest, close), _compare(coefficient * b + rest, close)
            return disjunction([conjunction([condition, yes]), conjunction([negate(condition), no])])
        if isinstance(term, (Absolute, Minimum, Maximum)):
            if close is _equal_zero:
                return conjunction([_compare(e, _greater_equal_zero), _compare(-e, _greater_equal_zero)])
            branches = (term.args[0], -term.args[0]) if isinstance(term, Absolute) else term.args
            options = [_compare(coefficient * branch + rest, close) for branch in branches]
            # c * max(..) >= r holds when some branch does for c > 0, when all do for c < 0; min the other way round.
            largest = not isinstance(term, Minimum)
            return disjunction(options) if largest == bool(coefficient > 0) else conjunction(options)
    return close(e)


def _scaled(e: Any) -> tuple[dict[Any, Any], Any, bool]:
    """Terms and constant with coprime integer coefficients; whether the sum of terms is integer valued. Coefficients of many
    digits are rounded, and then are coprime integers as far as that leaves them so.
    """
    terms, constant = linear_terms(e)
    while True:
        denominator = sympy.ilcm(1, *[c.q for c in terms.values()])
        divisor = sympy.Rational(gcd(*[int(c * denominator) for c in terms.values()]), denominator)
        exact = {t: c / divisor for t, c in terms.items()}
        terms = {t: rounded(c) for t, c in exact.items()}
        constant = rounded(constant / divisor)
        if terms == exact:
            return terms, constant, all(is_int(t) for t in terms)


def _sum(terms: dict[Any, Any], constant: Any) -> Any:
    return sympy.Add(*[c * t for t, c in terms.items()], constant)


def _greater_equal_zero(e: Any) -> Any:
    if e.is_number:
        return TRUE if e >= 0 else FALSE
    terms, constant, integer = _scaled(e)
    return sympy.Ge(_sum(terms, sympy.floor(constant) if integer else constant), 0, evaluate=False)


def _greater_zero(e: Any) -> Any:
    if e.is_number:
        return TRUE if e > 0 else FALSE
    terms, constant, integer = _scaled(e)
    if integer:  # t + c > 0 over the integers: t + ceil(c) - 1 >= 0
        return sympy.Ge(_sum(terms, sympy.ceiling(constant) - 1), 0, evaluate=False)
    return sympy.Gt(_sum(terms, constant), 0, evaluate=False)


def _equal_zero(e: Any) -> Any:
    if e.is_number:
        return TRUE if e == 0 else FALSE
    terms, constant, integer = _scaled(e)
    if integer and not constant.is_Integer:
        return FALSE
    if terms[min(terms, key=default_sort_key)] < 0:
        terms, constant = {t: -c for t, c in terms.items()}, -constant
    return sympy.Eq(_sum(terms, constant), 0, evaluate=False)


def _merge_bounds(atoms: list[Any]) -> list[Any] | None:
    """Keep the strongest of parallel bounds in a conjunction; None if they contradict each other."""
    bounds: dict[Any, Any] = {}  # direction (a sum without constant) -> least constant c of direction + c >= 0
    others: list[Any] = []
    for atom in atoms:
        if isinstance(atom, sympy.Ge):
            direction, constant = _direction(atom)
            bounds[direction] = min(constant, bounds.get(direction, constant))
        else:
            others.append(atom)
    kept: dict[Any, None] = {}
    for direction, constant in bounds.items():
        opposite = bounds.get(-direction)
        if opposite is None or constant + opposite > 0:
            kept[sympy.Ge(direction + constant, 0, evaluate=False)] = None
        elif constant + opposite < 0:
            return None
        else:
            kept[_equal_zero(direction + constant)] = None
    equalities = {_direction(a)[0]: _direction(a)[1] for a in kept if isinstance(a, sympy.Eq)}
    for atom in others:
        if isinstance(atom, sympy.Eq):
            direction, constant = _direction(atom)
            if equalities.setdefault(direction, constant) != constant:
                return None
        kept[atom] = None
    for direction, constant in equalities.items():  # a point decides every parallel atom
        for atom in [a for a in kept if not isinstance(a, sympy.Or)]:
            parallel, offset = _direction(atom)
            if parallel not in (direction, -direction):
                continue
            value = offset - constant if parallel == direction else offset + constant
            if isinstance(atom, sympy.Eq):
                continue
            holds = (
                value >= 0 if isinstance(atom, sympy.Ge) else value > 0 if isinstance(atom, sympy.Gt) else value != 0
            )
            if not holds:
                return None
            del kept[atom]
    return list(kept)


def _direction(atom: Any) -> tuple[Any, Any]:
    constant, direction = atom.args[0].as_coeff_Add()
    return direction, constant


def _build(operator: Any, args: Iterable[Any]) -> Any:
    unique = sorted(dict.fromkeys(args), key=default_sort_key)
    if len(unique) == 1:
        return unique[0]
    if not unique:
        return TRUE if operator is sympy.And else FALSE
    # Constructed directly: the arguments are canonical already, and sympy's own filter would search them again.
    node = sympy.Basic.__new__(operator, *unique)
    node._argset = frozenset(unique)
    return node

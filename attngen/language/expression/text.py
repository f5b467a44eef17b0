"""Expressions as text that the parser reads back to the same form."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import sympy

from attngen.language.expression.canonical import linear_terms
from attngen.language.expression.functions import (
    LARGEST_INTEGER,
    Absolute,
    BitAnd,
    BitOr,
    BitXor,
    Erf,
    Exp2,
    Floor,
    FloorDiv,
    Load,
    Maximum,
    Minimum,
    Power,
    PyMod,
    Round,
    ShiftLeft,
    ShiftRight,
    Sigmoid,
    Where,
    is_flag,
)

# Binding strength, loosest first; an operand is put in parentheses when it binds looser than its place needs.
OR, AND, COMPARE, SUM, PRODUCT, ATOM = range(6)

_NAMES = {
    Minimum: "min", Maximum: "max", Where: "where", Absolute: "abs", Sigmoid: "sigmoid", Erf: "erf", Exp2: "exp2",
    Floor: "floor", Round: "round",
}  # fmt: skip
_BITS = {BitAnd: "&", BitOr: "|", BitXor: "^", ShiftLeft: "<<", ShiftRight: ">>"}
_COMPARISONS = {sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}


def to_text(expr: Any, strength: int = OR) -> str:
    """Text of a canonical expression or condition."""
    text, own = _render(expr)
    return f"({text})" if own < strength else text


def number(value: Any) -> str:
    """An exact rational, as a decimal when a float of that value prints so."""
    fraction = Fraction(int(value.p), int(value.q))
    if fraction.denominator == 1 and abs(fraction.numerator) < LARGEST_INTEGER:
        return str(fraction.numerator)
    decimal = repr(float(fraction))
    return decimal if Fraction(decimal) == fraction else f"{fraction.numerator}/{fraction.denominator}"


def _render(expr: Any) -> tuple[str, int]:
    if expr == sympy.true or expr == sympy.false:
        return ("true" if expr == sympy.true else "false"), ATOM
    if isinstance(expr, sympy.Or):
        return " or ".join(to_text(arg, AND) for arg in expr.args), OR
    if isinstance(expr, sympy.And):
        return " and ".join(to_text(arg, COMPARE) for arg in expr.args), AND
    if isinstance(expr, (sympy.Eq, sympy.Ne)) and is_flag(expr.args[0]):
        text = to_text(expr.args[0])
        return (text, ATOM) if isinstance(expr, sympy.Ne) else (f"not {text}", COMPARE)
    for relation, sign in _COMPARISONS.items():
        if isinstance(expr, relation):
            left, right = _sides(expr.args[0])
            return f"{to_text(left, SUM)} {sign} {to_text(right, SUM)}", COMPARE
    if expr.is_Symbol:
        return expr.name, ATOM
    if expr.is_Rational:
        text = number(expr)
        return text, SUM if text.startswith("-") else PRODUCT if "/" in text else ATOM
    if isinstance(expr, Load):
        places = ", ".join(to_text(index) for index in expr.indices)
        return f"{expr.name}[{places}]" if places else expr.name, ATOM
    if isinstance(expr, (FloorDiv, PyMod)):
        sign = "//" if isinstance(expr, FloorDiv) else "%"
        return f"{to_text(expr.args[0], ATOM)} {sign} {to_text(expr.args[1], ATOM)}", PRODUCT
    if type(expr) in _BITS:  # in parentheses, since few know how strongly each binds
        return f"({f' {_BITS[type(expr)]} '.join(to_text(arg, ATOM) for arg in expr.args)})", ATOM
    if isinstance(expr, Power):
        return f"{to_text(expr.args[0], ATOM)} ** {to_text(expr.args[1], ATOM)}", PRODUCT
    if expr.is_Add:
        return _render_sum(expr), SUM
    if expr.is_Mul:
        return _render_product(expr)
    if expr.is_Pow:
        return _render_power(expr)
    name = _NAMES.get(type(expr), type(expr).__name__)
    return f"{name}({', '.join(to_text(arg) for arg in expr.args)})", ATOM


def _sides(e: Any) -> tuple[Any, Any]:
    """Move the negative terms of `e` to the right-hand side: i - j + 3 reads as i + 3 against j."""
    terms, constant = linear_terms(e)
    left = [c * t for t, c in terms.items() if c > 0] + ([constant] if constant > 0 else [])
    right = [-c * t for t, c in terms.items() if c < 0] + ([-constant] if constant < 0 else [])
    return sympy.Add(*left), sympy.Add(*right)


def _render_sum(expr: Any) -> str:
    terms = sorted(expr.as_ordered_terms(), key=lambda term: term.could_extract_minus_sign())
    text = to_text(terms[0], SUM)
    for term in terms[1:]:
        negative = term.could_extract_minus_sign()
        text += (" - " if negative else " + ") + to_text(-term if negative else term, PRODUCT)
    return text


def _render_product(expr: Any) -> tuple[str, int]:
    """A number in front of a sum would be multiplied into it when the text is read: the other factors stand in between, or
    parentheses.
    """
    coefficient, rest = expr.as_coeff_Mul()
    if coefficient < 0:
        text = to_text(-expr, PRODUCT)
        whole = (rest.is_Mul and text.startswith("(")) or isinstance(rest, (FloorDiv, PyMod))  # -x // 2 is (-x) // 2
        return f"-({text})" if whole else f"-{text}", SUM
    above = [factor for factor in rest.as_ordered_factors() if not _is_reciprocal(factor)]
    below = [sympy.Pow(f.base, -f.exp) for f in rest.as_ordered_factors() if _is_reciprocal(f)]
    of_sum = bool(above) and above[0].is_Add and len(above) + len(below) > 1
    p, q = sympy.Integer(coefficient.p), sympy.Integer(coefficient.q)
    if q != 1 and "/" in number(coefficient):
        below.insert(len(below) if of_sum else 0, q)
        coefficient = p
    text = " * ".join(to_text(f, ATOM) for f in above) + "".join(f" / {to_text(f, ATOM)}" for f in below)
    if coefficient == 1:
        return (text if above else f"1{text}"), PRODUCT
    if of_sum:
        return f"{number(coefficient)} * ({text})", PRODUCT
    return number(coefficient) + (" * " if above else "") + text, PRODUCT


def _is_reciprocal(factor: Any) -> bool:
    return bool(factor.is_Pow and factor.exp.is_Rational and factor.exp < 0)


def _render_power(expr: Any) -> tuple[str, int]:
    base, exponent = expr.args
    if exponent == sympy.Rational(1, 2):
        return f"sqrt({to_text(base)})", ATOM
    if exponent.is_Rational and exponent < 0:
        return f"1 / {to_text(sympy.Pow(base, -exponent), ATOM)}", PRODUCT
    if exponent.is_Integer:
        return " * ".join([to_text(base, ATOM)] * int(exponent)), PRODUCT
    if exponent.is_Rational and exponent.q == 2:  # x ** (n/2)
        return " * ".join([f"sqrt({to_text(base)})"] * int(exponent.p)), PRODUCT
    raise AssertionError(f"no text for {expr!r}")

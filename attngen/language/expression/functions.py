"""The vocabulary of the symbolic language: sympy symbols and the functions that sympy has no exact twin of.

All numbers are exact (Integer or Rational; 0.1 is 1/10), so an expression has one form whatever way it was
written. Integer functions follow Python: // and % round towards minus infinity.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.core.sorting import default_sort_key
from sympy.logic.boolalg import BooleanAtom, BooleanFunction

B = sympy.Symbol("b", integer=True)  # batch
H = sympy.Symbol("h", integer=True)  # query head
I = sympy.Symbol("i", integer=True)
J = sympy.Symbol("j", integer=True)  # original key position
S = sympy.Symbol("s", real=True)  # the scaled logit q.k * scale

ONE, ZERO = sympy.Integer(1), sympy.Integer(0)


class Load(sympy.Function):
    """Load(name, *indices): an element of a captured tensor. The name symbol is integer or real by dtype."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO  # indices are integers: a load is constant in every real symbol

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.args[0].name)

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return tuple(self.args[1:])


class FloorDiv(sympy.Function):
    """FloorDiv(a, b) = floor(a / b)."""

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        if b == 1 and is_int(a):
            return a
        if a.is_Rational and b.is_Rational and b != 0:
            return sympy.Integer(a // b)
        return None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


class PyMod(sympy.Function):
    """PyMod(a, b) = a - b * floor(a / b): the sign of the divisor, as in Python."""

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        if b == 1 and is_int(a):
            return ZERO
        if a.is_Rational and b.is_Rational and b != 0:
            return a - b * (a // b)
        return None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        a, b = self.args
        return a.diff(symbol) - b.diff(symbol) * FloorDiv(a, b)


def _lattice_arguments(cls: Any, args: tuple[Any, ...], pick: Any) -> list[Any]:
    flat: set[Any] = set()
    numbers: list[Any] = []
    for arg in args:
        for part in arg.args if isinstance(arg, cls) else (arg,):
            numbers.append(part) if part.is_Rational or part.is_infinite else flat.add(part)
    if numbers:
        flat.add(pick(numbers))
    return sorted(flat, key=default_sort_key)


class Minimum(sympy.Function):
    """Smallest of its arguments; flattened, sorted, numbers folded."""

    @classmethod
    def eval(cls, *args: Any) -> Any:
        kept = _lattice_arguments(cls, args, min)
        if len(kept) == 1:
            return kept[0]
        return None if tuple(kept) == args else cls(*kept)

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        first, rest = self.args[0], self.func(*self.args[1:])
        return Where(sympy.Ge(rest - first, 0, evaluate=False), first.diff(symbol), rest.diff(symbol))


class Maximum(sympy.Function):
    """Largest of its arguments; flattened, sorted, numbers folded."""

    @classmethod
    def eval(cls, *args: Any) -> Any:
        kept = _lattice_arguments(cls, args, max)
        if len(kept) == 1:
            return kept[0]
        return None if tuple(kept) == args else cls(*kept)

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        first, rest = self.args[0], self.func(*self.args[1:])
        return Where(sympy.Ge(first - rest, 0, evaluate=False), first.diff(symbol), rest.diff(symbol))


class Where(sympy.Function):
    """Where(condition, a, b): a where the condition holds, else b."""

    @classmethod
    def eval(cls, condition: Any, a: Any, b: Any) -> Any:
        if condition == sympy.true or a == b:
            return a
        if condition == sympy.false:
            return b
        return None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        condition, a, b = self.args
        return Where(condition, a.diff(symbol), b.diff(symbol))


class Absolute(sympy.Function):
    """Absolute value; Absolute(-x) is Absolute(x)."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        if x.is_Rational:
            return abs(x)
        if x.could_extract_minus_sign():
            return cls(-x)
        return None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        x = self.args[0]
        slope = x.diff(symbol)
        return Where(sympy.Ge(x, 0, evaluate=False), slope, -slope)


class Sigmoid(sympy.Function):
    """1 / (1 + exp(-x))."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return self * (1 - self) * self.args[0].diff(symbol)


class Uniform(sympy.Function):
    """Uniform(seed, b, h, i, j): a counter-based random number in [0, 1) with 24 bits; the same on every backend.

    u = mix(mix(mix(mix(seed) ^ b) ^ h) ^ i); r = mix(u ^ j); value = (r >> 8) * 2**-24, all in uint32, where mix is
    the two-multiply hash `x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16`
    (hash-prospector's lowbias32). Dropout draws its mask from it, so the backward recomputes instead of storing.
    """

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


@lru_cache(maxsize=65536)
def is_int(expr: Any) -> bool:
    """Whether an arithmetic expression is integer valued by construction."""
    if expr.is_Number:
        return bool(expr.is_Integer)
    if expr.is_Symbol:
        return bool(expr.is_integer)
    if isinstance(expr, Load):
        return bool(expr.args[0].is_integer)
    if isinstance(expr, Where):
        return is_int(expr.args[1]) and is_int(expr.args[2])
    if isinstance(expr, Uniform):
        return False
    if expr.is_Add or expr.is_Mul or isinstance(expr, (FloorDiv, PyMod, Minimum, Maximum, Absolute)):
        return all(is_int(arg) for arg in expr.args)
    if expr.is_Pow:
        return is_int(expr.base) and bool(expr.exp.is_Integer) and bool(expr.exp >= 0)
    return False


def is_flag(expr: Any) -> bool:
    """Whether this is a load from a boolean tensor: its name symbol is a nonnegative integer."""
    return isinstance(expr, Load) and bool(expr.args[0].is_nonnegative)


def is_condition(expr: Any) -> bool:
    """Whether the expression is a truth value."""
    return isinstance(expr, (Relational, BooleanFunction, BooleanAtom))


def kind(expr: Any) -> str:
    """One of "bool", "int" and "float"."""
    if is_condition(expr):
        return "bool"
    return "int" if is_int(expr) else "float"


def loads(expr: Any) -> tuple[Load, ...]:
    """The distinct captured-tensor loads of an expression, nested ones included, in a stable order."""
    return tuple(sorted(expr.atoms(Load), key=default_sort_key))

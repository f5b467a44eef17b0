"""The vocabulary of the symbolic language: sympy symbols and the functions that sympy has no exact twin of.

All numbers are exact (Integer or Rational; 0.1 is 1/10), so an expression has one form whatever way it was
written. Integer functions follow Python: // and % round towards minus infinity, bits are those of two's complement.
A whole number of 2**53 or more is a float: only below that does a float hold every integer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache, reduce
from typing import Any, ClassVar

import sympy
from sympy.core.relational import Relational
from sympy.core.sorting import default_sort_key
from sympy.logic.boolalg import BooleanAtom, BooleanFunction

from attngen.language.programs import LARGEST_ROUNDED, LARGEST_SHIFT

B = sympy.Symbol("b", integer=True)  # batch
H = sympy.Symbol("h", integer=True)  # query head
I = sympy.Symbol("i", integer=True)
J = sympy.Symbol("j", integer=True)  # original key position
S = sympy.Symbol("s", real=True)  # the scaled logit q.k * scale
Q_OFFSET = sympy.Symbol("q_offset", integer=True)  # position of the call's first query row
ROW = I - Q_OFFSET  # the query's row

LARGEST_INTEGER = 2**53  # numbers of this size and more are floats
LARGE_FACTOR = 2**24  # from here on a product is an integer only if it can't leave 64 bits

ONE, ZERO = sympy.Integer(1), sympy.Integer(0)
_TWO_OVER_SQRT_PI = sympy.Rational(str(2 / math.sqrt(math.pi)))
_LN_2 = sympy.Rational(str(math.log(2)))


class Position(sympy.Symbol):
    """A position besides i and j: what analysis and lowering put in their place. An int of 28 bits."""

    @classmethod
    def class_key(cls) -> Any:  # sorted among the other symbols
        return sympy.Symbol.class_key()


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

    is_commutative = True  # to sympy a condition is not

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


class Erf(sympy.Function):
    """The error function."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        x = self.args[0]
        return _TWO_OVER_SQRT_PI * sympy.exp(-(x**2)) * x.diff(symbol)


class Exp2(sympy.Function):
    """2 ** x."""

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return _LN_2 * self * self.args[0].diff(symbol)


class Power(sympy.Function):
    """Power(x, y) = x ** y for the exponents that sympy's own Pow is not kept for: see `builder.power`. x ** 0 is 1."""

    @classmethod
    def eval(cls, x: Any, y: Any) -> Any:
        return ONE if y == 0 else x if y == 1 else None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        x, y = self.args
        by_base, by_exponent = x.diff(symbol), y.diff(symbol)
        slope = y * Power(x, y - 1) * by_base if by_base != 0 else ZERO
        if by_exponent == 0:
            return slope
        return slope + self * (exact(math.log(x)) if x.is_Rational and x > 0 else sympy.log(x)) * by_exponent


class Floor(sympy.Function):
    """Floor(x): an integer, at most 2**30 in size. Of a fraction of integers it is a floor division."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        if is_int(x):
            return x
        if x.is_Rational:
            return _clipped(math.floor(x))
        divided = _integer_fraction(x)
        return None if divided is None else FloorDiv(*divided)

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


class Round(sympy.Function):
    """Round(x): the nearest integer, halves to the even one, at most 2**30 in size."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        if is_int(x):
            return x
        return _clipped(round(Fraction(int(x.p), int(x.q)))) if x.is_Rational else None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


class _Bits(sympy.Function):
    """A bitwise operation on integers; flattened, sorted, numbers folded."""

    fold: ClassVar[Callable[[int, int], int]]
    identity: ClassVar[int]

    @classmethod
    def eval(cls, *args: Any) -> Any:
        flat = [part for arg in args for part in (arg.args if isinstance(arg, cls) else (arg,))]
        number = reduce(cls.fold, (int(part) for part in flat if part.is_Integer), cls.identity)
        kept = sorted((part for part in flat if not part.is_Integer), key=default_sort_key)
        if cls.fold is not operator.xor:  # x & x is x
            kept = list(dict.fromkeys(kept))
        if number != cls.identity or not kept:
            kept.insert(0, sympy.Integer(number))
        if len(kept) == 1:
            return kept[0]
        return None if tuple(kept) == args else cls(*kept)

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


class BitAnd(_Bits):
    """a & b."""

    fold, identity = operator.and_, -1


class BitOr(_Bits):
    """a | b."""

    fold, identity = operator.or_, 0


class BitXor(_Bits):
    """a ^ b."""

    fold, identity = operator.xor, 0


class ShiftLeft(sympy.Function):
    """a << n, n taken into 0 .. 31; by a number it is a product."""

    @classmethod
    def eval(cls, a: Any, n: Any) -> Any:
        return a * 2 ** min(max(int(n), 0), LARGEST_SHIFT) if n.is_Integer else None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


class ShiftRight(sympy.Function):
    """a >> n, n taken into 0 .. 31; by a number it is a floor division."""

    @classmethod
    def eval(cls, a: Any, n: Any) -> Any:
        return FloorDiv(a, 2 ** min(max(int(n), 0), LARGEST_SHIFT)) if n.is_Integer else None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


class Uniform(sympy.Function):
    """Uniform(seed, b, h, i, j): a counter-based random number in [0, 1) with 24 bits; the same on every backend.

    u = mix(mix(mix(mix(seed) ^ b) ^ h) ^ i); r = mix(u ^ j); value = (r >> 8) * 2**-24, all in uint32, where mix is
    the two-multiply hash `x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16`
    (hash-prospector's lowbias32). Dropout draws its mask from it, so the backward recomputes instead of storing.
    """

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        return ZERO


def _clipped(number: int) -> Any:
    return sympy.Integer(min(max(number, -LARGEST_ROUNDED), LARGEST_ROUNDED))


_WHOLE = (Floor, Round, BitAnd, BitOr, BitXor, ShiftLeft, ShiftRight)


@lru_cache(maxsize=65536)
def is_int(expr: Any) -> bool:
    """Whether an arithmetic expression is integer valued by construction."""
    if expr.is_Number:
        return bool(expr.is_Integer) and abs(expr) < LARGEST_INTEGER
    if expr.is_Symbol:
        return bool(expr.is_integer)
    if isinstance(expr, Load):
        return bool(expr.args[0].is_integer)
    if isinstance(expr, Where):
        return is_int(expr.args[1]) and is_int(expr.args[2])
    if isinstance(expr, _WHOLE):
        return True
    if isinstance(expr, Uniform):
        return False
    if expr.is_Add or expr.is_Mul or isinstance(expr, (FloorDiv, PyMod, Minimum, Maximum, Absolute)):
        return all(is_int(arg) for arg in expr.args) and not _may_overflow(expr)
    if expr.is_Pow:
        return is_int(expr.base) and bool(expr.exp.is_Integer) and bool(expr.exp >= 0)
    return False


def _may_overflow(expr: Any) -> bool:
    """Whether this is a product with a large number that can leave 64 bits: `1e18 * (i - j)` is meant as a float."""
    if not expr.is_Mul:
        return False
    factor, rest = expr.as_coeff_Mul()
    return abs(factor) >= LARGE_FACTOR and abs(factor) * _size(rest) >= 2**62


def _size(expr: Any) -> int:
    """A bound on an integer expression's size: positions have 28 bits, other values 31."""
    if expr.is_Integer:
        return abs(int(expr))
    if not expr.args or isinstance(expr, (Load, *_WHOLE)):
        return 2**28 if expr in (B, H, I, J, Q_OFFSET) or isinstance(expr, Position) else 2**31
    sizes = [_size(arg) for arg in (expr.args[1:] if isinstance(expr, Where) else expr.args)]
    if expr.is_Add:
        return sum(sizes)
    if expr.is_Mul:
        return math.prod(sizes)
    if expr.is_Pow:
        return sizes[0] ** sizes[1]
    return sizes[0] if isinstance(expr, FloorDiv) else max(sizes)


def _integer_fraction(x: Any) -> tuple[Any, Any] | None:
    """(a, b) for x = a / b with an integer expression a and a positive number b; None for other x."""
    parts = [part.as_coeff_Mul() for part in sympy.Add.make_args(sympy.expand_mul(x))]
    if not all(factor.is_Rational and is_int(term) for factor, term in parts):
        return None
    divisor = sympy.ilcm(1, *[factor.q for factor, _ in parts])
    a = sympy.Add(*[divisor * factor * term for factor, term in parts])
    return (a, sympy.Integer(divisor)) if divisor < LARGE_FACTOR and is_int(a) else None


def rounded(number: Any) -> Any:
    """A rational as it stands in an expression: exact if both its parts are below 2**53, else the double nearest to it in its
    shortest decimal form.
    """
    if max(abs(number.p), number.q) < LARGEST_INTEGER:
        return number
    return exact(float(number))


def exact(number: float) -> Any:
    """A finite double as the rational that its shortest decimal form is: 0.1 is 1/10."""
    fraction = Fraction(repr(number))
    return sympy.Rational(fraction.numerator, fraction.denominator)


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

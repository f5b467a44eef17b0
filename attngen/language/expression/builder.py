"""What a user writes with: operators on `Expr`, captured `Tensor`s, run-time `Param`s and a few functions.

An `Expr` wraps a sympy expression together with the tensors and params it mentions.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import sympy
import torch

from attngen.errors import SpecError
from attngen.language.expression import canonical
from attngen.language.expression.functions import (
    Absolute,
    FloorDiv,
    Load,
    Maximum,
    Minimum,
    PyMod,
    Sigmoid,
    Where,
    is_condition,
    kind,
)
from attngen.language.expression.text import to_text

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
RESERVED = frozenset(
    {"b", "h", "i", "j", "s", "and", "or", "not", "if", "else", "true", "false", "True", "False"}
    | {"min", "max", "abs", "where", "exp", "log", "tanh", "sqrt", "sigmoid"}
    | {"q", "k", "v", "return_lse", "q_offset", "plan", "group", "seed"}
)
LARGEST_INTEGER = 2**62
LARGEST_POWER = 8


class Expr:
    """A symbolic value of kind "bool", "int" or "float". Build them from b, h, i, j, s, tensors and params."""

    __slots__ = ("declared", "sym")
    __hash__ = None  # type: ignore[assignment]  # == builds a condition

    def __init__(self, sym: Any, declared: Mapping[str, Declaration] | None = None):
        self.sym = _finite(sym)
        self.declared: dict[str, Declaration] = dict(declared or {})

    @property
    def kind(self) -> str:
        return kind(self.sym)

    def __repr__(self) -> str:
        return f"Expr({to_text(self.sym)})"

    def __bool__(self) -> bool:
        raise SpecError(
            f"`{to_text(self.sym)}` is symbolic and has no truth value while the spec is written",
            fix="write `a & b` for `a and b`, `a | b` for `a or b`, `~a` for `not a`, `(x <= y) & (y < z)` for the chained "
            "`x <= y < z`, and ag.where(condition, a, b) for `if`",
        )

    def __iter__(self) -> Any:
        raise SpecError(f"`{to_text(self.sym)}` is a single symbolic value and cannot be iterated")

    def __add__(self, other: Any) -> Expr:
        return _arithmetic("+", lambda a, b: a + b, self, other)

    def __radd__(self, other: Any) -> Expr:
        return _arithmetic("+", lambda a, b: a + b, other, self)

    def __sub__(self, other: Any) -> Expr:
        return _arithmetic("-", lambda a, b: a - b, self, other)

    def __rsub__(self, other: Any) -> Expr:
        return _arithmetic("-", lambda a, b: a - b, other, self)

    def __mul__(self, other: Any) -> Expr:
        return _arithmetic("*", lambda a, b: a * b, self, other)

    def __rmul__(self, other: Any) -> Expr:
        return _arithmetic("*", lambda a, b: a * b, other, self)

    def __truediv__(self, other: Any) -> Expr:
        return _arithmetic("/", lambda a, b: a / b, self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return _arithmetic("/", lambda a, b: a / b, other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return _arithmetic("//", FloorDiv, self, other)

    def __rfloordiv__(self, other: Any) -> Expr:
        return _arithmetic("//", FloorDiv, other, self)

    def __mod__(self, other: Any) -> Expr:
        return _arithmetic("%", PyMod, self, other)

    def __rmod__(self, other: Any) -> Expr:
        return _arithmetic("%", PyMod, other, self)

    def __pow__(self, exponent: Any) -> Expr:
        if isinstance(exponent, Expr) and exponent.sym.is_Integer:
            exponent = int(exponent.sym)
        if not isinstance(exponent, int) or not 0 <= exponent <= LARGEST_POWER:
            raise SpecError(
                f"`**` takes a whole number from 0 to {LARGEST_POWER}", fix="use exp and log for other powers"
            )
        return _arithmetic("**", lambda a, b: a**b, self, exponent)

    def __neg__(self) -> Expr:
        return _arithmetic("-", lambda a, b: a - b, 0, self)

    def __pos__(self) -> Expr:
        return _arithmetic("+", lambda a, b: a + b, 0, self)

    def __abs__(self) -> Expr:
        return absolute(self)

    def __lt__(self, other: Any) -> Expr:
        return _arithmetic("<", lambda a, b: canonical.greater(b, a), self, other)

    def __le__(self, other: Any) -> Expr:
        return _arithmetic("<=", lambda a, b: canonical.greater_equal(b, a), self, other)

    def __gt__(self, other: Any) -> Expr:
        return _arithmetic(">", canonical.greater, self, other)

    def __ge__(self, other: Any) -> Expr:
        return _arithmetic(">=", canonical.greater_equal, self, other)

    def __eq__(self, other: object) -> Expr:  # type: ignore[override]
        return _equality("==", self, other)

    def __ne__(self, other: object) -> Expr:  # type: ignore[override]
        return ~_equality("!=", self, other)

    def __and__(self, other: Any) -> Expr:
        return _logical("&", canonical.conjunction, self, other)

    def __rand__(self, other: Any) -> Expr:
        return _logical("&", canonical.conjunction, other, self)

    def __or__(self, other: Any) -> Expr:
        return _logical("|", canonical.disjunction, self, other)

    def __ror__(self, other: Any) -> Expr:
        return _logical("|", canonical.disjunction, other, self)

    def __invert__(self) -> Expr:
        return _logical("~", lambda args: canonical.negate(args[0]), self)


class Declaration:
    """A name that a spec captures from the call: a `Tensor` or a `Param`."""

    name: str

    def text(self) -> str:
        raise NotImplementedError


class Param(Expr, Declaration):
    """A run-time scalar: changing its value compiles nothing. `dtype` is int (default) or float."""

    __slots__ = ("name", "number_kind")

    def __init__(self, name: str, dtype: type = int):
        self.name = check_name(name)
        if dtype not in (int, float):
            raise SpecError(f"Param {name!r}: dtype is int or float, got {dtype!r}")
        self.number_kind = dtype.__name__
        super().__init__(sympy.Symbol(name, integer=True) if dtype is int else sympy.Symbol(name, real=True))
        self.declared[name] = self

    def text(self) -> str:
        return f"param {self.name}: {self.number_kind}"


class Tensor(Declaration):
    """A captured tensor with one to four indices: `slope = Tensor("slope", 1)`, used as `slope[h]`.

    `dtype` says which kind it holds: a floating dtype or None (any floating dtype is accepted at the call), an integer
    dtype (any of int32, int64), or torch.bool (its loads are conditions).
    """

    __slots__ = ("kind", "name", "ndim")

    def __init__(self, name: str, ndim: int, dtype: torch.dtype | str | None = None):
        self.name = check_name(name)
        if not isinstance(ndim, int) or not 1 <= ndim <= 4:
            raise SpecError(f"Tensor {name!r}: ndim is 1 to 4, got {ndim!r}")
        self.ndim = ndim
        self.kind = dtype if isinstance(dtype, str) else _dtype_kind(name, dtype)
        if self.kind not in ("float", "int", "bool"):
            raise SpecError(f"Tensor {name!r}: dtype is float, int or bool, got {dtype!r}")

    @property
    def symbol(self) -> sympy.Symbol:
        if self.kind == "float":
            return sympy.Symbol(self.name, real=True)
        # A boolean's elements are 0 and 1, which also tells its loads from those of an integer tensor.
        return sympy.Symbol(self.name, integer=True, **({"nonnegative": True} if self.kind == "bool" else {}))

    def __getitem__(self, indices: Any) -> Expr:
        places = indices if isinstance(indices, tuple) else (indices,)
        if len(places) != self.ndim:
            raise SpecError(f"`{self.name}` takes {self.ndim} indices, got {len(places)}")
        wrapped = [wrap(place) for place in places]
        for place in wrapped:
            if place.kind != "int":
                raise SpecError(f"`{self.name}` is indexed by integers, got `{to_text(place.sym)}` ({place.kind})")
        load = Load(self.symbol, *[place.sym for place in wrapped])
        return Expr(canonical.truth(load) if self.kind == "bool" else load, _join([*wrapped], self))

    def __iter__(self) -> Any:
        raise SpecError(f"`{self.name}` is a captured tensor and cannot be iterated", fix=f"index it: {self.name}[...]")

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.ndim}, {self.kind!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensor) and self.text() == other.text()

    def __hash__(self) -> int:
        return hash(self.text())

    def text(self) -> str:
        return f"tensor {self.name}: {self.kind}[{self.ndim}]"


def check_name(name: Any) -> str:
    """A name that is safe in generated source and not taken by the language."""
    if not isinstance(name, str) or not IDENTIFIER.fullmatch(name):
        raise SpecError(f"a name matches [A-Za-z_][A-Za-z0-9_]{{0,63}}, got {str(name)[:80]!r}")
    if name in RESERVED or name.startswith("__"):
        raise SpecError(f"the name {name!r} is taken by attngen", fix="choose another")
    return name


def wrap(value: Any) -> Expr:
    """A number or an `Expr` as an `Expr`; SpecError for anything else."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool):
        return Expr(sympy.true if value else sympy.false)
    if isinstance(value, numbers.Integral):
        if abs(int(value)) >= LARGEST_INTEGER:
            raise SpecError(f"the integer has {len(str(abs(int(value))))} digits, the limit is 2**62")
        return Expr(sympy.Integer(int(value)))
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise SpecError(
                f"a constant is finite, got {number}", fix="a key is excluded by the mask, not by an infinite score"
            )
        exact = Fraction(repr(number))
        return Expr(sympy.Rational(exact.numerator, exact.denominator))
    if isinstance(value, Tensor):
        raise SpecError(f"`{value.name}` is a tensor: index it, as in {value.name}[...]")
    raise SpecError(
        f"expected a number or a symbolic expression, got {type(value).__name__}",
        fix="capture tensors with ag.Tensor(name, ndim) and numbers that change with ag.Param(name)",
    )


# -- functions --------------------------------------------------------------------------------------------------------


def where(condition: Any, a: Any, b: Any) -> Expr:
    """a where the condition holds, else b."""
    test, yes, no = wrap(condition), wrap(a), wrap(b)
    _require("where's first argument", test, ("bool",))
    if yes.kind == "bool" and no.kind == "bool":
        return (test & yes) | (~test & no)
    _require("where's second argument", yes, ("int", "float"))
    _require("where's third argument", no, ("int", "float"))
    return Expr(Where(test.sym, yes.sym, no.sym), _join([test, yes, no]))


def minimum(*args: Any) -> Expr:
    """The smallest of its arguments."""
    return _function("min", Minimum, args, least=2, most=16)


def maximum(*args: Any) -> Expr:
    """The largest of its arguments."""
    return _function("max", Maximum, args, least=2, most=16)


def absolute(x: Any) -> Expr:
    """|x|."""
    return _function("abs", Absolute, (x,))


def exp(x: Any) -> Expr:
    """e ** x."""
    return _function("exp", sympy.exp, (x,))


def log(x: Any) -> Expr:
    """Natural logarithm."""
    return _function("log", sympy.log, (x,))


def tanh(x: Any) -> Expr:
    """Hyperbolic tangent."""
    return _function("tanh", sympy.tanh, (x,))


def sqrt(x: Any) -> Expr:
    """Square root."""
    return _function("sqrt", sympy.sqrt, (x,))


def sigmoid(x: Any) -> Expr:
    """1 / (1 + exp(-x))."""
    return _function("sigmoid", Sigmoid, (x,))


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "where": where,
    "min": minimum,
    "max": maximum,
    "abs": absolute,
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "sqrt": sqrt,
    "sigmoid": sigmoid,
}


# -- helpers ----------------------------------------------------------------------------------------------------------


def _finite(sym: Any) -> Any:
    """Fold irrational constants to doubles; refuse what is not a finite real number."""
    if is_condition(sym) or not sym.is_number or sym.is_Rational:
        return sym
    try:
        number = complex(sym)
    except (TypeError, ValueError, OverflowError):
        number = complex(math.nan)
    if number.imag != 0 or not math.isfinite(number.real):
        raise SpecError(
            "a constant part of the expression is not a finite real number (division by zero, log of 0, ...)"
        )
    exact = Fraction(repr(number.real))
    return sympy.Rational(exact.numerator, exact.denominator)


def _require(place: str, value: Expr, kinds: tuple[str, ...]) -> None:
    if value.kind not in kinds:
        raise SpecError(
            f"{place} takes {' or '.join(kinds)}, got `{to_text(value.sym)}` ({value.kind})",
            fix="put comparisons in parentheses: & and | bind tighter than <"
            if "bool" in kinds
            else "use where(condition, a, b)",
        )


def _join(values: Iterable[Expr], *extra: Declaration) -> dict[str, Declaration]:
    declared: dict[str, Declaration] = {}
    for source in [*(v.declared for v in values), {d.name: d for d in extra}]:
        for name, declaration in source.items():
            known = declared.setdefault(name, declaration)
            if known.text() != declaration.text():
                raise SpecError(f"{name!r} is declared twice: `{known.text()}` and `{declaration.text()}`")
    return declared


def _arithmetic(sign: str, apply: Callable[[Any, Any], Any], left: Any, right: Any) -> Expr:
    a, b = wrap(left), wrap(right)
    for operand in (a, b):
        _require(f"`{sign}`", operand, ("int", "float"))
    if sign in ("/", "//", "%") and b.sym == 0:
        raise SpecError(f"`{sign}` by zero")
    return Expr(apply(a.sym, b.sym), _join([a, b]))


def _equality(sign: str, left: Any, right: Any) -> Expr:
    a, b = wrap(left), wrap(right)
    if a.kind == "bool" and b.kind == "bool":
        return (a & b) | (~a & ~b)
    return _arithmetic(sign, canonical.equal, a, b)


def _logical(sign: str, apply: Callable[[list[Any]], Any], *operands: Any) -> Expr:
    args = [wrap(operand) for operand in operands]
    for arg in args:
        _require(f"`{sign}`", arg, ("bool",))
    return Expr(apply([arg.sym for arg in args]), _join(args))


def _function(name: str, apply: Callable[..., Any], args: tuple[Any, ...], least: int = 1, most: int = 1) -> Expr:
    if not least <= len(args) <= most:
        raise SpecError(f"{name} takes {least}{f' to {most}' if most > least else ''} arguments, got {len(args)}")
    wrapped = [wrap(arg) for arg in args]
    for arg in wrapped:
        _require(name, arg, ("int", "float"))
    result = apply(*[arg.sym for arg in wrapped])
    if result.has(sympy.Abs):  # sqrt(x * x)
        result = result.replace(sympy.Abs, Absolute)
    return Expr(result, _join(wrapped))


def _dtype_kind(name: str, dtype: torch.dtype | None) -> str:
    if dtype is None or dtype.is_floating_point:
        return "float"
    if dtype == torch.bool:
        return "bool"
    if dtype in (torch.int32, torch.int64):
        return "int"
    raise SpecError(f"Tensor {name!r}: dtype is a floating dtype, torch.int32, torch.int64 or torch.bool, got {dtype}")

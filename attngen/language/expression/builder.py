"""What a user writes with: operators on `Expr`, captured `Tensor`s, run-time `Param`s and a few functions.

An `Expr` wraps a sympy expression together with the tensors and params it mentions.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch

from attngen.errors import SpecError
from attngen.language.expression import canonical
from attngen.language.expression.functions import (
    LARGEST_INTEGER,
    LARGEST_SHIFT,
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
    exact,
    is_condition,
    kind,
    rounded,
)
from attngen.language.expression.text import to_text

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
RESERVED = frozenset(
    {"b", "h", "i", "j", "s", "and", "or", "not", "if", "else", "true", "false", "True", "False"}
    | {"min", "max", "abs", "where", "exp", "log", "tanh", "sqrt", "sigmoid"}
    | {"sin", "cos", "erf", "exp2", "floor", "ceil", "round", "relu", "clamp"}
    | {"q", "k", "v", "return_lse", "q_offset", "plan", "group", "scale", "seed"}
)
PARENTHESES = "put comparisons in parentheses: & and | bind tighter than <"
LARGEST_POWER = 8  # of an integer
LARGEST_EXPONENT = 64  # that is a number


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
        bits = f"{PARENTHESES}; " if self.sym.has(BitAnd, BitOr) else ""
        raise SpecError(
            f"`{to_text(self.sym)}` is symbolic and has no truth value while the spec is written",
            fix=bits
            + "write `a & b` for `a and b`, `a | b` for `a or b`, `~a` for `not a`, `(x <= y) & (y < z)` for the chained "
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
        return _power(self, exponent)

    def __rpow__(self, base: Any) -> Expr:
        return _power(base, self)

    def __lshift__(self, other: Any) -> Expr:
        return _shift("<<", ShiftLeft, self, other)

    def __rlshift__(self, other: Any) -> Expr:
        return _shift("<<", ShiftLeft, other, self)

    def __rshift__(self, other: Any) -> Expr:
        return _shift(">>", ShiftRight, self, other)

    def __rrshift__(self, other: Any) -> Expr:
        return _shift(">>", ShiftRight, other, self)

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
        return _logical("&", canonical.conjunction, BitAnd, self, other)

    def __rand__(self, other: Any) -> Expr:
        return _logical("&", canonical.conjunction, BitAnd, other, self)

    def __or__(self, other: Any) -> Expr:
        return _logical("|", canonical.disjunction, BitOr, self, other)

    def __ror__(self, other: Any) -> Expr:
        return _logical("|", canonical.disjunction, BitOr, other, self)

    def __xor__(self, other: Any) -> Expr:
        return _logical("^", _exclusive, BitXor, self, other)

    def __rxor__(self, other: Any) -> Expr:
        return _logical("^", _exclusive, BitXor, other, self)

    def __invert__(self) -> Expr:
        if self.kind == "int":
            return -self - 1
        return _logical("~", lambda args: canonical.negate(args[0]), None, self)

    def __floor__(self) -> Expr:
        return floor(self)

    def __ceil__(self) -> Expr:
        return ceil(self)

    def __round__(self) -> Expr:
        return round(self)

    def __index__(self) -> int:
        raise SpecError(
            f"`{to_text(self.sym)}` is symbolic: it cannot index a list, an array or a torch tensor",
            fix="capture what it indexes: t = ag.Tensor(NAME, ndim), t[...] in the spec, NAME=... at the call",
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _not_torch(func, args)


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
    """A captured tensor with up to four indices: `slope = Tensor("slope", 1)`, used as `slope[h]`. One without is a number on
    the device, such as a learned temperature: `heat = Tensor("heat", 0)`, used as `heat[()]` or, in arithmetic, as `heat`.

    `dtype` says which kind it holds: a floating dtype or None (any floating dtype is accepted at the call), an integer
    dtype (any of at most 64 bits), or torch.bool (its loads are conditions).
    """

    __slots__ = ("kind", "name", "ndim")

    def __init__(self, name: str, ndim: int, dtype: torch.dtype | str | None = None):
        self.name = check_name(name)
        if isinstance(ndim, bool) or not isinstance(ndim, int) or not 0 <= ndim <= 4:
            raise SpecError(f"Tensor {name!r}: ndim is 0 to 4, got {ndim!r}")
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
                raise SpecError(
                    f"`{self.name}` is indexed by integers, got `{to_text(place.sym)}` ({place.kind})",
                    fix="make it one with // or ag.floor" if place.kind == "float" else "use ag.where(condition, 1, 0)",
                )
            if place.sym.is_Integer and place.sym < 0:
                raise SpecError(
                    f"`{self.name}[{place.sym}]`: an index counts from the start, and the size is known at the call only",
                    fix="give the position from the start",
                )
        load = Load(self.symbol, *[place.sym for place in wrapped])
        return Expr(canonical.truth(load) if self.kind == "bool" else load, _join([*wrapped], self))

    def __iter__(self) -> Any:
        raise SpecError(f"`{self.name}` is a captured tensor and cannot be iterated", fix=f"index it: {self.name}[...]")

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.ndim}, {self.kind!r})"

    def __eq__(self, other: object) -> bool:
        return self.text() == other.text() if isinstance(other, Tensor) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text())

    def text(self) -> str:
        return f"tensor {self.name}: {self.kind}[{self.ndim}]"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _not_torch(func, args)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Tensor, *others: Any) -> Any:
        return getattr(wrap(self), name)(*(wrap(other) for other in others))

    return apply


# A tensor without indices is a number: it takes part in arithmetic by name.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Tensor, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))


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
            raise SpecError(
                f"the integer has {len(str(abs(int(value))))} digits, the limit is 2**53",
                fix="write a float, such as 1e30, or put it into a captured int64 tensor",
            )
        return Expr(sympy.Integer(int(value)))
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise SpecError(
                f"a constant is finite, got {number}", fix="a key is excluded by the mask, not by an infinite score"
            )
        return Expr(exact(number))
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value[()]
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


def sin(x: Any) -> Expr:
    """Sine of an angle in radians."""
    return _function("sin", sympy.sin, (x,))


def cos(x: Any) -> Expr:
    """Cosine of an angle in radians."""
    return _function("cos", sympy.cos, (x,))


def erf(x: Any) -> Expr:
    """The error function; x * (1 + erf(x / sqrt(2))) / 2 is GELU."""
    return _function("erf", Erf, (x,))


def exp2(x: Any) -> Expr:
    """2 ** x."""
    return _function("exp2", Exp2, (x,))


def floor(x: Any) -> Expr:
    """The largest integer that is not above x, as an integer of at most 2**30 in size; its derivative is 0."""
    return _function("floor", Floor, (x,))


def ceil(x: Any) -> Expr:
    """The smallest integer that is not below x, as an integer of at most 2**30 in size; its derivative is 0."""
    return -floor(-wrap(x))


def round(x: Any) -> Expr:
    """The integer nearest to x, halves to the even one, at most 2**30 in size; its derivative is 0."""
    return _function("round", Round, (x,))


def relu(x: Any) -> Expr:
    """max(x, 0)."""
    return maximum(x, 0)


def clamp(x: Any, min: Any = None, max: Any = None) -> Expr:
    """x, but not below min and not above max; max where min is above it."""
    if min is None and max is None:
        raise SpecError("clamp takes min, max or both")
    x = wrap(x) if min is None else maximum(x, min)
    return x if max is None else minimum(x, max)


FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "where": where,
    "min": minimum,
    "max": maximum,
    "abs": absolute,
    "exp": exp,
    "exp2": exp2,
    "log": log,
    "tanh": tanh,
    "sqrt": sqrt,
    "sigmoid": sigmoid,
    "sin": sin,
    "cos": cos,
    "erf": erf,
    "floor": floor,
    "ceil": ceil,
    "round": round,
    "relu": relu,
    "clamp": clamp,
}

# Those of one value, and clamp, are methods as well: s.tanh(), s.clamp(min=0).
for _name in FUNCTIONS.keys() - {"where", "min", "max"}:
    setattr(Expr, _name, FUNCTIONS[_name])


# -- helpers ----------------------------------------------------------------------------------------------------------


def _finite(sym: Any) -> Any:
    """Fold irrational constants to doubles and round those of many digits; refuse what is not a finite real number."""
    if is_condition(sym) or sym.is_Symbol:
        return sym
    if sym.has(sympy.I):
        raise SpecError("the expression is not a real number", fix="it has the root of something negative")
    try:
        if sym.is_number:
            return rounded(sym) if sym.is_Rational else exact(float(sym))
        # sqrt(2 * x) is sqrt(2) * sqrt(x) to sympy.
        numbers_ = {n: exact(float(n)) for n in sym.atoms(sympy.Pow) if n.is_number}
        numbers_ |= {n: rounded(n) for n in sym.atoms(sympy.Rational) if max(abs(n.p), n.q) >= LARGEST_INTEGER}
    except (TypeError, ValueError, OverflowError):
        raise SpecError(
            "a constant part of the expression is not a finite real number (division by zero, log of 0, ...)"
        ) from None
    numbers_ = {old: new for old, new in numbers_.items() if old != new}
    return sym.xreplace(numbers_) if numbers_ else sym


def _not_torch(func: Any, args: Any) -> SpecError:
    """What to write instead of a torch function on symbolic values."""
    name = getattr(func, "__name__", "").strip("_")
    known = {"where": "where", "clip": "clamp", **{n: n for n in FUNCTIONS}, **_TORCH_NAMES}.get(name)
    if any(isinstance(arg, torch.Tensor) for arg in args):
        fix = "capture the tensor: t = ag.Tensor(NAME, ndim), t[...] in the spec, NAME=... at the call"
    elif known is not None:
        fix = f"write ag.{known}(...)"
    else:
        fix = f"attngen has the functions {', '.join(FUNCTIONS)}: ag.where, ag.minimum, ag.tanh, ..."
    return SpecError(f"torch's {name} does not take symbolic values", fix=fix)


_TORCH_NAMES = {"minimum": "minimum", "maximum": "maximum", "absolute": "absolute", "abs": "absolute"}


def _require(place: str, value: Expr, kinds: tuple[str, ...]) -> None:
    if value.kind not in kinds:
        raise SpecError(
            f"{place} takes {' or '.join(kinds)}, got `{to_text(value.sym)}` ({value.kind})",
            fix=PARENTHESES
            if "bool" in kinds
            else "use where(condition, a, b)"
            if value.kind == "bool"
            else "make it an integer with // or floor",
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


def _logical(sign: str, conditions: Callable[[list[Any]], Any], integers: Any, *operands: Any) -> Expr:
    """A logical operator on conditions, or the bitwise one on integers."""
    args = [wrap(operand) for operand in operands]
    if integers is not None and all(arg.kind == "int" for arg in args):
        return Expr(integers(*[arg.sym for arg in args]), _join(args))
    kinds = ("bool",) if integers is None or any(arg.kind == "bool" for arg in args) else ("int",)
    for arg in args:
        _require(f"`{sign}`", arg, kinds)
    return Expr(conditions([arg.sym for arg in args]), _join(args))


def _exclusive(args: list[Any]) -> Any:
    a, b = args
    return canonical.disjunction(
        [canonical.conjunction([a, canonical.negate(b)]), canonical.conjunction([canonical.negate(a), b])]
    )


def _shift(sign: str, apply: Any, left: Any, right: Any) -> Expr:
    a, n = wrap(left), wrap(right)
    for operand in (a, n):
        _require(f"`{sign}`", operand, ("int",))
    if n.sym.is_Integer and not 0 <= n.sym <= LARGEST_SHIFT:
        raise SpecError(f"`{sign}` takes a number from 0 to {LARGEST_SHIFT}, got {n.sym}")
    return Expr(apply(a.sym, n.sym), _join([a, n]))


def _power(base: Any, exponent: Any) -> Expr:
    """x ** y. Whole and half exponents of some size are sympy's powers, which it joins with products; others are `Power`."""
    a, b = wrap(base), wrap(exponent)
    for operand in (a, b):
        _require("`**`", operand, ("int", "float"))
    x, y = a.sym, b.sym
    if a.kind == "int" and y.is_Integer and y > LARGEST_POWER:
        raise SpecError(
            f"`**` takes a whole number from 0 to {LARGEST_POWER} of an integer", fix="use exp and log for other powers"
        )
    if y.is_Rational and abs(y) > LARGEST_EXPONENT:
        raise SpecError(f"`**` takes an exponent from -{LARGEST_EXPONENT} to {LARGEST_EXPONENT}, got {to_text(y)}")
    if x.is_Rational and y.is_Rational and not (y.is_Integer and y >= 0):
        try:
            return wrap(float(x) ** float(y))
        except (ZeroDivisionError, OverflowError, SpecError):
            raise SpecError(f"`{to_text(x)} ** {to_text(y)}` is not a finite real number") from None
    if y.is_Rational and abs(y) <= LARGEST_POWER and (2 * y).is_Integer:
        return Expr(_without_abs(x**y), _join([a, b]))
    return Expr(Power(x, y), _join([a, b]))


def _function(name: str, apply: Callable[..., Any], args: tuple[Any, ...], least: int = 1, most: int = 1) -> Expr:
    if not least <= len(args) <= most:
        raise SpecError(f"{name} takes {least}{f' to {most}' if most > least else ''} arguments, got {len(args)}")
    wrapped = [wrap(arg) for arg in args]
    for arg in wrapped:
        _require(name, arg, ("int", "float"))
    return Expr(_without_abs(apply(*[arg.sym for arg in wrapped])), _join(wrapped))


def _without_abs(result: Any) -> Any:
    """sympy's root of x * x is its own absolute value."""
    return result.replace(sympy.Abs, Absolute) if result.has(sympy.Abs) else result


def _dtype_kind(name: str, dtype: torch.dtype | None) -> str:
    if dtype is None or dtype.is_floating_point:
        return "float"
    if dtype == torch.bool:
        return "bool"
    if isinstance(dtype, torch.dtype) and not dtype.is_complex:
        return "int"
    raise SpecError(f"Tensor {name!r}: dtype is a floating dtype, an integer dtype or torch.bool, got {dtype}")

"""The torch operations that a mod may use, and what each is in attngen's language."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from attngen.errors import SpecError
from attngen.language.expression import (
    Expr,
    absolute,
    ceil,
    clamp,
    cos,
    erf,
    exp,
    exp2,
    floor,
    log,
    maximum,
    minimum,
    relu,
    round,
    sigmoid,
    sin,
    sqrt,
    tanh,
    where,
)
from attngen.language.expression.builder import wrap


def number(x: Any) -> Expr:
    """A truth value as 0 or 1; a number as it is."""
    x = wrap(x)
    return where(x, 1, 0) if x.kind == "bool" else x


def condition(x: Any) -> Expr:
    """A number as whether it is not 0; a truth value as it is."""
    x = wrap(x)
    return x if x.kind == "bool" else x != 0


def cast(x: Any, kind: str) -> Expr:
    """torch's conversion to a dtype of this kind. A float loses its fraction; no float is rounded to fewer bits."""
    x = wrap(x)
    if kind == "bool":
        return condition(x)
    return _trunc(number(x)) if kind == "int" else number(x)


def _trunc(x: Expr) -> Expr:
    return x if x.kind == "int" else where(x >= 0, floor(x), ceil(x))


def _numbers(apply: Callable[..., Any]) -> Callable[..., Expr]:
    return lambda *args: wrap(apply(*[number(x) for x in args]))


def _conditions(apply: Callable[..., Any]) -> Callable[..., Expr]:
    return lambda *args: wrap(apply(*[condition(x) for x in args]))


def _bits(apply: Callable[..., Any]) -> Callable[..., Expr]:
    """On truth values if all are, else on integers."""

    def operation(*args: Any) -> Expr:
        values = [wrap(x) for x in args]
        logical = all(x.kind == "bool" for x in values)
        return wrap(apply(*(values if logical else [number(x) for x in values])))

    return operation


def _add(a: Any, b: Any, alpha: Any = 1) -> Expr:
    a, b = wrap(a), wrap(b)
    if a.kind == "bool" and b.kind == "bool":
        return a | b  # torch's sum of truth values
    return number(a) + number(alpha) * number(b)


def _sub(a: Any, b: Any, alpha: Any = 1) -> Expr:
    return number(a) - number(alpha) * number(b)


def _mul(a: Any, b: Any) -> Expr:
    a, b = wrap(a), wrap(b)
    if a.kind == "bool" and b.kind == "bool":
        return a & b
    return number(a) * number(b)


def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Expr:
    a, b = number(a), number(b)
    if rounding_mode == "floor":
        return a // b
    if rounding_mode == "trunc":
        return where((a >= 0) ^ (b >= 0), -(absolute(a) // absolute(b)), absolute(a) // absolute(b))
    return a / b


def _where(test: Any, a: Any, b: Any) -> Expr:
    a, b = wrap(a), wrap(b)
    if a.kind == "bool" and b.kind == "bool":
        return where(condition(test), a, b)
    return where(condition(test), number(a), number(b))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Expr:
    return clamp(number(x), None if min is None else number(min), None if max is None else number(max))


def _eq(a: Any, b: Any) -> Expr:
    a, b = wrap(a), wrap(b)
    return a == b if a.kind == "bool" == b.kind else number(a) == number(b)


def _same(x: Any, *args: Any, **named: Any) -> Expr:
    return wrap(x)


def _leaky_relu(x: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Expr:
    x = number(x)
    return where(x >= 0, x, x * negative_slope)


def _gelu(x: Any, approximate: str = "none") -> Expr:
    x = number(x)
    if approximate == "tanh":
        return x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x**3))) / 2
    return x * (1 + erf(x * 0.7071067811865476)) / 2


def _softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> Expr:
    x = number(x)
    # exp of something positive could overflow
    soft = maximum(x * beta, 0) + log(1 + exp(-absolute(x * beta)))
    return where(x * beta > threshold, x, soft / beta)


def _fmod(a: Any, b: Any) -> Expr:
    a, b = number(a), number(b)
    return where(a >= 0, absolute(a) % absolute(b), -(absolute(a) % absolute(b)))


def _names(names: str, apply: Callable[..., Expr]) -> dict[str, Callable[..., Expr]]:
    return dict.fromkeys(names.split(), apply)


# Under torch's names and those of Python's operators.
OPERATIONS: dict[str, Callable[..., Expr]] = {
    **_names("add", _add),
    **_names("sub subtract", _sub),
    **_names("mul multiply", _mul),
    **_names("div divide truediv true_divide", _div),
    **_names("floordiv floor_divide", _numbers(lambda a, b: a // b)),
    **_names("mod remainder", _numbers(lambda a, b: a % b)),
    **_names("fmod", _fmod),
    **_names("pow float_power", _numbers(lambda a, b: a**b)),
    **_names("neg negative", _numbers(lambda x: -x)),
    **_names("pos positive clone contiguous", _same),
    **_names("abs absolute", _numbers(absolute)),
    **_names("lt less", _numbers(lambda a, b: a < b)),
    **_names("le less_equal", _numbers(lambda a, b: a <= b)),
    **_names("gt greater", _numbers(lambda a, b: a > b)),
    **_names("ge greater_equal", _numbers(lambda a, b: a >= b)),
    **_names("eq", _eq),
    **_names("ne not_equal", lambda a, b: ~_eq(a, b)),
    **_names("and bitwise_and", _bits(lambda a, b: a & b)),
    **_names("or bitwise_or", _bits(lambda a, b: a | b)),
    **_names("xor bitwise_xor", _bits(lambda a, b: a ^ b)),
    **_names("invert bitwise_not", _bits(lambda x: ~x)),
    **_names("lshift bitwise_left_shift", _numbers(lambda a, b: a << b)),
    **_names("rshift bitwise_right_shift", _numbers(lambda a, b: a >> b)),
    **_names("logical_and", _conditions(lambda a, b: a & b)),
    **_names("logical_or", _conditions(lambda a, b: a | b)),
    **_names("logical_xor", _conditions(lambda a, b: a ^ b)),
    **_names("logical_not", _conditions(lambda x: ~x)),
    **_names("where", _where),
    **_names("masked_fill", lambda x, test, value: _where(test, value, x)),
    **_names("maximum max fmax", _numbers(maximum)),
    **_names("minimum min fmin", _numbers(minimum)),
    **_names("clamp clip", _clamp),
    **_names("clamp_min", lambda x, min: _clamp(x, min)),
    **_names("clamp_max", lambda x, max: _clamp(x, None, max)),
    **_names("exp", _numbers(exp)),
    **_names("exp2 special_exp2", _numbers(exp2)),
    **_names("log", _numbers(log)),
    **_names("log2", _numbers(lambda x: log(x) * 1.4426950408889634)),
    **_names("sqrt", _numbers(sqrt)),
    **_names("rsqrt", _numbers(lambda x: 1 / sqrt(x))),
    **_names("reciprocal", _numbers(lambda x: 1 / x)),
    **_names("square", _numbers(lambda x: x * x)),
    **_names("tanh", _numbers(tanh)),
    **_names("sigmoid special_expit", _numbers(sigmoid)),
    **_names("sin", _numbers(sin)),
    **_names("cos", _numbers(cos)),
    **_names("erf special_erf", _numbers(erf)),
    **_names("relu", lambda x, inplace=False: relu(number(x))),
    **_names("leaky_relu", _leaky_relu),
    **_names("silu", lambda x, inplace=False: number(x) * sigmoid(number(x))),
    **_names("gelu", _gelu),
    **_names("softplus", _softplus),
    **_names("floor", _numbers(floor)),
    **_names("ceil", _numbers(ceil)),
    **_names("round", _numbers(round)),
    **_names("trunc fix", _numbers(_trunc)),
    **_names("sign sgn", _numbers(lambda x: where(x > 0, 1, where(x < 0, -1, 0)))),
    **_names("bool", lambda x: cast(x, "bool")),
    **_names("int long", lambda x: cast(x, "int")),
    **_names("float double half bfloat16", lambda x: cast(x, "float")),
    # What they convert to is read from their operands: see `meaning`.
    **_names("to type type_as", _same),
}


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


CONDITIONS = _set("lt less le less_equal gt greater ge greater_equal eq ne not_equal bool") | _set(
    "logical_and logical_or logical_xor logical_not"
)
FLOATS = _set("div divide truediv true_divide reciprocal float_power exp exp2 special_exp2 log log2 sqrt rsqrt") | _set(
    "tanh sigmoid special_expit sin cos erf special_erf silu gelu softplus float double half bfloat16"
)
INTEGERS = _set("int long")
CONSTANTS = _set("tensor as_tensor scalar_tensor zeros ones full zeros_like ones_like full_like") | _set(
    "new_zeros new_ones new_full new_tensor"
)
RANDOM = _set(
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson dropout"
)
REVERSED = _set("radd rsub rmul rdiv rtruediv rfloordiv rmod rpow rand ror rxor rlshift rrshift")
METADATA = _set("get dim ndimension size numel nelement is_floating_point is_complex")  # get: of a property
VALUES = _set("item tolist numpy equal allclose __bool__ __int__ __float__ __complex__ __index__ __contains__")
KNOWN = (
    "a mod may use operators, elements of captured tensors, conversions of dtype, and torch's where, masked_fill, minimum, "
    "maximum, clamp, abs, sign, exp, exp2, log, log2, sqrt, rsqrt, square, pow, tanh, sigmoid, sin, cos, erf, relu, leaky_relu, "
    "gelu, silu, softplus, floor, ceil, round, trunc, remainder, fmod, floor_divide, div, logical_* and bitwise_*"
)


# Dynamo does not look into names, so these are constants to it.
@torch.compiler.assume_constant_result
def name_of(func: Any) -> str:
    """The name of a torch function, a tensor's method or an operator, without the underscores of operators and of what works in
    place.
    """
    return _read(func)[0]


@torch.compiler.assume_constant_result
def in_place(func: Any) -> bool:
    """Whether it changes its first argument: `x.add_(y)`, `x += y`."""
    return _read(func)[1]


@lru_cache(maxsize=4096)
def _read(func: Any) -> tuple[str, bool]:
    name = getattr(func, "__name__", "")
    plain = name.strip("_")
    if name in VALUES:
        return name, False
    if plain[:1] == "i" and plain[1:] in OPERATIONS and plain not in OPERATIONS:  # iadd
        return plain[1:], True
    return (plain if name.startswith("__") or plain in OPERATIONS else name), name == f"{plain}_"


def constant(name: str, args: list[Any], named: dict[str, Any]) -> Expr:
    """A number that a mod makes with a torch function: `torch.tensor(0.5)`, `score.new_zeros(())`. SpecError for one with
    dimensions.
    """
    like = wrap(args.pop(0)) if name.startswith("new_") or name.endswith("_like") else None
    value: Any = 0 if "zeros" in name else 1
    if "full" in name:
        value = named["fill_value"] if "fill_value" in named else args.pop()
    elif "tensor" in name:
        value = args.pop(0)
    size = named.get("size", args[0] if args else ())
    if size != () or len(args) > 1 or isinstance(value, tuple):
        raise SpecError(f"{name} of a size other than ()", fix="make the tensor outside of the mod and index it")
    kind = named.get("dtype")
    if kind is None and like is not None and "tensor" not in name:
        kind = like.kind
    return wrap(value) if kind is None else cast(value, kind)

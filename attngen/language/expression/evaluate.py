"""Evaluate an expression on torch tensors by walking its tree: no code is generated or executed as text."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import sympy
import torch

from attngen.language.expression.functions import (
    LARGEST_ROUNDED,
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
    Uniform,
    Where,
    is_int,
)

Value = Any  # a torch.Tensor or a Python number
_MASK32 = 0xFFFFFFFF


def evaluate(
    expr: Any, env: Mapping[str, Value], cache: dict[Any, Value] | None = None, real: torch.dtype = torch.float32
) -> Value:
    """The value of `expr`, broadcast over the tensors in `env` (symbol or captured-tensor name -> value).

    `cache` keeps values of subexpressions between calls on one env. `real` is the dtype that integers become where they
    meet fractions; floating tensors keep their own.

    Indices of loads outside the tensor are clamped, so that pairs a mask removes are harmless; whether an attended
    pair loads out of range is the caller's check.
    """
    if cache is None:
        cache = {}
    if expr in cache:
        return cache[expr]
    children, apply = _operation(expr)
    value = cache[expr] = apply([evaluate(child, env, cache, real) for child in children], env, real)
    return value


def tensor_of(value: Value, device: torch.device) -> torch.Tensor:
    """A value as a tensor there. A number is made on the device: copying it there would wait for it."""
    if isinstance(value, torch.Tensor):
        if value.device == device or value.dim():
            return value.to(device)
        if value.device.type != "cpu":
            return value.to(device)
        return torch.full((), value.item(), dtype=value.dtype, device=device)
    return torch.full((), value, device=device)


def uniform(seed: Value, b: Value, h: Value, i: Value, j: Value) -> Value:
    """The counter-based random number of `Uniform` as float32; arguments broadcast, integers of any width."""
    state, *counters = _tensors(seed, b, h, i, j)
    state = state.to(torch.int64)
    state = _mix(state ^ _mix(state >> 32))  # the high bits of a seed of 64; `fold_seed` does the same to a number
    for counter in counters:
        state = _mix(state ^ (counter.to(torch.int64) & _MASK32))
    return (state >> 8).to(torch.float32) * 2.0**-24


def fold_seed(seed: int) -> int:
    """Any int as one of 32 bits that draws the same numbers: below 2**32 itself."""
    word = seed & (2**64 - 1)
    return (word ^ int(_mix(torch.tensor(word >> 32)))) & _MASK32 if word >> 32 else word


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x.to(torch.int64) & _MASK32  # 64-bit products of 32-bit words wrap, and their low 32 bits stay exact
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


Apply = Callable[[list[Value], Mapping[str, Value], torch.dtype], Value]


@lru_cache(maxsize=8192)
def _operation(expr: Any) -> tuple[tuple[Any, ...], Apply]:
    """The expressions that `expr` needs, and how its value comes from theirs: told once, not at every tile."""
    if expr == sympy.true or expr == sympy.false:
        truth = bool(expr)
        return (), lambda args, env, real: truth
    if expr.is_Integer and is_int(expr):
        number = int(expr)
        return (), lambda args, env, real: number
    if expr.is_Rational:  # zero-dimensional: takes part in dtype promotion only by kind
        fraction = float(expr)
        return (), lambda args, env, real: torch.tensor(fraction, dtype=real)
    if expr.is_Symbol:
        name = expr.name

        def symbol(args: list[Value], env: Mapping[str, Value], real: torch.dtype) -> Value:
            value = env[name]
            return torch.tensor(value, dtype=real) if isinstance(value, float) else value

        return (), symbol
    if isinstance(expr, Load):
        loaded = expr.name
        return expr.indices, lambda args, env, real: _load(env[loaded], args)
    if expr.is_Pow:
        return (expr.base,), _power(expr.exp)
    if expr.is_Add:
        return expr.args, lambda args, env, real: _fold(args, operator.add)
    if expr.is_Mul:
        if not is_int(expr) and all(is_int(arg) for arg in expr.args):  # a product that may leave 64 bits
            return expr.args, lambda args, env, real: _fold([torch.as_tensor(a).to(real) for a in args], operator.mul)
        return expr.args, lambda args, env, real: _fold(args, operator.mul)
    if isinstance(expr, sympy.And):
        return expr.args, lambda args, env, real: _fold(args, operator.and_)
    if isinstance(expr, sympy.Or):
        return expr.args, lambda args, env, real: _fold(args, operator.or_)
    if type(expr) in _REAL_FUNCTIONS:
        real_function = _REAL_FUNCTIONS[type(expr)]

        def apply(args: list[Value], env: Mapping[str, Value], real: torch.dtype) -> Value:
            tensors = [torch.as_tensor(arg) for arg in args]
            return real_function(*[t if t.is_floating_point() else t.to(real) for t in tensors])

        return expr.args, apply
    function = _FUNCTIONS[type(expr)]
    return expr.args, lambda args, env, real: function(*args)


def _power(exponent: Any) -> Apply:
    if exponent.is_Integer and exponent > 0:
        whole = int(exponent)
        return lambda args, env, real: args[0] ** whole
    number = float(exponent)

    def apply(args: list[Value], env: Mapping[str, Value], real: torch.dtype) -> Value:
        tensor = torch.as_tensor(args[0])
        return torch.pow(tensor if tensor.is_floating_point() else tensor.to(real), number)

    return apply


def _fold(args: list[Value], combine: Any) -> Value:
    # Scalars first, then the small operands: a row and a scalar meet before either meets a tile.
    args = sorted(args, key=lambda a: a.numel() if isinstance(a, torch.Tensor) else 0)
    value = args[0]
    for arg in args[1:]:
        value = combine(value, arg)
    return value


def _load(tensor: torch.Tensor, indices: list[Value]) -> torch.Tensor:
    if 0 in tensor.shape:
        shapes = [index.shape for index in indices if isinstance(index, torch.Tensor)]
        return torch.zeros(torch.broadcast_shapes(*shapes), dtype=tensor.dtype, device=tensor.device)
    placed: list[torch.Tensor] = []
    for index in indices:
        dim = len(placed)
        if isinstance(index, torch.Tensor):
            placed.append(index.long().clamp(0, tensor.shape[dim] - 1))
        else:  # a view costs less than one more index
            tensor = tensor.select(dim, min(max(int(index), 0), tensor.shape[dim] - 1))
    value = tensor[tuple(placed)] if placed else tensor
    return value.to(torch.int32) if value.dtype == torch.bool else value


def _tensors(*args: Value) -> list[torch.Tensor]:
    """All on the device of those that aren't on the CPU: fractions and float params are numbers there."""
    devices = [a.device for a in args if isinstance(a, torch.Tensor)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    return [tensor_of(a, device) for a in args]


def _lattice(function: Any) -> Any:
    def apply(*args: Value) -> Value:
        if not any(isinstance(arg, torch.Tensor) for arg in args):
            return min(args) if function is torch.minimum else max(args)
        return _fold(list(args), lambda a, b: function(*_tensors(a, b)))

    return apply


def _where(condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, a, b)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """A rounded number as an integer; nan is the smallest."""
    x = x.float() if x.itemsize == 2 else x
    return x.nan_to_num(nan=-torch.inf).clamp(-LARGEST_ROUNDED, LARGEST_ROUNDED).to(torch.int64)


def _constant(a: Value) -> Value:
    """What a step function takes: it has no slope, and torch no derivative of it."""
    return a.detach() if isinstance(a, torch.Tensor) else a


def _steps(n: Value) -> Value:
    """How far to shift, in 0 .. 31."""
    return n.clamp(0, LARGEST_SHIFT) if isinstance(n, torch.Tensor) else min(max(n, 0), LARGEST_SHIFT)


def _long(a: Value) -> Value:
    return a.long() if isinstance(a, torch.Tensor) else a


_REAL_FUNCTIONS: dict[Any, Any] = {
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.tanh: torch.tanh,
    Sigmoid: torch.sigmoid,
    sympy.sin: torch.sin,
    sympy.cos: torch.cos,
    Erf: torch.erf,
    Exp2: torch.exp2,
    Power: torch.pow,
    Floor: lambda x: _whole(torch.floor(x)),
    Round: lambda x: _whole(torch.round(x)),
}
_FUNCTIONS: dict[Any, Any] = {
    Absolute: abs,
    FloorDiv: lambda a, b: _constant(a) // _constant(b),
    PyMod: lambda a, b: a % b,
    Minimum: _lattice(torch.minimum),
    Maximum: _lattice(torch.maximum),
    Where: _where,
    Uniform: uniform,
    BitAnd: lambda *args: _fold(list(args), operator.and_),
    BitOr: lambda *args: _fold(list(args), operator.or_),
    BitXor: lambda *args: _fold(list(args), operator.xor),
    ShiftLeft: lambda a, n: _long(a) << _steps(n),
    ShiftRight: lambda a, n: a >> _steps(n),
    sympy.GreaterThan: lambda a, b: a >= b,
    sympy.StrictGreaterThan: lambda a, b: a > b,
    sympy.Equality: lambda a, b: a == b,
    sympy.Unequality: lambda a, b: a != b,
}

"""From the symbolic language to programs (`attngen.language.programs`): how expressions come to be evaluated."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from attngen.language.expression.functions import (
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
    is_flag,
    is_int,
)
from attngen.language.programs import Node, program_of

_OPERATIONS: dict[Any, str] = {
    sympy.And: "and",
    sympy.Or: "or",
    sympy.exp: "exp",
    sympy.log: "log",
    sympy.tanh: "tanh",
    Sigmoid: "sigmoid",
    sympy.sin: "sin",
    sympy.cos: "cos",
    Erf: "erf",
    Exp2: "exp2",
    Power: "raise",
    Floor: "floor",
    Round: "round",
    Absolute: "abs",
    FloorDiv: "floordiv",
    PyMod: "mod",
    Minimum: "min",
    Maximum: "max",
    Where: "where",
    Uniform: "uniform",
    BitAnd: "bit and",
    BitOr: "bit or",
    BitXor: "bit xor",
    ShiftLeft: "shift left",
    ShiftRight: "shift right",
    sympy.GreaterThan: ">=",
    sympy.StrictGreaterThan: ">",
    sympy.Equality: "==",
    sympy.Unequality: "!=",
}


@program_of.register(sympy.Basic)
@lru_cache(maxsize=8192)
def _(expr: Any) -> Node:
    if expr == sympy.true or expr == sympy.false:
        return Node("bool", (), bool(expr))
    if expr.is_Integer and is_int(expr):
        return Node("int", (), int(expr))
    if expr.is_Rational:
        return Node("real", (), float(expr))
    if expr.is_Symbol:
        return Node("integer" if expr.is_integer else "number", (), expr.name)
    if isinstance(expr, Load):
        kind = "bool" if is_flag(expr) else "int" if is_int(expr) else "float"
        return Node("load", _all(expr.indices), expr.name, kind)
    if expr.is_Pow:
        whole = expr.exp.is_Integer and expr.exp > 0
        return Node("power", _all((expr.base,)), int(expr.exp) if whole else float(expr.exp))
    if expr.is_Add:
        return Node("add", _all(expr.args))
    if expr.is_Mul:
        large = not is_int(expr) and all(is_int(arg) for arg in expr.args)
        return Node("real mul" if large else "mul", _all(expr.args))
    return Node(_OPERATIONS[type(expr)], _all(expr.args))


def _all(expressions: Any) -> tuple[Node, ...]:
    return tuple(program_of(expr) for expr in expressions)

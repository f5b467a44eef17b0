"""The symbolic language: what masks and scores are made of. It loads when something of it is first used: a call needs none."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attngen.language.expression.builder import (
        Expr,
        Param,
        Tensor,
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
    from attngen.language.expression.canonical import (
        conjunction,
        disjunction,
        equal,
        greater,
        greater_equal,
        linear_terms,
        negate,
        not_equal,
        truth,
    )
    from attngen.language.expression.functions import (
        LARGEST_ROUNDED,
        LARGEST_SHIFT,
        Q_OFFSET,
        ROW,
        Absolute,
        B,
        BitAnd,
        BitOr,
        BitXor,
        Erf,
        Exp2,
        Floor,
        FloorDiv,
        H,
        I,
        J,
        Load,
        Maximum,
        Minimum,
        Position,
        Power,
        PyMod,
        Round,
        S,
        ShiftLeft,
        ShiftRight,
        Sigmoid,
        Uniform,
        Where,
        is_flag,
        is_int,
        kind,
        loads,
    )
    from attngen.language.expression.text import to_text

_MODULES = ("functions", "canonical", "text", "compiled", "builder")


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name in _MODULES:  # a module's own import asks for it before it is there
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in _MODULES:
        found = vars(importlib.import_module(f"{__name__}.{module}"))
        if name in found:
            globals()[name] = found[name]
            return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LARGEST_ROUNDED",
    "LARGEST_SHIFT",
    "Q_OFFSET",
    "ROW",
    "Absolute",
    "B",
    "BitAnd",
    "BitOr",
    "BitXor",
    "Erf",
    "Exp2",
    "Expr",
    "Floor",
    "FloorDiv",
    "H",
    "I",
    "J",
    "Load",
    "Maximum",
    "Minimum",
    "Param",
    "Position",
    "Power",
    "PyMod",
    "Round",
    "S",
    "ShiftLeft",
    "ShiftRight",
    "Sigmoid",
    "Tensor",
    "Uniform",
    "Where",
    "absolute",
    "ceil",
    "clamp",
    "conjunction",
    "cos",
    "disjunction",
    "equal",
    "erf",
    "exp",
    "exp2",
    "floor",
    "greater",
    "greater_equal",
    "is_flag",
    "is_int",
    "kind",
    "linear_terms",
    "loads",
    "log",
    "maximum",
    "minimum",
    "negate",
    "not_equal",
    "relu",
    "round",
    "sigmoid",
    "sin",
    "sqrt",
    "tanh",
    "to_text",
    "truth",
    "where",
]

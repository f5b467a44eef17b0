"""A walk program on plain integers. Of a short call, torch's price per operation on tiny tensors is most of the work."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import sympy
import torch

from attngen.analysis.facts import Facts
from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST
from attngen.analysis.walk import WalkProgram
from attngen.language.expression import Absolute, FloorDiv, Load, Maximum, Minimum, PyMod, Where


class Step(NamedTuple):
    """values[place] = function(*arguments(values))."""

    place: int
    function: Callable[..., Any]
    arguments: Callable[[list[Any]], tuple[Any, ...]]


class ScalarProgram:
    """What `WalkProgram.evaluate` does for all tiles with tensors, for one tile with Python integers."""

    def __init__(self, program: WalkProgram):
        """KeyError if something in it has no value on integers."""
        self._values: list[Any] = []
        self._inputs: list[int] = []
        self._names: list[str] = []
        self.loads = False  # whether it reads captured tensors
        self._steps: list[Step] = []
        self._places: dict[Any, int] = {}
        for symbol, expr in program.lines:
            self._places[symbol] = self._place(expr)
        segments = [(s, False) for s in program.full] + [(s, True) for s in program.partial]
        self._segments = [(self._place(s.first), self._place(s.count), partial) for s, partial in segments]
        self.by_batch, self.by_head = "b" in self._names, "h" in self._names
        # The layers of a model ask the same of it.
        self._known = lru_cache(maxsize=64)(self._evaluate)

    def runs(
        self, env: Mapping[str, Any], first: int, last: int, length: int, grain: int, b: int, h: int
    ) -> list[tuple[int, int, bool]]:
        """(start, stop, whether the mask is needed) of the keys, `length` in all, that queries at positions first .. last
        visit, rounded out to `grain`. env: params and captures.
        """
        given: dict[str, Any] = {
            FIRST.name: first,
            LAST.name: last,
            BEGIN.name: 0,
            END.name: length,
            BLOCK.name: grain,
            "b": b,
            "h": h,
        }
        inputs = tuple(given[name] if name in given else env[name] for name in self._names)
        return self._evaluate(inputs, length, grain) if self.loads else self._known(inputs, length, grain)

    def _evaluate(self, inputs: tuple[Any, ...], length: int, grain: int) -> list[tuple[int, int, bool]]:
        values = self._values.copy()
        for place, value in zip(self._inputs, inputs, strict=True):
            values[place] = value
        for place, function, arguments in self._steps:
            values[place] = function(*arguments(values))
        return [
            (values[start] * grain, min((values[start] + values[count]) * grain, length), partial)
            for start, count, partial in self._segments
            if values[count] > 0
        ]

    def _place(self, expr: Any) -> int:
        """Where the value of an expression will be; equal ones share a place."""
        if expr in self._places:
            return self._places[expr]
        function, args = _operation(expr)
        self.loads |= function is _element
        places = [self._place(arg) for arg in args]
        self._places[expr] = place = len(self._values)
        self._values.append(None)
        if function is None:
            self._inputs.append(place)
            self._names.append(expr.name)
        elif not places:
            self._values[place] = function()
        elif len(places) == 1:
            (only,) = places
            self._steps.append(Step(place, function, lambda values: (values[only],)))
        else:
            self._steps.append(Step(place, function, itemgetter(*places)))
        return place


@lru_cache(maxsize=256)
def scalar_program(facts: Facts) -> ScalarProgram | None:
    """How a tile of queries walks the keys; None if that needs tables of captured data, or reals."""
    if facts.program_keys.tables:
        return None
    try:
        return ScalarProgram(facts.program_keys)
    except KeyError:
        return None


def _operation(expr: Any) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    """(its function, its arguments); None for an input. KeyError if it isn't about integers."""
    if expr == sympy.true or expr == sympy.false:
        truth = bool(expr)
        return (lambda: truth), ()
    if expr.is_Integer:
        number = int(expr)
        return (lambda: number), ()
    if expr.is_Symbol:
        if not expr.is_integer:
            raise KeyError(expr)
        return None, ()
    if isinstance(expr, Load):
        if not expr.args[0].is_integer:
            raise KeyError(expr)
        return _element, expr.args
    return _FUNCTIONS[type(expr)], expr.args


def _element(tensor: torch.Tensor, *index: int) -> int:
    """Of a captured tensor, indices clamped as in `evaluate`."""
    inside = [min(max(i, 0), size - 1) for i, size in zip(index, tensor.shape, strict=True)]
    return int(tensor[tuple(inside)]) if tensor.numel() else 0


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: lambda *args: sum(args),
    sympy.Mul: lambda *args: math.prod(args),
    sympy.And: lambda *args: all(args),
    sympy.Or: lambda *args: any(args),
    Absolute: abs,
    FloorDiv: operator.floordiv,
    PyMod: operator.mod,
    Minimum: min,
    Maximum: max,
    Where: lambda condition, a, b: a if condition else b,
    sympy.GreaterThan: operator.ge,
    sympy.StrictGreaterThan: operator.gt,
    sympy.Equality: operator.eq,
    sympy.Unequality: operator.ne,
}

"""A walk program on plain integers. Of a short call, torch's price per operation on tiny tensors is most of the work."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from attngen.language.programs import Node

Segments = tuple[tuple[Node, Node], ...]  # (first, count) of consecutive tiles
FIRST, LAST, BEGIN, END, BLOCK = "tile.first", "tile.last", "walk.begin", "walk.end", "walk.block"


class Step(NamedTuple):
    """values[place] = function(*arguments(values))."""

    place: int
    function: Callable[..., Any]
    arguments: Callable[[list[Any]], tuple[Any, ...]]


class ScalarProgram:
    """What `TileProgram.evaluate` does for all tiles with tensors, for one tile with Python integers."""

    def __init__(self, lines: Iterable[tuple[str, Node]], full: Segments, partial: Segments):
        """KeyError if something in it has no value on integers."""
        self._values: list[Any] = []
        self._inputs: list[int] = []
        self._names: list[str] = []
        self.loads = False  # whether it reads captured tensors
        self._steps: list[Step] = []
        self._places: dict[Node, int] = {}
        for name, expr in lines:
            self._places[Node("integer", (), name)] = self._place(expr)
        segments = [(s, False) for s in full] + [(s, True) for s in partial]
        self._segments = [(self._place(first), self._place(count), masked) for (first, count), masked in segments]
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
            FIRST: first,
            LAST: last,
            BEGIN: 0,
            END: length,
            BLOCK: grain,
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

    def _place(self, expr: Node) -> int:
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
            self._names.append(expr.value)
        elif not places:
            self._values[place] = function()
        elif len(places) == 1:
            (only,) = places
            self._steps.append(Step(place, function, lambda values: (values[only],)))
        else:
            self._steps.append(Step(place, function, itemgetter(*places)))
        return place


def _operation(expr: Node) -> tuple[Callable[..., Any] | None, tuple[Node, ...]]:
    """(its function, its arguments); None for an input. KeyError if it isn't about integers."""
    value = expr.value
    if expr.op in ("bool", "int"):
        return (lambda: value), ()
    if expr.op == "integer":
        return None, ()
    if expr.op == "load" and expr.kind != "float":
        return _element, (Node("integer", (), value), *expr.args)
    return _FUNCTIONS[expr.op], expr.args


def _element(tensor: torch.Tensor, *index: int) -> int:
    """Of a captured tensor, indices clamped as in `evaluate`."""
    inside = [min(max(i, 0), size - 1) for i, size in zip(index, tensor.shape, strict=True)]
    return int(tensor[tuple(inside)]) if tensor.numel() else 0


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *args: sum(args),
    "mul": lambda *args: math.prod(args),
    "and": lambda *args: all(args),
    "or": lambda *args: any(args),
    "abs": abs,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "where": lambda condition, a, b: a if condition else b,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}

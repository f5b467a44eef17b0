"""Walks: which tiles of the other axis a tile has to visit, and which of them need the mask.

`Walk` holds the analysis in positions. `Walk.program()` turns it into a short scalar program over tile numbers, the
same one that a Triton kernel runs in registers and that `TileProgram.evaluate` runs for all tiles at once with torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from attngen.analysis.intervals import INFINITY, Cover, Interval, cover, join_neighbours, merge
from attngen.analysis.normal import Reader
from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST, ZERO, Down, Order, Up
from attngen.analysis.scalars import ScalarProgram
from attngen.analysis.summaries import Axis, Summary, prepare
from attngen.analysis.tables import Table, Tables
from attngen.analysis.tile_program import Evaluated, TileProgram
from attngen.language.expression import B, FloorDiv, H, I, J, Maximum, Minimum, Where, conjunction, negate, to_text
from attngen.language.programs import program_of

MAX_SEGMENTS = 16  # live x hole intervals whose intersections a program spells out


@dataclass(frozen=True)
class Segment:
    """`count` consecutive tiles of the walked axis from tile `first`; count is never negative."""

    first: Any
    count: Any


@dataclass(frozen=True)
class WalkProgram:
    """Scalar code that finds a tile's full and partial tiles.

    `lines` assign symbols in order, from the inputs FIRST, LAST, BEGIN, END, BLOCK, params, b, h, loads by b and h,
    and the symbols of `tables`. Segments are disjoint: each tile to visit is in exactly one. In every FloorDiv by
    BLOCK whose value is used the dividend is >= 0; other floor divisions (by a number or a param) may have a
    negative one.
    """

    lines: tuple[tuple[Any, Any], ...]
    full: tuple[Segment, ...]
    partial: tuple[Segment, ...]
    tables: tuple[Table, ...]
    exact_live: bool  # no tile is visited without need, for every value of the params
    exact_holes: bool  # no full tile is treated as partial

    def __str__(self) -> str:
        text = [f"{symbol.name} = {to_text(expr)}" for symbol, expr in self.lines]
        for name, segments in (("full", self.full), ("partial", self.partial)):
            text += [f"{name}: {to_text(s.count)} tiles from tile {to_text(s.first)}" for s in segments] or [
                f"{name}: none"
            ]
        return "\n".join(text)

    @cached_property
    def inputs(self) -> frozenset[Any]:
        """Symbols that the lines read and do not assign, loaded tensors' names excluded."""
        used: set[Any] = set()
        for expr in [e for _, e in self.lines] + [x for s in (*self.full, *self.partial) for x in (s.first, s.count)]:
            names = {load.args[0] for load in expr.atoms(sympy.Function) if type(load).__name__ == "Load"}
            used |= expr.free_symbols - names
        return frozenset(used - {symbol for symbol, _ in self.lines})

    def evaluate(self, first: Any, last: Any, begin: Any, end: Any, block: int, env: Mapping[str, Any]) -> Evaluated:
        """Run it for many tiles, see `TileProgram.evaluate`."""
        return self.plain.evaluate(first, last, begin, end, block, env)

    @property
    def scalar(self) -> ScalarProgram | None:
        """The same for one tile, on integers."""
        return self.plain.scalar

    @cached_property
    def plain(self) -> TileProgram:
        """The same as plain data, to run it."""
        full, partial = (
            tuple((program_of(s.first), program_of(s.count)) for s in segments)
            for segments in (self.full, self.partial)
        )
        lines = tuple((symbol.name, program_of(expr)) for symbol, expr in self.lines)
        return TileProgram(lines, full, partial, bool(self.tables))


@dataclass(frozen=True)
class Walk:
    """What a tile of one axis meets on the other, in original positions, for every value of the params.

    `live` covers every position that some row of the tile may attend; `holes` every position that is masked for some
    row. A tile of the walked axis that meets no live interval is empty, one that meets no hole is full. The bounds are
    in FIRST and LAST, params, b, h, loads by b and h, and symbols of `tables`.
    """

    axis: str  # the walked axis: "j" when a query tile walks keys, "i" when a key tile walks queries
    live: tuple[Interval, ...]
    holes: tuple[Interval, ...]
    tables: tuple[Table, ...]
    positive: frozenset[Any]  # params that divide; the analysis holds for values >= 1
    exact_live: bool
    exact_holes: bool
    taken: frozenset[str]  # names that lines must not use

    def __str__(self) -> str:
        tile, walked = ("i", "j") if self.axis == "j" else ("j", "i")
        rows = f"for rows {tile} = tile.first .. tile.last, positions {walked}"
        live = ", ".join(map(str, self.live)) or "none"
        holes = ", ".join(map(str, self.holes)) or "none"
        return "\n".join(
            [f"{rows}: live in {live}", f"    masked for some row in {holes}", *(f"    {t}" for t in self.tables)]
        )

    @property
    def divisors(self) -> frozenset[str]:
        """Names of the params that divide."""
        return frozenset(symbol.name for symbol in self.positive)

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """Its tables, as what computes them takes them."""
        return tuple(table.summary for table in self.tables)

    @property
    def needs_tables(self) -> bool:
        """Whether the walk reads captured data that has to be summarised before."""
        return bool(self.tables)

    @cached_property
    def uneven(self) -> bool:
        """Whether tiles at one end have most to visit, as under a causal mask: the last queries, or the first keys. Never where
        captured data decides.
        """
        fixed = {(_fixed(x.low), _fixed(x.high)) for x in self.live}
        growing = (self.axis == "j", self.axis == "i")  # keys up to the tile's own, or queries from the tile's own on
        return not self.needs_tables and growing in fixed and growing[::-1] not in fixed

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The names of its tables' values."""
        return tuple(symbol.name for table in self.tables for symbol in table.symbols)

    def differ(self, offset_tensor: bool) -> tuple[bool, bool]:
        """Whether its tables differ from one batch to the next, and from one query head to the next."""
        read = self._read
        return offset_tensor or B in read, H in read

    @cached_property
    def _read(self) -> frozenset[Any]:
        return frozenset().union(*(x.free_symbols for table in self.tables for x in (table.tile, table.walked)))

    def prepare(
        self, env: Mapping[str, Any], tile: Axis, walked: Axis, block: int, device: Any = "cpu"
    ) -> dict[str, torch.Tensor]:
        """The walk's tables for one call, see `tables.prepare`; nothing for closed-form masks."""
        return prepare(self.summaries, env, tile, walked, block, device)

    def program(self, begin: Any = None) -> WalkProgram:
        """The program in tile numbers. `begin` defaults to 0 for keys and to BEGIN for queries."""
        start = begin if begin is not None else ZERO if self.axis == "j" else BEGIN
        return _program(self, sympy.sympify(start) if isinstance(start, int) else start)


def _fixed(bound: Any) -> bool:
    """Whether it is the same for all tiles, or for all but the first few."""
    if isinstance(bound, Minimum) and any(arg.is_Integer for arg in bound.args):
        return True
    return not {FIRST, LAST} & bound.free_symbols


def analyse(mask: Any, tile: Any, walked: Any) -> Walk:
    """Analyse one direction of a mask: a tile of the axis `tile` (I or J) walks the axis `walked`."""
    taken = frozenset(symbol.name for symbol in mask.free_symbols)
    tables = Tables(tile, walked, taken)
    reader = Reader(tile, walked, tables)
    live: Cover = cover(mask, reader)
    holes: Cover = cover(negate(mask), reader)
    used = tables.used_by(x for i in (*live.intervals, *holes.intervals) for x in (i.low, i.high, i.when))
    return Walk(
        axis=walked.name,
        live=live.intervals,
        holes=holes.intervals,
        tables=used,
        positive=frozenset(reader.divisors),
        exact_live=live.exact,
        exact_holes=holes.exact,
        taken=taken | {symbol.name for table in used for symbol in table.symbols},
    )


def walk_keys(mask: Any) -> Walk:
    """A tile of queries walks the keys."""
    return analyse(mask, I, J)


def walk_queries(mask: Any) -> Walk:
    """A tile of keys walks the queries."""
    return analyse(mask, J, I)


# -- from positions to tiles ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """Tiles first .. stop - 1; empty if stop <= first."""

    first: Any
    stop: Any


class _Builder:
    """Collects the lines of a program; equal expressions share a line."""

    def __init__(self, walk: Walk, begin: Any):
        self.order = Order(walk.positive, begin=begin)
        self.begin, self.length = begin, END - begin
        self.taken = set(walk.taken)
        self.lines: dict[Any, Any] = {}
        self._named: dict[Any, Any] = {}

    def line(self, name: str, expr: Any) -> Any:
        """A symbol for `expr`, or the expression itself when it needs no line."""
        if expr.is_Symbol or expr.is_Integer:
            return expr
        if expr not in self._named:
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            symbol = sympy.Symbol(name, integer=True)
            self._named[expr], self.lines[symbol] = symbol, expr
            self.order.definitions[symbol] = expr
        return self._named[expr]

    def offset(self, position: Any) -> Any:
        """A position as an offset from the walk's begin."""
        if position in (INFINITY, -INFINITY):
            return position
        if isinstance(position, (Minimum, Maximum)):
            return position.func(*[self.offset(arg) for arg in position.args])
        if isinstance(position, Where):
            return Where(position.args[0], self.offset(position.args[1]), self.offset(position.args[2]))
        return position.xreplace({BEGIN: self.begin}) - self.begin

    def span(self, name: str, x: Interval, clip: bool) -> _Span:
        """Tiles that an interval touches. `clip` keeps them in the walked axis; holes are cut by the live spans
        anyway.
        """
        order, low, high, when = self.order, self.offset(x.low), self.offset(x.high), x.when
        if x.high == INFINITY and not clip:
            return _Span(_down(order.largest(ZERO, order.smallest(low, self.length))), INFINITY)
        if clip:
            high = order.smallest(high, self.length)
        if low == -INFINITY:
            return _Span(ZERO, self.line(f"{name}_stop", Where(when, Up(order.largest(ZERO, high)), ZERO)))
        low = order.largest(ZERO, low)
        low, high = self.line(f"{name}_start", low), self.line(f"{name}_end", high)
        if not order.less(low, high):  # an empty interval would still touch the tile it lies in
            when = conjunction([when, sympy.Gt(high - low, 0, evaluate=False)])
        first = self.line(f"{name}_first", _down(low))
        stop = self.line(f"{name}_stop", Where(when, Up(high), first))
        order.assume(first, stop)
        order.assume(ZERO, stop)
        return _Span(first, stop)

    def disjoint(self, name: str, spans: Sequence[_Span]) -> list[_Span]:
        """The same tiles as spans in ascending order without overlaps."""
        ordered = self._sorted(name, spans)
        result: list[_Span] = []
        reached: Any = ZERO
        for number, span in enumerate(ordered):
            label = _label(name, number, ordered)
            result.append(_Span(self.line(f"{label}_first", self.order.largest(span.first, reached)), span.stop))
            if number + 1 < len(ordered):
                reached = self.line(f"{name}{number + 1}_reached", self.order.largest(reached, span.stop))
        return result

    def _sorted(self, name: str, spans: Sequence[_Span]) -> list[_Span]:
        """Ascending by first: statically where it is proved, by compare and exchange elsewhere."""
        ordered = list(spans)
        if ordered and ordered[-1].stop == INFINITY:
            rest = ordered[-1]
            ordered = [a for a in ordered[:-1] if not self.order.less_equal(rest.first, a.first)] + [rest]
        for end in range(len(ordered) - 1, 0, -1):  # bubble sort as a network
            for k in range(end):
                a, b = ordered[k], ordered[k + 1]
                if self.order.less_equal(a.first, b.first):
                    continue
                if self.order.less_equal(b.first, a.first):
                    ordered[k], ordered[k + 1] = b, a
                    continue
                if b.stop == INFINITY:  # all of a that lies above b's first tile is in b too
                    ordered[k] = _Span(self.line(f"{name}{k + 1}_from", Minimum(a.first, b.first)), a.stop)
                    continue
                swap = sympy.Gt(a.first - b.first, 0, evaluate=False)
                tag = f"{name}_{len(self.lines)}"
                ordered[k] = _Span(
                    self.line(f"{tag}_first", Minimum(a.first, b.first)),
                    self.line(f"{tag}_stop", Where(swap, b.stop, a.stop)),
                )
                ordered[k + 1] = _Span(
                    self.line(f"{tag}_next", Maximum(a.first, b.first)),
                    self.line(f"{tag}_end", Where(swap, a.stop, b.stop)),
                )
        return ordered

    def segments(self, name: str, pieces: Iterable[tuple[Any, Any]]) -> tuple[Segment, ...]:
        """Segments of the non-empty (first, stop) pieces."""
        kept = [(first, stop) for first, stop in pieces if not self.order.less_equal(stop, first)]
        result = []
        for number, (first, stop) in enumerate(kept):
            label = name if len(kept) == 1 else f"{name}{number + 1}"
            first, stop = self.line(f"{label}_first", first), self.line(f"{label}_stop", stop)
            count = stop - first if self.order.less_equal(first, stop) else Maximum(stop - first, 0)
            result.append(Segment(first, self.line(f"{label}_count", count)))
        return tuple(result)


def _program(walk: Walk, begin: Any) -> WalkProgram:
    build = _Builder(walk, begin)
    order = build.order
    live = list(walk.live)
    # Positions past the end are holes of the last, ragged tile.
    holes = merge([*walk.holes, Interval(END, INFINITY)], order)
    joined = False
    while len(live) * len(holes) > MAX_SEGMENTS and len(holes) > 2:
        holes, joined = join_neighbours(holes, len(holes) - 1, order), True

    live_spans = build.disjoint("live", [build.span(_label("live", k, live), x, clip=True) for k, x in enumerate(live)])
    hole_spans = build.disjoint(
        "hole", [build.span(_label("hole", k, holes), x, clip=False) for k, x in enumerate(holes)]
    )
    gaps, reached = [], ZERO
    for hole in hole_spans:  # the last one has no end: it holds the positions past END
        gaps.append(_Span(reached, hole.first))
        reached = order.largest(hole.first, hole.stop)

    def meet(a: _Span, b: _Span) -> tuple[Any, Any]:
        return order.largest(a.first, b.first), order.smallest(a.stop, b.stop)

    full = build.segments("full", (meet(span, gap) for span in live_spans for gap in gaps))
    partial = build.segments("partial", (meet(span, hole) for span in live_spans for hole in hole_spans))
    in_tiles = {symbol: _in_tiles(expr) for symbol, expr in build.lines.items()}
    lines = _reachable(in_tiles, (*full, *partial))
    return WalkProgram(lines, full, partial, walk.tables, walk.exact_live, walk.exact_holes and not joined)


def _down(offset: Any) -> Any:
    return ZERO if offset == 0 else Down(offset)


def _label(name: str, number: int, items: Sequence[Any]) -> str:
    return name if len(items) == 1 else f"{name}{number + 1}"


def _in_tiles(expr: Any) -> Any:
    """Down and Up as divisions by BLOCK."""
    if isinstance(expr, Down):
        return FloorDiv(expr.args[0], BLOCK)
    if isinstance(expr, Up):
        return FloorDiv(expr.args[0] + BLOCK - 1, BLOCK)
    if not expr.args or not expr.has(Down, Up):
        return expr
    return expr.func(*[_in_tiles(arg) for arg in expr.args])


def _reachable(lines: Mapping[Any, Any], segments: Iterable[Segment]) -> tuple[tuple[Any, Any], ...]:
    """The lines that some segment needs, in order."""
    needed = {symbol for s in segments for x in (s.first, s.count) for symbol in x.free_symbols}
    kept = []
    for symbol, expr in reversed(list(lines.items())):
        if symbol in needed:
            needed |= expr.free_symbols
            kept.append((symbol, expr))
    return tuple(reversed(kept))

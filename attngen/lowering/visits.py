"""The two loops of a kernel: how many tiles each visits, and how a step finds its tile.

The tiles come from the walk's program, as runs whose bounds are computed in registers, or from lists in memory
(`attngen.language.lists`). A split kernel does a part of both loops: elements lo .. hi - 1 of its output's full tiles followed by
its partial ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy

from attngen.language.lists import TileLists
from attngen.lowering.printer import Place, Printer
from attngen.lowering.sides import Sides

Segments = tuple[tuple[Any, Any], ...]  # (first, count) in tiles


@dataclass(frozen=True)
class Visits:
    """One loop: `range` over `variable`, and the statements that give `tile` where that is not the variable itself."""

    variable: str
    range: str
    find: tuple[str, ...]


@dataclass
class Reader:
    """Prints what stands in front of the loops. `lists` collects the tensors of lists that the kernel reads, `tables` the
    walk's summaries; `locate` the statements that give a step's rows, apart for full and partial tiles.
    """

    spec: Any
    facts: Any
    sides: Sides
    printer: Printer
    head: Place
    names: Mapping[str, str]
    blocks: tuple[int, int]
    one_loop: bool = False
    sliced: str = ""  # "split", "stream" or nothing
    lists: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def by_rows(self) -> bool:
        """Whether single rows are listed, not tiles."""
        return self.spec.lists is not None and not isinstance(self.spec.lists, TileLists)

    def loops(self) -> tuple[Visits | None, Visits | None]:
        """The full and the partial loop; None for one that never visits a tile."""
        if self.spec.lists is None:
            return self._loops_of_walk()
        full, partial = self._list_of_tiles() if isinstance(self.spec.lists, TileLists) else self._list_of_rows()
        return self._sliced(full, partial)

    def locate(self, partial: bool) -> tuple[str, ...]:
        """Row numbers of walked tile `tile`, and in a partial tile which of its rows are there."""
        walked, there = self.sides.walked, ", mask=inside, other=0" if partial else ""
        rows = f"rows = {walked.index}.to(tl.int64)[:, None]"
        if not self.by_rows:
            lines = [f"{walked.index} = tile * {walked.block} + {walked.lane}"]
            lines += [rows] if self.spec.page_size is None else []
            lines += [f"inside = {walked.index} < {walked.length}"] if partial else []
        else:
            lines = [f"edge = tile * {walked.block} + {walked.lane}"]
            lines += ["inside = edge < edges"] if partial else []
            lines.append(f"{walked.index} = tl.load(listed + edge{there}).to(tl.int32)")
            if self.spec.lists.weighted:
                if walked.noun == "query":
                    lines.append(f"place = tl.load(places + edge{there})")
                place = "edge" if walked.noun == "key" else "place"
                lines.append(f"weight = tl.load(weights + {place}{there.replace('0', '0.0')}).to(tl.float32)")
            lines += [rows] if self.spec.page_size is None else []
        if self.spec.page_size is None:
            return tuple(lines)
        # Entries that no attended key needs may hold anything.
        return (
            *lines,
            f"page = tl.load(page_row + {walked.index} // PAGE_SIZE{there})",
            "page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)[:, None]",
            f"rows = ({walked.index} % PAGE_SIZE)[:, None]",
        )

    # -- closed forms -------------------------------------------------------------------------------------------------

    def _loops_of_walk(self) -> tuple[Visits | None, Visits | None]:
        full, partial = self._segments()
        if self.one_loop:
            full, partial = (), (*full, *partial)
        if self.sliced:
            return self._sliced(*(self._counted(noun, s) for noun, s in (("full", full), ("partial", partial))))
        return self._run("full", full), self._run("partial", partial)

    def _segments(self) -> tuple[Segments, Segments]:
        """The scalar program that finds the walked tiles, as statements in front of the loops."""
        from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST

        resident, walked = self.sides.resident, self.sides.walked
        program = self.facts.program_keys if walked.noun == "key" else self.facts.program_queries
        integer = lambda name: sympy.Symbol(name, integer=True)  # noqa: E731
        begin = sympy.Integer(0) if walked.noun == "key" else integer("q_offset")
        inputs = {
            FIRST: integer("first"),
            LAST: integer("last"),
            BEGIN: begin,
            END: begin + integer(walked.length),
            BLOCK: integer(walked.block),
        }
        start, stop = f"{resident.tile} * {resident.block}", f"{resident.tile} * {resident.block} + {resident.block}"
        shift = " + q_offset" if resident.noun == "query" else ""
        lines = self.head.lines
        self.printer.placed |= {inputs[s]: frozenset({"walk"}) for s in (FIRST, LAST)}
        if FIRST in program.inputs:
            lines.append(f"first = {start}{' // group' if resident.packed else ''}{shift}")
        if LAST in program.inputs and resident.packed:
            lines.append(f"last = tl.minimum(({stop} - 1) // group, {resident.length} - 1){shift}")
        elif LAST in program.inputs:
            lines.append(f"last = tl.minimum({stop}, {resident.length}) - 1{shift}")
        for symbol in (s for table in program.tables for s in table.symbols if s in program.inputs):
            self.tables.append(symbol.name)
            name = self.names[symbol.name]
            inputs[symbol] = integer(name)
            self.printer.placed[inputs[symbol]] = frozenset({"walk"})
            lines.append(f"{name}_row = {name}_table + b * {name}_stride_b")
            lines.append(f"{name} = tl.load({name}_row + h * {name}_stride_h + {resident.tile})")
        for symbol, expr in program.lines:
            self.printer.define(symbol, expr.xreplace(inputs))
        full, partial = (
            tuple((s.first.xreplace(inputs), s.count.xreplace(inputs)) for s in part if s.count != 0)
            for part in (program.full, program.partial)
        )
        return full, partial

    def _text(self, expr: Any) -> str:
        return self.printer.value(expr).text

    def _symbol(self, name: str, expr: Any) -> Any:
        """A symbol for a tile count, defined in front of the loops."""
        symbol = sympy.Symbol(name, integer=True)
        self.printer.define(symbol, expr)
        return symbol

    def _run(self, noun: str, segments: Segments) -> Visits | None:
        if not segments:
            return None
        if len(segments) == 1:
            first, count = segments[0]
            bounds = f"{self._text(first)}, {self._text(first)} + {self._text(count)}"
            return Visits("tile", bounds if first != 0 else self._text(count), ())
        done, find = self._chain(noun, segments)
        return Visits("step", self._text(done), find)

    def _chain(self, noun: str, segments: Segments) -> tuple[Any, tuple[str, ...]]:
        """Several segments as one loop over `step`: how many tiles they have together, and which is step's."""
        first, done = segments[0]
        lines = [f"tile = {self._text(first)} + step" if first != 0 else "tile = step"]
        for number, (first, count) in enumerate(segments[1:], 2):
            if first == done:  # it goes on where the last segment ends
                done = self._symbol(f"{noun}_count{number}", done + count)
                continue
            skip = self._symbol(f"{noun}_shift{number}", first - done)
            lines.append(f"tile = tl.where(step < {self._text(done)}, tile, {self._text(skip)} + step)")
            done = self._symbol(f"{noun}_count{number}", done + count)
        return done, tuple(lines)

    def _counted(self, noun: str, segments: Segments) -> tuple[str, tuple[str, ...]] | None:
        if not segments:
            return None
        done, find = self._chain(noun, segments)
        return self._text(done), find

    # -- lists --------------------------------------------------------------------------------------------------------

    def _base(self, variable: str, name: str, head: str) -> None:
        """Makes `variable` point to a head's part of a tensor of the lists."""
        self.lists.append(name)
        self.head.lines.append(f"{variable} = {name} + b.to(tl.int64) * {name}_stride_b")
        self.head.lines.append(f"{variable} += {head}.to(tl.int64) * {name}_stride_h")

    def _list_of_tiles(self) -> tuple[tuple[str, tuple[str, ...]] | None, tuple[str, tuple[str, ...]] | None]:
        lists, resident, lines = self.spec.lists, self.sides.resident, self.head.lines
        by_query = resident.noun == "query"
        own, other = (self.blocks[0], self.blocks[1]) if by_query else (self.blocks[1], self.blocks[0])
        own_list, other_list = (lists.block_m, lists.block_n) if by_query else (lists.block_n, lists.block_m)
        row = resident.tile if own == own_list else f"{resident.tile} // {own_list // own}"
        self._base("run", f"{resident.noun}_runs", "h")
        lines.append(f"run += {row} * 3")
        self._base("listed", f"{resident.noun}_tiles", "h")
        lines.append("listed += tl.load(run)")
        parts = other_list // other
        times = f" * {parts}" if parts > 1 else ""
        place = f"step // {parts}" if parts > 1 else "step"
        rest = f" * {parts} + step % {parts}" if parts > 1 else ""
        lines.append(f"full_count = tl.load(run + 1).to(tl.int32){times}")
        lines.append(f"partial_count = tl.load(run + 2).to(tl.int32){times}")
        find = (f"tile = tl.load(listed + {place}).to(tl.int32){rest}",)
        if self.one_loop:
            lines.append("partial_count += full_count")
            return None, ("partial_count", find)
        behind = (f"tile = tl.load(listed_partial + {place}).to(tl.int32){rest}",)
        lines.append("listed_partial = listed + tl.load(run + 1)")
        return ("full_count", find), ("partial_count", behind)

    def _list_of_rows(self) -> tuple[tuple[str, tuple[str, ...]] | None, tuple[str, tuple[str, ...]] | None]:
        lists, resident, walked, lines = self.spec.lists, self.sides.resident, self.sides.walked, self.head.lines
        head, noun = ("h" if lists.by_query_head else "kv_head"), resident.noun
        row = "query" if noun == "query" else resident.tile
        self._base("run", f"{noun}_runs", head)
        lines.append(f"run += {row}.to(tl.int64) * 2")
        lines.append("first_edge = tl.load(run).to(tl.int64)")
        lines.append("edges = tl.load(run + 1).to(tl.int32)")
        self._base("listed", f"{noun}_edges", head)
        lines.append("listed += first_edge")
        if lists.weighted:
            self._base("weights", "edge_weight", head)
            if noun == "key":
                self._base("places", "key_places", head)
            lines.append(f"{'weights' if noun == 'query' else 'places'} += first_edge")
        if self.spec.mask != sympy.true or self.one_loop:
            lines.append(f"partial_count = tl.cdiv(edges, {walked.block})")
            return None, ("partial_count", ("tile = step",))
        lines.append(f"full_count = edges // {walked.block}")
        lines.append(f"partial_count = tl.cdiv(edges, {walked.block}) - full_count")
        return ("full_count", ("tile = step",)), ("partial_count", ("tile = full_count + step",))

    # -- slices -------------------------------------------------------------------------------------------------------

    def _sliced(
        self, full: tuple[str, tuple[str, ...]] | None, partial: tuple[str, tuple[str, ...]] | None
    ) -> tuple[Visits | None, Visits | None]:
        """The loops over all of `full` and `partial`, or over elements lo .. hi - 1 of one after the other."""
        if not self.sliced:
            return tuple(None if p is None else Visits("step", p[0], p[1]) for p in (full, partial))  # type: ignore[return-value]
        lines, counts = self.head.lines, [part[0] for part in (full, partial) if part is not None]
        lines.append(f"count = {' + '.join(counts) or '0'}")
        if self.sliced == "split":
            lines += [
                "lo = count // splits * split + tl.minimum(split, count % splits)",
                "hi = lo + count // splits + (split < count % splits).to(tl.int32)",
            ]
        else:
            lines += ["lo = tl.maximum(begin - start, 0)", "hi = tl.minimum(end - start, count)"]
        found: list[Visits | None] = [None, None]
        if full is not None:
            size = full[0]
            found[0] = Visits("step", f"tl.minimum(lo, {size}), tl.minimum(hi, {size})", full[1])
        if partial is not None:
            before = f" - {full[0]}" if full is not None else ""
            bounds = f"tl.maximum(lo{before}, 0), tl.maximum(hi{before}, 0)" if before else "lo, hi"
            found[1] = Visits("step", bounds, partial[1])
        return found[0], found[1]

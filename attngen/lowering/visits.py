"""The two loops of a kernel: how many tiles each visits, and how a step finds its tile.

The tiles come from the walk's program, as intervals whose bounds are computed in registers, or from lists in memory
(`attngen.language.lists`). A split kernel does a part of both loops: elements lo .. hi - 1 of its output's full tiles followed by
its partial ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from attngen.analysis import WalkProgram
from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST
from attngen.language.expression import Position
from attngen.language.lists import TileLists
from attngen.lowering.axes import Roles
from attngen.lowering.printer import Printer
from attngen.lowering.statements import Assign, Spread, Statements, Value, assign, call, name, value_of

Segments = tuple[tuple[Any, Any], ...]  # (first, count) in tiles
STEP, TILE_, BATCH = name("step"), name("tile"), name("b")

# A walk with one interval of live tiles, masked at its ends: what the analysis numbers has names there.
_SIMPLE = {
    "hole_first": "unmasked_stop",
    "hole1_stop": "unmasked_first",
    "hole2_first": "unmasked_stop",
    "partial1_first": "before_first",
    "partial1_stop": "before_stop",
    "partial1_count": "before_full",
    "partial2_first": "after_first",
    "partial2_stop": "after_stop",
    "partial2_count": "after_full",
}
# What is computed on the way to them, where a line is too short for it.
_PARTS = {
    "unmasked_first": "unmasked_start",
    "full_first": "unmasked_start",
    "unmasked_stop": "masked_first",
    "live_stop": "live_tiles",
}


@dataclass(frozen=True)
class Visits:
    """One loop: the arguments of range over `variable`, and the statements that give `tile` where that is not the variable."""

    variable: str
    bounds: tuple[Value, ...]
    find: Statements = ()


@dataclass(frozen=True)
class Part:
    """The tiles of one loop when they are counted from 0: how many, and how to find number `step`."""

    count: Value
    find: Statements


@dataclass
class TileWalk:
    """How a kernel finds its tiles.

    names: what it calls the walk's summaries. blocks: rows and keys of a tile. one_loop: full and partial tiles go through one
    loop. split: "split", "stream" or nothing. head: the statements in front of the loops, which `loops` leaves.
    """

    spec: Any
    facts: Any
    roles: Roles
    printer: Printer
    names: Mapping[str, str]
    blocks: tuple[int, int]
    one_loop: bool = False
    split: str = ""
    head: list[Assign] = field(default_factory=list)

    @property
    def by_rows(self) -> bool:
        """Whether single rows are listed, not tiles."""
        return self.spec.lists is not None and not isinstance(self.spec.lists, TileLists)

    @property
    def program(self) -> WalkProgram:
        """The closed form of the walk."""
        found: WalkProgram = self.facts.program_keys if self.roles.walked.noun == "key" else self.facts.program_queries
        return found

    @property
    def tables(self) -> tuple[str, ...]:
        """The walk's summaries of captured data that it reads."""
        if self.spec.lists is not None:
            return ()
        inputs = self.program.inputs
        return tuple(s.name for table in self.program.tables for s in table.symbols if s in inputs)

    def loops(self) -> tuple[Visits | None, Visits | None]:
        """The full and the partial loop; None for one that never visits a tile."""
        if self.spec.lists is not None:
            full, partial = self._list_of_rows() if self.by_rows else self._list_of_tiles()
            return self._sliced(full, partial)
        named = _simple(self.program)
        segments = self._segments(named)
        if self.one_loop:
            segments = ((), (*segments[0], *segments[1]))
        if self.split:
            return self._sliced(self._part("full", segments[0], named), self._part("partial", segments[1], named))
        return self._interval("full", segments[0], named), self._interval("partial", segments[1], named)

    def locate(self, partial: bool) -> Statements:
        """Row numbers of walked tile `tile`, and in a partial tile which of its rows are there."""
        walked, paged = self.roles.walked, self.spec.page_size is not None
        index, lane = name(walked.index, walked.axis), name(walked.lane, walked.axis)
        there: dict[str, Any] = {"mask": name("inside"), "other": 0} if partial else {}
        number = TILE_ * name(walked.block) + lane
        if not self.by_rows:
            out = [assign(walked.index, number, walked.axis)]
            inside = index.less(name(walked.length))
        else:
            edge = name("edge", walked.axis)
            out = [assign("edge", number, walked.axis)]
            inside = edge.less(name("edges"))
        if not self.by_rows and not paged:
            out.append(assign("rows", Spread(index.to("int64"), "[:, None]")))
        if partial:
            out.append(assign("inside", inside, walked.axis))
        if self.by_rows:
            row = call("tl.load", name("listed") + edge, **there).to("int32")
            out.append(assign(walked.index, row, walked.axis))
            if self.spec.lists.weighted:
                own = edge
                if walked.noun == "query":
                    out.append(assign("place", call("tl.load", name("places") + edge, **there), walked.axis))
                    own = name("place", walked.axis)
                if partial:
                    there["other"] = 0.0
                weight = call("tl.load", name("weights") + own, **there, kind="float").to("float32")
                out.append(assign("weight", weight, walked.axis))
                if partial:
                    there["other"] = 0
        if self.by_rows and not paged:
            out.append(assign("rows", Spread(index.to("int64"), "[:, None]")))
        if not paged:
            return tuple(out)
        page = call("tl.load", name("page_row") + index // name("PAGE_SIZE"), **there)
        clamped = call("tl.minimum", call("tl.maximum", name("page"), 0), name("pages") - 1)
        return (
            *out,
            # Entries that no attended key needs may hold anything.
            assign("page", page, walked.axis),
            assign("page", Spread(clamped.to("int64"), "[:, None]")),
            assign("rows", Spread(index % name("PAGE_SIZE"), "[:, None]")),
        )

    # -- closed forms -------------------------------------------------------------------------------------------------

    def _segments(self, named: Mapping[str, str]) -> tuple[Segments, Segments]:
        """The scalar program that finds the walked tiles, as statements in front of the loops."""
        resident, walked, program = self.roles.resident, self.roles.walked, self.program
        begin = _integer("q_offset") if walked.shift else sympy.Integer(0)
        inputs = {
            FIRST: Position("first", integer=True),
            LAST: Position("last", integer=True),
            BEGIN: begin,
            END: begin + _integer(walked.length),
            BLOCK: _integer(walked.block),
        }
        self._ends(program)
        reason = f"what this {resident.noun} tile's captured data allow, found before the launch"
        for table in self.tables:
            own = self.names[table]
            inputs[_integer(table)] = _integer(own)
            row = name(f"{own}_table", kind="pointer") + BATCH * name(f"{own}_stride_b")
            value = name(f"{own}_row", kind="pointer") + name("h") * name(f"{own}_stride_h") + name(resident.tile)
            self.head.append(replace(assign(f"{own}_row", row), reason=reason))
            self.head.append(assign(own, call("tl.load", value)))
            reason = ""
        inputs |= {symbol: _integer(named.get(symbol.name, symbol.name)) for symbol, _ in program.lines}
        group = ""
        for symbol, expr in program.lines:
            own_group = "live" if symbol.name.startswith("live") else "partial" if "partial" in symbol.name else "full"
            reason = self._reason(own_group) if own_group != group else ""
            group = own_group
            self._define(inputs[symbol].name, expr.xreplace(inputs), reason)
        full, partial = (
            tuple((s.first.xreplace(inputs), s.count.xreplace(inputs)) for s in part if s.count != 0)
            for part in (program.full, program.partial)
        )
        return full, partial

    def _ends(self, program: WalkProgram) -> None:
        """Original positions of the resident tile's first and last row."""
        resident = self.roles.resident
        start = name(resident.tile) * name(resident.block)
        shifted = (lambda value: value + name("q_offset")) if resident.shift else (lambda value: value)
        reason = f"this tile's first and last {'row' if resident.noun == 'query' else 'key'}, as positions"
        if FIRST in program.inputs:
            first = shifted(start // name("group") if resident.packed else start)
            self.head.append(assign("first", first, reason=reason))
            reason = ""
        if LAST in program.inputs:
            stop, length = start + name(resident.block), name(resident.length)
            last: Value = call("tl.minimum", stop, length) - 1
            if resident.packed:
                last = call("tl.minimum", (stop - 1) // name("group"), length - 1)
            self.head.append(assign("last", shifted(last), reason=reason))

    def _reason(self, group: str) -> str:
        by_keys = self.roles.walked.noun == "key"
        if group == "live":
            if by_keys:
                return "key tiles that some row of this query tile attends"
            return "query tiles with a row that attends some key of this tile"
        if group == "partial":
            if not self.program.full:
                return "they are all partial"
            both = len(self.program.partial) == 2 and _simple(self.program)
            return f"the partial tiles {'before and behind' if both else 'beside'} them"
        if not self.program.full:
            return "the masked ones"
        return (
            f"of those, the ones {'every row attends fully' if by_keys else 'whose rows attend all keys of this tile'}"
        )

    def _define(self, own: str, expr: Any, reason: str = "") -> Any:
        """A scalar in front of the loops; as a symbol."""
        parts = (_PARTS.get(own, "bound"), f"any_{own.partition('_')[0]}")
        self.head.append(replace(assign(own, self.printer.value(expr), reason=reason), parts=parts))
        return _integer(own)

    def _interval(self, noun: str, segments: Segments, named: Mapping[str, str]) -> Visits | None:
        if not segments:
            return None
        if len(segments) > 1:
            part = self._part(noun, segments, named)
            assert part is not None
            return Visits("step", (part.count,), part.find)
        first, count = segments[0]
        if first == 0:
            return Visits("tile", (self._scalar(count),))
        # Counted from 0: Triton's pipeline takes fewer registers than from one tile to another.
        return Visits("step", (self._scalar(count),), (assign("tile", self._scalar(first) + STEP),))

    def _part(self, noun: str, segments: Segments, named: Mapping[str, str]) -> Part | None:
        """Several segments as one loop over `step`: how many tiles they have together, and which is step's."""
        if not segments:
            return None
        first, done = segments[0]
        reason = "" if named else f"those {noun} tiles, one interval behind the other"
        find = [assign("tile", self._scalar(first) + STEP if first != 0 else STEP)]
        for number, (first, count) in enumerate(segments[1:], 2):
            last = number == len(segments)
            total = f"{noun}_count" if last else f"{noun}_count{number}"
            if first != done:  # else it goes on where the last segment ends
                own = "skip_full" if named and noun == "partial" else f"{noun}_skip{number}"
                skip, reason = self._define(own, first - done, reason), ""
                behind = self._scalar(skip) + STEP
                find.append(assign("tile", call("tl.where", STEP.less(self._scalar(done)), TILE_, behind)))
            done = self._define(total, done + count)
        return Part(self._scalar(done), tuple(find))

    def _scalar(self, expr: Any) -> Value:
        return self.printer.value(expr)

    # -- lists --------------------------------------------------------------------------------------------------------

    def _base(self, variable: str, list_: str, head: str, reason: str = "") -> None:
        """Makes `variable` point to a head's part of a tensor of the lists."""
        pointer = name(list_, kind="pointer") + BATCH.to("int64") * name(f"{list_}_stride_b")
        self.head.append(assign(variable, pointer, reason=reason))
        self._advance(variable, name(head).to("int64") * name(f"{list_}_stride_h"))

    def _advance(self, variable: str, by: Value) -> None:
        self.head.append(assign(variable, name(variable, kind="pointer") + by))

    def _list_of_tiles(self) -> tuple[Part | None, Part | None]:
        lists, resident = self.spec.lists, self.roles.resident
        by_query = resident.noun == "query"
        own, other = self.blocks if by_query else self.blocks[::-1]
        own_list, other_list = (lists.block_m, lists.block_n) if by_query else (lists.block_n, lists.block_m)
        row = name(resident.tile) if own == own_list else name(resident.tile) // (own_list // own)
        walked = self.roles.walked.noun
        self._base(
            "run", f"{resident.noun}_runs", "h", f"where this tile's list of {walked} tiles starts, and how long it is"
        )
        self._advance("run", row * 3)
        self._base("listed", f"{resident.noun}_tiles", "h")
        self._advance("listed", call("tl.load", name("run")))
        parts = other_list // other

        def find(start: str) -> Statements:
            listed = call("tl.load", name(start) + (STEP // parts if parts > 1 else STEP)).to("int32")
            return (assign("tile", listed * parts + STEP % parts if parts > 1 else listed),)

        for noun, place in (("full", 1), ("partial", 2)):
            count = call("tl.load", name("run") + place).to("int32")
            self.head.append(assign(f"{noun}_count", count * parts if parts > 1 else count))
        if self.one_loop:
            self.head.append(assign("partial_count", name("partial_count") + name("full_count")))
            return None, Part(name("partial_count"), find("listed"))
        self.head.append(assign("listed_partial", name("listed") + call("tl.load", name("run") + 1)))
        return Part(name("full_count"), find("listed")), Part(name("partial_count"), find("listed_partial"))

    def _list_of_rows(self) -> tuple[Part | None, Part | None]:
        lists, resident, walked = self.spec.lists, self.roles.resident, self.roles.walked
        head, noun = ("h" if lists.by_query_head else "kv_head"), resident.noun
        row = name("query" if noun == "query" else resident.tile)
        self._base("run", f"{noun}_runs", head, f"where this {noun}'s list starts, and how long it is")
        self._advance("run", row.to("int64") * 2)
        self.head.append(assign("first_edge", call("tl.load", name("run")).to("int64")))
        self.head.append(assign("edges", call("tl.load", name("run") + 1).to("int32")))
        self._base("listed", f"{noun}_edges", head)
        self._advance("listed", name("first_edge"))
        if lists.weighted:
            self._base("weights", "edge_weight", head)
            if noun == "key":
                self._base("places", "key_places", head)
            self._advance("weights" if noun == "query" else "places", name("first_edge"))
        tiles = call("tl.cdiv", name("edges"), name(walked.block))
        if self.spec.mask != sympy.true or self.one_loop:
            self.head.append(assign("partial_count", tiles))
            return None, Part(name("partial_count"), (assign("tile", STEP),))
        self.head.append(assign("full_count", name("edges") // name(walked.block)))
        self.head.append(assign("partial_count", tiles - name("full_count")))
        full = Part(name("full_count"), (assign("tile", STEP),))
        return full, Part(name("partial_count"), (assign("tile", name("full_count") + STEP),))

    # -- slices -------------------------------------------------------------------------------------------------------

    def _sliced(self, full: Part | None, partial: Part | None) -> tuple[Visits | None, Visits | None]:
        """The loops over all of `full` and `partial`, or over elements lo .. hi - 1 of one after the other."""
        if not self.split:
            whole = [None if part is None else Visits("step", (part.count,), part.find) for part in (full, partial)]
            return whole[0], whole[1]
        lo, hi, count, splits, split = (name(n) for n in ("lo", "hi", "count", "splits", "split"))
        counts = [part.count for part in (full, partial) if part is not None]
        all_ = sum(counts[1:], start=counts[0]) if counts else value_of(0)
        self.head.append(
            assign("count", all_, reason="this program's share of those tiles, the full ones first: lo .. hi - 1")
        )
        if self.split == "split":
            self.head.append(assign("lo", count // splits * split + call("tl.minimum", split, count % splits)))
            more = split.less(count % splits)
            self.head.append(assign("hi", lo + count // splits + more.to("int32")))
        else:
            start = name("start")
            self.head.append(assign("lo", call("tl.maximum", name("begin") - start, 0)))
            self.head.append(assign("hi", call("tl.minimum", name("end") - start, count)))
        found: list[Visits | None] = [None, None]
        bounds: tuple[Value, ...]
        if full is not None:
            bounds = tuple(call("tl.minimum", end, full.count) for end in (lo, hi))
            found[0] = Visits("step", bounds, full.find)
        if partial is not None:
            bounds = (lo, hi)
            if full is not None:
                bounds = tuple(call("tl.maximum", end - full.count, 0) for end in (lo, hi))
            found[1] = Visits("step", bounds, partial.find)
        return found[0], found[1]


def _integer(text: str) -> Any:
    return sympy.Symbol(text, integer=True)


def _simple(program: WalkProgram) -> Mapping[str, str]:
    """The names of a program with one interval of live tiles, masked only in front and behind; else none."""
    lines = {symbol.name for symbol, _ in program.lines}
    numbered = re.compile(
        r"(live\d|hole_?\d*_(\d|start|end)|hole[3-9]|hole1_first|hole\d\d|hole_stop|full\d|partial[3-9])"
    )
    if any(numbered.match(line) for line in lines):
        return {}
    own = dict(_SIMPLE)
    if len(program.full) == 1 and str(program.full[0].first) == "hole1_stop":
        own["hole1_stop"] = "full_first"
    return own

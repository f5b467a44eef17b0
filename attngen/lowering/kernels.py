"""What goes into the holes of the kernel skeletons: for each kernel, its sides, tensors, loops and printed statements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from attngen.expression import B, H, I, J, S, Uniform
from attngen.lowering.printer import AND, COMPARE, Axes, Place, Printer
from attngen.lowering.width import needs_64_bits

Segments = tuple[tuple[Any, Any], ...]  # (first, count) in tiles
EVERYTHING: Axes = frozenset({"b", "h", "i", "j", "walk"})
LOG2E, SCALE, SCALE2 = sympy.Symbol("LOG2E", real=True), sympy.Symbol("scale"), sympy.Symbol("scale2", real=True)


@dataclass(frozen=True)
class Side:
    """Names of what belongs to the query rows or to the keys of a tile. `position`: the line that makes original
    positions from row numbers, None where they are the same; `safe`: the line that makes positions that exist, for loads."""

    noun: str
    tile: str
    block: str
    length: str
    index: str
    lane: str
    stored: str
    position: str | None
    safe: str

    @property
    def axis(self) -> str:
        return "i" if self.noun == "query" else "j"


QUERY = Side(
    noun="query",
    tile="query_tile",
    block="BLOCK_M",
    length="n_q",
    index="row",
    lane="lane_m",
    stored="row_in",
    position="i = row + q_offset",
    safe="i_safe = tl.minimum(row, n_q - 1) + q_offset",
)
KEY = Side(
    noun="key",
    tile="key_tile",
    block="BLOCK_N",
    length="n_k",
    index="j",
    lane="lane_n",
    stored="key_in",
    position=None,
    safe="j_safe = tl.minimum(j, n_k - 1)",
)


@dataclass(frozen=True)
class Chunk:
    """A power-of-two slice of a head dim. `limit`: the head dim where the slice reaches beyond it, else None."""

    index: int
    start: int
    width: int
    limit: int | None


def chunks(head_dim: int) -> tuple[Chunk, ...]:
    """192 = 128 + 64, 80 = 64 + 16; a rest below 16 is padded to 16, the least a matrix product takes."""
    out: list[Chunk] = []
    start = 0
    while start < head_dim:
        width = max(16, 1 << ((head_dim - start).bit_length() - 1))
        out.append(Chunk(len(out), start, width, head_dim if start + width > head_dim else None))
        start += width
    return tuple(out)


@dataclass(frozen=True)
class View:
    """A tensor [B, heads, n, d] as the kernel sees it. `head`: the variable with its head number."""

    name: str
    chunks: tuple[Chunk, ...]
    columns: str
    head: str
    strided: bool


@dataclass(frozen=True)
class Step:
    """One of the two loops: its range, the statements that find the tile, and what a step computes there."""

    partial: bool
    comment: str
    variable: str
    range: str
    tile: tuple[str, ...]
    lines: tuple[str, ...]
    logits: str
    valid: str
    keep: str
    slope: str
    bin: str
    uses_position: bool
    uses_safe: bool


@dataclass(frozen=True)
class Sides:
    """Which side is resident in a kernel and which is walked, and whether a program serves a whole GQA group."""

    resident: Side
    walked: Side
    grouped: bool


QUERIES_WALK_KEYS = Sides(QUERY, KEY, False)
SIDES = {
    "forward": QUERIES_WALK_KEYS,
    "delta": QUERIES_WALK_KEYS,
    "dq": QUERIES_WALK_KEYS,
    "dkv": Sides(KEY, QUERY, True),
}


@dataclass(frozen=True)
class Loop:
    """A loop over heads: its comment, the argument of range, and the lines that find b and h from g."""

    comment: str
    range: str
    lines: tuple[str, ...]


def decode(sides: Sides, loop_b: bool, loop_h: bool) -> tuple[tuple[str, ...], Loop | None]:
    """Lines that find batch and head from the program's number, and the loop over those that one program owns."""
    kv_head = "kv_head = h // group"
    if sides.grouped:
        return (
            "kv_heads = heads // group",
            "kv_head = program // tiles % kv_heads",
            "b = program // tiles // kv_heads",
        ), None
    if not (loop_b or loop_h):
        return ("h = program // tiles % heads", "b = program // tiles // heads", kv_head), None
    if not loop_b:
        return ("b = program // tiles",), Loop(
            "the heads, which share the result", "heads", ("h = tl.full([], g, tl.int32)", kv_head)
        )
    if not loop_h:
        lines = ("h = program // tiles", kv_head)
        return lines, Loop("the batch, which shares the result", "batch", ("b = tl.full([], g, tl.int32)",))
    both = ("pair = tl.full([], g, tl.int32)", "b = pair // heads", "h = pair % heads", kv_head)
    return (), Loop("batch and heads, which share the result", "batch * heads", both)


class Holes:
    """Prints a spec's expressions for one kernel. After `fill`, `program` and `head` hold what stands in front of the
    loops and `steps` the loops themselves."""

    def __init__(self, spec: Any, facts: Any, sides: Sides, *, offset_tensor: bool, names: Mapping[str, str]) -> None:
        self.spec, self.facts, self.sides, self.names = spec, facts, sides, names
        own = sides.resident.axis
        known = frozenset({"b", own}) if sides.grouped else frozenset({"b", "h", own})
        self.program, self.head = Place(known), Place(known | {"h", "walk"})
        symbols = {p.sym: names[n] for n, p in spec.params.items()}
        trusted = {B, H, J} if offset_tensor else {B, H, I, J}  # with offsets on the device nobody has checked i
        self.printer = Printer([self.program, self.head], own, symbols, trusted, names)
        walk = facts.program_keys if sides.walked is KEY else facts.program_queries
        printed = [*spec.expressions.args, *(line for _, line in walk.lines)]
        self.printer.wide = needs_64_bits(printed, frozenset(p.sym for p in spec.params.values()))
        self.form = "general"
        rest = sympy.Add(*[term for term in sympy.Add.make_args(spec.score) if term != S])
        if spec.score == S and (spec.scale is None or spec.scale > 0):
            self.form = "folded"
        elif spec.score == S + rest and S not in rest.free_symbols:
            self.form = "additive"
        terms = sympy.Add.make_args(rest if self.form == "additive" else spec.score)
        scaled = sympy.Add(*[LOG2E * term for term in terms if term != 0])
        self.logits = S * SCALE2 + scaled if self.form == "additive" else scaled
        # With closed-form intervals only the edges are partial: a few tiles, for which a pipeline's prologue costs more
        # registers than it hides.
        self.few_partial = False
        self.tables: list[str] = []  # the walk's per-tile summaries that this kernel reads
        self.boost = ""  # what a weight that survives dropout is multiplied by
        self.steps: tuple[Step, ...] = ()

    def fill(self, slope: Any = 1, site: Any = None) -> None:
        """Print the walk and the two loops. `slope`: what dS is multiplied by. `site`: a captured load whose place in
        the tensor a step needs."""
        slope, self.site = sympy.sympify(slope), site
        self.printer.share(self.spec.mask, self.logits, slope)
        full, partial = self._walk()
        self.few_partial = bool(full) and not self.tables
        steps = [self._step(full, False, slope), self._step(partial, True, slope)]
        self.steps = tuple(step for step in steps if step is not None)

    def _walk(self) -> tuple[Segments, Segments]:
        """The scalar program that finds the walked tiles, as statements in front of the loops."""
        from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST

        resident, walked = self.sides.resident, self.sides.walked
        program = self.facts.program_keys if walked is KEY else self.facts.program_queries
        integer = lambda name: sympy.Symbol(name, integer=True)  # noqa: E731
        begin = sympy.Integer(0) if walked is KEY else integer("q_offset")
        inputs = {
            FIRST: integer("first"),
            LAST: integer("last"),
            BEGIN: begin,
            END: begin + integer(walked.length),
            BLOCK: integer(walked.block),
        }
        start, shift = f"{resident.tile} * {resident.block}", " + q_offset" if resident is QUERY else ""
        lines = self.head.lines
        self.printer.placed |= {inputs[s]: frozenset({"walk"}) for s in (FIRST, LAST)}
        if FIRST in program.inputs:
            lines.append(f"first = {start}{shift}")
        if LAST in program.inputs:
            lines.append(f"last = tl.minimum({start} + {resident.block}, {resident.length}) - 1{shift}")
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

    def _step(self, segments: Segments, partial: bool, slope: Any) -> Step | None:
        if not segments:
            return None
        variable, bounds, tile = self._loop("partial" if partial else "full", segments)
        walked = self.sides.walked
        child = self.printer.inside(EVERYTHING, exists=None if partial else walked.axis)
        valid = ""
        if partial:
            inside = child.vector("inside", walked.axis)
            valid = inside
            if self.spec.mask != sympy.true:
                valid = "valid"
                child.places[-1].lines.append(f"valid = {child.operand(self.spec.mask, AND)} & {inside}")
        logits = "" if self.form == "folded" else child.operand(self.logits, COMPARE)
        if logits and S not in self.logits.free_symbols:
            logits += " + tl.zeros_like(s)"
        keep = ""
        if self.spec.dropout is not None:
            self.boost = child.operand(1 / (1 - self.spec.dropout))
            seed = sympy.Symbol("seed", integer=True)
            keep = "keep"
            condition = child.operand(
                sympy.Ge(Uniform(seed, B, H, I, J) - self.spec.dropout, 0, evaluate=False), COMPARE
            )
            child.places[-1].lines.append(f"keep = {condition}")
        factor = "" if slope == 1 else child.operand(slope)
        place = child.flat(self.site.load, self.site.dims) if self.site is not None and self.site.dims else ""
        self.printer.used |= child.used
        noun, kind_ = walked.noun, "partial" if partial else "full"
        says = "only some pairs attend" if self.spec.mask != sympy.true else "it reaches past the end"
        return Step(
            partial=partial,
            comment=f"{kind_} {noun} tiles: {says if partial else 'every pair attends, so no mask'}",
            variable=variable,
            range=f"tl.range({bounds}, num_stages=1)" if partial and self.few_partial else f"range({bounds})",
            tile=tile,
            lines=tuple(child.places[-1].lines),
            logits=logits,
            valid=valid,
            keep=keep,
            slope=factor,
            bin=place,
            uses_position=walked.axis in child.used,
            uses_safe=f"{walked.axis}_safe" in child.used,
        )

    def _count(self, name: str, expr: Any) -> Any:
        """A symbol for a tile count, defined in front of the loops."""
        symbol = sympy.Symbol(name, integer=True)
        self.printer.define(symbol, expr)
        return symbol

    def _loop(self, noun: str, segments: Segments) -> tuple[str, str, tuple[str, ...]]:
        """Loop variable, arguments of range, and the statements that give `tile`. Several segments are one loop."""
        text = lambda e: self.printer.value(e).text  # noqa: E731
        if len(segments) == 1:
            first, count = segments[0]
            return "tile", f"{text(first)}, {text(first)} + {text(count)}" if first != 0 else text(count), ()
        first, done = segments[0]
        lines = [f"tile = {text(first)} + step" if first != 0 else "tile = step"]
        for number, (first, count) in enumerate(segments[1:], 2):
            skip = self._count(f"{noun}_shift{number}", first - done)
            lines.append(f"tile = tl.where(step < {text(done)}, tile, {text(skip)} + step)")
            done = self._count(f"{noun}_count{number}", done + count)
        return "step", text(done), tuple(lines)

"""The varying part of one kernel: which tiles its loops visit, and what the spec says about a pair, as statements.

The outlines in `templates/` hold the rest. What they read of these statements is declared here: what neither they nor another
statement reads is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from attngen import debug
from attngen.analysis import WEIGHT
from attngen.language.expression import B, H, I, J, Load, S, Sigmoid, Uniform
from attngen.lowering import passes
from attngen.lowering.axes import Roles
from attngen.lowering.gradients import Gradient
from attngen.lowering.printer import Printer, chain
from attngen.lowering.signature import loaded_in_tiles
from attngen.lowering.statements import (
    AND,
    TILE,
    XOR,
    Assign,
    Call,
    Loop,
    Name,
    Number,
    Statements,
    Value,
    arange,
    assign,
    call,
    lines,
    name,
    unhoisted,
)
from attngen.lowering.visits import TileWalk, Visits
from attngen.lowering.width import needs_64_bits

LOG2E, SCALE = sympy.Symbol("LOG2E", real=True), sympy.Symbol("scale", real=True)

# What each outline reads of the statements, apart from what a step computes.
_READS = {
    "forward": ("row", "row_in", "h", "b", "lo", "hi", "count", "output", "split"),
    "merge": ("row", "row_in", "h", "b", "first_slot", "last_slot"),
    "delta": ("row", "row_in", "h", "b"),
    "delta_of_out": ("row", "row_in", "h", "b"),
    "excess": ("row", "row_in", "h", "b"),
    "dq": ("row", "row_in", "h", "b"),
    "dkv": ("j", "key_in", "kv_head", "b", "h", "part"),
    "capture": ("row", "row_in", "h", "b"),
    "capture by keys": ("j", "key_in", "h", "b"),
}
_STEP_READS = ("inside", "page", "tile", "valid", "keep")

# The places of a kernel's statements, outermost first, and which each lies in. A step's pairs come behind its tile.
DECODE, OWNER, PROGRAM, GROUP, HEAD, FULL, FULL_PAIRS, PARTIAL, PARTIAL_PAIRS, TAIL = range(10)
NESTED = {
    OWNER: DECODE,
    PROGRAM: OWNER,
    GROUP: PROGRAM,
    HEAD: GROUP,
    FULL: HEAD,
    FULL_PAIRS: FULL,
    PARTIAL: HEAD,
    PARTIAL_PAIRS: PARTIAL,
    TAIL: PROGRAM,
}
_PLACES = {"decode": DECODE, "owner": OWNER, "program": PROGRAM, "group": GROUP, "head": HEAD, "tail": TAIL}


@dataclass(frozen=True)
class Step:
    """One of the two loops. tile: the statements that find a tile and its rows. pairs: what a step computes for its pairs.
    steep: whether finite logits may have an infinite slope.

    Items are what the outline uses of `pairs`: "valid" (which pairs attend), "x" (the logits), "keep" (which survive dropout),
    "keep_scale" (what their weight is multiplied by), "slope" (what dS is multiplied by); and of each gradient of a captured tensor
    "slope_NAME" (the same for it), "bin_NAME" (an element's place).
    """

    partial: bool
    comment: str
    variable: str
    range: Value
    tile: Statements
    pairs: Statements
    steep: bool

    def __getitem__(self, key: str) -> Value | None:
        found = next((s for s in self.pairs if s.target.name == key), None)
        return None if found is None else found.value if found.inline else found.target


@dataclass(frozen=True)
class Body:
    """The statements of a kernel, by place. owner: the loop around all outputs of a program, if it computes several. heads: the
    loop over the query heads that share a key head. rows: the axis along the rows of a tile. form, natural: of the logits, see
    `Facts.form` and `Facts.natural`. wide: whether numbers of walked tiles have 64 bits.
    """

    places: tuple[Statements, ...]
    owner: Loop | None
    heads: Loop | None
    steps: tuple[Step, ...]
    rows: str
    form: str
    natural: bool
    wide: bool

    def __getitem__(self, place: str) -> list[str]:
        """The text of a place: "decode", "owner", "program", "group", "head" or "tail"."""
        return self.lines(self.places[_PLACES[place]])

    def lines(self, statements: Statements) -> list[str]:
        """The text of some of its statements."""
        return lines(statements, self.rows)

    @property
    def sink(self) -> Value | None:
        """The logit of a key with value 0, or None."""
        return next((s.value for s in self.places[TAIL] if s.inline), None)

    @property
    def reads(self) -> frozenset[str]:
        """Every variable that the statements and loops read."""
        loops = [loop.range.reads for loop in (self.owner, self.heads, *self.steps) if loop is not None]
        return frozenset().union(*loops, *(s.value.reads for place in self.places for s in place))

    @property
    def helpers(self) -> list[str]:
        """The functions of `templates/helpers` that it calls."""
        values = (value for place in self.places for s in place for value in s.value.walk())
        called = {value.function for value in values if isinstance(value, Call) and value.function}
        return sorted({"mix" if helper == "uniform" else helper for helper in called if "." not in helper})


@dataclass(frozen=True)
class Lowering:
    """Makes the body of one kernel. See `render` for what it is made from.

    blocks: rows and keys of a tile. names: what the kernel calls captured tensors, params and tables. one_loop,
    pipeline_edges, disable_licm: as in `Tile` (`warp_specialize`). split: "split" or "stream" where programs share outputs. guarded:
    whether the outline goes through the programs of an earlier launch.
    """

    spec: Any
    facts: Any
    kernel: str
    roles: Roles
    names: Mapping[str, str]
    blocks: tuple[int, int]
    gradients: tuple[Gradient, ...] = ()
    offset_tensor: bool = False
    one_loop: bool = False
    pipeline_edges: bool = False
    disable_licm: bool = False
    split: str = ""
    guarded: bool = False

    def body(self, decode: Statements, owner: Loop | None, reads: Iterable[str]) -> Body:
        """The kernel's statements after all passes."""
        walk = TileWalk(
            self.spec, self.facts, self.roles, self._printer(), self.names, self.blocks, self.one_loop, self.split
        )
        visits = walk.loops() if self.walks else (None, None)
        only_edges = visits[0] is not None and not walk.tables and self.spec.lists is None
        ahead = (True, not only_edges or self.pipeline_edges)
        ranges = [self._range(found, pipelined) for found, pipelined in zip(visits, ahead, strict=True)]
        loops = [loop for loop in (owner, self._heads, *ranges) if loop is not None]
        wanted = {*_READS[self._row], *_STEP_READS, *reads, *self._walked_reads}
        for loop in loops:
            wanted |= loop.range.reads if isinstance(loop, Loop) else loop.reads
        before = self._places(decode, owner, walk, visits)
        places = passed(before, wanted, self.names, f"{self.kernel}, rows along {self.roles.resident.axis}")
        steps = [
            Step(
                partial,
                self._comment(partial),
                found.variable,
                bounds,
                tile=places[PARTIAL if partial else FULL],
                pairs=places[PARTIAL_PAIRS if partial else FULL_PAIRS],
                steep=_steep(self._slope),
            )
            for partial, found, bounds in zip((False, True), visits, ranges, strict=True)
            if found is not None and bounds is not None
        ]
        rows, facts = self.roles.resident.axis, self.facts
        wide = self._printer().wide
        return Body(tuple(places), owner, self._heads, tuple(steps), rows, facts.form, facts.natural, wide)

    def _places(
        self, decode: Statements, owner: Loop | None, walk: TileWalk, visits: tuple[Visits | None, Visits | None]
    ) -> list[Statements]:
        """What stands where before the passes."""
        places: list[Statements] = [()] * len(range(TAIL + 1))
        tiles, program = assign("tiles", self.roles.resident.tiles), assign("program", call("tl.program_id", 0))
        places[DECODE] = (tiles, *(() if self.guarded else (program,)), *decode)
        places[OWNER] = owner.body if owner is not None else ()
        places[PROGRAM] = self._program()
        places[GROUP] = self._heads.body if self._heads is not None else ()
        places[HEAD] = tuple(walk.head)
        for partial, found in enumerate(visits):
            if found is not None:
                places[PARTIAL if partial else FULL] = (*found.find, *self._tile(walk, bool(partial)))
                places[PARTIAL_PAIRS if partial else FULL_PAIRS] = self._pairs(bool(partial))
        if self.spec.sink is not None and self._meets_sink:
            places[TAIL] = (_inline("sink", self._printer().value(self.spec.sink)),)
        return places

    @property
    def _heads(self) -> Loop | None:
        if not self.roles.grouped:
            return None
        h = assign("h", name("kv_head") * name("group") + name("g"))
        # A tile of captured data leaves few registers.
        heads = unhoisted(name("group")) if loaded_in_tiles(self.spec) else self._loop(name("group"))
        return Loop("g", heads, (h,), "every query head that reads this key head")

    @property
    def walks(self) -> bool:
        """Whether the kernel visits tiles."""
        return self.kernel not in ("merge", "delta", "delta_of_out")

    @property
    def _ends_add_nothing(self) -> bool:
        """Whether walked rows past the end may take part where the mask lets them, since they are loaded as zeros: dV += P^T 0,
        dK += dS^T 0. Their P is exp(0) if the logits are those of q and k alone. (After 0 * inf the guarded kernel looks.)
        """
        return self.kernel == "dkv" and not self.guarded and self.facts.form == "folded"

    @property
    def _meets_sink(self) -> bool:
        """Whether this kernel has the whole of a row's softmax."""
        return self.kernel in ("merge", "excess") or (self.kernel == "forward" and self.split != "split")

    @property
    def _walked_reads(self) -> tuple[str, ...]:
        """With queries walked, an outline loads lse and delta by their rows."""
        return (self.roles.walked.index,) if self.roles.walked.shift else ()

    @property
    def _row(self) -> str:
        return "capture by keys" if self.kernel == "capture" and self.roles.walked.noun == "query" else self.kernel

    # -- what stands where --------------------------------------------------------------------------------------------

    def _program(self) -> Statements:
        resident, walked = self.roles.resident, self.roles.walked
        out: list[Assign] = []
        if self.offset_tensor:
            offset = call("tl.load", name("q_offsets", kind="pointer") + name("b")).to("int32")
            out.append(assign("q_offset", offset))
        out += resident.rows
        out += [resident.position] if resident.position is not None else []
        out.append(resident.safe)
        if self.walks:
            out.append(assign(walked.lane, arange(walked.block), walked.axis))
        if self.walks and self.spec.page_size is not None:
            row = name("page_table", kind="pointer") + name("b").to("int64") * name("page_table_stride_b")
            out.append(assign("page_row", row))
        return tuple(out)

    def _tile(self, walk: TileWalk, partial: bool) -> Statements:
        walked = self.roles.walked
        position = (walked.position,) if walked.position is not None else ()
        return (*walk.locate(partial), *position, walked.safe)

    def _pairs(self, partial: bool) -> Statements:
        """What the spec says about a tile's pairs: which attend, their logits, and what the gradient needs."""
        spec, walked = self.spec, self.roles.walked
        printer = self._printer(exists=None if partial else walked.axis)
        out: list[Assign] = []
        if partial:
            inside = printer.spread(name("inside", walked.axis, "bool"))
            if spec.mask == sympy.true:
                out.append(_inline("valid", inside))
            elif self._ends_add_nothing:
                out.append(assign("valid", printer.operand(spec.mask)))
            else:
                out.append(
                    assign("valid", chain([("", printer.operand(spec.mask), AND), (" & ", inside, XOR)], AND, "bool"))
                )
        if self.facts.form != "folded":
            logits = printer.operand(self._logits)
            if S not in self._logits.free_symbols:
                logits = logits + call("tl.zeros_like", name("s", TILE))
            out.append(_inline("x", logits))
        if spec.dropout is not None and self.kernel != "excess":
            out.append(_inline("keep_scale", printer.operand(1 / (1 - spec.dropout))))
            kept = sympy.Ge(Uniform(spec.seed, B, H, I, J) - spec.dropout, 0, evaluate=False)
            out.append(assign("keep", printer.operand(kept)))
        slope = self._slope
        if slope != 1:
            out.append(_inline("slope", printer.operand(slope)))
        for gradient in self.gradients:
            site = gradient.site
            if site.slope != 1:
                out.append(_inline(f"slope_{gradient.own}", printer.operand(sympy.sympify(site.slope))))
            if gradient.bins:
                out.append(_inline(f"bin_{gradient.own}", printer.flat(site.load, site.dims)))
        return tuple(out)

    def _range(self, visits: Visits | None, pipelined: bool) -> Value | None:
        """With closed-form intervals only the edges are partial: a few tiles, for which a pipeline's prologue often costs more
        registers than it hides (`Tile.pipeline_edges`)."""
        if visits is None:
            return None
        if self.one_loop:
            return self._loop(*visits.bounds, warp_specialize="True")
        return self._loop(*visits.bounds, **({} if pipelined else {"num_stages": "1"}))

    def _loop(self, *bounds: Value, **options: str) -> Value:
        """A loop's range, with options of Triton's."""
        options |= {"disable_licm": "True"} if self.disable_licm else {}
        named = tuple((option, Number(value)) for option, value in options.items())
        return Call("tl.range" if named else "range", bounds, named=named)

    def _comment(self, partial: bool) -> str:
        noun = self.roles.walked.noun
        if self.one_loop:
            return f"all {noun} tiles, with the mask"
        if not partial:
            return f"full {noun} tiles: every pair attends, so no mask"
        says = "only some pairs attend" if self.spec.mask != sympy.true else "it reaches past the end"
        return f"partial {noun} tiles: {says}"

    # -- expressions --------------------------------------------------------------------------------------------------

    def _printer(self, exists: str | None = None) -> Printer:
        spec, roles = self.spec, self.roles
        along = {WEIGHT: frozenset(roles.walked.axis)}
        if roles.resident.packed:
            along[H] = frozenset(roles.resident.axis)
        params = frozenset(p.sym for p in spec.params.values())
        walk = self.facts.program_keys if roles.walked.noun == "key" else self.facts.program_queries
        printed = [*spec.expressions.args, *(line for _, line in walk.lines if spec.lists is None)]
        return Printer(
            rows=roles.resident.axis,
            symbols={p.sym: self.names[n] for n, p in spec.params.items()},
            names=self.names,
            # With offsets on the device nobody has checked i.
            trusted=frozenset({B, H, J} if self.offset_tensor else {B, H, I, J}),
            along=along,
            exists=exists,
            wide=needs_64_bits(printed, params),
        )

    @property
    def _logits(self) -> Any:
        """The logits in the kernel's unit, of s, which for the general form is scaled."""
        unit = sympy.Integer(1) if self.facts.natural else LOG2E
        return sympy.Add(
            *[
                unit * (SCALE * S if term == S and self.facts.form == "additive" else term)
                for term in self.facts.score_terms
            ]
        )

    @property
    def _slope(self) -> Any:
        """What dS is multiplied by for the gradients of q and k."""
        return sympy.sympify(self.facts.score_ds) if self.kernel in ("dq", "dkv") else sympy.Integer(1)


def passed(places: list[Statements], wanted: Iterable[str], names: Mapping[str, str], title: str) -> list[Statements]:
    """The passes, in order. With ATTNGEN_DEBUG=5 the statements after each.

    wanted: what the outline reads. names: what the kernel calls captured tensors, params and tables.
    """

    def shown(after: Any, places: list[Statements]) -> list[Statements]:
        if debug.level() >= 5:
            text = [line for statements in places for line in lines(statements, "i")]
            debug.say(5, f"statements of {title} after {after.__name__}", "\n    ".join(["", *text]))
        return places

    def is_taken(variable: str) -> bool:
        return variable in names.values() or bool(re.search(r"_(stride_\w+|size_\d+|table|row)$", variable))

    variables = passes.Variables()
    places = shown(passes.repeated, [passes.repeated(statements) for statements in places])
    places = shown(passes.short, [passes.short(statements) for statements in places])
    places = shown(passes.unnest, [passes.unnest(statements, variables) for statements in places])
    placed = passes.place(places, NESTED, frozenset({FULL, PARTIAL}), _LOOP_VARIABLES, PROGRAM)
    placed = shown(passes.place, placed)
    read = shown(passes.drop, passes.drop(placed, NESTED, wanted))
    return shown(passes.rename, passes.rename(read, NESTED, is_taken))


# Known only inside a step; the outline makes them.
_LOOP_VARIABLES = frozenset({"s", "step", "tile", "start"})


def _steep(slope: Any) -> bool:
    """Whether it may be infinite for finite logits and captures: false only for what is made of functions that never are."""
    if slope.is_Pow and slope.exp.is_Integer and slope.exp > 0:
        return _steep(slope.base)
    tame = (
        slope.is_Atom
        or slope.is_Add
        or slope.is_Mul
        or isinstance(slope, (Load, Sigmoid, sympy.tanh, sympy.sin, sympy.cos))
    )
    return not tame or any(_steep(arg) for arg in slope.args)


def _inline(target: str, value: Value) -> Assign:
    return Assign(Name(target, value.axes, value.kind), value, inline=True)

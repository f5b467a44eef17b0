"""`render_tables`: the kernel that makes the tables of a walk, one launch for all of them (`attngen.analysis.tables` says what each
holds, and does the same with torch).

A program has one tile. It computes the tile-axis part A of each table for the tile's rows, then goes through the walked positions
in chunks, computes their part C, and keeps what the tile's rows make of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy

from attngen.analysis import Table
from attngen.analysis.summaries import LIMIT, ROOM
from attngen.language.expression import B, H, I, J, kind
from attngen.lowering import signature
from attngen.lowering.axes import Roles, decode_tables, roles_of
from attngen.lowering.kernels import DECODE, FULL, PROGRAM, TAIL, Body, passed
from attngen.lowering.printer import Printer
from attngen.lowering.signature import Arg
from attngen.lowering.source import Grid, Source, environment, tidy
from attngen.lowering.statements import BLOCKS, Assign, Statements, arange, assign, call, lines, name
from attngen.lowering.width import needs_64_bits
from attngen.schedule import Tile

CHUNK = 1024  # walked positions of a step
WARPS = 4


@dataclass(frozen=True)
class Code:
    """What the outline needs of one table. number: what its variables end in. a, c: those with -A and C (or A and -C, where
    they shall be equal), which are compared; with no C just A. rows: whether `a` varies along the tile's rows. results: names of
    its values, the first of which is value `place` of all.
    """

    table: Table
    number: int
    place: int
    a: str
    c: str
    rows: bool
    results: tuple[str, ...]

    @property
    def sides(self) -> tuple[Any, Any]:
        """The expressions of a and c."""
        tile, walked = self.table.tile, self.table.walked
        if not self.c:
            return tile, None
        turned = self.table.kind == "match" and walked.could_extract_minus_sign()
        return (tile, -walked) if turned else (-tile, walked)


@dataclass(frozen=True)
class Outline:
    """See `render.Outline`. room: of a sum of real numbers. limit: of a value."""

    about: tuple[str, ...]
    args: tuple[Arg, ...]
    tile: Tile
    name: str = "tables"
    function: str = "tables"
    guarded: bool = False
    looks: bool = False
    walks: bool = False
    page_size: None = None
    precision: str = ""
    sums: tuple[tuple[str, ...], ...] = ((),)
    chunk: int = CHUNK
    room: float = ROOM
    limit: int = LIMIT


def render_tables(spec: Any, facts: Any, kernel: str, block: int, offset_tensor: bool) -> Source:
    """What makes the tables that `kernel` reads, of `block` queries or, for "dkv", keys each. See `render.render`."""
    of_keys = kernel == "dkv"
    walk = facts.walk_of(kernel)
    by_batch, by_head = walk.differ(offset_tensor)
    roles = roles_of(of_keys, False, packed=False, listed=False, by_query_head=False)
    names = signature.kernel_names([*spec.params, *spec.tensors], ())
    codes = _codes(walk.tables)
    walked, begin = roles.walked, "q_offset" if roles.walked.shift else ""
    reads = {"program", "inside", walked.index, walked.length, *(x for code in codes for x in (code.a, code.c) if x)}
    reads |= {begin} if begin else set()

    params = {p.sym: names[n] for n, p in spec.params.items()}
    printer = Printer(
        rows=roles.resident.axis,
        symbols=params,
        names=names,
        trusted=frozenset({B, H, J} if offset_tensor else {B, H, I, J}),
        wide=needs_64_bits([x for t in walk.tables for x in (t.tile, t.walked)], frozenset(params)),
    )
    places: list[Statements] = [()] * (TAIL + 1)
    program = (assign("tiles", roles.resident.tiles), assign("program", call("tl.program_id", 0)))
    places[DECODE] = (*program, *decode_tables(roles, by_batch, by_head))
    places[PROGRAM] = _tile(roles, codes, printer, offset_tensor)
    places[FULL] = _chunk(roles, codes, printer)
    places = passed(places, reads, names, f"tables of {roles.resident.noun} tiles")
    body = Body(tuple(places), None, None, (), roles.resident.axis, "", False, False)

    args = signature.arguments(
        "tables",
        spec,
        {*body.reads, *reads},
        names,
        aligned=True,
        offset_tensor=offset_tensor,
        restores=False,
        split="",
        tables=(),
        by_keys=of_keys,
        gradients=(),
    )
    about = (
        f"attngen {signature.TABLE['tables'].title}.",
        "",
        *(f"{', '.join(code.results)}: {str(code.table).partition(': ')[2]}" for code in codes),
        f"for each tile of {block} {'keys' if of_keys else 'query rows'}",
    )
    text = (
        environment()
        .get_template("tables.jinja")
        .render(
            kernel=Outline(about, args, Tile(block_m=block, block_n=block)),
            R=roles.resident,
            W=walked,
            tensors={},
            body=body,
            chunk=lines(places[FULL], roles.resident.axis, {**BLOCKS, walked.axis: "CHUNK"}),
            tables=codes,
            begin=begin,
        )
    )
    grid = Grid(roles.resident.length, block, "q" if by_head else "one", by_batch)
    return Source("tables", tidy(text), args, grid, WARPS, 1)


def _codes(tables: Iterable[Table]) -> list[Code]:
    codes: list[Code] = []
    for number, table in enumerate(tables, 1):
        looks = table.kind in ("order", "match")
        rows = bool(table.tile.free_symbols & {I, J})
        place = sum(len(code.results) for code in codes)
        results = tuple(symbol.name for symbol in table.symbols)
        codes.append(Code(table, number, place, f"a{number}", f"c{number}" if looks else "", rows, results))
    return codes


def _tile(roles: Roles, codes: Iterable[Code], printer: Printer, offset_tensor: bool) -> Statements:
    """The tile's rows, of which those past the end are copies of the last, and a of each table."""
    resident = roles.resident
    out: list[Assign] = []
    if offset_tensor:
        out.append(assign("q_offset", call("tl.load", name("q_offsets", kind="pointer") + name("b")).to("int32")))
    row = resident.rows[0].value
    out.append(assign(resident.index, call("tl.minimum", row, name(resident.length) - 1), resident.axis))
    out += [] if resident.position is None else [resident.position]
    there = replace(printer, exists=resident.axis, _known={})
    for code in codes:
        expr = sympy.sympify(code.sides[0])
        value, axes = there.value(expr), resident.axis
        if not code.rows:  # a number, made one of the kernel's
            dtype = "tl.float32" if kind(expr) == "float" else "tl.int64"
            value, axes = call("tl.full", name("[]"), value, name(dtype), kind=kind(expr)), ""
        out.append(assign(code.a, value, axes))
    return tuple(out)


def _chunk(roles: Roles, codes: Iterable[Code], printer: Printer) -> Statements:
    """Walked positions from `start` on, and c of each table."""
    walked = roles.walked
    index = name(walked.index, walked.axis)
    return (
        assign(walked.index, name("start") + arange("CHUNK"), walked.axis),
        *(() if walked.position is None else (walked.position,)),
        walked.safe,
        assign("inside", index.less(name(walked.length)), walked.axis),
        *(assign(code.c, printer.value(code.sides[1]), walked.axis) for code in codes if code.c),
    )

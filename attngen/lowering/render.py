"""`render`: one kernel of a spec, under a schedule, as a `Source`."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from attngen.language.expression import B, H
from attngen.language.lists import RowLists
from attngen.lowering.captures import Site
from attngen.lowering.kernels import Holes
from attngen.lowering.printer import PRODUCT
from attngen.lowering.sides import (
    HEADS,
    KEY,
    KV_HEAD,
    ONE_KEY,
    PACKED,
    QUERY,
    Loop,
    Sides,
    View,
    chunks,
    decode,
    decode_longest_first,
    sides_of,
)
from attngen.lowering.source import Arg, Grid, Source, environment, tidy
from attngen.schedule import KERNELS, Tile

TENSORS = {
    "forward": ("q", "k", "v", "out"),
    "delta": ("out", "do"),
    "dq": ("q", "do", "k", "v", "dq"),
    "dkv": ("k", "v", "q", "do", "dk", "dv"),
    "capture": ("q", "do", "k", "v"),
    "merge": ("out",),
}
_SHAPES = {
    "q": ("B", "heads", "n_q", "D"),
    "k": ("B", "heads // group", "n_k", "D"),
    "v": ("B", "heads // group", "n_k", "Dv"),
    "out": ("B", "heads", "n_q", "Dv"),
}
_LIKE = {"do": "out", "dq": "q", "dk": "k", "dv": "v"}
_ROWS = {  # float32 [B, heads, n_q], contiguous
    "forward": ("lse",),
    "delta": ("dlse", "delta"),
    "dq": ("lse", "delta"),
    "dkv": ("lse", "delta"),
    "capture": ("lse", "delta"),
    "merge": ("lse",),
}
ROWS_OF_LISTS = 16  # rows of a tile that serves one query or key: the least a matrix product takes
LONGEST = 10  # characters of a captured tensor's or param's name that the kernel keeps, for lines that fit

_GRADS = {
    "total": "[B, heads, tiles]",
    "rows": "[B, heads, n_q]",
    "keys": "[B, heads, n_k]",
    "pairs": "[B or 1, heads or 1, n_q, n_k]",
    "bins": "[B, heads, tiles, bins]",
    "atomic": "[B, heads, bins]",
    "edges": "[B, list heads, listed keys]",
}
_STATES = (
    Arg("states", "tensor", "states", "*fp32", comment="[slots, BLOCK_M, Dv]: unnormalised sums"),
    Arg("maxima", "tensor", "maxima", "*fp32", comment="[slots, 2, BLOCK_M]: m and l"),
)
_TITLES = {
    "forward": "forward: a query tile walks its keys with the online softmax",
    "delta": "backward, first step: delta = rowsum(dO * O) - dlse",
    "dq": "backward: a query tile walks its keys and sums dQ",
    "dkv": "backward: a key tile walks its queries and sums dK and dV",
    "capture": "backward: the gradient of a captured tensor",
    "merge": "forward, second step: merge the partial softmax states of each output",
}


def render(
    spec: Any,
    facts: Any,
    kernel: str,
    *,
    head_dim: int,
    head_dim_v: int,
    dtype: Any,
    schedule: Any,
    aligned: bool = True,
    offset_tensor: bool = False,
    site: Site | None = None,
) -> Source:
    """The source of `kernel`: "forward" and for a split one "merge", "delta", "dq", "dkv", or "capture" for one `site` (see
    `captures`).

    schedule: a complete one. aligned: the last dimension of every [B, heads, n, d] tensor has stride 1 and all other
    strides are multiples of 16, so rows are loaded in whole vectors; False takes any strides. offset_tensor: q_offset is
    an int32 tensor [B]. The text does not depend on lengths, batch, head counts, params or the scale.
    """
    by_keys = kernel == "dkv" or (site is not None and site.by_keys)
    tile = schedule.tile("dkv" if by_keys else {"delta": "dq", "capture": "dq", "merge": "forward"}.get(kernel, kernel))
    by_rows = isinstance(spec.lists, RowLists) and kernel != "delta"
    if by_rows:  # one query, or key, a tile: its rows are the heads
        tile = replace(tile, **{"block_n" if by_keys else "block_m": ROWS_OF_LISTS})
    forward = kernel in ("forward", "merge")
    sides = sides_of(
        by_keys,
        kernel == "dkv",
        packed=(forward and bool(schedule.pack)) or (by_rows and (site is None or site.kind == "edges")),
        listed=by_rows,
        by_query_head=by_rows and spec.lists.by_query_head,
    )
    sliced = "" if not forward or schedule.split in (None, 1) else "stream" if schedule.split == "stream" else "split"
    tensors = TENSORS[kernel] if kernel != "capture" or not by_keys else ("k", "v", "q", "do")
    owned = (
        [not site.uses(symbol) for symbol in (B, H)]
        if site is not None and site.kind == "pairs" and not by_rows
        else [False, False]
    )
    lines, owner = _programs(kernel, sides, sliced, owned, tile)
    described = tile.tma and aligned and not by_rows and spec.page_size is None and kernel in ("forward", "dq", "dkv")
    reads_keys = "k" in tensors
    walk = facts.walk_keys if sides.walked is KEY else facts.walk_queries
    tables = [symbol.name for table in walk.tables for symbol in table.symbols]
    own_names = () if spec.lists is None else spec.lists.names
    names = _safe_names([*spec.params, *(n for n in spec.tensors if n not in (*own_names, "page_table")), *tables])
    holes = Holes(
        spec,
        facts,
        sides,
        blocks=(tile.block_m, tile.block_n),
        offset_tensor=offset_tensor,
        names=names,
        one_loop=described and tile.warp_specialize,
        sliced=sliced if kernel == "forward" else "",
    )
    if kernel not in ("delta", "merge"):
        slope = 1 if kernel == "forward" else facts.score_ds if site is None else site.slope
        holes.fill(slope, site if site is not None and site.kind in ("bins", "atomic") else None)
    d, dv = chunks(head_dim), chunks(head_dim_v)
    columns = "d" if d == dv else "e"
    views = {
        t: View(
            t,
            dv if _shape(t)[3] == "Dv" else d,
            columns if _shape(t)[3] == "Dv" else "d",
            _head(t),
            not aligned,
            packed=sides.resident.packed and _head(t) == "h",
            paged=spec.page_size is not None and _head(t) == "kv_head",
            described=described
            and t in ("q", "do", "k", "v")
            and not (sides.resident.packed and _head(t) == "h")
            and (tile.warp_specialize or (_shape(t)[2] == "n_q") != (sides.resident is QUERY)),
            side=QUERY if _shape(t)[2] == "n_q" else KEY,
        )
        for t in tensors
    }
    sink = ""
    if spec.sink is not None and (kernel == "merge" or (kernel == "forward" and sliced != "split")):
        sink = holes.printer.value(spec.sink).at(PRODUCT)
    args = _arguments(spec, holes, kernel, tensors, names, aligned, offset_tensor, site, lines, owner, sliced)
    text = (
        environment()
        .get_template(f"{kernel}.jinja")
        .render(
            **views,
            about=_about(spec, kernel, head_dim, head_dim_v, dtype, tile),
            name=kernel,
            args=args,
            block_m=tile.block_m,
            block_n=tile.block_n,
            precision=schedule.precision if str(dtype) == "torch.float32" else "",
            helpers=sorted(holes.printer.helpers),
            R=sides.resident,
            W=sides.walked,
            grouped=sides.grouped,
            load_offset=offset_tensor and any(arg.role == "offset" for arg in args),
            uses_resident_position=sides.resident.axis in holes.printer.used,
            uses_resident_safe=f"{sides.resident.axis}_safe" in holes.printer.used,
            dims={"d": head_dim, columns: head_dim_v},
            d_chunks=d,
            dv_chunks=dv,
            columns={view.columns: view.chunks for view in views.values()},
            score=holes.form,
            program=holes.program.lines,
            head=holes.head.lines,
            steps=holes.steps,
            sink=sink,
            resident_tensors=[views[t] for t in tensors[:2]],
            walked_tensors=[views[t] for t in tensors[2:4]],
            decode=[line for line in lines if reads_keys or line != KV_HEAD],
            walks=reads_keys,
            sliced=sliced,
            one_loop=holes.reader.one_loop,
            head_dim_v=head_dim_v,
            page_size=spec.page_size if reads_keys else None,
            listed=by_rows,
            list_head="h" if by_rows and spec.lists.by_query_head else "kv_head",
            owner=owner,
            site=site,
            site_bins=" * ".join(f"{names[site.tensor]}_size_{d}" for d in site.dims) if site is not None else "",
            boost=holes.boost,
        )
    )
    block = tile.block_n if by_keys else tile.block_m
    heads = "kv" if sides.grouped or sides.resident.packed else "one" if owned[1] else "q"
    kind = "single" if by_rows else "packed" if sides.resident.packed else "rows"
    kind = "heads" if by_rows and sides.resident.packed else kind
    grid = Grid(sides.resident.length, block, heads, not owned[0], kind, sliced if kernel == "forward" else "")
    if kernel in KERNELS and not sliced:
        grid = replace(grid, persistent=tile.persistent)
    # A merge holds two states of a tile at once, and reads each once: as many warps as keep them in registers.
    warps = max(4, min(16, block * head_dim_v // 1024)) if kernel == "merge" else tile.num_warps
    return Source(kernel, tidy(text), args, grid, _power_of_two(warps), tile.num_stages)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _programs(
    kernel: str, sides: Sides, sliced: str, owned: list[bool], tile: Tile
) -> tuple[tuple[str, ...], Loop | None]:
    """How a program finds what it computes, and the loop around all of it if it computes several outputs."""
    if kernel == "merge" and sliced == "stream":
        owners = ("first_slot = tl.load(owners + 2 * program)", "last_slot = tl.load(owners + 2 * program + 1)")
        return (*decode(sides, "program")[0], *owners), None
    if kernel in KERNELS and not sliced:
        number = "output" if tile.persistent else "program"
        lines = decode(sides, number)[0] if tile.order == "by_head" else decode_longest_first(sides, number)
        if not tile.persistent:
            return lines, None
        number = f"tiles * {'(heads // group)' if sides.grouped or sides.resident.packed else 'heads'} * batch"
        every = f"program, {number}, tl.num_programs(0)"
        return (), Loop("every so many outputs", "output", every, lines)
    if kernel == "merge" or not sliced:
        return decode(sides, "program", *owned)
    lines, _ = decode(sides, "output")
    if sliced == "split":
        return ("output = program // splits", "split = program % splits", *lines), None
    run = (
        "begin = tl.load(begins + program)",
        "end = tl.load(begins + program + 1)",
        "first_output = tl.load(firsts + program)",
        "last_output = tl.load(firsts + program + 1)",
    )
    outputs = Loop(
        "the outputs that this program has tiles of",
        "output",
        "first_output, last_output + 1",
        (*lines, "start = tl.load(starts + output)"),
    )
    return run, outputs


def _shape(tensor: str) -> tuple[str, ...]:
    return _SHAPES[_LIKE.get(tensor, tensor)]


def _dims(tensor: str, paged: bool) -> tuple[str, ...]:
    return ("pages", "heads // group", "PAGE_SIZE", _shape(tensor)[3]) if paged else _shape(tensor)


def _head(tensor: str) -> str:
    return "h" if _shape(tensor)[1] == "heads" else "kv_head"


def _arguments(
    spec: Any,
    holes: Holes,
    kernel: str,
    tensors: tuple[str, ...],
    names: dict[str, str],
    aligned: bool,
    offset_tensor: bool,
    site: Site | None,
    lines: tuple[str, ...],
    owner: Loop | None,
    sliced: str,
) -> tuple[Arg, ...]:
    out: list[Arg] = []
    if kernel == "forward" and sliced == "split":
        tensors = tensors[:-1]  # out is written by merge
    paged = {"k", "v"} if spec.page_size is not None else set()
    out += [Arg(t, "tensor", t, "*q", comment=f"[{', '.join(_dims(t, t in paged))}]") for t in tensors]
    rows = () if kernel == "forward" and sliced == "split" else _ROWS[kernel]
    out += [Arg(t, "tensor", t, "*fp32", comment="[B, heads, n_q]") for t in rows]
    if sliced:
        out += _STATES
        runs = {"forward": ("starts", "begins", "firsts"), "merge": ("owners",)}[kernel]
        out += [Arg(name, "tensor", name, "*i32") for name in (runs if sliced == "stream" else ())]
    if site is not None:
        out.append(Arg("grad", "tensor", "grad", "*fp32", comment=_GRADS[site.kind]))
    for t in tensors:
        for dim, axis in enumerate("bhn" if aligned else "bhnd"):
            out.append(Arg(f"{t}_stride_{axis}", "stride", t, "i32", dim, specialize=aligned))
    if site is not None and site.kind in ("pairs", "edges"):
        out += [Arg(f"grad_stride_{axis}", "stride", "grad", "i64", dim, False) for dim, axis in enumerate("bh")]
    lengths = ["heads", "n_q"]
    lengths += ["group"] if kernel != "delta" else []
    lengths += ["n_k"] if "k" in tensors else []
    decoded = (*lines, *((owner.range, *owner.lines) if owner is not None else ()))
    lengths += [name for name in ("batch", "together") if any(name in line for line in decoded)]
    lengths += ["splits"] if sliced == "split" else []
    lengths += ["pages"] if spec.page_size is not None and kernel != "merge" else []
    out += [Arg(length, "length", length, "i32", specialize=False) for length in lengths]
    if kernel == "delta":
        return tuple(out)
    if kernel != "merge":
        out.append(Arg("scale", "scale", "scale", "fp32", specialize=False))
    used = holes.printer.used
    if used & {"i", "i_safe", "q_offset"} or any(
        "q_offset" in line for line in (*holes.program.lines, *holes.head.lines)
    ):
        if offset_tensor:
            out.append(Arg("q_offsets", "offset", "q_offset", "*i32", comment="[B]"))
        else:
            out.append(Arg("q_offset", "offset", "q_offset", "i32", specialize=False))
    for name, param in spec.params.items():
        if names[name] in used:
            kind = "i32" if param.sym.is_integer else "fp32"
            out.append(Arg(names[name], "param", name, kind, specialize=False))
    listed = isinstance(spec.lists, RowLists)
    for name in holes.reader.lists:
        what = f"{name.removesuffix('_runs')} {'rows, 2' if listed else 'tiles, 3'}" if "runs" in name else "listed"
        out.append(Arg(name, "tensor", name, "*capture", comment=f"[B or 1, heads or 1, {what}]"))
        out += [Arg(f"{name}_stride_{axis}", "stride", name, "i64", dim, False) for dim, axis in enumerate("bh")]
    if spec.page_size is not None and kernel != "merge":
        out.append(Arg("page_table", "tensor", "page_table", "*capture", comment="[B, pages of a row]"))
        out.append(Arg("page_table_stride_b", "stride", "page_table", "i32", 0, False))
    for name in holes.reader.tables:
        out.append(Arg(f"{names[name]}_table", "table", name, "*i32", comment="[B or 1, heads or 1, tiles]"))
        out += [Arg(f"{names[name]}_stride_{axis}", "stride", name, "i32", dim, False) for dim, axis in enumerate("bh")]
    for name, tensor in spec.tensors.items():
        if name not in holes.printer.loaded:
            continue
        own = names[name]
        last = tensor.ndim - 1
        out.append(Arg(own, "tensor", name, "*capture"))
        out += [
            Arg(f"{own}_stride_{dim}", "stride", name, "i32", dim, specialize=dim == last) for dim in range(last + 1)
        ]
        for _, dim in sorted(b for b in holes.printer.bounded if b[0] == name):
            out.append(Arg(f"{own}_size_{dim}", "size", name, "i32", dim, specialize=False))
    return tuple(out)


def _about(spec: Any, kernel: str, head_dim: int, head_dim_v: int, dtype: Any, tile: Any) -> list[str]:
    return [
        f"attngen {_TITLES[kernel]}.",
        "",
        f"spec {spec.key[:16]}",
        *(f"    {line}" for line in _wrapped(str(spec).splitlines())),
        f"head dims {head_dim} and {head_dim_v}, {str(dtype).removeprefix('torch.')}",
        f"schedule block_m={tile.block_m}, block_n={tile.block_n}, num_warps={tile.num_warps}, num_stages={tile.num_stages}",
    ]


def _wrapped(lines: Iterable[str], width: int = 100) -> Iterable[str]:
    for line in lines:
        while len(line) > width:
            cut = line.rfind(" ", 0, width)
            cut = width if cut <= 0 else cut
            yield line[:cut]
            line = "    " + line[cut:].lstrip()
        yield line


@lru_cache(maxsize=1)
def _reserved() -> frozenset[str]:
    """Every name that a template gives to something: a captured tensor or a param of that name is renamed."""
    loader = environment().loader
    assert loader is not None
    words: set[str] = set()
    for template in environment().list_templates():
        text = loader.get_source(environment(), template)[0]
        text = re.sub(r"\{#.*?#\}|\{%.*?%\}", " ", text, flags=re.S)
        text = re.sub(r"\{\{(.*?)\}\}", lambda hole: " ".join(re.findall(r'"([^"]*)"', hole[1])), text, flags=re.S)
        words |= set(re.findall(r"[A-Za-z_]\w*", text))
    for side in (QUERY, KEY):
        words |= {side.tile, side.block, side.length, side.index, side.lane, side.stored}
    for side in (QUERY, KEY, PACKED, HEADS, ONE_KEY):
        words |= {word for line in side.rows for word in re.findall(r"[A-Za-z_]\w*", line)}
    words |= {
        "grad",
        "first",
        "last",
        "step",
        "tile",
        "valid",
        "inside",
        "scalar",
        "row",
        "key",
        "hash",
        "boost",
        "do",
        "e",
        "d",
    }
    return frozenset(words)


def _safe_names(names: Iterable[str]) -> dict[str, str]:
    """Kernel names of captured tensors and params: their own, unless the kernel uses that for something else."""
    out: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"(_(\d+|ok|x|at|index|head|rows|step|lanes|stride|size|tile)|_[bhijnd])+$", "", name)
        taken = (
            keyword.iskeyword(name)
            or name in _reserved()
            or stem in _reserved()
            or re.match(r"user_|(live|hole|full|partial)\d*_", name)
        )
        own = f"user_{name}" if taken else name
        if len(own) > LONGEST:
            own = f"{own[: LONGEST - 3]}_{len(out)}"
        out[name] = own
    return out

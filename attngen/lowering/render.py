"""`render`: one kernel of a spec, under a schedule, as a `Source`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from attngen.analysis import LARGE, NOTICED
from attngen.analysis.sites import Site
from attngen.language.lists import RowLists
from attngen.lowering import signature
from attngen.lowering.axes import (
    KEY,
    PROGRAM,
    QUERY,
    Chunk,
    Roles,
    View,
    chunks,
    decode,
    decode_longest_first,
    decode_shared,
    every_output,
    roles_of,
)
from attngen.lowering.gradients import Gradient, gradients_of
from attngen.lowering.kernels import Body, Lowering
from attngen.lowering.signature import Arg
from attngen.lowering.source import Grid, Source, environment, tidy
from attngen.lowering.statements import Loop, Statements, Value, assign, call, name
from attngen.schedule import KERNELS, Tile

ROWS_OF_LISTS = 16  # rows of a tile that serves one query or key: the least a matrix product takes
GUARDED = "_guarded"  # behind the name of a kernel that does again what another one marked
_TILE_OF = {"delta": "dq", "delta_of_out": "dq", "excess": "dq", "capture": "dq", "merge": "forward"}


@dataclass(frozen=True)
class Outline:
    """What an outline needs to know apart from statements, axes and tensors.

    about: the file's docstring. split: "split" or "stream" where several programs share an output. one_loop: full and partial
    tiles go through one loop. by_rows: keys are listed row by row, `list_head` is whose list it is. precision: of float32
    products, else nothing. rows: what it takes of each row, see `signature.Takes`. d, dv: the slices of the head dims. large:
    the size of an lse from which on it is exact no more. gradients: of captured tensors that it adds up.
    looks: whether it marks results that are not finite; guarded: whether it does again what was marked, and keeps what masked
    pairs hold out of all sums. sums: of a key tile, those of each of the programs that share it.
    """

    name: str
    about: tuple[str, ...]
    args: tuple[Arg, ...]
    tile: Tile
    split: str
    one_loop: bool
    by_rows: bool
    list_head: str
    page_size: int | None
    precision: str
    rows: tuple[str, ...]
    head_dim_v: int
    d: tuple[Chunk, ...]
    dv: tuple[Chunk, ...]
    walks: bool
    large: float
    restores: bool
    gradients: tuple[Gradient, ...]
    looks: bool
    guarded: bool
    sums: tuple[tuple[str, ...], ...]

    @property
    def function(self) -> str:
        """The kernel's name."""
        return self.name + GUARDED * self.guarded


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
    sites: tuple[Site, ...] = (),
) -> Source:
    """The source of `kernel`: "forward" and for a split one "merge", "delta", "dq", "dkv", "capture" for one site, and for a
    backward that lacks what a forward left "excess" (`Facts.restores`). Where there are masks, "forward_guarded", "dq_guarded" and
    "dkv_guarded" do again what came out as no number.

    sites: of captured tensors whose gradients it adds up, see `attngen.plan.launches`; a guarded kernel leaves them as the first did.
    schedule: a complete one. aligned: the last dimension of every [B, heads, n, d] tensor has stride 1 and all other
    strides are multiples of 16, so rows are loaded in whole vectors; False takes any strides. offset_tensor: q_offset is
    an int32 tensor [B]. The text does not depend on lengths, batch, head counts, params or the scale.
    """
    guarded, kernel = kernel.endswith(GUARDED), kernel.removesuffix(GUARDED)
    by_keys = kernel == "dkv" or (kernel == "capture" and sites[0].by_keys)
    by_rows = isinstance(spec.lists, RowLists) and kernel not in ("delta", "delta_of_out")
    tile = schedule.tile("dkv" if by_keys else _TILE_OF.get(kernel, kernel))
    if by_rows:  # one query, or key, a tile: its rows are the heads
        tile = replace(tile, **{"block_n" if by_keys else "block_m": ROWS_OF_LISTS})
    forward = kernel in ("forward", "merge")
    split = "" if not forward or schedule.split in (None, 1) else "stream" if schedule.split == "stream" else "split"
    roles = roles_of(
        by_keys,
        kernel == "dkv",
        packed=(forward and bool(schedule.pack)) or (by_rows and kernel != "capture"),
        listed=by_rows,
        by_query_head=by_rows and spec.lists.by_query_head,
    )
    # Pairs of all heads, or batches, that no index of a captured tensor uses add to the same elements.
    scattered = () if by_rows else tuple(site for site in sites if site.kind == "pairs")
    all_batches = any(not site.by_batch for site in scattered)
    all_heads = any(not site.by_head for site in scattered)
    described = tile.tma and aligned and not by_rows and spec.page_size is None and kernel in KERNELS
    one_loop = described and tile.warp_specialize and not guarded

    single, restores = dtype == torch.float32, facts.restores(dtype)
    views = _views(spec, kernel, by_keys, roles, head_dim, head_dim_v, aligned, described, one_loop)
    walk = facts.walk_keys if roles.walked is KEY else facts.walk_queries
    tables = [symbol.name for table in walk.tables for symbol in table.symbols]
    lists = () if spec.lists is None else spec.lists.names
    names = signature.kernel_names(
        [*spec.params, *(n for n in spec.tensors if n not in (*lists, "page_table"))], tables
    )
    gradients = () if guarded else gradients_of(sites, names)
    lowering = Lowering(
        spec,
        facts,
        kernel,
        roles,
        names,
        blocks=(tile.block_m, tile.block_n),
        gradients=gradients,
        offset_tensor=offset_tensor,
        one_loop=one_loop,
        pipeline_edges=tile.pipeline_edges and not guarded,
        disable_licm=tile.disable_licm,
        split=split if kernel == "forward" else "",
        guarded=guarded,
    )
    launched = name("launched") if guarded else call("tl.num_programs", 0)
    programs, owner = _programs(kernel, roles, split, all_batches, all_heads, tile, launched)
    marks = kernel in KERNELS and may_need_guard(spec)
    reads = _outline_reads(views, roles, gradients, split)
    reads |= {"odd"} if marks else set()
    reads |= {"launched"} if guarded else set()
    body = lowering.body(programs, owner, reads)
    args = signature.arguments(
        kernel,
        spec,
        {*body.reads, *reads},
        names,
        aligned=aligned,
        offset_tensor=offset_tensor,
        restores=restores,
        split=split,
        tables=tables,
        by_keys=by_keys,
        gradients=gradients,
    )
    outline = Outline(
        name=kernel,
        about=_about(spec, kernel, gradients, head_dim, head_dim_v, dtype, tile),
        args=args,
        tile=tile,
        split=split,
        one_loop=one_loop,
        by_rows=by_rows,
        list_head="h" if by_rows and spec.lists.by_query_head else "kv_head",
        page_size=spec.page_size if lowering.walks else None,
        precision=schedule.precision if lowering.walks and single else "",
        rows=signature.takes(kernel, restores=restores, by_keys=by_keys).rows,
        head_dim_v=head_dim_v,
        d=chunks(head_dim),
        dv=chunks(head_dim_v),
        walks=lowering.walks,
        large=NOTICED if single else LARGE,
        restores=restores,
        gradients=gradients,
        looks=marks and not guarded,
        guarded=guarded,
        sums=_sums(kernel, tile),
    )
    text = _text(outline, roles, views, body)
    grid = replace(_grid(kernel, roles, tile, split, by_rows, all_batches, all_heads), again=guarded)
    # A merge holds two states of a tile at once, and reads each once: as many warps as keep them in registers.
    warps = max(4, min(16, grid.block * head_dim_v // 1024)) if kernel == "merge" else tile.num_warps
    return Source(outline.function, text, args, grid, _power_of_two(warps), tile.num_stages)


def kernels_of(spec: Any, facts: Any, dtype: Any) -> tuple[str, ...]:
    """The names of a spec's kernels for inputs of that dtype but for gradients of captures, which have one for each site."""
    guarded = tuple(kernel + GUARDED for kernel in KERNELS) if may_need_guard(spec) else ()
    excess = ("excess",) if facts.restores(dtype) else ()
    tables = ("tables",) if spec.lists is None and facts.walk_keys.needs_tables else ()
    return ("forward", "merge", "delta", "delta_of_out", *excess, "dq", "dkv", *guarded, *tables)


def may_need_guard(spec: Any) -> bool:
    """Whether a value that is not finite may meet a weight of 0: where some pairs are masked."""
    return bool(spec.mask != sympy.true)


def _text(outline: Outline, roles: Roles, views: dict[str, View], body: Body) -> str:
    """The last step: an outline filled with statements."""
    template = environment().get_template(f"{outline.name}.jinja")
    return tidy(template.render(kernel=outline, R=roles.resident, W=roles.walked, tensors=views, body=body))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _grid(kernel: str, roles: Roles, tile: Tile, split: str, by_rows: bool, all_batches: bool, all_heads: bool) -> Grid:
    resident = roles.resident
    block = tile.block_m if resident.axis == "i" else tile.block_n
    heads = "kv" if roles.by_kv_head else "one" if all_heads else "q"
    rows = "packed" if resident.packed else "single" if by_rows else "rows"
    rows = "heads" if by_rows and resident.packed else rows
    grid = Grid(resident.length, block, heads, not all_batches, rows, split if kernel == "forward" else "")
    if kernel not in KERNELS or split:
        return grid
    return replace(grid, persistent=tile.persistent, parts=tile.parts)


def _sums(kernel: str, tile: Tile) -> tuple[tuple[str, ...], ...]:
    """What a key tile adds up, by the programs that share it; of other kernels nothing, in one program."""
    if kernel != "dkv":
        return ((),)
    return (("dv",), ("dk",)) if tile.separate_sums else (("dk", "dv"),)


def _programs(
    kernel: str, roles: Roles, split: str, all_batches: bool, all_heads: bool, tile: Tile, launched: Value
) -> tuple[Statements, Loop | None]:
    """How a program finds what it computes, and the loop around all of it if it computes several outputs. launched: how many
    programs there are.
    """
    output = name("output")

    def load(list_: str, place: Any) -> Any:
        return call("tl.load", name(list_, kind="pointer") + place)

    if kernel == "merge" and split == "stream":
        first, last = load("owners", 2 * PROGRAM), load("owners", 2 * PROGRAM + 1)
        return (*decode(roles, PROGRAM), assign("first_slot", first), assign("last_slot", last)), None
    if kernel in KERNELS and not split and not all_batches:
        number, parts = output if tile.persistent else PROGRAM, tile.parts
        own: Statements = ()
        if parts > 1:
            own = (assign("part", number % parts), assign("whole", number // parts))
            number = name("whole")
        found = decode(roles, number) if tile.order == "by_head" else decode_longest_first(roles, number)
        if not tile.persistent:
            return (*own, *found), None
        first, outputs, step = every_output(roles, launched)
        every = call("range", first, outputs * parts if parts > 1 else outputs, step)
        found = (*own, *found)
        return (), Loop("output", every, found, "every so many outputs")
    if kernel == "merge" or not split:
        return decode_shared(roles, all_batches, all_heads, launched)
    if split == "split":
        own = (assign("output", PROGRAM // name("splits")), assign("split", PROGRAM % name("splits")))
        return (*own, *decode(roles, output)), None
    run = (
        assign("begin", load("begins", PROGRAM)),
        assign("end", load("begins", PROGRAM + 1)),
        assign("first_output", load("firsts", PROGRAM)),
        assign("last_output", load("firsts", PROGRAM + 1)),
    )
    every = call("range", name("first_output"), name("last_output") + 1)
    body = (*decode(roles, output), assign("start", load("starts", output)))
    return run, Loop("output", every, body, "the outputs that this program has tiles of")


def _outline_reads(views: dict[str, View], roles: Roles, gradients: tuple[Gradient, ...], split: str) -> frozenset[str]:
    """Variables and arguments that the outline reads for these tensors, apart from `kernels._READS`."""
    reads = {"heads", "n_q", *(view.head for view in views.values())}
    reads |= {"n_k"} if "k" in views else set()
    reads |= {"splits"} if split == "split" else set()
    reads |= {view.axis.tile for view in views.values() if view.described}
    if "k" in views and not all(view.described for view in views.values() if view.axis.axis == roles.walked.axis):
        reads.add("rows")
    return frozenset(reads.union(*(g.reads for g in gradients)))


def _views(
    spec: Any,
    kernel: str,
    by_keys: bool,
    roles: Roles,
    head_dim: int,
    head_dim_v: int,
    aligned: bool,
    described: bool,
    one_loop: bool,
) -> dict[str, View]:
    """The tensors of a kernel, in the order of its signature."""
    views, read, written = {}, ("q", "do", "k", "v"), ("dq", "dk", "dv")
    for tensor in signature.takes(kernel, by_keys=by_keys).tensors:
        _, heads, length, dim = signature.shape(tensor)
        head = "h" if heads == "heads" else "kv_head"
        axis = QUERY if length == "n_q" else KEY
        packed = roles.resident.packed and head == "h"
        walked = axis.axis != roles.resident.axis
        views[tensor] = View(
            tensor,
            dim=head_dim_v if dim == "Dv" else head_dim,
            columns="e" if dim == "Dv" and head_dim != head_dim_v else "d",
            head=head,
            axis=axis,
            strided=not aligned,
            packed=packed,
            paged=spec.page_size is not None and head == "kv_head",
            described=described and not packed and (tensor in written or (tensor in read and (one_loop or walked))),
        )
    return views


def _about(
    spec: Any, kernel: str, gradients: tuple[Gradient, ...], head_dim: int, head_dim_v: int, dtype: Any, tile: Any
) -> tuple[str, ...]:
    named = ", ".join(dict.fromkeys(g.site.tensor for g in gradients))
    beside = f", and the gradient of {named}" if named and kernel != "capture" else ""
    return (
        f"attngen {signature.TABLE[kernel].title}{beside}.",
        "",
        f"spec {spec.key[:16]}",
        *(f"    {line}" for line in _wrapped(str(spec).splitlines())),
        f"head dims {head_dim} and {head_dim_v}, {str(dtype).removeprefix('torch.')}",
        f"schedule block_m={tile.block_m}, block_n={tile.block_n}, num_warps={tile.num_warps}, num_stages={tile.num_stages}",
    )


def _wrapped(lines: Iterable[str], width: int = 100) -> Iterable[str]:
    for line in lines:
        while len(line) > width:
            cut = line.rfind(" ", 5, width)  # behind the indent: a longer word is cut, too
            cut = width if cut < 0 else cut
            yield line[:cut]
            line = "    " + line[cut:].lstrip()
        yield line

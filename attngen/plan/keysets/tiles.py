"""Live tiles: block-sparse attention with a layout given at the call, and what every other list of tiles is made with.

A tile list says which tiles of queries and keys are visited; the mask still holds inside them. `tile_lists` sorts listed
tiles, in both directions, into those that the mask leaves whole, those it cuts and those it empties, which are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, singledispatch
from typing import TYPE_CHECKING, Any

import torch

from attngen.analysis.call_facts import facts_of
from attngen.analysis.summaries import Axis
from attngen.analysis.tiles import check_positive, run
from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.checks import check_dims, check_range, check_tensor
from attngen.language.keysets.tiles import Block, BlockCluster, BlockSparse, Pruned, Tiles
from attngen.language.lists import TileLists
from attngen.language.programs import broadcast
from attngen.plan.planner import FAMILIES, Family, Planner, inner_spec, mask_of
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


FULL, PARTIAL, EMPTY = 0, 1, 2  # in the order in which a list has them
LIMIT = 2**31


@dataclass(frozen=True, eq=False)
class Live:
    """Listed tiles, in any order: `columns` int [B', H', E] has key-tile numbers, -1 for none, `rows` int [1, 1, E] or
    [B', H', E] the query tiles they belong to. `distinct`: none is there twice; otherwise a tile that is counts once.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    distinct: bool = True


def grid(block: Block, call: Call) -> tuple[int, int]:
    """How many tiles of queries and of keys a call has."""
    return -(-call.q.shape[2] // block[0]), -(-call.k.shape[2] // block[1])


@singledispatch
def live(keys: Tiles, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
    """The listed tiles of a call, for each kind of key set. InputError."""
    raise NotImplementedError(type(keys).__name__)


def plan_tiles(keys: Any, planner: Planner) -> Result:
    """Lists of live tiles, and one attention along them."""
    scored = ("q", "k") if isinstance(keys, Pruned) else ()
    reads = (*scored, *keys.prepared, *planner.mask_reads)
    make = partial(_prepare, keys, planner.spec)
    found = planner.prepare("list tiles", make, reads, TileLists.names, planner.mask_params)

    def build() -> dict[str, Any]:
        return {"mask": planner.mask, "score": planner.score, "lists": TileLists(*keys.block)}

    return planner.attend("tiles", "tiles", build, "q", "k", "v", found, offset=True)


def _prepare(keys: Any, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    return tile_lists(live(keys, spec, call, given), spec, call, keys.block)


# -- preparation ------------------------------------------------------------------------------------------------------


def tile_lists(live: Live, spec: Spec, call: Call, block: Block, masked_inside: bool = False) -> dict[str, Any]:
    """The tensors of `TileLists`. Memory is proportional to the list; nothing waits for the device unless that is the CPU.

    masked_inside: the piece masks more than the spec's mask does, so no tile is full.
    """
    block_m, block_n = block
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    tiles_q, tiles_k = -(-n_q // block_m), -(-n_k // block_n)
    bound = bind_mask(spec, call)
    if 0 in (tiles_q, tiles_k, *call.q.shape[:2]):
        empty = torch.zeros((1, 1, 0), dtype=torch.int32, device=call.q.device)
        runs = [empty.new_zeros((1, 1, tiles, 3)) for tiles in (tiles_q, tiles_k)]
        return dict(zip(TileLists.names, (empty, runs[0], empty, runs[1]), strict=True))
    check_entries("q and k", live.columns.shape[-1])
    rows, columns = live.rows.long(), live.columns.long()
    state = Segments(bound, block).state(rows, columns)
    if masked_inside:
        state = torch.where(state == FULL, PARTIAL, state)
    # A number that is no tile is in none of the mask's segments: it is dropped too where the checks are turned off.
    state = torch.where(columns < 0, EMPTY, state)
    word = torch.int32 if 2 * tiles_q * tiles_k < LIMIT else torch.int64
    none = 2 * tiles_q * tiles_k
    code = torch.where(state == EMPTY, none, (2 * rows + state) * tiles_k + columns).to(word).sort(dim=-1).values
    if not live.distinct:
        again = torch.nn.functional.pad(code[..., 1:] == code[..., :-1], (1, 0))
        code = code.masked_fill(again, none).sort(dim=-1).values
    query_tiles, query_runs, code = _cut(code, tiles_q, tiles_k, call.waits)
    if not call.wants_grad:
        nothing = query_tiles.new_zeros((1, 1, 0)), query_runs.new_zeros((1, 1, 0, 3))
        return dict(zip(TileLists.names, (query_tiles, query_runs, *nothing), strict=True))
    # The other direction, from the entries in this order. What is cut at the end there is the last tile of queries.
    row, column, partial = code // (2 * tiles_k), code % tiles_k, code // tiles_k % 2 == 1
    if n_q % block_m:
        partial = partial | (row == tiles_q - 1)
    turned = torch.where(code >= none, none, (2 * column + partial) * tiles_q + row).to(word).sort(dim=-1).values
    key_tiles, key_runs, _ = _cut(turned, tiles_k, tiles_q, call.waits)
    return dict(zip(TileLists.names, (query_tiles, query_runs, key_tiles, key_runs), strict=True))


def _cut(code: torch.Tensor, owners: int, items: int, waits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From sorted (2 * owner + state) * items + item: the items, the runs [B', H', owners, 3], and the code that is left."""
    edges = torch.arange(2 * owners + 1, dtype=code.dtype, device=code.device) * items
    place = torch.searchsorted(code, edges.expand(*code.shape[:2], -1).contiguous())
    if waits and place.numel():
        code = code[..., : int(place[..., -1].max())]
    count = place.diff(dim=-1)
    runs = torch.stack([place[..., :-1:2], count[..., ::2], count[..., 1::2]], -1)
    return (code % items).to(torch.int32), runs.to(torch.int32), code


class Segments:
    """What the mask alone makes of all tiles: `attngen.analysis` tells it as runs of key tiles per query tile."""

    def __init__(self, bound: Call, block: Block):
        q, known = bound.q, facts_of(bound.spec)
        offset = bound.q_offset.view(-1, 1, 1) if isinstance(bound.q_offset, torch.Tensor) else bound.q_offset
        env: dict[str, Any] = {**bound.captures, **bound.params}
        env |= {"b": torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)}
        env |= {"h": torch.arange(q.shape[1], device=q.device).view(1, -1, 1)}
        check_positive(known.walk_keys, env)
        queries, keys = Axis("i", offset, q.shape[2]), Axis("j", 0, bound.k.shape[2])
        self.full, self.partial = run(known.walk_keys, known.program_keys, env, queries, keys, *block, q.device)
        self.tiles_q = -(-q.shape[2] // block[0])

    def state(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """FULL, PARTIAL or EMPTY of tiles (rows, columns), both int64 that broadcast to [B', H', E]."""
        state = torch.full_like(columns, EMPTY)
        for value, segments in ((PARTIAL, self.partial), (FULL, self.full)):
            for first, count in segments:
                low, size = (self._of(rows, x) for x in (first, count))
                state = torch.where((columns >= low) & (columns < low + size), value, state)
        return state

    def _of(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """values [B', H', tiles or 1] of each entry's row."""
        if values.shape[-1] == 1:
            return values
        lead = broadcast(rows.shape[:-1], values.shape[:-1])
        return values.expand(*lead, -1).gather(-1, rows.expand(*lead, -1))


def bind_mask(spec: Spec, call: Call) -> Call:
    """The call of the mask alone, checked. InputError for a capture of the mask that was not given to `attn.plan`."""
    only = inner_spec(spec, "the mask", lambda: {"mask": mask_of(spec), "scale": None})
    captures = {**call.captures, **call.params}
    for name in (*only.tensors, *only.params):
        if captures.get(name) is None:
            wanted = {**only.tensors, **only.params}[name].text()
            raise InputError(
                name, wanted, "nothing", f"the mask reads it to sort the tiles: pass {name}=... to plan too"
            )
    named = {name: captures[name] for name in (*only.tensors, *only.params)}
    named = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in named.items()}
    return bind(only, call.q, call.k, call.v, q_offset=call.q_offset, captures=named, values=False)


# -- layouts given at the call ----------------------------------------------------------------------------------------


@live.register(BlockSparse)
def _(keys: BlockSparse, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
    layout, counts, indices = (given.get(name) for name in keys.prepared)
    rows, columns = grid(keys.block, call)
    if (layout is None) == (counts is None and indices is None):
        got = "neither" if layout is None else "both"
        raise InputError("layout", "layout=, or counts= and indices=", got, "pass one of the two at the call")
    if layout is not None:
        lead = _lead(check_dims("layout", layout, (4,), "bool [B or 1, H or 1, tiles_q, tiles_k]"), call)
        check_entries("layout", rows * columns)
        dims = f"[B or 1, H or 1, tiles_q, tiles_k] for tiles of {keys.block[0]} x {keys.block[1]}"
        return from_layout(
            check_tensor("layout", layout, "bool", (*lead, rows, columns), dims, call.q.device), call.waits
        )
    indices = check_dims("indices", indices, (4,), "int [B or 1, H or 1, tiles_q, L]")
    lead = _lead(indices, call)
    shape = (*lead, rows, indices.shape[3])
    indices = check_tensor("indices", indices, "int", shape, "[B or 1, H or 1, tiles_q, L]", call.q.device)
    check_entries("indices", rows * indices.shape[3])
    counts = check_tensor("counts", counts, "int", (*lead, rows), "[B or 1, H or 1, tiles_q]", call.q.device)
    check_range("counts", counts, 0, indices.shape[3] + 1, "numbers of indices")
    counted = torch.arange(indices.shape[3], device=counts.device) < counts.unsqueeze(-1)
    return from_indices("indices", torch.where(counted, indices, -1), columns)


@live.register(BlockCluster)
def _(keys: BlockCluster, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
    dims, (rows, columns) = "[B or 1, H or 1, tiles_q, K]", grid(keys.block, call)
    index = check_dims("index", given.get("index"), (4,), f"int {dims}")
    shape = (*_lead(index, call), rows, index.shape[3])
    return from_indices("index", check_tensor("index", index, "int", shape, dims, call.q.device), columns)


def from_indices(name: str, index: torch.Tensor, columns: int) -> Live:
    """Of key-tile numbers int [B', H', tiles_q, L], -1 for none. InputError for one out of range."""
    check_entries(name, index.shape[2] * index.shape[3])
    check_range(name, index, -1, columns, "numbers of key tiles, or -1 for none")
    rows = torch.arange(index.shape[2], device=index.device).repeat_interleave(index.shape[3])
    return Live(rows.view(1, 1, -1), index.flatten(2), distinct=False)


def check_entries(name: str, count: int) -> None:
    """InputError if a head's list could have more entries than its offsets, which are int32, reach."""
    if count >= LIMIT:
        raise InputError(name, f"fewer than {LIMIT} listed tiles for a head", count, "choose larger tiles")


def from_layout(layout: torch.Tensor, waits: bool) -> Live:
    """Of a dense bool layout [B', H', tiles_q, tiles_k]: as many entries as it has places; where waiting is free, as
    the fullest head has live tiles.
    """
    flat, columns = layout.flatten(2), max(layout.shape[3], 1)
    if waits:
        head, place = flat.flatten(0, 1).nonzero(as_tuple=True)
        count = torch.bincount(head, minlength=flat.shape[0] * flat.shape[1])
        slot = torch.arange(len(head)) - (count.cumsum(0) - count)[head]
        entry = torch.full((len(count), int(count.max()) if len(count) else 0), -1)
        entry[head, slot] = place
        entry = entry.view(*flat.shape[:2], entry.shape[1])
        return Live(entry.clamp(min=0) // columns, torch.where(entry < 0, -1, entry % columns))
    place = torch.arange(flat.shape[2], device=layout.device).view(1, 1, -1)
    return Live(place // columns, torch.where(flat, place % columns, -1))


def _lead(value: torch.Tensor, call: Call) -> tuple[int, int]:
    """The batch and head sizes that `value` should have: each the call's, or 1."""
    batch, heads = call.q.shape[:2]
    return (1 if value.shape[0] == 1 else batch, 1 if value.shape[1] == 1 else heads)


FAMILIES[Tiles] = Family(plan_tiles)

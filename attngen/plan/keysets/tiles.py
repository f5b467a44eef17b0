"""Live tiles: block-sparse attention with a layout given at the call, and what every other list of tiles is made with.

A tile list says which tiles of queries and keys are visited; the mask still holds inside them. `tile_lists` sorts listed
tiles, in both directions, into those that the mask leaves whole, those it cuts and those it empties, which are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import InputError, SpecError
from attngen.language.checks import check_dims
from attngen.language.expression import Expr
from attngen.language.lists import TileLists
from attngen.plan.keysets.base import KeySet, Pieces, Result, check_range, check_tensor

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec

Block = tuple[int, int]
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


@dataclass(frozen=True)
class Tiles(KeySet):
    """Base of key sets that list tiles of `block` = (queries, keys). A subclass has the field and says which are `live`."""

    def grid(self, call: Call) -> tuple[int, int]:
        """How many tiles of queries and of keys the call has."""
        block_m, block_n = self.block  # type: ignore[attr-defined]
        return -(-call.q.shape[2] // block_m), -(-call.k.shape[2] // block_n)

    def live(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
        """The listed tiles of a call. InputError."""
        raise NotImplementedError

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        return tile_lists(self.live(spec, call, given), spec, call, self.block)  # type: ignore[attr-defined]

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        block = self.block  # type: ignore[attr-defined]
        call = pieces.call
        check_params(plan, call)

        def build() -> dict[str, Any]:
            return {"mask": pieces.mask, "score": pieces.score, "lists": TileLists(*block)}

        lists = {name: plan[name] for name in TileLists.names}
        return pieces.attend(("tiles", block), build, call.q, call.k, call.v, call.q_offset, **lists)


def read_block(place: str, block: Any) -> Block:
    """(queries, keys) of a tile, from a pair or from one number for both. SpecError unless both are multiples of 16."""
    pair = (block, block) if isinstance(block, int) else block
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise SpecError(f"{place}: block is (queries, keys) of a tile, or one number for both, got {block!r}")
    try:
        lists = TileLists(*pair)
    except SpecError:
        wanted = "block is (queries, keys) of a tile, both multiples of 16, or one number for both"
        raise SpecError(f"{place}: {wanted}, got {block!r}") from None
    return lists.block_m, lists.block_n


# -- preparation ------------------------------------------------------------------------------------------------------


def tile_lists(live: Live, spec: Spec, call: Call, block: Block, masked_inside: bool = False) -> dict[str, Any]:
    """The tensors of `TileLists`, and `mask_params`: the mask's params that they hold for. Memory is proportional to the
    list; nothing waits for the device unless that is the CPU.

    masked_inside: the piece masks more than the spec's mask does, so no tile is full.
    """
    block_m, block_n = block
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    tiles_q, tiles_k = -(-n_q // block_m), -(-n_k // block_n)
    bound = bind_mask(spec, call)
    params = tuple(sorted(bound.params.items()))
    if 0 in (tiles_q, tiles_k, *call.q.shape[:2]):
        empty = torch.zeros((1, 1, 0), dtype=torch.int32, device=call.q.device)
        runs = [empty.new_zeros((1, 1, tiles, 3)) for tiles in (tiles_q, tiles_k)]
        return dict(zip((*TileLists.names, "mask_params"), (empty, runs[0], empty, runs[1], params), strict=True))
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
    query_tiles, query_runs, code = _cut(code, tiles_q, tiles_k)
    if not call.wants_grad:
        nothing = query_tiles.new_zeros((1, 1, 0)), query_runs.new_zeros((1, 1, 0, 3))
        return dict(zip((*TileLists.names, "mask_params"), (query_tiles, query_runs, *nothing, params), strict=True))
    # The other direction, from the entries in this order. What is cut at the end there is the last tile of queries.
    row, column, partial = code // (2 * tiles_k), code % tiles_k, code // tiles_k % 2 == 1
    if n_q % block_m:
        partial = partial | (row == tiles_q - 1)
    turned = torch.where(code >= none, none, (2 * column + partial) * tiles_q + row).to(word).sort(dim=-1).values
    key_tiles, key_runs, _ = _cut(turned, tiles_k, tiles_q)
    found = (query_tiles, query_runs, key_tiles, key_runs, params)
    return dict(zip((*TileLists.names, "mask_params"), found, strict=True))


def _cut(code: torch.Tensor, owners: int, items: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From sorted (2 * owner + state) * items + item: the items, the runs [B', H', owners, 3], and the code that is left."""
    edges = torch.arange(2 * owners + 1, dtype=code.dtype, device=code.device) * items
    place = torch.searchsorted(code, edges.expand(*code.shape[:2], -1).contiguous())
    if code.device.type == "cpu" and place.numel():
        code = code[..., : int(place[..., -1].max())]
    count = place.diff(dim=-1)
    runs = torch.stack([place[..., :-1:2], count[..., ::2], count[..., 1::2]], -1)
    return (code % items).to(torch.int32), runs.to(torch.int32), code


class Segments:
    """What the mask alone makes of all tiles: `attngen.analysis` tells it as runs of key tiles per query tile."""

    def __init__(self, bound: Call, block: Block):
        from attngen.analysis import Axis, facts, run
        from attngen.analysis.tiles import check_positive

        q, known = bound.q, facts(bound.spec)
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
        lead = torch.broadcast_shapes(rows.shape[:-1], values.shape[:-1])
        return values.expand(*lead, -1).gather(-1, rows.expand(*lead, -1))


def bind_mask(spec: Spec, call: Call) -> Call:
    """The call of the mask alone, checked. InputError for a capture of the mask that was not given to `attn.plan`."""
    from attngen.language.call import bind

    only = _mask_only(spec)
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


@lru_cache(maxsize=256)
def _mask_only(spec: Spec) -> Spec:
    from attngen.language.spec import Spec

    return Spec(mask=Expr(spec.mask, {**spec.tensors, **spec.params}))


def check_params(plan: Mapping[str, Any], call: Call) -> None:
    """InputError if the plan was made for a mask with other params. That its tensors are the same is taken on trust."""
    for name, value in plan["mask_params"]:
        if call.params[name] != value:
            raise InputError("plan", f"a plan made with {name}={call.params[name]}", f"one made with {name}={value}")


# -- layouts given at the call ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSparse(Tiles):
    """Tiles given as a layout, or as counts and indices."""

    block: Block

    name: ClassVar[str] = "block_sparse"
    prepared: ClassVar[tuple[str, ...]] = ("layout", "counts", "indices")
    optional: ClassVar[tuple[str, ...]] = ("layout", "counts", "indices")

    def __post_init__(self) -> None:
        read_block(self.name, self.block)

    def live(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
        layout, counts, indices = (given.get(name) for name in self.prepared)
        rows, columns = self.grid(call)
        if (layout is None) == (counts is None and indices is None):
            got = "neither" if layout is None else "both"
            raise InputError("layout", "layout=, or counts= and indices=", got, "pass one of the two at the call")
        if layout is not None:
            lead = _lead(check_dims("layout", layout, (4,), "bool [B or 1, H or 1, tiles_q, tiles_k]"), call)
            check_entries("layout", rows * columns)
            dims = f"[B or 1, H or 1, tiles_q, tiles_k] for tiles of {self.block[0]} x {self.block[1]}"
            return from_layout(check_tensor("layout", layout, "bool", (*lead, rows, columns), dims, call.q.device))
        indices = check_dims("indices", indices, (4,), "int [B or 1, H or 1, tiles_q, L]")
        lead = _lead(indices, call)
        shape = (*lead, rows, indices.shape[3])
        indices = check_tensor("indices", indices, "int", shape, "[B or 1, H or 1, tiles_q, L]", call.q.device)
        check_entries("indices", rows * indices.shape[3])
        counts = check_tensor("counts", counts, "int", (*lead, rows), "[B or 1, H or 1, tiles_q]", call.q.device)
        check_range("counts", counts, 0, indices.shape[3] + 1, "numbers of indices")
        counted = torch.arange(indices.shape[3], device=counts.device) < counts.unsqueeze(-1)
        return from_indices("indices", torch.where(counted, indices, -1), columns)


@dataclass(frozen=True)
class BlockCluster(Tiles):
    """Key tiles given per query tile. index int [B or 1, H or 1, tiles_q, K], -1 for none."""

    block: Block

    name: ClassVar[str] = "block_cluster"
    prepared: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        read_block(self.name, self.block)

    def live(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
        dims, (rows, columns) = "[B or 1, H or 1, tiles_q, K]", self.grid(call)
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


def from_layout(layout: torch.Tensor) -> Live:
    """Of a dense bool layout [B', H', tiles_q, tiles_k]: as many entries as it has places; on the CPU, where waiting is
    free, as the fullest head has live tiles.
    """
    flat, columns = layout.flatten(2), max(layout.shape[3], 1)
    if layout.device.type == "cpu":
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


def block_sparse(block: Any = (128, 128)) -> BlockSparse:
    """Attention to live tiles (block-sparse FlashAttention, arXiv 2205.14135): `Spec(keys=ag.block_sparse((128, 128)),
    mask=...)`, block = (queries, keys) of a tile, multiples of 16. At the call either

    layout= bool [B or 1, H or 1, tiles_q, tiles_k], True for a live tile; or, for long inputs,
    counts= int [B or 1, H or 1, tiles_q] and indices= int [B or 1, H or 1, tiles_q, L]: row r's live tiles are the first
    counts[r] entries of indices[r], in any order; one that is listed twice counts once.

    Tiles are of rows: query tile r has rows r * block_m and on, whatever q_offset is. The mask holds inside live tiles;
    H is the number of query heads. `attn.plan` sorts the tiles by what the mask makes of them: it needs the mask's
    captures, and serves calls with the same ones. Raises SpecError, and InputError at the call.
    """
    return BlockSparse(read_block("block_sparse", block))


def block_cluster(block: Any = (64, 64)) -> BlockCluster:
    """Each query tile attends to the key tiles it names (SparseAccelerate's block clusters, arXiv 2412.06198):
    `Spec(keys=ag.block_cluster((64, 64)), mask=ag.causal())`, called with index= int [B or 1, H or 1, tiles_q, K], -1 for
    none; a tile that is named twice counts once. Raises SpecError, and InputError at the call.
    """
    return BlockCluster(read_block("block_cluster", block))

"""Vertical-slash attention: chosen key columns and chosen distances, per head (MInference, arXiv 2407.02490).

Without ever looking at all pairs: piece one gathers the columns. Piece two lists the tiles that slash lines touch, which for
tile (r, c) depends on r - c only, and masks inside them by distance, without the columns. The two are disjoint, and merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.checks import check_dims, check_range, check_tensor
from attngen.language.keysets.tiles import Adaptive, Slashes, VerticalSlash
from attngen.language.lists import TileLists
from attngen.plan.keysets.estimate import A_SHAPE, CLUSTER, Estimate
from attngen.plan.keysets.tiles import Live, tile_lists
from attngen.plan.moves import Rows, shared_rows
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


LINES = ("column_hit", "slash_hit", "base")
COLUMNS = ("column", "shift", "count")
ESTIMATED = ("kind", "vertical", "band", "index", "sink", "window")  # what is read of an `Estimate`


def plan_lines(keys: Slashes, planner: Planner) -> Result:
    """Tiles that slash lines touch, and the columns, gathered."""
    adaptive = isinstance(keys, Adaptive)
    whole = ("whole",) if adaptive else ()
    prepare: Any = prepare_estimated if adaptive else prepare_lines
    make = partial(prepare, keys, planner.spec)
    own = tuple(f"estimate.{name}" for name in ESTIMATED) if adaptive else keys.prepared
    writes = (*TileLists.names, *LINES, *whole, *COLUMNS, "column_rows")
    found = planner.prepare("find lines", make, (*own, *planner.mask_reads), writes, planner.mask_params)

    def lines() -> dict[str, Any]:
        from attngen.language.moved import b, h, i, j

        column, slash = (planner.tensor(name, 3, torch.bool) for name in ("column_hit", "slash_hit"))
        hit = slash[b, h, i - j - planner.tensor("base", 1)[b]]
        if adaptive:
            hit = hit | planner.tensor("whole", 2, torch.bool)[b, h]
        return {
            "mask": planner.mask & hit & ~column[b, h, j],
            "score": planner.score,
            "lists": TileLists(keys.block, keys.block),  # type: ignore[attr-defined]
        }

    names = (*TileLists.names, *LINES, *whole)
    listed = planner.attend("lines", "lines", lines, "q", "k", "v", {n: found[n] for n in names}, offset=True)
    if planner.sizes.n_k == 0:
        return listed

    def columns() -> dict[str, Any]:
        from attngen.language.moved import b, h, i, j, moved

        column = planner.tensor("column", 3)
        there = j < planner.tensor("count", 2)[b, h]
        places = {"i": i + planner.tensor("shift", 1)[b], "j": column[b, h, j]}
        return {"mask": moved(planner.mask, **places) & there, "score": moved(planner.score, **places)}

    # The heads of a group take their rows from the keys that they share.
    k = planner.take("column keys", "k", Rows(unique=False), found["column_rows"])
    v = planner.take("column values", "v", Rows(unique=False), found["column_rows"])
    gathered = planner.attend("columns", "columns", columns, "q", k, v, {n: found[n] for n in COLUMNS})
    return planner.merge(listed, gathered)


def prepare_from(
    block: int,
    spec: Spec,
    call: Call,
    vertical: torch.Tensor,
    slash: torch.Tensor,
    diagonal: torch.Tensor,
    clusters: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """What is prepared for vertical int64 [B, H, Kv] and slash int64 [B, H, Ks], -1 for none, and tile diagonals int64
    [B, H, T]: numbers r - c + tiles_k - 1 of those that the slash lines touch, tiles_q + tiles_k - 1 for none, any of
    them several times.

    clusters: (whole bool [B, H], index int64 [B, H, tiles_q, K], -1 for none): heads that see whole tiles instead.
    """
    device, (batch, heads, n_q, _), n_k = call.q.device, call.q.shape, call.k.shape[2]
    tiles_q, tiles_k = -(-n_q // block), -(-n_k // block)
    # A distance i - j has the place i - j - base; no pair that exists is outside of the table.
    base = call.offset_column - (n_k - 1)
    slash_hit = _marked(torch.where(slash < 0, -1, slash - base), n_q + n_k - 1)
    column = _once(torch.where(vertical < 0, n_k, vertical), n_k).sort(dim=-1).values  # the missing ones last
    none = tiles_q + tiles_k - 1
    diagonal = _once(diagonal, none).unsqueeze(-2)
    row = torch.arange(tiles_q, device=device)
    listed = row.unsqueeze(-1) + (tiles_k - 1) - diagonal
    listed = torch.where((diagonal < none) & (listed >= 0) & (listed < tiles_k), listed, -1)
    if clusters is not None:
        whole, index = clusters
        wide = max(listed.shape[3], index.shape[3])
        index, listed = (torch.nn.functional.pad(x, (0, wide - x.shape[3]), value=-1) for x in (index, listed))
        listed = torch.where(whole.view(batch, heads, 1, 1), index, listed)
    listed_tiles = Live(row.repeat_interleave(listed.shape[3]).view(1, 1, -1), listed.flatten(2))
    there = column.clamp(max=max(n_k - 1, 0))
    offset = call.q_offset
    offsets = offset if isinstance(offset, torch.Tensor) else torch.full((batch,), offset, device=device)
    return {
        **tile_lists(listed_tiles, spec, call, (block, block), masked_inside=True),
        "column_hit": _marked(vertical, n_k),
        "slash_hit": slash_hit,
        "base": (offsets - (n_k - 1)).to(torch.int32),
        "shift": offsets.to(torch.int32),
        "column": there.to(torch.int32),
        "column_rows": shared_rows(there, call.k.shape[1], n_k),
        "count": (column < n_k).sum(-1).to(torch.int32),
        **({} if clusters is None else {"whole": clusters[0]}),
    }


def _once(numbers: torch.Tensor, none: int) -> torch.Tensor:
    """Numbers [B, H, K], each one once: its repetitions become `none`."""
    numbers = numbers.sort(dim=-1).values
    again = torch.nn.functional.pad(numbers[..., 1:] == numbers[..., :-1], (1, 0))
    return numbers.masked_fill(again, none)


def _marked(places: torch.Tensor, length: int) -> torch.Tensor:
    """bool [B, H, length], true at the places [B, H, K] that are in range."""
    inside = torch.where((places >= 0) & (places < length), places, length)
    hit = torch.zeros((*places.shape[:2], length + 1), dtype=torch.bool, device=places.device)
    return hit.scatter_(-1, inside, True)[..., :length].contiguous()


def touched(first: torch.Tensor, last: torch.Tensor, block: int, call: Call, most: int) -> torch.Tensor:
    """Tile diagonals that distances first .. last (int64 [B, H, K], first < 0 for none) touch, at most `most` each: numbers
    r - c + tiles_k - 1 in [B, H, K * most], tiles_q + tiles_k - 1 for none.
    """
    tiles_q, tiles_k = -(-call.q.shape[2] // block), -(-call.k.shape[2] // block)
    # Pairs of tile (r, c) are offset + (r - c) * block - (block - 1) .. offset + (r - c) * block + (block - 1) apart.
    low = torch.div(first - call.offset_column, block, rounding_mode="floor")
    high = torch.div(last - call.offset_column + block - 1, block, rounding_mode="floor")
    found = low.unsqueeze(-1) + torch.arange(most, device=first.device)
    place = found + (tiles_k - 1)
    real = (found <= high.unsqueeze(-1)) & (first >= 0).unsqueeze(-1) & (place >= 0) & (place < tiles_q + tiles_k - 1)
    return torch.where(real, place, tiles_q + tiles_k - 1).flatten(2)


def prepare_lines(keys: VerticalSlash, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    found = []
    for name, size, what in (("vertical", "Kv", "rows of k"), ("slash", "Ks", "distances i - j")):
        value = check_dims(name, given.get(name), (3,), f"int [B, H, {size}]")
        shape = (*call.q.shape[:2], value.shape[2])
        value = check_tensor(name, value, "int", shape, f"[B, H, {size}]", call.q.device)
        check_range(name, value, -1, call.k.shape[2] if name == "vertical" else 2**28, f"{what}, or -1 for none")
        found.append(value.long())
    vertical, slash = found
    return prepare_from(keys.block, spec, call, vertical, slash, touched(slash, slash, keys.block, call, 2))


def prepare_estimated(keys: Adaptive, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    found = {name.removeprefix("estimate."): value for name, value in given.items()}
    block, (batch, heads) = keys.block, call.q.shape[:2]
    a_shape = (found["kind"] == A_SHAPE).unsqueeze(-1)
    cluster = (found["kind"] == CLUSTER).unsqueeze(-1)

    def per_head(near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """Of a-shape heads `near` [K], of the others `far` [B, H, K'], none for clusters: [B, H, larger K]."""
        wide = max(near.shape[0], far.shape[2])
        near = torch.nn.functional.pad(near, (0, wide - near.shape[0]), value=-1)
        far = torch.nn.functional.pad(far, (0, wide - far.shape[2]), value=-1)
        return torch.where(cluster, -1, torch.where(a_shape, near, far))

    device = call.q.device
    sink = torch.arange(min(found["sink"], call.k.shape[2]), device=device)
    vertical = per_head(sink, found["vertical"])
    inside = torch.arange(block, device=device)
    lines = (found["band"].unsqueeze(-1) * block + inside).flatten(2)
    slash = per_head(torch.arange(found["window"], device=device), torch.where(lines < 0, -1, lines))
    # The same distances as runs: the window in runs of `block`, the last one shorter.
    start = torch.arange(0, found["window"], block, device=device)
    first = per_head(start, torch.where(found["band"] < 0, -1, found["band"] * block))
    length = torch.where(a_shape, (found["window"] - first).clamp(max=block), block)
    diagonal = touched(first, first + length - 1, block, call, 3)
    return prepare_from(keys.block, spec, call, vertical, slash, diagonal, (cluster.view(batch, heads), found["index"]))


def read_estimate(keys: Adaptive, given: Mapping[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """The tensors and numbers of estimate=. InputError."""
    found = given.get("estimate")
    if not isinstance(found, Estimate):
        fix = "pass estimate=ag.estimate(q, k, ...) at the call"
        raise InputError("estimate", "what ag.estimate returns", type(found).__name__, fix)
    sizes = (keys.block, *q.shape[:2], -(-q.shape[2] // keys.block), k.shape[2], str(q.device))
    if found.sizes != sizes:
        names = "(block, B, Hq, tiles_q, Nk, device)"
        raise InputError("estimate", f"one for {names} = {sizes}", f"one for {found.sizes}")
    return {f"estimate.{name}": getattr(found, name) for name in ESTIMATED}


FAMILIES[VerticalSlash] = Family(plan_lines)
FAMILIES[Adaptive] = Family(plan_lines, read=read_estimate)

"""Vertical-slash attention: chosen key columns and chosen distances, per head (MInference, arXiv 2407.02490).

Without ever looking at all pairs: piece one gathers the columns. Piece two lists the tiles that slash lines touch, which for
tile (r, c) depends on r - c only, and masks inside them by distance, without the columns. The two are disjoint, and merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.backends.rows import take
from attngen.errors import InputError, SpecError
from attngen.language.checks import check_dims
from attngen.language.lists import TileLists
from attngen.plan.keysets.base import (
    KeySet,
    Pieces,
    Result,
    b,
    check_range,
    check_tensor,
    h,
    i,
    j,
    moved,
    offset_column,
    positive,
)
from attngen.plan.keysets.estimate import A_SHAPE, CLUSTER, Estimate
from attngen.plan.keysets.tiles import Live, check_params, tile_lists
from attngen.state.merging import merge

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec


@dataclass(frozen=True)
class Slashes(KeySet):
    """Base: heads that attend to columns, distances and whole tiles, in square tiles of `block`."""

    def prepare_from(
        self,
        spec: Spec,
        call: Call,
        vertical: torch.Tensor,
        slash: torch.Tensor,
        diagonal: torch.Tensor,
        clusters: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """The plan for vertical int64 [B, H, Kv] and slash int64 [B, H, Ks], -1 for none, and tile diagonals int64
        [B, H, T]: numbers r - c + tiles_k - 1 of those that the slash lines touch, tiles_q + tiles_k - 1 for none, any of
        them several times.

        clusters: (whole bool [B, H], index int64 [B, H, tiles_q, K], -1 for none): heads that see whole tiles instead.
        """
        block: int = self.block  # type: ignore[attr-defined]
        device, (batch, heads, n_q, _), n_k = call.q.device, call.q.shape, call.k.shape[2]
        tiles_q, tiles_k = -(-n_q // block), -(-n_k // block)
        # A distance i - j has the place i - j - base; no pair that exists is outside of the table.
        base = offset_column(call) - (n_k - 1)
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
        live = Live(row.repeat_interleave(listed.shape[3]).view(1, 1, -1), listed.flatten(2))
        offset = call.q_offset
        offsets = offset if isinstance(offset, torch.Tensor) else torch.full((batch,), offset, device=device)
        return {
            **tile_lists(live, spec, call, (block, block), masked_inside=True),
            "column_hit": _marked(vertical, n_k),
            "slash_hit": slash_hit,
            "base": (offsets - (n_k - 1)).to(torch.int32),
            "shift": offsets.to(torch.int32),
            "column": column.clamp(max=max(n_k - 1, 0)).to(torch.int32),
            "count": (column < n_k).sum(-1).to(torch.int32),
            **({} if clusters is None else {"whole": clusters[0]}),
        }

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call, block = pieces.call, self.block  # type: ignore[attr-defined]
        check_params(plan, call)
        with_whole = "whole" in plan

        def tiles() -> dict[str, Any]:
            column, slash = (pieces.tensor(name, 3, torch.bool) for name in ("column_hit", "slash_hit"))
            hit = slash[b, h, i - j - pieces.tensor("base", 1)[b]]
            if with_whole:
                hit = hit | pieces.tensor("whole", 2, torch.bool)[b, h]
            return {
                "mask": pieces.mask & hit & ~column[b, h, j],
                "score": pieces.score,
                "lists": TileLists(block, block),
            }

        names = (*TileLists.names, "column_hit", "slash_hit", "base", *(("whole",) if with_whole else ()))
        listed = pieces.attend(
            ("slashes", block, with_whole), tiles, call.q, call.k, call.v, call.q_offset, **{n: plan[n] for n in names}
        )
        if plan["column"].shape[2] == 0 or 0 in call.q.shape or call.k.shape[2] == 0:
            return listed

        def columns() -> dict[str, Any]:
            column = pieces.tensor("column", 3)
            there = j < pieces.tensor("count", 2)[b, h]
            places = {"i": i + pieces.tensor("shift", 1)[b], "j": column[b, h, j]}
            return {"mask": moved(pieces.mask, **places) & there, "score": moved(pieces.score, **places)}

        # The heads of a group take their rows from the keys that they share, one after the other.
        rows = plan["column"].long()
        shared = rows.view(*call.k.shape[:2], -1)
        k, v = (take(x, shared, unique=False).view(*rows.shape, x.shape[3]) for x in (call.k, call.v))
        names = ("column", "shift", "count")
        return merge(listed, pieces.attend("columns", columns, call.q, k, v, **{n: plan[n] for n in names}))


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
    low = torch.div(first - offset_column(call), block, rounding_mode="floor")
    high = torch.div(last - offset_column(call) + block - 1, block, rounding_mode="floor")
    found = low.unsqueeze(-1) + torch.arange(most, device=first.device)
    place = found + (tiles_k - 1)
    real = (found <= high.unsqueeze(-1)) & (first >= 0).unsqueeze(-1) & (place >= 0) & (place < tiles_q + tiles_k - 1)
    return torch.where(real, place, tiles_q + tiles_k - 1).flatten(2)


@dataclass(frozen=True)
class VerticalSlash(Slashes):
    """Columns and distances given at the call."""

    block: int = 64

    name: ClassVar[str] = "vertical_slash"
    prepared: ClassVar[tuple[str, ...]] = ("vertical", "slash")

    def __post_init__(self) -> None:
        _square(self.name, self.block)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        found = []
        for name, size, what in (("vertical", "Kv", "rows of k"), ("slash", "Ks", "distances i - j")):
            value = check_dims(name, given.get(name), (3,), f"int [B, H, {size}]")
            shape = (*call.q.shape[:2], value.shape[2])
            value = check_tensor(name, value, "int", shape, f"[B, H, {size}]", call.q.device)
            check_range(name, value, -1, call.k.shape[2] if name == "vertical" else 2**28, f"{what}, or -1 for none")
            found.append(value.long())
        vertical, slash = found
        return self.prepare_from(spec, call, vertical, slash, touched(slash, slash, self.block, call, 2))


@dataclass(frozen=True)
class Adaptive(Slashes):
    """Per head an A-shape, vertical lines and slashes, or clusters of tiles, as an `Estimate` says."""

    block: int = 64

    name: ClassVar[str] = "adaptive"
    prepared: ClassVar[tuple[str, ...]] = ("estimate",)

    def __post_init__(self) -> None:
        _square(self.name, self.block)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        found = given.get("estimate")
        if not isinstance(found, Estimate):
            fix = "pass estimate=ag.estimate(q, k, ...) at the call"
            raise InputError("estimate", "what ag.estimate returns", type(found).__name__, fix)
        tiles_q = -(-call.q.shape[2] // self.block)
        sizes = (self.block, *call.q.shape[:2], tiles_q, call.k.shape[2], str(call.q.device))
        if found.sizes != sizes:
            names = "(block, B, Hq, tiles_q, Nk, device)"
            raise InputError("estimate", f"one for {names} = {sizes}", f"one for {found.sizes}")
        block, (batch, heads) = self.block, call.q.shape[:2]
        a_shape = (found.kind == A_SHAPE).unsqueeze(-1)
        cluster = (found.kind == CLUSTER).unsqueeze(-1)

        def per_head(near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
            """Of a-shape heads `near` [K], of the others `far` [B, H, K'], none for clusters: [B, H, larger K]."""
            wide = max(near.shape[0], far.shape[2])
            near = torch.nn.functional.pad(near, (0, wide - near.shape[0]), value=-1)
            far = torch.nn.functional.pad(far, (0, wide - far.shape[2]), value=-1)
            return torch.where(cluster, -1, torch.where(a_shape, near, far))

        device = call.q.device
        sink = torch.arange(min(found.sink, call.k.shape[2]), device=device)
        vertical = per_head(sink, found.vertical)
        inside = torch.arange(block, device=device)
        lines = (found.band.unsqueeze(-1) * block + inside).flatten(2)
        slash = per_head(torch.arange(found.window, device=device), torch.where(lines < 0, -1, lines))
        # The same distances as runs: the window in runs of `block`, the last one shorter.
        start = torch.arange(0, found.window, block, device=device)
        first = per_head(start, torch.where(found.band < 0, -1, found.band * block))
        length = torch.where(a_shape, (found.window - first).clamp(max=block), block)
        diagonal = touched(first, first + length - 1, block, call, 3)
        return self.prepare_from(spec, call, vertical, slash, diagonal, (cluster.view(batch, heads), found.index))


def vertical_slash(block: int = 64) -> VerticalSlash:
    """Key columns and distances, chosen per head (MInference, arXiv 2407.02490; SparseAccelerate, 2412.06198):
    `Spec(keys=ag.vertical_slash(), mask=ag.causal())`, called with vertical= int [B, H, Kv], keys j, and slash=
    int [B, H, Ks], distances i - j of at least 0; -1 for none, H query heads. A pair is attended iff j is in vertical or
    i - j is in slash, and the mask holds; what is named twice counts once. Work goes with the tiles (`block` a side, a
    multiple of 16) that slash lines touch, and with Kv. Raises SpecError, and InputError at the call.
    """
    return VerticalSlash(_square("vertical_slash", block))


def adaptive(block: int = 64) -> Adaptive:
    """Per head the pattern that `ag.estimate` chose for it, all heads in one call: `Spec(keys=ag.adaptive(64),
    mask=ag.causal())`, called with estimate=ag.estimate(q, k, block=64, ...). Raises SpecError, and InputError at the call.
    """
    return Adaptive(_square("adaptive", block))


def _square(place: str, block: Any) -> int:
    try:
        return TileLists(positive(place, block), block).block_m
    except SpecError:
        raise SpecError(f"{place}: block is a multiple of 16, got {block!r}") from None

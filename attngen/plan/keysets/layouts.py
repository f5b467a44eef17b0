"""Tile patterns that a formula lists: butterfly and BigBird. Time and memory go with the live tiles, not with the grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attngen.language.call import Call
from attngen.language.keysets.tiles import BigBird, Butterfly
from attngen.language.programs import uniform
from attngen.plan.keysets.tiles import Live, grid, live

if TYPE_CHECKING:
    from attngen.language.spec import Spec


@live.register(Butterfly)
def _(keys: Butterfly, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
    tiles_q, tiles_k = grid(keys.block, call)
    device = call.q.device
    side = keys.size or 1 << (max(tiles_q, tiles_k, 1) - 1).bit_length()
    # Without a size there is nothing to stretch: a tile is its own place on the grid.
    along_q, along_k = (tiles_q, tiles_k) if keys.size else (side, side)
    bits = side.bit_length() - 1
    step = torch.arange(-1, bits if keys.levels is None else min(bits, keys.levels), device=device)
    step = torch.where(step < 0, 0, 1 << step.clamp(min=0))  # 0, 1, 2, 4, ..
    row = torch.arange(tiles_q, device=device)
    cell = (row * side // max(along_q, 1)).unsqueeze(-1) ^ step  # [tiles_q, steps]
    # A cell of the grid is the tiles c with c * side // along_k == cell.
    first, stop = (-((-x * along_k) // side) for x in (cell, cell + 1))
    tile = first.unsqueeze(-1) + torch.arange(-(-along_k // side), device=device)
    tile = torch.where((tile < stop.unsqueeze(-1)) & (tile < tiles_k), tile, -1).flatten(1)
    return with_globals(tile.view(1, 1, *tile.shape), keys.global_rows, keys.global_columns, tiles_k)


@live.register(BigBird)
def _(keys: BigBird, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
    tiles_q, tiles_k = grid(keys.block, call)
    device, reach = call.q.device, keys.window // 2
    row = torch.arange(tiles_q, device=device).unsqueeze(-1)
    center = row * tiles_k // max(tiles_q, 1)
    near = center + torch.arange(keys.window, device=device) - reach
    near = torch.where((near >= 0) & (near < tiles_k), near, -1).view(1, 1, *near.shape)
    # The tiles that are left to draw from are those behind the global ones, without the window.
    start = (center - reach).clamp(min=keys.globals, max=tiles_k)
    stop = (center - reach + keys.window).clamp(min=keys.globals, max=tiles_k)
    drawn = _draw(keys, tiles_k - keys.globals - (stop - start), call.q.shape[1]) + keys.globals
    drawn = torch.where(drawn >= start, drawn + (stop - start), drawn)
    drawn = torch.where(drawn < tiles_k, drawn, -1)
    tile = torch.cat([near.expand(1, drawn.shape[1], -1, -1), drawn], -1)
    return with_globals(tile, keys.globals, keys.globals, tiles_k)


def _draw(keys: BigBird, left: torch.Tensor, heads: int) -> torch.Tensor:
    """`random` different numbers below `left` [tiles_q, 1], uniformly (R. Floyd's sampling): [1, H, tiles_q, random];
    numbers of at least `left` where there are not enough.
    """
    rows = torch.arange(len(left), device=left.device).view(1, 1, -1, 1)
    head = torch.arange(heads, device=left.device).view(1, -1, 1, 1)
    drawn = torch.zeros((1, heads, len(left), 0), dtype=torch.int64, device=left.device)
    # Numbers are made on the device: copying them there would wait for it.
    seed, zero = (torch.full((), number, device=left.device) for number in (keys.seed, 0))
    for number in range(keys.random):
        last = left.view(1, 1, -1, 1) - keys.random + number
        pick = (uniform(seed, zero, head, rows, zero + number).double() * (last + 1)).long()
        pick = torch.where((drawn == pick).any(-1, keepdim=True), last, pick)
        missing = torch.full_like(pick, 2**30)
        drawn = torch.cat([drawn, torch.where(last >= 0, pick, missing)], -1)
    return drawn


def with_globals(tile: torch.Tensor, rows: int, columns: int, tiles_k: int) -> Live:
    """Tiles [1, H', tiles_q, L] without those in the first `rows` and `columns`, which are all live instead."""
    lead, tiles_q, device = tile.shape[:2], tile.shape[2], tile.device
    rows, columns = min(rows, tiles_q), min(columns, tiles_k)
    row = torch.arange(tiles_q, device=device)
    tile = torch.where((tile >= columns) & (row.unsqueeze(-1) >= rows), tile, -1)
    every_row, every_column = row[:rows], torch.arange(tiles_k, device=device)
    owners = [row.repeat_interleave(tile.shape[3]), every_row.repeat_interleave(tiles_k)]
    owners += [row[rows:].repeat_interleave(columns)]
    items = [tile.flatten(2), every_column.repeat(rows).expand(*lead, -1)]
    items += [every_column[:columns].repeat(tiles_q - rows).expand(*lead, -1)]
    return Live(torch.cat(owners).view(1, 1, -1), torch.cat(items, -1))

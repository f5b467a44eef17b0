"""Tile patterns that a formula lists: butterfly and BigBird. Time and memory go with the live tiles, not with the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import SpecError
from attngen.language.expression.evaluate import uniform
from attngen.plan.keysets.base import positive
from attngen.plan.keysets.tiles import Block, Live, Tiles, read_block

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec


@dataclass(frozen=True)
class Butterfly(Tiles):
    """Tiles whose places on a grid differ in at most one bit."""

    block: Block
    size: int | None = None
    levels: int | None = None
    global_rows: int = 0
    global_columns: int = 0

    name: ClassVar[str] = "butterfly"

    def __post_init__(self) -> None:
        read_block(self.name, self.block)
        if self.size is not None and positive("butterfly: size", self.size) & (self.size - 1):
            raise SpecError(f"butterfly: size is a power of two, got {self.size}")
        for place, least in (("levels", 0), ("global_rows", 0), ("global_columns", 0)):
            if getattr(self, place) is not None:
                positive(f"butterfly: {place}", getattr(self, place), least)

    def live(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
        tiles_q, tiles_k = self.grid(call)
        device = call.q.device
        side = self.size or 1 << (max(tiles_q, tiles_k, 1) - 1).bit_length()
        # Without a size there is nothing to stretch: a tile is its own place on the grid.
        along_q, along_k = (tiles_q, tiles_k) if self.size else (side, side)
        bits = side.bit_length() - 1
        step = torch.arange(-1, bits if self.levels is None else min(bits, self.levels), device=device)
        step = torch.where(step < 0, 0, 1 << step.clamp(min=0))  # 0, 1, 2, 4, ..
        row = torch.arange(tiles_q, device=device)
        cell = (row * side // max(along_q, 1)).unsqueeze(-1) ^ step  # [tiles_q, steps]
        # A cell of the grid is the tiles c with c * side // along_k == cell.
        first, stop = (-((-x * along_k) // side) for x in (cell, cell + 1))
        tile = first.unsqueeze(-1) + torch.arange(-(-along_k // side), device=device)
        tile = torch.where((tile < stop.unsqueeze(-1)) & (tile < tiles_k), tile, -1).flatten(1)
        return with_globals(tile.view(1, 1, *tile.shape), self.global_rows, self.global_columns, tiles_k)


@dataclass(frozen=True)
class BigBird(Tiles):
    """A window of tiles, global ones, and random ones."""

    block: Block
    window: int = 3
    globals: int = 1
    random: int = 3
    seed: int = 0

    name: ClassVar[str] = "big_bird"

    def __post_init__(self) -> None:
        read_block(self.name, self.block)
        for place in ("window", "globals", "random", "seed"):
            positive(f"big_bird: {place}", getattr(self, place), 0)
        if self.window % 2 == 0 and self.window:
            raise SpecError(f"big_bird: window is an odd number of tiles (or 0), got {self.window}")

    def live(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
        tiles_q, tiles_k = self.grid(call)
        device, reach = call.q.device, self.window // 2
        row = torch.arange(tiles_q, device=device).unsqueeze(-1)
        center = row * tiles_k // max(tiles_q, 1)
        near = center + torch.arange(self.window, device=device) - reach
        near = torch.where((near >= 0) & (near < tiles_k), near, -1).view(1, 1, *near.shape)
        # The tiles that are left to draw from are those behind the global ones, without the window.
        start = (center - reach).clamp(min=self.globals, max=tiles_k)
        stop = (center - reach + self.window).clamp(min=self.globals, max=tiles_k)
        drawn = self._draw(tiles_k - self.globals - (stop - start), call.q.shape[1]) + self.globals
        drawn = torch.where(drawn >= start, drawn + (stop - start), drawn)
        drawn = torch.where(drawn < tiles_k, drawn, -1)
        tile = torch.cat([near.expand(1, drawn.shape[1], -1, -1), drawn], -1)
        return with_globals(tile, self.globals, self.globals, tiles_k)

    def _draw(self, left: torch.Tensor, heads: int) -> torch.Tensor:
        """`random` different numbers below `left` [tiles_q, 1], uniformly (R. Floyd's sampling): [1, H, tiles_q, random];
        numbers of at least `left` where there are not enough.
        """
        rows = torch.arange(len(left), device=left.device).view(1, 1, -1, 1)
        head = torch.arange(heads, device=left.device).view(1, -1, 1, 1)
        drawn = torch.zeros((1, heads, len(left), 0), dtype=torch.int64, device=left.device)
        # Numbers are made on the device: copying them there would wait for it.
        seed, zero = (torch.full((), number, device=left.device) for number in (self.seed, 0))
        for number in range(self.random):
            last = left.view(1, 1, -1, 1) - self.random + number
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


def butterfly(
    block: Any = (128, 128),
    size: int | None = None,
    levels: int | None = None,
    global_rows: int = 0,
    global_columns: int = 0,
) -> Butterfly:
    """Block-sparse FlashAttention's butterfly (arXiv 2205.14135, section 3.3): `Spec(keys=ag.butterfly((128, 128)))`.

    Places r and c of a square grid are connected iff r xor c is 0 or a power of two below 2^levels (None: every power
    below the grid's side). `size`, a power of two, is the grid's side; it is stretched over the tiles: tile (r, c) is at
    the place (r * size // tiles_q, c * size // tiles_k). None: a grid on which each tile has a place of its own. The first
    `global_rows` query tiles see all keys, and the first `global_columns` key tiles are seen by all. Raises SpecError.
    """
    return Butterfly(read_block("butterfly", block), size, levels, global_rows, global_columns)


def big_bird(block: Any = (64, 64), window: int = 3, globals: int = 1, random: int = 3, seed: int = 0) -> BigBird:
    """BigBird (arXiv 2007.14062): `Spec(keys=ag.big_bird((64, 64), window=3, globals=2, random=3))`, sizes in tiles.

    Query tile r sees: the `window` (odd) key tiles around tile r * tiles_k // tiles_q; the first `globals` key tiles, and
    the first `globals` query tiles see all keys; and `random` other tiles, drawn without replacement for each query tile
    and head, the same for one seed on every device (all the others where there are no more). Raises SpecError.
    """
    return BigBird(read_block("big_bird", block), window, globals, random, seed)

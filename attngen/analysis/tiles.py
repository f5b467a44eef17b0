"""The tile programs run for all tiles of an axis: what each tile visits, as the kernels will."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from attngen.analysis.summaries import Axis
from attngen.analysis.tile_program import Evaluated
from attngen.errors import InputError

EMPTY, PARTIAL, FULL = 0, 1, 2


class Program(Protocol):
    """A walk in tile numbers: `WalkProgram`, `TileProgram`."""

    def evaluate(
        self, first: Any, last: Any, begin: Any, end: Any, block: int, env: Mapping[str, Any]
    ) -> Evaluated: ...


class Walk(Protocol):
    """What running a walk asks of it: `attngen.analysis.walk.Walk`, `attngen.analysis.call_facts.WalkFacts`."""

    @property
    def divisors(self) -> frozenset[str]: ...

    def prepare(
        self, env: Mapping[str, Any], tile: Axis, walked: Axis, block: int, device: Any = "cpu"
    ) -> dict[str, torch.Tensor]: ...


Segments = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (firsts, counts), each [B or 1, H or 1, tiles]


def run(
    walk: Walk,
    program: Program,
    env: Mapping[str, Any],
    tile: Axis,
    walked: Axis,
    block_tile: int,
    block_walked: int,
    device: Any = "cpu",
    tables: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Segments, Segments]:
    """Prepare the walk's tables and run its program for all tiles of an axis: (full segments, partial segments).

    `env`: params and captures by name, "b" int64 [B, 1, 1] and "h" int64 [1, H, 1]. tables: those of the walk, if they are
    there already.
    """
    scope = {**env, **(tables or walk.prepare(env, tile, walked, block_tile, device))}
    starts = torch.arange(0, tile.length, block_tile, device=device).view(1, 1, -1)
    last = (starts + block_tile).clamp(max=tile.length) - 1
    end = walked.begin + walked.length
    full_first, full_count, partial_first, partial_count = program.evaluate(
        starts + tile.begin, last + tile.begin, walked.begin, end, block_walked, scope
    )
    return tuple(zip(full_first, full_count, strict=True)), tuple(zip(partial_first, partial_count, strict=True))


def paint(full: Segments, partial: Segments, tiles: int, walked_tiles: int, b: int = 0, h: int = 0) -> torch.Tensor:
    """The segments of one (b, h) as int8 [tiles, walked tiles]: 0 empty, 1 partial, 2 full."""
    canvas = torch.zeros(tiles, walked_tiles, dtype=torch.int8, device="cpu")
    columns = torch.arange(walked_tiles, device="cpu")
    for value, segments in ((FULL, full), (PARTIAL, partial)):
        for first, count in segments:
            low, size = (x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)].cpu().view(-1, 1) for x in (first, count))
            canvas.masked_fill_((columns >= low) & (columns < low + size), value)
    return canvas


def check_positive(walk: Walk, env: Mapping[str, Any]) -> None:
    """InputError for a param that divides a position and is not positive."""
    for name in walk.divisors:
        value = env.get(name)
        if value is not None and not isinstance(value, torch.Tensor) and value < 1:
            raise InputError(name, "at least 1, since the mask divides by it", value)

"""Per-tile summaries of captured data, for masks that no closed form describes: O(N) time and memory, no host sync.

A table holds a few int32 values per (b, h, tile of the tile axis). Four kinds, for an atom with a tile-axis part A
(which includes what depends on neither axis) and a walked part C:

- `extent`: the least and the largest A over the tile's rows;
- `order`:  the hull of the walked positions with A + C >= 0 (or > 0) for some row of the tile;
- `match`:  the hull of the walked positions with A + C == 0 for some row, and one run of positions where it holds for
            every row (empty unless A is constant over the tile): the walk's full part;
- `floor`:  floor(A) of a real A that is the same for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.language.call import LARGEST_PARAM
from attngen.language.programs import Node, broadcast, evaluate, negative, tensor_of

GRANULE = 16  # walked positions summarised together by an `order` table
CHUNK = 8192  # positions evaluated at a time, so that temporaries stay small
LIMIT = LARGEST_PARAM  # of a value, so that a bound's sums with positions fit 32 bits; none so large is ever met
ROOM = 1e-6  # what a sum of real terms may be off by, relative to them


@dataclass(frozen=True)
class Summary:
    """How to compute one table: its kind, the programs A and C, whether the order is strict and the terms are real numbers, and the
    names of its values, one int32 [B or 1, H or 1, tiles] each.
    """

    kind: str
    tile: Node
    walked: Node
    strict: bool
    real: bool
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a call: its symbol's name, its first original position (an int, or int tensor [B, 1, 1]) and its
    length.
    """

    name: str
    begin: Any
    length: int

    def positions(self, start: int, stop: int, device: Any) -> torch.Tensor:
        """Original positions of rows start..stop, [B or 1, 1, stop - start]."""
        return torch.arange(start, stop, device=device).view(1, 1, -1) + self.begin

    def last(self) -> Any:
        """One past the last original position."""
        return self.begin + self.length


def prepare(
    tables: Iterable[Summary], env: Mapping[str, Any], tile: Axis, walked: Axis, block: int, device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """Compute tables: {symbol name: int32 [B or 1, H or 1, tiles]}, walked positions being original ones.

    `env` has the captures by name, and "b" [B, 1, 1] and "h" [1, H, 1] as integer tensors where expressions use them.
    `block` is the tile's size on the tile axis. Launches a bounded number of torch operations and never waits for the
    device. On a GPU one generated kernel does the same (`attngen.lowering.tables`).
    """
    values: dict[str, torch.Tensor] = {}
    if tile.length == 0 or walked.length == 0:  # nothing to visit, whatever the bounds
        empty = torch.zeros((1, 1, -(-tile.length // block)), dtype=torch.int32, device=device)
        return {name: empty for table in tables for name in table.symbols}
    for table in tables:
        results = KINDS[table.kind](table, env, tile, walked, block, device)
        for name, result in zip(table.symbols, results, strict=True):
            values[name] = result.clamp(-LIMIT, LIMIT).to(torch.int32)
    return values


# -- kinds ------------------------------------------------------------------------------------------------------------


def _extent(table: Summary, env: Any, tile: Axis, walked: Axis, block: int, device: Any) -> tuple[torch.Tensor, ...]:
    return _blocks(table.tile, env, tile, block, device, torch.amin), _blocks(
        table.tile, env, tile, block, device, torch.amax
    )


def _order(table: Summary, env: Any, tile: Axis, walked: Axis, block: int, device: Any) -> tuple[torch.Tensor, ...]:
    """Running maxima over granules of C find the granule, a second look inside it finds the position."""
    threshold = -_blocks(table.tile, env, tile, block, device, torch.amax)
    peaks = _blocks(table.walked, env, walked, GRANULE, device, torch.amax)
    if table.real:  # leave room for a kernel that sums in another order
        size = torch.nan_to_num(threshold, posinf=0.0, neginf=0.0).abs()
        largest = _blocks(table.walked, env, walked, GRANULE, device, _largest_size).amax(-1, keepdim=True)
        threshold = threshold - ROOM * (size + largest)
    peaks, threshold = _aligned(peaks, threshold)
    granules = peaks.shape[-1]

    def search(running: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(running, threshold, right=table.strict)

    ahead = search(peaks.cummax(-1).values)
    behind = granules - 1 - search(peaks.flip(-1).cummax(-1).values)
    first = _inside(table, env, walked, ahead, threshold, device).amin(-1)
    last = _inside(table, env, walked, behind, threshold, device, missing=-1).amax(-1)
    return first + walked.begin, last + 1 + walked.begin


def _largest_size(values: torch.Tensor, dim: int, keepdim: bool = False) -> torch.Tensor:
    return torch.nan_to_num(values, posinf=0.0, neginf=0.0).abs().amax(dim, keepdim=keepdim)


def _inside(
    table: Summary,
    env: Any,
    walked: Axis,
    granule: torch.Tensor,
    threshold: torch.Tensor,
    device: Any,
    missing: int | None = None,
) -> torch.Tensor:
    """Rows of each tile's granule that reach its threshold, [B', H', tiles, GRANULE]; `missing` for the others."""
    missing = walked.length if missing is None else missing
    rows = granule.unsqueeze(-1) * GRANULE + torch.arange(GRANULE, device=device)
    inside = (rows >= 0) & (rows < walked.length)
    flat = rows.clamp(0, walked.length - 1).flatten(-2)
    values = _nan_holds(evaluate(table.walked, {**env, walked.name: flat + walked.begin}))
    values = values.expand(broadcast(values.shape, flat.shape)).unflatten(-1, (-1, GRANULE))
    bound = threshold.unsqueeze(-1)
    return torch.where(inside & ((values > bound) if table.strict else (values >= bound)), rows, missing)


def _match(table: Summary, env: Any, tile: Axis, walked: Axis, block: int, device: Any) -> tuple[torch.Tensor, ...]:
    """Runs of equal C, sorted by value, are looked up for every run of equal A; the tile's hull is over its runs."""
    tiles = -(-tile.length // block)
    wanted, wanted_start, _, wanted_fits = _runs(negative(table.tile), env, tile, device, block)
    value, start, stop, fits = _runs(table.walked, env, walked, device)
    value, order = value.sort(dim=-1, stable=True)
    start, stop = start.gather(-1, order), stop.gather(-1, order)
    wanted, value = _aligned(wanted, value)
    wanted_start, start, stop = (x.expand(*wanted.shape[:-1], -1) for x in (wanted_start, start, stop))
    low, high = torch.searchsorted(value, wanted), torch.searchsorted(value, wanted, right=True)
    found, n = high > low, walked.length
    at_low, at_high = low.clamp(max=value.shape[-1] - 1), (high - 1).clamp(min=0)
    first = torch.where(found, start.gather(-1, at_low), n)
    last = torch.where(found, stop.gather(-1, at_high), 0)
    run_stop = torch.where(found, stop.gather(-1, at_low), 0)
    target = torch.where(
        wanted_start < tile.length, wanted_start // block, tiles
    ).long()  # unused slots go to an extra tile

    def reduce(source: torch.Tensor, how: str, initial: Any) -> torch.Tensor:
        shape = (*source.shape[:-1], tiles + 1)
        return torch.full(shape, initial, dtype=source.dtype, device=device).scatter_reduce(-1, target, source, how)[
            ..., :-1
        ]

    known = (wanted_fits & fits).expand(*wanted.shape[:-1], 1)
    limits = torch.iinfo(wanted.dtype) if not wanted.is_floating_point() else torch.finfo(wanted.dtype)
    constant = reduce(wanted, "amin", limits.max) == reduce(wanted, "amax", limits.min)
    hull_first, hull_stop = reduce(first, "amin", n), reduce(last, "amax", 0)
    run_first, run_stop = reduce(first, "amin", n), reduce(run_stop, "amax", 0)
    full = known & constant & (run_first < run_stop)
    return tuple(
        rows + walked.begin
        for rows in (
            torch.where(known, hull_first, 0),
            torch.where(known, hull_stop, n),
            torch.where(full, run_first, n),
            torch.where(full, run_stop, n),
        )
    )


def _floor(table: Summary, env: Any, tile: Axis, walked: Axis, block: int, device: Any) -> tuple[torch.Tensor, ...]:
    value = _nan_holds(tensor_of(evaluate(table.tile, env), device).double())
    return (value.floor().expand(*value.shape[:-1] if value.ndim else (1, 1), -(-tile.length // block)),)


KINDS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "extent": _extent,
    "order": _order,
    "match": _match,
    "floor": _floor,
}


# -- steps ------------------------------------------------------------------------------------------------------------


def _chunks(expr: Any, env: Any, axis: Axis, device: Any, multiple: int) -> Iterable[tuple[int, torch.Tensor]]:
    """(first row, values [B', H', rows]) over the axis, in pieces whose size is a multiple of `multiple`."""
    size = -(-max(CHUNK, axis.length // 64) // multiple) * multiple
    for start in range(0, axis.length, size):
        stop = min(start + size, axis.length)
        positions = axis.positions(start, stop, device)
        values = tensor_of(evaluate(expr, {**env, axis.name: positions}), device)
        yield start, values.expand(broadcast(values.shape, (1, 1, stop - start)))


def _blocks(expr: Any, env: Any, axis: Axis, block: int, device: Any, reduce: Any) -> torch.Tensor:
    """Reduce an expression over blocks of an axis: [B', H', blocks]."""
    parts = []
    for _, values in _chunks(expr, env, axis, device, block):
        values, ragged = _nan_holds(values), values.shape[-1] % block
        whole = values[..., : values.shape[-1] - ragged]
        if whole.shape[-1]:
            parts.append(reduce(whole.unflatten(-1, (-1, block)), -1))
        if ragged:
            parts.append(reduce(values[..., -ragged:], -1, keepdim=True))
    return torch.cat(parts, -1)


def _nan_holds(values: torch.Tensor) -> torch.Tensor:
    """A nan makes both an atom and its negation count as possible, so that its tile is neither skipped nor full."""
    return (
        torch.nan_to_num(values, nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))
        if values.is_floating_point()
        else values
    )


def _runs(
    expr: Any, env: Any, axis: Axis, device: Any, break_at: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximal runs of equal values, also broken at multiples of `break_at`.

    Returns value, first row and stop row [B', H', runs], and whether they all fit [B', H', 1]. There are as many slots
    as rows in short axes and a sixteenth of that in long ones; unused slots have the largest value and start at the
    axis' end.
    """
    n = axis.length
    slots = min(n, max(4096, n // 16) + (-(-n // break_at) if break_at else 0))
    value = start = count = previous = None
    for row, values in _chunks(expr, env, axis, device, break_at or 1):
        rows = torch.arange(row, row + values.shape[-1], dtype=torch.int32, device=device)
        if value is None or start is None or count is None or previous is None:
            lead = values.shape[:-1]
            largest = float("inf") if values.is_floating_point() else torch.iinfo(values.dtype).max
            value = torch.full((*lead, slots + 1), largest, dtype=values.dtype, device=device)
            start = torch.full((*lead, slots + 1), n, dtype=torch.int32, device=device)
            count = torch.zeros((*lead, 1), dtype=torch.int64, device=device)
            previous = values[..., :1]
        before = torch.cat([previous, values[..., :-1]], -1)
        breaks = values != before
        if row == 0:
            breaks[..., 0] = True
        if break_at:
            breaks = breaks | (rows % break_at == 0)
        index = breaks.cumsum(-1) + (count - 1)
        slot = torch.where(breaks, index.clamp(max=slots), slots)
        value.scatter_(-1, slot, values)
        start.scatter_(-1, slot, rows.expand_as(slot))
        count, previous = index[..., -1:] + 1, values[..., -1:]
    assert value is not None and start is not None and count is not None
    value, start = value[..., :slots], start[..., :slots]
    stop = torch.cat([start[..., 1:], start.new_full((*start.shape[:-1], 1), n)], -1)
    return value, start, stop, count <= slots


def _aligned(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two with equal batch and head dimensions and a common dtype."""
    lead = broadcast(a.shape[:-1], b.shape[:-1])
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype).expand(*lead, -1).contiguous(), b.to(dtype).expand(*lead, -1).contiguous()

"""Bytes that a forward asks of memory, counted from its plan: the tiles that the kernel's own walk visits, not a formula.

`of` goes through the steps of the plan that the call would run with. What it counts are requests, before any cache: where
heads of a group walk their keys apart, each of them asks for them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from attngen.analysis import Facts, facts
from attngen.backends import meta, work
from attngen.language.call import Call
from attngen.language.device import multiprocessors, programs_at_once
from attngen.language.lists import RowLists, TileLists
from attngen.lowering import Source, render
from attngen.plan.stream_k import Runs, stream_k
from attngen.runtime.attention import CompiledAttention
from attngen.schedule import Schedule, Target
from attngen.schedule.choice import choose, on_gpu

MODELLED, PROCESSORS = "sm_90", 132  # an H200, where no GPU is at hand


@dataclass(frozen=True)
class Traffic:
    """Bytes. keys: K and V rows of the tiles visited, cut at the end of the keys. queries: q, by every program that works on
    them. results: out and lse, written. states: the partial states of a split, written and read again.

    Not counted: captured tensors, lists, page tables, and what a key set moves while it prepares, gathers and merges.
    """

    keys: int = 0
    queries: int = 0
    results: int = 0
    states: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.total:,} bytes: keys and values {self.keys:,}, queries {self.queries:,}, "
            f"results {self.results:,}, partial states {self.states:,}"
        )


def of(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int | torch.Tensor = 0,
    schedule: Schedule | None = None,
    **captures: Any,
) -> Traffic:
    """What a forward with these arguments reads and writes; arguments as at a call, see `CompiledAttention`.

    schedule: decisions over those of `attention`. What both leave open is what the call would run with on the GPU that holds
    the tensors; elsewhere the model's choice for an H200 (with backend="interpret" the interpreter's small tiles). A call
    with a key set or ragged lengths is run once, and the traffic of the attentions in its plan is added up. The counts wait for
    the device. Raises InputError, ScheduleError.
    """
    total = Traffic()
    for _, call in attention.attends(q, k, v, q_offset=q_offset, **captures):
        total += _forward(attention, call, schedule)
    return total


def _forward(attention: CompiledAttention, call: Call, given: Schedule | None) -> Traffic:
    known = facts(call.spec)
    schedule = _schedule(attention, call, known, given)
    size = call.q.element_size()
    rows_of_floats = 1 + known.restores(call.q.dtype)  # lse, and what a large one lacks
    results = call.q[..., 0].numel() * (call.v.shape[3] * size + 4 * rows_of_floats)
    if call.q.numel() == 0 or call.n_k == 0 or call.k.numel() == 0:
        return Traffic(results=results)
    d, dv = call.q.shape[3], call.v.shape[3]
    source = render(call.spec, known, "forward", head_dim=d, head_dim_v=dv, dtype=call.q.dtype, schedule=schedule)
    tables = work.walk_tables(call, known, schedule, "forward", meta.tables)
    runs: Runs | None = None
    if schedule.split == "stream":
        runs = stream_k(work.tile_counts(call, known, source.grid, schedule, tables), schedule.programs or PROCESSORS)
    keys = int(_keys(call, known, source, schedule, tables).sum())
    rows = int((_rows(call, source, schedule) * _programs(call, source, schedule, runs)).sum())
    states = _state_bytes(call, source, schedule, runs)  # written by the first launch, and read by the second
    return Traffic(keys * (d + dv) * size, rows * d * size, results, 2 * states)


def _schedule(attention: CompiledAttention, call: Call, known: Facts, given: Schedule | None) -> Schedule:
    """What the call runs with on its GPU or in the interpreter; elsewhere the model's choice for the modelled GPU."""
    pins = (given or Schedule()).over(attention.pins)
    if call.q.is_cuda or attention.backend == "interpret":
        backend = "triton" if call.q.is_cuda else "interpret"
        schedule = choose(call, known, backend, pins, attention.db)[0]
    else:
        schedule = on_gpu(call, known, Target.named(MODELLED), PROCESSORS, pins)
    if schedule.split == "stream" and schedule.programs is None:
        processors = multiprocessors(call.q.device) if call.q.is_cuda else PROCESSORS
        schedule = replace(schedule, programs=programs_at_once(processors, schedule.tile("forward").num_warps))
    return schedule


# -- per output of the kernel, int64 [outputs] in the order of its programs ---------------------------------------------


def _keys(
    call: Call, known: Facts, source: Source, schedule: Schedule, tables: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Keys that an output's programs load. A tile that reaches past the last key is cut there, as the kernel's loads are."""
    n_k, block_n, lists, grid = call.n_k, schedule.tile("forward").block_n, call.spec.lists, source.grid
    tiles = grid.tiles(work.sizes_of(call, schedule))
    if lists is None:
        rows, group = call.q.shape[2], call.group if grid.rows == "packed" else 1
        offset = call.q_offset.view(-1, 1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
        start = torch.arange(tiles, device=call.q.device).view(1, 1, -1) * grid.block
        last = ((start + grid.block - 1) // group).clamp(max=rows - 1)
        scope = {**work.environment(call), **tables}
        walk = known.program_keys.evaluate(start // group + offset, last + offset, 0, n_k, block_n, scope)
        found = torch.zeros((1, 1, 1), dtype=torch.int64, device=call.q.device)
        for firsts, counts in ((walk[0], walk[1]), (walk[2], walk[3])):
            for first, count in zip(firsts, counts, strict=True):
                found = found + (((first + count) * block_n).clamp(max=n_k) - first * block_n) * (count > 0)
        return _spread(call, source, found, tiles)
    runs = call.captures["query_runs"].long()
    if isinstance(lists, RowLists):
        return _spread(call, source, runs[..., 1], tiles)
    own = runs[..., 1:].sum(-1)
    ragged = torch.nn.functional.pad((call.captures["query_tiles"] == n_k // lists.block_n).long().cumsum(-1), (1, 0))
    ragged = ragged.expand(*torch.broadcast_shapes(ragged.shape[:2], runs.shape[:2]), -1)
    first = runs[..., 0].expand(*ragged.shape[:2], -1)
    past = ragged.gather(-1, first + own.expand_as(first)) - ragged.gather(-1, first)
    return _spread(call, source, own * lists.block_n - past * (-n_k % lists.block_n), tiles)


def _spread(call: Call, source: Source, keys: torch.Tensor, tiles: int) -> torch.Tensor:
    """From lists or walks [B', H', *] to the kernel's outputs."""
    lists, grid = call.spec.lists, source.grid
    heads = call.q.shape[1] if grid.heads == "q" else call.k.shape[1]
    if isinstance(lists, TileLists):
        keys = keys.repeat_interleave(lists.block_m // grid.block, -1)[..., :tiles]
    elif isinstance(lists, RowLists):
        keys = keys.repeat_interleave(tiles // call.q.shape[2], -1)
    if keys.shape[1] == call.q.shape[1] > heads:
        keys = keys[:, :: call.group]
    elif keys.shape[1] not in (1, heads):
        keys = keys.repeat_interleave(call.group, 1)
    return keys.expand(call.q.shape[0], heads, tiles).reshape(-1)


def _rows(call: Call, source: Source, schedule: Schedule) -> torch.Tensor:
    """Rows of q of each output; a tile's rows that are copies of one are one."""
    grid, (batch, heads, n_q, _), group = source.grid, call.q.shape, call.group
    tiles = grid.tiles(work.sizes_of(call, schedule))
    place = torch.arange(tiles, device=call.q.device)
    length = {"rows": n_q, "packed": n_q * group, "heads": group, "single": n_q}[grid.rows]
    if grid.rows == "heads":
        place = place % (tiles // n_q)
    block = 1 if grid.rows == "single" else grid.block
    rows = (length - place * block).clamp(max=block)
    return rows.repeat(batch * (heads if grid.heads == "q" else call.k.shape[1]))


def _programs(call: Call, source: Source, schedule: Schedule, runs: Runs | None) -> torch.Tensor | int:
    """How many programs work on each output, and so load its queries."""
    if runs is not None:
        return (runs.owners[:, 1] - runs.owners[:, 0] + 1).long()
    return schedule.split if isinstance(schedule.split, int) else 1


def _state_bytes(call: Call, source: Source, schedule: Schedule, runs: Runs | None) -> int:
    """Partial states, moved once: float32 maximum, sum and weighted values of every row of a tile."""
    if schedule.split in (None, 1):
        return 0
    if runs is None:
        number = source.grid.outputs(work.sizes_of(call, schedule)) * int(schedule.split or 1)
    else:
        owners = _programs(call, source, schedule, runs)
        number = int(torch.where(torch.as_tensor(owners) > 1, owners, 0).sum())
    return number * source.grid.block * (call.v.shape[3] + 2) * 4

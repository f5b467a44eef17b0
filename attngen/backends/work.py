"""How much a launch has to do: its sizes, the tiles that each output visits, and how a split forward shares them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch

from attngen.language.call import Call
from attngen.language.device import cache_bytes, multiprocessors, programs_at_once
from attngen.language.lists import TileLists
from attngen.language.schedule import Schedule
from attngen.plan.grid import Grid
from attngen.plan.stream_k import Runs, slots, stream_k

Facts = Any  # `attngen.analysis.spec_facts.Facts`, or of a pack `attngen.analysis.call_facts.CallFacts`
MOST_COUNTED = 64  # query tiles


def table_tiles(call: Call, schedule: Schedule, kernel: str) -> int:
    """How many tiles those tables are of."""
    tile = schedule.tile(kernel)
    return -(-call.n_k // tile.block_n) if kernel == "dkv" else -(-call.q.shape[2] // tile.block_m)


def environment(call: Call) -> dict[str, Any]:
    """What walks and tables read."""
    return {
        **call.captures,
        **call.params,
        "b": torch.arange(call.q.shape[0], device=call.q.device).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1], device=call.q.device).view(1, -1, 1),
        "q_offset": call.offset_column,
    }


def sizes_of(call: Call, schedule: Schedule, heads_of: str = "q") -> dict[str, int]:
    """The lengths that kernels and grids take. heads_of: what a kernel's grid has programs for, see `Grid.heads`."""
    batch, heads, n_q, _ = call.q.shape
    processors = multiprocessors(call.q.device)
    return {
        "batch": batch,
        "heads": heads,
        "group": call.group,
        "n_q": n_q,
        "n_k": call.n_k,
        "pages": call.k.shape[0],
        "splits": schedule.split if isinstance(schedule.split, int) else 1,
        "programs": schedule.programs or programs_at_once(processors, schedule.tile("forward").num_warps),
        "multiprocessors": processors,
        "together": heads_together(call, heads_of),
    }


def heads_together(call: Call, heads_of: str) -> int:
    """How many of a grid's heads have tiles that come by turns, by the keys and values that fit half of the second-level cache."""
    every = call.q.shape[0] * call.q.shape[1] // call.group
    head = max(1, call.n_k * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size())
    found = turns(every, cache_bytes(call.q.device) // 2 // head)
    return found if heads_of == "kv" else found * call.group


def turns(every: int, fit: int) -> int:
    """As many heads as fit, or a few less that all are a multiple of: a last few heads alone would wait for their longest tile."""
    fit = max(1, min(every, fit))
    return next((heads for heads in range(fit, fit // 2, -1) if every % heads == 0), fit)


def stream_runs(
    call: Call, facts: Facts, schedule: Schedule, grid: Grid, sizes: dict[str, int], walk: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Equal runs of all outputs' key tiles over the programs of a stream-K launch, without waiting for the device."""
    counts = _counted(call, facts, grid, grid.tiles(sizes), schedule)
    if counts is not None:
        stream = torch.cuda.current_stream(call.q.device).cuda_stream if call.q.is_cuda else 0
        return _equal_runs(counts, grid.outputs(sizes) // len(counts), sizes["programs"], call.q.device, stream)
    return _named(stream_k(tile_counts(call, facts, grid, schedule, walk), sizes["programs"]))


def _named(runs: Runs) -> dict[str, torch.Tensor]:
    return {"starts": runs.starts, "begins": runs.begin, "firsts": runs.first, "owners": runs.owners}


def _counted(call: Call, facts: Facts, grid: Grid, tiles: int, schedule: Schedule) -> tuple[int, ...] | None:
    """How many key tiles each query tile of any head visits, counted here, where that is a matter of few integers: in decoding it
    changes once in many tokens. Not while a graph is captured, which would keep what `_equal_runs` may forget.
    """
    program = facts.program_keys.scalar
    if call.spec.lists is not None or program is None or program.loads or program.by_batch or program.by_head:
        return None
    if not 0 < tiles <= MOST_COUNTED or isinstance(call.q_offset, torch.Tensor):
        return None
    if call.q.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    group, block_n = call.group if grid.rows == "packed" else 1, schedule.tile("forward").block_n
    found = []
    for start in range(0, tiles * grid.block, grid.block):
        last = min((start + grid.block - 1) // group, call.q.shape[2] - 1)
        edges = start // group + call.q_offset, last + call.q_offset
        runs = program.runs({**call.params, "q_offset": call.q_offset}, *edges, call.n_k, block_n, 0, 0)
        found.append(sum(-(-(stop - first) // block_n) for first, stop, _ in runs))
    return tuple(found)


@lru_cache(maxsize=256)
def _equal_runs(
    counts: tuple[int, ...], repeat: int, programs: int, device: torch.device, stream: int
) -> dict[str, torch.Tensor]:
    """stream: the one that makes them, and reads them."""
    return _named(stream_k(torch.tensor(counts, dtype=torch.int64, device=device).repeat(repeat), programs))


def tile_counts(
    call: Call, facts: Facts, grid: Grid, schedule: Schedule, tables: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """How many key tiles each output of the forward kernel visits: int64 [outputs], in the order of its programs."""
    lists, batch, block_n = call.spec.lists, call.q.shape[0], schedule.tile("forward").block_n
    per_head = grid.heads == "q"
    heads = call.q.shape[1] if per_head else call.k.shape[1]
    tiles, device = grid.tiles(sizes_of(call, schedule)), call.q.device
    if lists is None:
        rows, group = call.q.shape[2], call.group if grid.rows == "packed" else 1
        offset = call.offset_column
        start = torch.arange(tiles, device=device).view(1, 1, -1) * grid.block
        last = ((start + grid.block - 1) // group).clamp(max=rows - 1)
        scope = {**environment(call), **tables}
        found = facts.program_keys.evaluate(start // group + offset, last + offset, 0, call.n_k, block_n, scope)
        counts = sum(
            (x for part in (found[1], found[3]) for x in part), torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
        )
    else:
        runs = call.captures["query_runs"]
        if isinstance(lists, TileLists):
            counts = runs[..., 1:].sum(-1) * (lists.block_n // block_n)
            counts = counts.repeat_interleave(lists.block_m // grid.block, -1)[..., :tiles]
        else:
            counts = (-(-runs[..., 1] // block_n)).repeat_interleave(tiles // max(call.q.shape[2], 1), -1)
        if not per_head and counts.shape[1] == call.q.shape[1] != heads:
            counts = counts[:, :: call.group]
        if per_head and counts.shape[1] not in (1, heads):
            counts = counts.repeat_interleave(call.group, 1)
    return counts.long().expand(batch, heads, tiles).reshape(-1)


def states_of(call: Call, grid: Grid, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Buffers for the partial states of a split forward, float32."""
    outputs = grid.outputs(sizes)
    number = outputs * sizes["splits"] if grid.sliced == "split" else slots(outputs, sizes["programs"])
    new = partial(torch.empty, dtype=torch.float32, device=call.q.device)
    return {"states": new((number, grid.block, call.v.shape[3])), "maxima": new((number, 2, grid.block))}


def walk_tables(
    call: Call, facts: Facts, schedule: Schedule, kernel: str, make: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The given tables, or those of this call, as `make` makes them; nothing for a walk that needs none."""
    walk = facts.walk_of(kernel)
    if call.spec.lists is not None or not walk.needs_tables:
        return {}
    return call.tables.get(kernel) or make(call, facts, schedule, kernel)

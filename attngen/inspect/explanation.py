"""What attngen does with one call and why, as a value: `explain` prints it as text, `page` as a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.analysis import GPUS, Cost, Facts, tile_map
from attngen.analysis.cost import visited_pairs
from attngen.backends import pick
from attngen.backends.cpu.tiles import grain_of
from attngen.language.call import Call
from attngen.language.lists import RowLists, TileLists
from attngen.language.spec import Spec
from attngen.plan.launches import backward_launches, forward_launches
from attngen.plan.plan import Plan, Sizes
from attngen.plan.steps import Attend
from attngen.runtime.attention import CompiledAttention
from attngen.runtime.executable import tensors_of
from attngen.schedule import Schedule

ALTERNATIVES = ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128))
CPU_ALTERNATIVES = (32, 64, 128, 256, 512)  # queries of a tile
MOST_TILES = 2**22  # a finer map would take seconds to draw


@dataclass(frozen=True)
class Buffer:
    """What a step makes: its name, dtype, shape and size in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')} {list(self.shape)}, {self.bytes:,} bytes"


@dataclass(frozen=True)
class Alternative:
    """A forward tile, and the pairs that it visits for each pair that is attended. chosen: this is the schedule's own."""

    block_m: int
    block_n: int
    visited: float
    chosen: bool


@dataclass(frozen=True, eq=False)
class Attention:
    """One ordinary attention of a call. name: its step in the plan. tile: the (query rows, keys) that a forward tile's pairs are
    rounded out to. tiles: the map of batch 0, head 0 (int8: 0 empty, 1 partial, 2 full), None where there are no pairs; cell:
    the (query rows, keys) of its elements. pins: what of the schedule was decided by hand; origin: where the rest came from.
    kernels: of each direction, with the captured tensors whose gradients they add up; of a backend that compiles any. cost and
    alternatives are modelled; a key set's lists have no alternatives.
    """

    name: str
    call: Call
    sizes: Sizes
    facts: Facts
    pins: Schedule
    schedule: Schedule
    origin: str
    tile: tuple[int, int]
    cell: tuple[int, int]
    tiles: torch.Tensor | None
    kernels: Mapping[str, tuple[str, ...]]
    cost: Cost
    alternatives: tuple[Alternative, ...]

    @property
    def by_key(self) -> bool:
        """Whether rows visit the single keys that they list."""
        return isinstance(self.call.spec.lists, RowLists)

    @property
    def known(self) -> str:
        """The facts; of a spec with lists with what they are about."""
        lists = self.call.spec.lists
        about = "" if lists is None else f"what is visited say the lists, {lists.text}; of the mask is known:\n"
        return f"{about}{self.facts}"


@dataclass(frozen=True, eq=False)
class Explanation:
    """plans: by direction, "forward" and "backward" (a paged cache has no backward). made: by step of the forward, what it
    makes; a step that is an attention makes none that exists yet. attentions: in the order of the plan. keyed: whether the call
    has a key set. dense_pairs: every query with every key.
    """

    spec: Spec
    backend: str
    plans: Mapping[str, Plan]
    made: Mapping[str, tuple[Buffer, ...]]
    attentions: tuple[Attention, ...]
    keyed: bool
    dense_pairs: int

    @property
    def together(self) -> str:
        """What all attentions visit, in words; empty for a plain one, which says it itself."""
        if not self.keyed and len(self.attentions) == 1:
            return ""
        total = sum(own.cost.pairs for own in self.attentions)
        share = f"{total / max(self.dense_pairs, 1):.1%}"
        return f"{total:,} visited, {share} of the {self.dense_pairs:,} of every query with every key"


def explanation(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offset: Any,
    captures: Mapping[str, Any],
) -> Explanation:
    """Of a call with these arguments. Prepares and moves rows as it would, and runs no attention. InputError, ScheduleError."""
    k, v = attention.for_all_batches(q, k, v)
    call, given, executable = attention.checked(q, k, v, q_offset, captures)
    backend = pick(attention.backend, call.q.device)
    attends, buffers = executable.attends(call, given)
    plans = {"forward": executable.forward_plan}
    if call.spec.page_size is None:  # a paged cache is for inference
        wanted = {name for name, value in tensors_of(call, given).items() if value.requires_grad}
        plans["backward"] = executable.backward_plan(frozenset(wanted or "qkv"))
    return Explanation(
        attention.spec,
        backend,
        plans,
        {step.name: _made(step.writes, buffers) for step in plans["forward"].steps if not isinstance(step, Attend)},
        tuple(_attention(attention, step.name, inner, backend) for step, inner in attends),
        call.spec.keys is not None,
        call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.n_k,
    )


def _attention(attention: CompiledAttention, name: str, call: Call, backend: str) -> Attention:
    stages = attention.specialiser.of(call)
    batch, heads, n_q, head_dim = call.q.shape
    sizes = Sizes(batch, heads, call.k.shape[1], n_q, call.n_k, head_dim, call.v.shape[3])
    tile = _tile(call, stages.schedule, backend)
    cell = _cell(tile, n_q, call.n_k)
    pairs = bool(n_q and call.n_k and batch)
    return Attention(
        name,
        call,
        sizes,
        stages.facts,
        attention.pins.over(call.spec.schedule),
        stages.schedule,
        stages.origin,
        tile,
        cell,
        _map(call, cell) if pairs else None,
        _kernels(call, stages.facts, stages.schedule, sizes) if backend in ("triton", "interpret") else {},
        _cost(call, stages.facts, sizes, tile),
        _alternatives(call, stages.facts, sizes, stages.schedule, backend) if pairs and call.spec.lists is None else (),
    )


def _kernels(call: Call, known: Facts, schedule: Schedule, sizes: Sizes) -> dict[str, tuple[str, ...]]:
    kernels = {"forward": forward_launches(schedule)}
    if call.spec.page_size is None:
        wanted = [name for name, tensor in call.captures.items() if tensor.requires_grad]
        own = sizes.batch, sizes.heads_q, isinstance(call.q_offset, torch.Tensor)
        launches = backward_launches(known, call.spec.lists, call.q.dtype, schedule, wanted, *own)
        kernels["backward"] = ("delta", *map(str, launches))
    return kernels


def _made(names: Iterable[str], buffers: Mapping[str, Any]) -> tuple[Buffer, ...]:
    tensors = {name: buffers[name] for name in names if isinstance(buffers.get(name), torch.Tensor)}
    return tuple(Buffer(name, x.dtype, tuple(x.shape), x.numel() * x.element_size()) for name, x in tensors.items())


def _walk_captures(call: Call) -> dict[str, Any]:
    """What decides the tiles: what the mask reads, and the lists that take its place."""
    read = {symbol.name for symbol in call.spec.mask.free_symbols}
    read |= set() if call.spec.lists is None else {*call.spec.lists.names}
    values: dict[str, Any] = {**call.captures, **call.params}
    return {name: value for name, value in values.items() if name in read}


def _tile(call: Call, schedule: Schedule, backend: str) -> tuple[int, int]:
    """What a forward tile's pairs are rounded out to: listed tiles or pairs, on the CPU the grain of its walk, else the tile."""
    if call.spec.lists is not None:
        lists = call.spec.lists
        return (lists.block_m, lists.block_n) if isinstance(lists, TileLists) else (1, 1)
    block_m, block_n = _forward(schedule)
    return (block_m, grain_of(block_m, call.q.shape[2])) if backend == "cpu" else (block_m, block_n)


def _forward(schedule: Schedule) -> tuple[int, int]:
    return schedule.forward.block_m or 128, schedule.forward.block_n or 64


def _cell(tile: tuple[int, int], n_q: int, n_k: int) -> tuple[int, int]:
    """So many tiles that a map of them is quick to draw."""
    block_m, block_n = tile
    while (n_q // block_m + 1) * (n_k // block_n + 1) > MOST_TILES:
        block_m, block_n = 2 * block_m, 2 * block_n
    return block_m, block_n


def _map(call: Call, cell: tuple[int, int]) -> torch.Tensor:
    return tile_map(call.spec, call.q.shape[2], call.n_k, *cell, q_offset=call.q_offset, **_walk_captures(call))


def _gpu(device: torch.device) -> str:
    """The GPU whose rates bound this call: the one at hand if its rates are known, else an H200."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((gpu for gpu in GPUS if gpu in name), "H200")
    return "H200"


def _cost(call: Call, known: Facts, sizes: Sizes, tile: tuple[int, int]) -> Cost:
    return known.cost(
        batch=sizes.batch,
        heads_q=sizes.heads_q,
        heads_kv=sizes.heads_kv,
        n_q=sizes.n_q,
        n_k=sizes.n_k,
        head_dim=sizes.head_dim,
        head_dim_v=sizes.head_dim_v,
        dtype=call.q.dtype,
        q_offset=call.q_offset,
        captures=_walk_captures(call),
        block_m=tile[0],
        block_n=tile[1],
        gpu=_gpu(call.q.device),
    )


def _alternatives(call: Call, known: Facts, sizes: Sizes, schedule: Schedule, backend: str) -> tuple[Alternative, ...]:
    """Forward tiles as the backend has them, the schedule's own among them."""
    shape, captures = (sizes.batch, sizes.heads_q, sizes.n_q, sizes.n_k), _walk_captures(call)

    def visited(block_m: int, block_n: int) -> int:
        return sum(visited_pairs(known, *shape, block_m, block_n, call.q_offset, captures) or (0, 0))

    own, attended = _forward(schedule), visited(1, 1) or 1
    others = [(m, own[1]) for m in CPU_ALTERNATIVES] if backend == "cpu" else ALTERNATIVES
    pairs = {(m, n): visited(m, grain_of(m, sizes.n_q) if backend == "cpu" else n) for m, n in sorted({*others, own})}
    return tuple(Alternative(m, n, count / attended, (m, n) == own) for (m, n), count in pairs.items())

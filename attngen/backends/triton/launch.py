"""Run a plan's launches with Triton: buffers, arguments, grids. The same code drives the compiled and interpreted kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from attngen import debug
from attngen.analysis import Facts
from attngen.analysis import facts as analyse
from attngen.errors import InputError, ScheduleError
from attngen.language.call import Call
from attngen.language.lists import RowLists, TileLists
from attngen.language.programs import evaluate, tensor_of
from attngen.language.spec import Spec
from attngen.lowering import Source, render
from attngen.lowering.captures import EDGES, Site, collect, sites
from attngen.lowering.render import GUARDED, may_need_guard
from attngen.lowering.signature import CAPTURED, takes
from attngen.lowering.source import Grid
from attngen.lowering.tables import render_tables
from attngen.plan.stream_k import Runs, slots, stream_k
from attngen.reference.dense import dense_env
from attngen.schedule import KERNELS, Schedule, Target
from attngen.schedule.choice import complete_for, multiprocessors


def forward(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`. A split forward writes partial states, which a second launch merges."""
    _check(call)
    rows = call.q.shape[:3]
    out, lse = call.q.new_empty((*rows, call.v.shape[3])), call.q.new_empty(rows, dtype=torch.float32)
    made: dict[str, torch.Tensor] = {"out": out, "lse": lse}
    if call.spec.page_size is not None and min(call.k.shape[0], call.n_k) == 0:  # not even a page to load nothing from
        return out.zero_(), lse.fill_(-torch.inf)
    given = _inputs(call, q=call.q, k=call.k, v=call.v)
    walk = walk_tables(call, facts, schedule, "forward")
    walking = given.and_(walk)
    if schedule.split in (None, 1):
        _launch("forward", call, facts, schedule, walking, made)
        return out, lse
    grid, sizes = _grid_of(call, facts, schedule, {**given.tensors, **made}), _sizes(call, schedule)
    if schedule.split == "stream":
        made |= _runs(call, facts, schedule, grid, sizes, walk)
    made |= _states(call, grid, sizes)
    _launch("forward", call, facts, schedule, walking, made)
    _launch("merge", call, facts, schedule, given, made)
    return out, lse


def delta(out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
    """rowsum(dO * O) - dlse, float32 [B, Hq, Nq]; dlse: None for 0."""
    schedule, facts = _plain(out.device, out.shape[3], out.dtype)
    made = {"delta": out.new_empty(out.shape[:3], dtype=torch.float32)}
    call = Call(_PLAIN, out, out, out, {}, {}, 0)
    given = _inputs(call, out=out, do=do)
    if dlse is None:
        _launch("delta_of_out", call, facts, schedule, given, made)
    else:
        made["dlse"] = dlse.to(torch.float32).contiguous()
        _launch("delta", call, facts, schedule, given, made)
    return made["delta"]


def backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    lse: torch.Tensor,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients, see `attngen.backends`: two passes, before them one for what a large lse lacks, where that would show, and for
    each wanted capture one of its own; no atomics between them.
    """
    _check(call)
    given = _inputs(call, q=call.q, k=call.k, v=call.v, do=do)
    walks = {kernel: given.and_(walk_tables(call, facts, schedule, kernel)) for kernel in ("dq", "dkv")}
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
    made = {"lse": lse.contiguous(), "delta": delta.contiguous(), "dq": dq, "dk": dk, "dv": dv}
    if facts.restores(call.q.dtype):
        made["excess"] = torch.empty_like(made["lse"])
        _launch("excess", call, facts, schedule, walks["dq"], made)
    for kernel, walking in walks.items():
        _launch(kernel, call, facts, schedule, walking, made)
    gradients = {name: _capture_gradient(name, call, facts, schedule, given, made, walks) for name in wanted}
    return dq, dk, dv, gradients


def tables(call: Call, facts: Facts, schedule: Schedule, kernel: str) -> dict[str, torch.Tensor]:
    """Summaries of captured data for the walk of one kernel: int32 [B or 1, H or 1, tiles] each."""
    walk = facts.walk_of(kernel)
    by_batch, by_head = walk.differ(isinstance(call.q_offset, torch.Tensor))
    leading = call.q.shape[0] if by_batch else 1, call.q.shape[1] if by_head else 1
    shape, device = (len(walk.symbols), *leading, table_tiles(call, schedule, kernel)), call.q.device
    if min(call.q.shape[2], call.n_k) == 0:  # nothing to visit, whatever the bounds
        made = torch.zeros(shape, dtype=torch.int32, device=device)
    else:
        made = torch.empty(shape, dtype=torch.int32, device=device)
        _launch(f"{kernel}{TABLES}", call, facts, schedule, _inputs(call), {"made": made})
    return dict(zip(walk.symbols, made.unbind(0), strict=True))


def table_tiles(call: Call, schedule: Schedule, kernel: str) -> int:
    """How many tiles those tables are of."""
    tile = schedule.tile(kernel)
    return -(-call.n_k // tile.block_n) if kernel == "dkv" else -(-call.q.shape[2] // tile.block_m)


def walk_tables(
    call: Call, facts: Facts, schedule: Schedule, kernel: str, make: Callable[..., dict[str, torch.Tensor]] = tables
) -> dict[str, torch.Tensor]:
    """The given tables, or those of this call, as `make` makes them; nothing for a walk that needs none."""
    walk = facts.walk_of(kernel)
    if call.spec.lists is not None or not walk.needs_tables:
        return {}
    return call.tables.get(kernel) or make(call, facts, schedule, kernel)


TABLES = " tables"  # behind the name of the kernel whose walk reads them
_PLAIN = Spec()


@lru_cache(maxsize=256)
def _plain(device: torch.device, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, Facts]:
    return complete_for(_PLAIN, target_of(device), head_dim, head_dim, dtype, Schedule()), analyse(_PLAIN)


def _check(call: Call) -> None:
    if call.q.dtype == torch.float64:
        raise InputError("q", "float32, float16 or bfloat16 on this backend", "torch.float64", "use the CPU backend")


def target_of(device: torch.device) -> str:
    """The name of a device's target; on a CPU it is the interpreter's."""
    return Target.of_device(device).name if device.type == "cuda" else "interpreter"


def environment(call: Call) -> dict[str, Any]:
    """What walks and tables read."""
    return {
        **call.captures,
        **call.params,
        "b": torch.arange(call.q.shape[0], device=call.q.device).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1], device=call.q.device).view(1, -1, 1),
        "q_offset": call.offset_column,
    }


def _runs(
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


MOST_COUNTED = 64  # query tiles


def tile_counts(
    call: Call, facts: Facts, grid: Grid, schedule: Schedule, tables: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """How many key tiles each output of the forward kernel visits: int64 [outputs], in the order of its programs."""
    lists, batch, block_n = call.spec.lists, call.q.shape[0], schedule.tile("forward").block_n
    per_head = grid.heads == "q"
    heads = call.q.shape[1] if per_head else call.k.shape[1]
    tiles, device = grid.tiles(_sizes(call, schedule)), call.q.device
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


def _states(call: Call, grid: Grid, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """Buffers for the partial states of a split forward, float32."""
    outputs = grid.outputs(sizes)
    number = outputs * sizes["splits"] if grid.sliced == "split" else slots(outputs, sizes["programs"])
    new = partial(torch.empty, dtype=torch.float32, device=call.q.device)
    return {"states": new((number, grid.block, call.v.shape[3])), "maxima": new((number, 2, grid.block))}


_GRIDS: dict[Any, Grid] = {}


def _grid_of(call: Call, facts: Facts, schedule: Schedule, buffers: Mapping[str, Any]) -> Grid:
    """How the forward's programs lie over its outputs: the same whatever the lengths."""
    key = facts, schedule, call.q.shape[3], call.v.shape[3], call.q.dtype
    found = _GRIDS.get(key)
    if found is None:
        if len(_GRIDS) >= MOST_READY:
            _GRIDS.clear()
        found = _GRIDS[key] = _source_of("forward", call, facts, schedule, buffers).grid
    return found


def _sizes(call: Call, schedule: Schedule) -> dict[str, int]:
    """The lengths that kernels and grids take."""
    batch, heads, n_q, _ = call.q.shape
    return {
        "batch": batch,
        "heads": heads,
        "group": call.group,
        "n_q": n_q,
        "n_k": call.n_k,
        "pages": call.k.shape[0],
        "splits": schedule.split if isinstance(schedule.split, int) else 1,
        "programs": schedule.programs or multiprocessors(call.q.device),
        "multiprocessors": multiprocessors(call.q.device),
        "together": heads_together(call),
    }


def heads_together(call: Call) -> int:
    """How many heads' keys and values fit half of the second-level cache: those whose tiles come by turns."""
    cache = torch.cuda.get_device_properties(call.q.device).L2_cache_size if call.q.is_cuda else 2**22
    head = max(1, call.n_k * (call.k.shape[3] + call.v.shape[3]) * call.k.element_size())
    return max(1, cache // 2 // head) * call.group


@dataclass(frozen=True, eq=False)
class _Ready:
    """A launch for one set of shapes and strides: what is left to a call is to put in its pointers and numbers. programs: 0 if there is
    nothing to launch. tensors, params: (place, name) of each; offset, scale: where an int q_offset and the scale go.
    """

    source: Source
    programs: int
    arguments: list[Any]
    tensors: tuple[tuple[int, str], ...]
    params: tuple[tuple[int, str], ...]
    offset: int | None
    scale: int | None
    options: dict[str, Any]
    again: tuple[Source, int] | None = None  # what looks after results that are no numbers, and its programs


_READY: dict[Any, _Ready] = {}
MOST_READY = 4096  # then all are forgotten: they cost some 100 us each


@dataclass(frozen=True)
class _Inputs:
    """The tensors that a launch is given, and what its arguments depend on of them besides pointers. Tensors that are made for
    it depend on these, and rows [B, heads, n_q] are contiguous.
    """

    tensors: Mapping[str, torch.Tensor]
    described: tuple[Any, ...]

    def and_(self, tensors: Mapping[str, torch.Tensor]) -> _Inputs:
        """These and others."""
        return _Inputs({**self.tensors, **tensors}, self.described + _described(tensors)) if tensors else self


def _described(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() & 15) for x in tensors.values()])


def _inputs(call: Call, **tensors: torch.Tensor) -> _Inputs:
    """Some tensors, and what the call captures."""
    given = {**_captures(call), **tensors} if call.captures else tensors
    return _Inputs(given, _described(given))


def _launch(
    kernel: str,
    call: Call,
    facts: Facts,
    schedule: Schedule,
    given: _Inputs,
    made: Mapping[str, torch.Tensor],
    site: Site | None = None,
) -> None:
    """Launch a kernel on the current stream of the call's device; nothing for an empty grid."""
    offset, q = call.q_offset, call.q
    key = kernel, facts, schedule, site, type(offset), q.device, q.shape, call.k.shape, given.described
    ready = _READY.get(key)
    if ready is None:
        if len(_READY) >= MOST_READY:
            _READY.clear()
        ready = _READY[key] = _made_ready(kernel, call, facts, schedule, {**given.tensors, **made}, site)
    if not ready.programs:
        return
    tensors = {**given.tensors, **made}
    if ready.again is not None:
        tensors["odd"] = torch.empty(ready.programs, dtype=torch.int32, device=q.device)
    arguments = ready.arguments.copy()
    for place, name in ready.tensors:
        arguments[place] = tensors[name]
    for place, name in ready.params:
        value = call.params[name]
        arguments[place] = value - 2**32 if name == "seed" and value >= 2**31 else value  # an i32
    if ready.offset is not None:
        arguments[ready.offset] = offset.to(torch.int32) if isinstance(offset, torch.Tensor) else offset
    if ready.scale is not None:
        arguments[ready.scale] = call.scale
    with torch.cuda.device_of(q):  # Triton takes the current device, whichever the pointers are of
        _run(ready.source, ready.programs, arguments, ready.options)
        if ready.again is not None:
            source, programs = ready.again
            _run(source, programs, [*arguments, ready.programs], ready.options)


def _captures(call: Call) -> dict[str, torch.Tensor]:
    """The captured tensors; those of lists contiguous, and empty ones of a size that a stride can be made from."""
    own = () if call.spec.lists is None else call.spec.lists.names
    return {CAPTURED + name: t.contiguous() if name in own else t for name, t in call.captures.items()}


def _source_of(
    kernel: str,
    call: Call,
    facts: Facts,
    schedule: Schedule,
    tensors: Mapping[str, Any],
    site: Site | None = None,
) -> Source:
    by_offset = isinstance(call.q_offset, torch.Tensor)
    if kernel.endswith(TABLES):
        return _tables_source(call.spec, facts, kernel.removesuffix(TABLES), schedule, by_offset)
    aligned = all(_aligned(tensors[name]) for name in takes(kernel.removesuffix(GUARDED)).tensors)
    dims = call.q.shape[3], call.v.shape[3]
    return _source(call.spec, facts, kernel, *dims, call.q.dtype, schedule, aligned, by_offset, site)


def _capture_gradient(
    name: str,
    call: Call,
    facts: Facts,
    schedule: Schedule,
    given: _Inputs,
    made: Mapping[str, torch.Tensor],
    walks: Mapping[str, _Inputs],
) -> torch.Tensor:
    """The gradient of one captured tensor, float32 and of its (expanded) shape: from the score's loads, and the sink's."""
    tensor, (batch, heads, n_q, _), n_k = call.captures[name], call.q.shape, call.n_k
    total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
    own, of_sink = facts.load_grads.get(name, ()), facts.sink_grads.get(name, ())
    read = [index for load, _ in (*own, *of_sink) for index in load.indices]
    read += [call.spec.sink, *(slope for _, slope in of_sink)] if of_sink else []
    env = dense_env(call, torch.float32, read)
    shifted = isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0
    if isinstance(call.spec.lists, RowLists) and name == "edge_weight":
        list_heads = heads if call.spec.lists.by_query_head else call.k.shape[1]
        grad = total.new_zeros((batch, list_heads, tensor.shape[2]))
        _launch("capture", call, facts, schedule, given, {**made, "grad": grad}, EDGES)
        return grad.sum_to_size(tensor.shape)
    for site in sites(own, schedule.deterministic is not False):
        program = facts.program_queries if site.by_keys else facts.program_keys
        if call.spec.lists is None and not (program.full or program.partial):
            continue  # no pair attends, so none contributes
        kernel = "dkv" if site.by_keys else "dq"
        rows = 1 if isinstance(call.spec.lists, RowLists) else schedule.tile("dq").block_m
        shape = site.buffer_shape(batch, heads, n_q, n_k, rows, tuple(tensor.shape))
        make = torch.zeros if site.zeroed or 0 in call.q.shape else torch.empty
        grad = make(shape, dtype=torch.float32, device=tensor.device)
        _launch("capture", call, facts, schedule, walks[kernel], {**made, "grad": grad}, site)
        total += collect(site, grad, tensor, env, shifted)
    for load, slope in of_sink:
        # The sink is a key with value 0: its dS is P * (0 - delta).
        sink = tensor_of(evaluate(call.spec.sink, env), tensor.device).to(torch.float32)
        lse, excess = made["lse"][..., None], made["excess"][..., None] if "excess" in made else 0.0
        p = torch.where(lse > -torch.inf, torch.exp(sink - lse) * 2.0**-excess, 0.0)  # [B, Hq, Nq, 1]
        ds = -p * made["delta"][..., None]
        share = (ds * evaluate(slope, env)).expand(batch, heads, n_q, 1)
        if not load.indices:
            total += share.sum()
            continue
        places = [tensor_of(evaluate(index, env), tensor.device).long() for index in load.indices]
        total.index_put_(tuple(place.expand(share.shape) for place in places), share, accumulate=True)
    return total


def _made_ready(
    kernel: str, call: Call, facts: Facts, schedule: Schedule, tensors: Mapping[str, Any], site: Site | None
) -> _Ready:
    """A kernel's arguments from their description."""
    source, lengths = _source_of(kernel, call, facts, schedule, tensors, site), _sizes(call, schedule)
    programs = source.grid.programs(lengths)
    arguments: list[Any] = [None] * len(source.args)
    places: dict[str, list[tuple[int, str]]] = {"tensor": [], "table": [], "param": [], "offset": [], "scale": []}
    if programs * lengths["batch"] * lengths["heads"] == 0:
        return _Ready(source, 0, arguments, (), (), None, None, {})
    for place, arg in enumerate(source.args):
        if arg.role in places:
            places[arg.role].append((place, arg.of))
        elif arg.role == "stride":
            tensor = tensors[arg.of]
            arguments[place] = tensor.stride(arg.dim) if tensor.shape[arg.dim] != 1 else 0
        elif arg.role == "size":
            arguments[place] = tensors[arg.of].shape[arg.dim]
        elif arg.role == "length":
            arguments[place] = lengths[arg.of]
        else:
            raise AssertionError(arg)
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True}
    offset, scale = (next((place for place, _ in places[role]), None) for role in ("offset", "scale"))
    found = (*places["tensor"], *places["table"])
    again = None
    if kernel in KERNELS and may_need_guard(call.spec):
        guarded = _source_of(kernel + GUARDED, call, facts, schedule, tensors, site)
        assert guarded.args[:-1] == source.args and guarded.num_stages == source.num_stages
        again = guarded, guarded.grid.programs(lengths)
    return _Ready(source, programs, arguments, found, tuple(places["param"]), offset, scale, options, again)


def _run(source: Source, programs: int, arguments: list[Any], options: dict[str, Any]) -> None:
    try:
        _start(source, programs, arguments, options)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise ScheduleError(f"{source.name}: {error}; choose smaller blocks or fewer stages") from error
        raise


def _start(source: Source, programs: int, arguments: list[Any], options: dict[str, Any]) -> None:
    """One launch, on the current device."""
    kernel = source.load()[(programs,)]
    if source.makes_descriptors:
        # They live in memory that an allocator gives, which Triton keeps per context: a backward has its thread's.
        copy_context().run(_allocating, kernel, arguments, options)
    else:
        kernel(*arguments, **options)


def _allocating(kernel: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    import triton

    triton.set_allocator(_allocate)
    kernel(*arguments, **options)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _aligned(tensor: torch.Tensor) -> bool:
    """Unit stride along the head dim and every other stride a multiple of 16, so that rows load in whole vectors."""
    *outer, last = tensor.stride()
    steps = [stride for stride, size in zip(outer, tensor.shape, strict=False) if size > 1]
    return (last == 1 or tensor.shape[-1] == 1) and all(s % 16 == 0 for s in steps) and tensor.data_ptr() % 16 == 0


@lru_cache(maxsize=1024)
def _tables_source(spec: Spec, facts: Facts, kernel: str, schedule: Schedule, offset_tensor: bool) -> Source:
    tile = schedule.tile(kernel)
    with debug.timed(f"rendering the tables of {kernel}"):
        source = render_tables(spec, facts, kernel, tile.block_n if kernel == "dkv" else tile.block_m, offset_tensor)
    debug.say(4, "source", source.text)
    return source


@lru_cache(maxsize=1024)
def _source(
    spec: Spec,
    facts: Facts,
    kernel: str,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    schedule: Schedule,
    aligned: bool,
    offset_tensor: bool,
    site: Site | None,
) -> Source:
    with debug.timed(f"rendering {kernel}"):
        source = render(
            spec,
            facts,
            kernel,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            schedule=schedule,
            aligned=aligned,
            offset_tensor=offset_tensor,
            site=site,
        )
    debug.say(4, "source", source.text)
    return source

"""Run a plan's launches with Triton: buffers, arguments, grids. The same code drives the compiled and interpreted kernels."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from functools import lru_cache, partial
from typing import Any

import torch

from attngen import debug
from attngen.analysis import Facts
from attngen.analysis.tables import Axis
from attngen.errors import InputError, ScheduleError
from attngen.language.call import Call
from attngen.language.expression import evaluate, tensor_of
from attngen.language.lists import RowLists, TileLists
from attngen.language.spec import Spec
from attngen.lowering import Source, render
from attngen.lowering.captures import EDGES, Site, collect, sites
from attngen.lowering.signature import takes
from attngen.plan.plan import Plan, Step, backward_plan, forward_plan
from attngen.plan.stream_k import slots, stream_k
from attngen.reference.dense import dense_env
from attngen.schedule import Schedule
from attngen.schedule.choice import multiprocessors


def forward(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`."""
    batch, heads, n_q, _ = call.q.shape
    buffers = {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "out": call.q.new_empty((batch, heads, n_q, call.v.shape[3])),
        "lse": call.q.new_empty((batch, heads, n_q), dtype=torch.float32),
    }
    if call.spec.page_size is not None and min(call.k.shape[0], call.n_k) == 0:  # not even a page to load nothing from
        return buffers["out"].zero_(), buffers["lse"].fill_(-torch.inf)
    _run(forward_plan(call.spec, facts, schedule.split), call, facts, schedule, buffers)
    return buffers["out"], buffers["lse"]


def backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    wanted: list[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients, see `attngen.backends`."""
    buffers = {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "out": out,
        "lse": lse.contiguous(),
        "do": grad_out,
        "dlse": grad_lse.to(torch.float32).contiguous(),
        "delta": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "excess": torch.empty_like(lse, memory_format=torch.contiguous_format),
        "dq": torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device),
        "dk": torch.empty(call.k.shape, dtype=call.k.dtype, device=call.k.device),
        "dv": torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device),
    }
    _run(backward_plan(call.spec, facts, wanted), call, facts, schedule, buffers)
    return buffers["dq"], buffers["dk"], buffers["dv"], {name: buffers[f"d {name}"] for name in wanted}


# -- running a plan ---------------------------------------------------------------------------------------------------


def _run(plan: Plan, call: Call, facts: Facts, schedule: Schedule, buffers: dict[str, Any]) -> None:
    if call.q.dtype == torch.float64:
        raise InputError("q", "float32, float16 or bfloat16 on this backend", "torch.float64", "use the CPU backend")
    debug.say(5, "plan", plan)
    for step in plan.steps:
        if step.kind == "tables":
            buffers[step.writes[0]] = _tables(step, call, facts, schedule)
        elif step.kind == "runs":
            buffers |= _runs(call, facts, schedule, buffers)
        elif step.kind == "kernel":
            if "states" in step.writes:
                buffers |= _states(call, facts, schedule, buffers)
            _launch(step.name, call, facts, schedule, {**buffers, **_tables_of(step.name, buffers)})
        else:
            buffers[step.writes[0]] = _capture_gradient(step, call, facts, schedule, buffers)
        for name in plan.released[step.name]:
            del buffers[name]


def _tables_of(kernel: str, buffers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return buffers.get(f"tables of {'dq' if kernel == 'delta' else kernel}", {})


def _tables(step: Step, call: Call, facts: Facts, schedule: Schedule) -> dict[str, torch.Tensor]:
    """Summaries of captured data for the walk of one kernel: int32 [B or 1, H or 1, tiles] each."""
    kernel = step.name.removeprefix("tables of ")
    tile = schedule.tile(kernel)
    offset: Any = call.q_offset
    if isinstance(offset, torch.Tensor):
        offset = offset.view(-1, 1, 1)
    queries, keys = Axis("i", offset, call.q.shape[2]), Axis("j", 0, call.n_k)
    device, env = call.q.device, _environment(call)
    if kernel == "dkv":
        return facts.walk_queries.prepare(env, keys, queries, tile.block_n, device)
    return facts.walk_keys.prepare(env, queries, keys, tile.block_m, device)


def _environment(call: Call) -> dict[str, Any]:
    """What walks and tables read."""
    return {
        **call.captures,
        **call.params,
        "b": torch.arange(call.q.shape[0], device=call.q.device).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1], device=call.q.device).view(1, -1, 1),
        "q_offset": call.q_offset.view(-1, 1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset,
    }


def _runs(call: Call, facts: Facts, schedule: Schedule, buffers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Equal runs of all outputs' key tiles over the programs of a stream-K launch, without waiting for the device."""
    source = _source_of("forward", call, facts, schedule, buffers)
    sizes = _sizes(call, schedule)
    counts = tile_counts(call, facts, source, schedule, _tables_of("forward", buffers))
    runs = stream_k(counts, sizes["programs"])
    assert len(counts) == source.grid.outputs(sizes)
    return {"starts": runs.starts, "begins": runs.begin, "firsts": runs.first, "owners": runs.owners}


def tile_counts(
    call: Call, facts: Facts, source: Source, schedule: Schedule, tables: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """How many key tiles each output of the forward kernel visits: int64 [outputs], in the order of its programs."""
    lists, batch, block_n = call.spec.lists, call.q.shape[0], schedule.tile("forward").block_n
    per_head = source.grid.heads == "q"
    heads = call.q.shape[1] if per_head else call.k.shape[1]
    tiles, device = source.grid.tiles(_sizes(call, schedule)), call.q.device
    if lists is None:
        rows, group = call.q.shape[2], call.group if source.grid.rows == "packed" else 1
        offset = call.q_offset.view(-1, 1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
        start = torch.arange(tiles, device=device).view(1, 1, -1) * source.grid.block
        last = ((start + source.grid.block - 1) // group).clamp(max=rows - 1)
        scope = {**_environment(call), **tables}
        found = facts.program_keys.evaluate(start // group + offset, last + offset, 0, call.n_k, block_n, scope)
        counts = sum(
            (x for part in (found[1], found[3]) for x in part), torch.zeros((1, 1, 1), dtype=torch.int64, device=device)
        )
    else:
        runs = call.captures["query_runs"]
        if isinstance(lists, TileLists):
            counts = runs[..., 1:].sum(-1) * (lists.block_n // block_n)
            counts = counts.repeat_interleave(lists.block_m // source.grid.block, -1)[..., :tiles]
        else:
            counts = (-(-runs[..., 1] // block_n)).repeat_interleave(tiles // max(call.q.shape[2], 1), -1)
        if not per_head and counts.shape[1] == call.q.shape[1] != heads:
            counts = counts[:, :: call.group]
        if per_head and counts.shape[1] not in (1, heads):
            counts = counts.repeat_interleave(call.group, 1)
    return counts.long().expand(batch, heads, tiles).reshape(-1)


def _states(call: Call, facts: Facts, schedule: Schedule, buffers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Buffers for the partial states of a split forward, float32."""
    source = _source_of("forward", call, facts, schedule, buffers)
    sizes = _sizes(call, schedule)
    outputs = source.grid.outputs(sizes)
    number = outputs * sizes["splits"] if source.grid.sliced == "split" else slots(outputs, sizes["programs"])
    new = partial(torch.empty, dtype=torch.float32, device=call.q.device)
    return {
        "states": new((number, source.grid.block, call.v.shape[3])),
        "maxima": new((number, 2, source.grid.block)),
    }


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


def _launch(
    kernel: str, call: Call, facts: Facts, schedule: Schedule, tensors: dict[str, Any], site: Site | None = None
) -> None:
    source = _source_of(kernel, call, facts, schedule, tensors, site)
    launch(source, call, {**_captures(call), **tensors}, schedule)


def _captures(call: Call) -> dict[str, torch.Tensor]:
    """The captured tensors; those of lists contiguous, and empty ones of a size that a stride can be made from."""
    own = () if call.spec.lists is None else call.spec.lists.names
    return {name: t.contiguous() if name in own else t for name, t in call.captures.items()}


def _source_of(
    kernel: str,
    call: Call,
    facts: Facts,
    schedule: Schedule,
    tensors: Mapping[str, Any],
    site: Site | None = None,
) -> Source:
    aligned = all(_aligned(tensors[name]) for name in takes(kernel, facts.natural).tensors)
    by_offset = isinstance(call.q_offset, torch.Tensor)
    dims = call.q.shape[3], call.v.shape[3]
    return _source(call.spec, facts, kernel, *dims, call.q.dtype, schedule, aligned, by_offset, site)


def _capture_gradient(
    step: Step, call: Call, facts: Facts, schedule: Schedule, buffers: dict[str, Any]
) -> torch.Tensor:
    """The gradient of one captured tensor, float32 and of its (expanded) shape: from the score's loads, and the sink's."""
    name = step.name.removeprefix("gradient of ")
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
        _launch("capture", call, facts, schedule, {**buffers, "grad": grad}, EDGES)
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
        _launch("capture", call, facts, schedule, {**buffers, **_tables_of(kernel, buffers), "grad": grad}, site)
        total += collect(site, grad, tensor, env, shifted)
    for load, slope in of_sink:
        # The sink is a key with value 0: its dS is P * (0 - delta).
        sink = tensor_of(evaluate(call.spec.sink, env), tensor.device).to(torch.float32)
        lse, excess = buffers["lse"][..., None], buffers["excess"][..., None] if facts.natural else 0.0
        p = torch.where(lse > -torch.inf, torch.exp(sink - lse) * 2.0**-excess, 0.0)  # [B, Hq, Nq, 1]
        ds = -p * buffers["delta"][..., None]
        share = (ds * evaluate(slope, env)).expand(batch, heads, n_q, 1)
        if not load.indices:
            total += share.sum()
            continue
        places = [tensor_of(evaluate(index, env), tensor.device).long() for index in load.indices]
        total.index_put_(tuple(place.expand(share.shape) for place in places), share, accumulate=True)
    return total


def launch(source: Source, call: Call, tensors: dict[str, Any], schedule: Schedule) -> None:
    """Build a kernel's arguments from their description and launch it; nothing is launched for an empty grid."""
    head_dim, lengths = call.q.shape[3], _sizes(call, schedule)
    programs = source.grid.programs(lengths)
    if programs * lengths["batch"] * lengths["heads"] == 0:
        return
    arguments: list[Any] = []
    for arg in source.args:
        if arg.role in ("tensor", "table"):
            arguments.append(tensors[arg.of])
        elif arg.role == "stride":
            tensor = tensors[arg.of]
            arguments.append(tensor.stride(arg.dim) if tensor.shape[arg.dim] != 1 else 0)
        elif arg.role == "size":
            arguments.append(tensors[arg.of].shape[arg.dim])
        elif arg.role == "length":
            arguments.append(lengths[arg.of])
        elif arg.role == "scale":
            arguments.append(call.spec.scale_for(head_dim))
        elif arg.role == "offset":
            offset = call.q_offset
            arguments.append(offset.to(torch.int32) if isinstance(offset, torch.Tensor) else offset)
        else:
            arguments.append(call.params[arg.of])
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True}
    try:
        with torch.cuda.device_of(call.q):  # Triton takes the current device, whichever the pointers are of
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

"""Run a plan's launches with Triton: buffers, arguments, grids. The same code drives the compiled and interpreted kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from attngen import debug
from attngen.analysis import Facts
from attngen.analysis.tables import Axis
from attngen.errors import InputError, ScheduleError
from attngen.expression import evaluate
from attngen.inputs import Call
from attngen.lowering import Source, render
from attngen.lowering.captures import Site, collect, sites
from attngen.plan import Plan, Step, backward_plan, forward_plan
from attngen.reference import dense_env
from attngen.schedule import Schedule
from attngen.spec import Spec


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
    _run(forward_plan(call.spec, facts), call, facts, schedule, buffers)
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
        elif step.kind == "kernel":
            _launch(step.name, call, facts, schedule, {**buffers, **_tables_of(step.name, buffers)})
        else:
            buffers[step.writes[0]] = _capture_gradient(step, call, facts, schedule, buffers)
        for name in plan.released[step.name]:
            del buffers[name]


def _tables_of(kernel: str, buffers: dict[str, Any]) -> dict[str, torch.Tensor]:
    return buffers.get(f"tables of {kernel}", {})


def _tables(step: Step, call: Call, facts: Facts, schedule: Schedule) -> dict[str, torch.Tensor]:
    """Summaries of captured data for the walk of one kernel: int32 [B or 1, H or 1, tiles] each."""
    kernel = step.name.removeprefix("tables of ")
    tile = schedule.tile(kernel)
    offset: Any = call.q_offset
    if isinstance(offset, torch.Tensor):
        offset = offset.view(-1, 1, 1)
    queries, keys = Axis("i", offset, call.q.shape[2]), Axis("j", 0, call.n_k)
    device = call.q.device
    env: dict[str, Any] = {
        **call.captures,
        **call.params,
        "b": torch.arange(call.q.shape[0], device=device).view(-1, 1, 1),
        "h": torch.arange(call.q.shape[1], device=device).view(1, -1, 1),
    }
    if kernel == "dkv":
        return facts.walk_queries.prepare(env, keys, queries, tile.block_n, device)
    return facts.walk_keys.prepare(env, queries, keys, tile.block_m, device)


def _launch(
    kernel: str, call: Call, facts: Facts, schedule: Schedule, tensors: dict[str, Any], site: Site | None = None
) -> None:
    aligned = all(_aligned(tensors[name]) for name in _VIEWS[kernel])
    by_offset = isinstance(call.q_offset, torch.Tensor)
    dims = call.q.shape[3], call.v.shape[3]
    source = _source(call.spec, facts, kernel, *dims, call.q.dtype, schedule, aligned, by_offset, site)
    launch(source, call, {**call.captures, **tensors})


_VIEWS = {
    "forward": ("q", "k", "v", "out"),
    "delta": ("out", "do"),
    "dq": ("q", "do", "k", "v", "dq"),
    "dkv": ("k", "v", "q", "do", "dk", "dv"),
    "capture": ("q", "do", "k", "v"),
}


def _capture_gradient(
    step: Step, call: Call, facts: Facts, schedule: Schedule, buffers: dict[str, Any]
) -> torch.Tensor:
    """The gradient of one captured tensor, float32 and of its (expanded) shape: from the score's loads, and the sink's."""
    name = step.name.removeprefix("gradient of ")
    tensor, (batch, heads, n_q, _), n_k = call.captures[name], call.q.shape, call.n_k
    total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
    env = dense_env(call, torch.float32)
    shifted = isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0
    for site in sites(facts.load_grads.get(name, ()), schedule.deterministic is not False):
        program = facts.program_queries if site.by_keys else facts.program_keys
        if not (program.full or program.partial):
            continue  # no pair attends, so none contributes
        kernel = "dkv" if site.by_keys else "dq"
        shape = site.buffer_shape(batch, heads, n_q, n_k, schedule.tile("dq").block_m, tuple(tensor.shape))
        make = torch.zeros if site.zeroed or 0 in call.q.shape else torch.empty
        grad = make(shape, dtype=torch.float32, device=tensor.device)
        _launch("capture", call, facts, schedule, {**buffers, **_tables_of(kernel, buffers), "grad": grad}, site)
        total += collect(site, grad, tensor, env, shifted)
    for load, slope in facts.sink_grads.get(name, ()):
        # The sink is a key with value 0: its dS is P * (0 - delta).
        sink = torch.as_tensor(evaluate(call.spec.sink, env), device=tensor.device).to(torch.float32)
        ds = -torch.exp(sink - buffers["lse"][..., None]) * buffers["delta"][..., None]  # [B, Hq, Nq, 1]
        share = (ds * evaluate(slope, env)).expand(batch, heads, n_q, 1)
        places = [torch.as_tensor(evaluate(index, env), device=tensor.device).long() for index in load.indices]
        total.index_put_(tuple(place.expand(share.shape) for place in places), share, accumulate=True)
    return total


def launch(source: Source, call: Call, tensors: dict[str, Any]) -> None:
    """Build a kernel's arguments from their description and launch it; nothing is launched for an empty grid."""
    batch, heads, n_q, head_dim = call.q.shape
    lengths = {"batch": batch, "heads": heads, "group": call.group, "n_q": n_q, "n_k": call.n_k}
    programs = source.grid.programs(
        lengths[source.grid.length], heads if source.grid.heads == "q" else call.k.shape[1], batch
    )
    if programs * batch * heads == 0:
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
        source.load()[(programs,)](*arguments, **options)
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise ScheduleError(f"{source.name}: {error}; choose smaller blocks or fewer stages") from error
        raise


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

"""The table of contents: from a spec to what runs.

    analyse -> choose -> plan -> render -> bind

A call goes through all of it once per signature (`attngen.runtime.attention`). Whoever needs less stops earlier: `source`
after `render`, `explain` after `plan`; cross-compiling renders for another target; the tuner changes the schedule between
`choose` and `render`.
"""

from __future__ import annotations

import torch

from attngen.analysis import Facts, facts
from attngen.errors import InputError
from attngen.language.keyset import KeySet
from attngen.language.spec import Spec
from attngen.lowering import Source, kernels_of, render
from attngen.lowering.tables import render_tables
from attngen.plan.forward import forward_plan
from attngen.plan.plan import Plan, Sizes
from attngen.runtime.executable import Executable
from attngen.runtime.executor import Executor
from attngen.schedule import Schedule
from attngen.schedule.choice import complete_for


def analyse(spec: Spec) -> Facts:
    """Which tiles are empty, partial and full, derivatives, cost: what holds for every call."""
    return facts(spec)


def choose(spec: Spec, target: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, pins: Schedule) -> Schedule:
    """Tiles and forms for a target without a database; `Specialiser` asks the database for a call's device."""
    return complete_for(spec, target, head_dim, head_dim_v, dtype, pins)


def plan(spec: Spec, keys: KeySet | None, sizes: Sizes, backend: str) -> Plan:
    """Everything that a forward of these sizes does."""
    return forward_plan(spec, keys, sizes, backend)


def source_of(
    spec: Spec, kernel: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, target: str, pins: Schedule
) -> Source:
    """The generated file of one kernel. InputError for a name that is none, or none of this spec's."""
    schedule, known = choose(spec, target, head_dim, head_dim_v, dtype, pins), analyse(spec)
    names = kernels_of(spec, known, dtype)
    if kernel not in names:
        raise InputError("kernel", f"one of {', '.join(names)}", repr(kernel))
    return rendered(spec, kernel, head_dim, head_dim_v, dtype, schedule)


def rendered(
    spec: Spec,
    kernel: str,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    schedule: Schedule,
    offset_tensor: bool = False,
) -> Source:
    """The generated file of one of a spec's kernels (`kernels_of`) under a complete schedule. offset_tensor: q_offset is one."""
    known = analyse(spec)
    if kernel == "tables":
        return render_tables(spec, known, "forward", schedule.tile("forward").block_m, offset_tensor)
    return render(
        spec,
        known,
        kernel,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        schedule=schedule,
        offset_tensor=offset_tensor,
    )


def bind(spec: Spec, keys: KeySet | None, sizes: Sizes, executor: Executor, backend: str) -> Executable:
    """The plan with what runs it."""
    return Executable(spec, keys, plan(spec, keys, sizes, backend), executor, backend)

"""Cross-compilation: kernels for a named GPU on a machine without one, and what they will need there.

Registers and spills come from the tools inside the triton package, instruction counts from the disassembly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from attngen.analysis import Facts
from attngen.analysis import facts as analyse
from attngen.analysis.sites import site_of
from attngen.backends.triton.compiling import compile_source
from attngen.backends.triton.machine_code import MachineCode
from attngen.lowering import Source, render
from attngen.plan.launches import Launch, backward_launches, forward_launches, learned_of
from attngen.runtime import first_tiles
from attngen.runtime.attention import CompiledAttention
from attngen.schedule import Schedule, Target, complete, fit
from attngen.schedule.choice import choose_elsewhere
from attngen.schedule.legality import check


@dataclass(frozen=True)
class Compiled(MachineCode):
    """One kernel of attngen compiled for one target; loops over full tiles stand before those over partial ones.

    ptx and cubin are None for AMD targets, whose assembly and code object are `assembly` and `binary`.
    """

    source: Source

    @property
    def ptx(self) -> str | None:
        """PTX text, for NVIDIA targets."""
        return self.assembly if self.target.startswith("sm_") else None

    @property
    def cubin(self) -> bytes | None:
        """The cubin, for NVIDIA targets."""
        return self.binary if self.target.startswith("sm_") else None

    def __str__(self) -> str:
        return (
            f"{self.name} {self.target}: {self.registers} registers, {self.spills} spilled, {self.shared} bytes shared"
        )


@dataclass(frozen=True)
class CompiledAttend:
    """One attention of a call for a GPU that is not here: its step in the plan, where its schedule came from, and its kernels."""

    name: str
    origin: str
    schedule: Schedule
    kernels: list[Compiled]


def cross_compile(
    spec: Any,
    target: str = "sm_90",
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    schedule: Schedule | None = None,
    passes: Iterable[str] = ("forward", "backward"),
    wide: Collection[str] = (),
    gradients: Collection[str] | None = None,
) -> list[Compiled]:
    """The kernels of a spec, compiled for `target` ("sm_80" to "sm_120", "gfx942", or a GPU: "H100"); no GPU needed.

    schedule: decisions over the spec's and the model's choice.
    passes: "forward", "backward" or single kernels.
    gradients: of captured tensors, which the backward finds besides; None: of all that the score loads.
    wide: which captured integer tensors are int64; the others are int32, captured floats float32.

    Raises ScheduleError when a kernel needs more shared memory than a program can have there.
    """
    gpu = Target.named(target)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    pins = (schedule or Schedule()).over(spec.schedule)
    chosen = fit(complete(spec, gpu, head_dim, head_dim_v, dtype, pins), spec.lists, pins)
    known = analyse(spec)
    check(spec, known, chosen)
    results = []
    wanted = learned_of(known, spec.lists) if gradients is None else gradients
    for launch in _launches(spec, known, chosen, dtype, passes, wanted):
        sites = tuple(site_of(known.load_grads, site) for site in launch.sites)
        source = render(
            spec,
            known,
            launch.kernel,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            schedule=chosen,
            sites=sites,
        )
        kinds = {name: "wide" if name in wide else tensor.kind for name, tensor in spec.tensors.items()}
        made = compile_source(source, gpu, dtype, kinds)
        results.append(Compiled(**vars(made), source=source))
    return results


def _launches(
    spec: Any, known: Facts, schedule: Schedule, dtype: torch.dtype, passes: Iterable[str], wanted: Collection[str]
) -> list[Launch]:
    """The kernels that the names stand for."""
    directions = {
        "forward": [Launch(name) for name in forward_launches(schedule)],
        "backward": [Launch("delta"), *backward_launches(known, spec.lists, dtype, schedule, wanted)],
    }
    every = [launch for direction in directions.values() for launch in direction]
    named = (directions.get(n) or [own for own in every if own.kernel == n] or [Launch(n)] for n in passes)
    found = [launch for launches in named for launch in launches]
    # Paged caches are for inference.
    return found if spec.page_size is None else [own for own in found if own.kernel in ("forward", "merge")]


def cross_compile_call(
    attention: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    target: str,
    passes: Iterable[str] = ("forward", "backward"),
    q_offset: int | torch.Tensor = 0,
    **captures: Any,
) -> list[CompiledAttend]:
    """The kernels of each attention that such a call is made of, as it would run on a GPU that is not here.

    target: "H100", "sm_90", ... Schedules are those of the GPU's records, tuned there or modelled (`ag.tune(target=)`), else the
    model's, with the search that a first call there would do. Plans as on a GPU, where no size depends on a value. Raises
    InputError, ScheduleError.
    """
    found = []
    for step, call in attention.attends(q, k, v, q_offset=q_offset, patient=False, **captures):
        schedule, origin = choose_elsewhere(
            call, analyse(call.spec), target, attention.pins, attention.db, first_tiles.search
        )
        kernels = cross_compile(
            call.spec,
            target,
            dtype=q.dtype,
            head_dim=call.q.shape[3],
            head_dim_v=call.v.shape[3],
            schedule=schedule,
            passes=passes,
            wide=[name for name, tensor in call.captures.items() if tensor.dtype == torch.int64],
        )
        found.append(CompiledAttend(step.name, origin, schedule, kernels))
    return found


# Schedules that matter on newer GPUs, by what they change: what `attngen compile --variants` shows side by side.
VARIANTS: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "tensor descriptors": {"tma": True, "dq_tma": True, "dkv_tma": True},
    "specialised warps": {"tma": True, "warp_specialize": True, "num_warps": 4},
    "persistent": {"persistent": 1, "dq_persistent": 1, "dkv_persistent": 1},
    "by head": {f"{prefix}order": "by_head" for prefix in ("", "dq_", "dkv_")},
    "packed heads, stream-K": {"pack": True, "split": "stream"},
}
FORWARD_ONLY = ("specialised warps", "packed heads, stream-K")

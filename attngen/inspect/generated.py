"""The files that an explained call's kernels are generated from, each once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attngen.errors import ScheduleError
from attngen.inspect.explanation import Attention, Explanation
from attngen.inspect.traffic import MODELLED, PROCESSORS
from attngen.lowering import Source, kernels_of
from attngen.plan.launches import forward_launches
from attngen.runtime.pipeline import rendered
from attngen.schedule import Target
from attngen.schedule.choice import on_gpu

INFERENCE = ("forward", "merge", "forward_guarded")  # the kernels of a paged cache


@dataclass(frozen=True)
class Kernel:
    """A generated file. users: the attentions of the call that it is a kernel of."""

    name: str
    source: Source
    users: tuple[str, ...]


@dataclass(frozen=True)
class Generated:
    """where: what the kernels are for, in words. without: why an attention has none, by its name."""

    where: str
    kernels: tuple[Kernel, ...]
    without: dict[str, str]


def generated(found: Explanation) -> Generated:
    """The kernels of both directions but for gradients of captures, which have one for each place that reads one. Of a call on
    the CPU, which compiles nothing, those that an H200 would get by the model's choice.
    """
    texts: dict[str, tuple[str, Source, list[str]]] = {}
    without = {}
    for own in found.attentions:
        try:
            for name, source in _sources(own, found.backend):
                texts.setdefault(source.key, (name, source, []))[2].append(own.name)
        except ScheduleError as error:  # pinned for the CPU, or of a dtype that only the CPU has
            without[own.name] = str(error)
    kernels = tuple(Kernel(name, source, tuple(users)) for name, source, users in texts.values())
    here = f"backend {found.backend!r}"
    modelled = f"{MODELLED}, by the model's choice for an H200: {here} compiles nothing"
    return Generated(here if found.backend in ("triton", "interpret") else modelled, kernels, without)


def _sources(own: Attention, backend: str) -> list[tuple[str, Source]]:
    call, known, schedule = own.call, own.facts, own.schedule
    spec, dtype = call.spec, call.q.dtype
    if dtype == torch.float64:
        raise ScheduleError("float64 is for the CPU backend; kernels are of float32, float16 or bfloat16")
    if backend not in ("triton", "interpret"):
        schedule = on_gpu(call, known, Target.named(MODELLED), PROCESSORS, own.pins)
    left = {"delta_of_out", *(() if "merge" in forward_launches(schedule) else ("merge",))}
    names = [name for name in kernels_of(spec, known, dtype) if name not in left]
    shifted = isinstance(call.q_offset, torch.Tensor)
    kept = names if spec.page_size is None else [name for name in names if name in INFERENCE]
    dims = own.sizes.head_dim, own.sizes.head_dim_v
    return [(name, rendered(spec, name, *dims, dtype, schedule, shifted)) for name in kept]

"""The device to tune for: this machine's GPU or CPU by measuring, or a named GPU by the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from attngen.analysis import GPUS, Gpu, facts
from attngen.analysis.cost import visited_pairs
from attngen.backends.worker import Worker
from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.spec import Spec
from attngen.schedule import Schedule, Target
from attngen.schedule.choice import device_identity, generator_versions, on_gpu
from attngen.schedule.completion import complete_on_cpu
from attngen.schedule.identities import IDENTITIES, gpu_named
from attngen.store import Device, Shape, Versions
from attngen.tuning.model import GpuModel, Rates, compiled_by
from attngen.tuning.sizes import offset_of
from attngen.tuning.space import PIECES, Space, cpu_space, gpu_space, special_forms


class Searched(Protocol):
    """What is tuned: of a `Job` as much as a device needs to know."""

    @property
    def spec(self) -> Spec: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def piece(self) -> str: ...

    @property
    def values(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class TargetDevice:
    """device, versions: part of every record's key; kind: what its records are; torch_device: where candidates run,
    None for a GPU that is not here; target: None for a CPU; gpu: known rates, exact if it is this very GPU."""

    device: Device
    versions: Versions
    kind: str
    torch_device: torch.device | None
    target: Target | None
    gpu: Gpu | None
    exact: bool = True

    @property
    def usual_dtype(self) -> torch.dtype:
        """What is tuned where nobody says."""
        return torch.float32 if self.target is None else torch.bfloat16

    def space(self, job: Searched) -> tuple[Space, Schedule]:
        """What may be chosen, and the complete schedule that a point changes."""
        shape, pins, known = job.shape, job.spec.schedule or Schedule(), facts(job.spec)
        call = _empty_call(job.spec, shape, job.dtype, job.values)
        if self.target is not None:
            start = on_gpu(call, known, self.target, self.device.units, pins)
            forms = special_forms(job.spec, shape, self.target, job.piece)
            if self.torch_device is None:  # the model does not see in which order programs come: the default stays
                forms = {name: every for name, every in forms.items() if not name.endswith(("order", "persistent"))}
            return gpu_space(
                job.piece, shape, job.dtype.itemsize, self.target, start, pins, forms, job.spec.lists
            ), start
        start = complete_on_cpu(call, known, pins)
        return cpu_space(job.piece, shape, start, pins, job.spec.lists), start

    def model(self, job: Searched, worker: Worker) -> GpuModel | None:
        """What is known about schedules beforehand; nothing on a CPU, where measuring costs less than a model."""
        if self.target is None or self.gpu is None:
            return None
        rate = self.gpu.matrix_half if job.dtype.itemsize <= 2 else self.gpu.matrix_float
        return GpuModel(
            job.piece,
            job.shape,
            job.dtype.itemsize,
            self.target,
            Rates(rate, self.gpu.bandwidth, self.gpu.exp, self.device.units),
            partial(_pairs, job.spec, job.shape, job.values),
            compiled_by(worker, PIECES[job.piece]),
            bounded=self.exact,
            masked=partial(_masked, job.spec, job.shape, job.values),
            prunes=self.kind == "measured",
        )


def find_target_device(target: str | None, device: torch.device | str | None) -> TargetDevice:
    """target: a GPU or an architecture to model, unless it is the one in this machine; None: measure on `device`, by
    default the GPU if there is one. Raises InputError for a target or device that is not known."""
    here = _here(device)
    if target is None:
        return here
    gpu = gpu_named(target)
    if here.gpu is not None and here.exact and here.gpu.name == gpu.name:
        return here
    versions = generator_versions("triton")
    return TargetDevice(IDENTITIES[gpu.name], versions, "modelled", None, Target.named(gpu.target), gpu)


def _here(device: torch.device | str | None) -> TargetDevice:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as problem:
        raise InputError("device", "cpu or cuda", repr(device)) from problem
    if found.type == "cpu":
        return TargetDevice(device_identity(found), generator_versions("cpu"), "measured", found, None, None)
    if found.type != "cuda" or not torch.cuda.is_available():
        raise InputError("device", "a device of this machine", str(found), "name a GPU with target= to model it")
    identity, target = device_identity(found), Target.of_device(found)
    gpu = next((gpu for gpu in GPUS.values() if IDENTITIES[gpu.name].name == identity.name), None)
    like = gpu or next((gpu for gpu in GPUS.values() if gpu.target == target.name), None)
    return TargetDevice(identity, generator_versions("triton"), "measured", found, target, like, exact=gpu is not None)


def _pairs(spec: Spec, shape: Shape, captures: Mapping[str, Any], m: int, n: int) -> float:
    """Pairs of the visited tiles, on average over batch and heads."""
    return sum(_visited(spec, shape, captures, m, n))


def _masked(spec: Spec, shape: Shape, captures: Mapping[str, Any], m: int, n: int) -> float:
    """Those of partial tiles."""
    return _visited(spec, shape, captures, m, n)[1]


def _visited(spec: Spec, shape: Shape, captures: Mapping[str, Any], m: int, n: int) -> tuple[float, float]:
    """Pairs of full and of partial tiles."""
    heads = shape.heads_q if _varies(spec) else 1
    batch = shape.batch if _varies(spec) else 1
    offset = captures.get("q_offset", offset_of(shape))
    found = visited_pairs(facts(spec), batch, heads, shape.n_q, shape.n_k, m, n, offset, captures)
    if found is None:
        return float(shape.n_q * shape.n_k), 0.0
    full, partial = found
    return full / (batch * heads), partial / (batch * heads)


def _varies(spec: Spec) -> bool:
    """Whether the mask or the lists may differ between batches or heads."""
    return spec.lists is not None or bool({symbol.name for symbol in spec.mask.free_symbols} & {"b", "h"})


def _empty_call(spec: Spec, shape: Shape, dtype: torch.dtype, captures: Mapping[str, Any]) -> Call:
    """A call with the right sizes and no values or memory: enough to choose a schedule for."""

    def sized(*size: int) -> torch.Tensor:
        return torch.empty((), dtype=dtype).expand(size)

    q = sized(shape.batch, shape.heads_q, shape.n_q, shape.head_dim)
    keys = shape.batch, shape.heads_kv, shape.n_k
    if spec.page_size is not None:
        keys = int(captures["page_table"].max()) + 1, shape.heads_kv, spec.page_size
    k, v = (sized(*keys, dim) for dim in (shape.head_dim, shape.head_dim_v))
    named = {name: value for name, value in captures.items() if name != "q_offset"}
    offset = captures.get("q_offset", offset_of(shape))
    return bind(spec, q, k, v, q_offset=offset, captures=named, values=False)

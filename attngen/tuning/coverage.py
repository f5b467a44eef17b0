"""What the database has for calls that are to come, and what it lacks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from attngen.language.spec import Spec
from attngen.schedule import Target
from attngen.schedule.choice import DIRECTIONS, generator_versions
from attngen.schedule.identities import find_gpu
from attngen.store import Device, Found, Record, Shape, Workload, open_store
from attngen.tuning.jobs import Job, jobs_of
from attngen.tuning.target_device import TargetDevice, find_target_device

EXACT, NEAR, NONE = "exact", "nearest", "none"


@dataclass(frozen=True)
class Covered:
    """One attention of a call, in one direction, on one device; found: the record that it would use, None for none."""

    job: Job
    found: Found | None

    @property
    def status(self) -> str:
        """EXACT: of this bucket of sizes and these versions; NEAR: of another bucket, or of other versions; NONE."""
        return NONE if self.found is None else EXACT if self.found.exact else NEAR

    @property
    def words(self) -> str:
        """What a call would use, for people."""
        if self.found is None:
            return "none: the model chooses"
        return f"{self.found.how}, {self.found.record.time_text}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        key, job = self.job.key, self.job
        sizes = {field.name: getattr(job.shape, field.name) for field in fields(Shape)}
        return {
            "name": job.name, "part": job.part.name, "spec": job.spec.text, "spec_key": job.spec.key, **sizes,
            "bucket": key.shape_text(), "dtype": key.dtype, "direction": job.piece, "device": key.device,
            "status": self.status, "how": "" if self.found is None else self.found.how,
            "kind": "" if self.found is None else self.found.record.kind,
            "seconds": None if self.found is None else self.found.record.seconds,
        }  # fmt: skip


def coverage(
    workloads: Iterable[Workload], devices: Sequence[TargetDevice], *, db: str | Path | None = None
) -> list[Covered]:
    """For each device, call, and direction the record that it would use. InputError, StoreError."""
    store, calls = open_store(db), list(workloads)
    return [Covered(job, store.lookup(job.key)) for device in devices for job in jobs_of(calls, device)]


def devices_of(records: Iterable[Record]) -> list[TargetDevice]:
    """The devices that records were made for, and the one here, first."""
    here = find_target_device(None, None)
    found = {_identity(here.device): here}
    for record in records:
        device = Device(record.key.device, record.key.units, record.key.memory, record.key.driver)
        found.setdefault(_identity(device), _elsewhere(device, bool(record.key.triton)))
    return list(found.values())


def _identity(device: Device) -> tuple[str, int, int]:
    return device.name, device.units, device.memory


def _elsewhere(device: Device, is_gpu: bool) -> TargetDevice:
    """A device as its records name it."""
    if not is_gpu:
        return TargetDevice(device, generator_versions("cpu"), "measured", torch.device("cpu"), None, None)
    gpu = find_gpu(device.name)
    target = Target.named(gpu.target if gpu is not None else "sm_80")  # only to see that there is something to choose
    return TargetDevice(device, generator_versions("triton"), "measured", None, target, gpu)


def known_workloads(records: Iterable[Record]) -> list[Workload]:
    """What records are of, as calls in both directions: each spec, dtype and bucket once. Records without a spec's text say nothing, nor do
    tiles that a first call found.
    """
    found: dict[tuple[Any, ...], Workload] = {}
    for record in records:
        key = record.key
        if record.spec and key.piece in DIRECTIONS:
            shape = Shape(key.batch, key.heads_q, key.heads_kv, key.n_q, key.n_k, key.head_dim, key.head_dim_v)
            found.setdefault(
                (key.spec_key, key.dtype, shape), Workload("", Spec.from_text(record.spec), shape, key.dtype)
            )
    return list(found.values())

"""The manifest of a pack, read: its specs, which schedule is for which sizes, and which kernel is for which call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attngen.errors import PackError, ScheduleError
from attngen.language.plain import PlainSpec
from attngen.language.schedule import KERNELS, Schedule
from attngen.packs import driver, format
from attngen.packs.plain import NUMBER, TEXT, TRUTH, Missing, get_spec

# Of captured tensors, as kernels name the pointers to them.
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}

Dims = tuple[int, int]


def dtype_name(dtype: torch.dtype) -> str:
    """As a manifest has it: bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Choice:
    """A schedule for calls of about these sizes."""

    bucket: tuple[int, ...]
    schedule: Schedule
    origin: str


@dataclass(frozen=True)
class Contents:
    """The manifest, read. choices: by (spec, target, dtype, dims); kernels: by `_key` the name of a kernel and the kinds of captured
    tensors that it takes.
    """

    pack: format.Pack
    specs: Mapping[str, PlainSpec]
    plain: PlainSpec
    backward: bool
    choices: Mapping[Any, tuple[Choice, ...]]
    kernels: Mapping[Any, Mapping[tuple[tuple[str, str], ...], str]]

    @classmethod
    def read(cls, pack: format.Pack) -> Contents:
        """PackError for a manifest that is malformed."""
        whole = pack.manifest
        fields = {"specs", "plain", "backward", "schedules", "choices", "launches"}
        if set(whole) != fields:
            raise PackError(f"expected the fields {', '.join(sorted(fields))}, got {', '.join(sorted(whole))}")
        schedules = [_schedule(data) for data in _list(whole["schedules"])]
        choices: dict[Any, tuple[Choice, ...]] = {}
        for row in _list(whole["choices"]):
            data = _fields(row, ("spec", "target", "dtype", "dims", "bucket", "schedule", "origin"))
            key = (*(TEXT.get(None, data[name]) for name in ("spec", "target", "dtype")), _dims(data["dims"]))
            found = Choice(
                _numbers(data["bucket"], 5), _at(schedules, data["schedule"]), TEXT.get(None, data["origin"])
            )
            choices[key] = (*choices.get(key, ()), found)
        kernels: dict[Any, dict[Any, str]] = {}
        for row in _list(whole["launches"]):
            names = ("spec", "kernel", "target", "dtype", "dims", "schedule", "offset", "kinds", "sites", "name")
            data = _fields(row, names)
            name = TEXT.get(None, data["name"])
            if name not in pack.kernels:
                raise PackError(f"launches: expected a kernel of the pack, got {name!r:.60}")
            if not isinstance(data["kinds"], dict):
                raise PackError(f"kinds: expected an object, got {data['kinds']!r:.60}")
            kinds = tuple(sorted((own, TEXT.get(None, kind)) for own, kind in data["kinds"].items()))
            texts = (TEXT.get(None, data[own]) for own in ("spec", "kernel", "target", "dtype"))
            rest = _at(schedules, data["schedule"]), TRUTH.get(None, data["offset"]), _sites(data["sites"])
            kernels.setdefault((*texts, _dims(data["dims"]), *rest), {})[kinds] = name
        if not isinstance(whole["specs"], dict):
            raise PackError("specs: expected an object")
        specs = {}
        for name, data in whole["specs"].items():
            both = _fields(data, ("text", "plain"))
            specs[name] = get_spec(both["plain"])
            if specs[name].text != both["text"]:
                raise PackError(f"specs: {name}: expected its text twice, got two")
        return cls(pack, specs, get_spec(whole["plain"]), TRUTH.get(None, whole["backward"]), choices, kernels)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Of the kernels, the newest first."""
        found = {kernel.target for kernel in self.pack.kernels.values()}
        return tuple(sorted(found, key=lambda target: -int(target.removeprefix("sm_"))))

    def target_of(self, device: torch.device) -> str:
        """The one that runs on a device. Missing."""
        here = driver.capability(driver.index_of(device))
        for target in self.targets:
            if driver.runs_on(target, here):
                return target
        raise Missing(
            f"{self.pack.folder} has kernels for {', '.join(self.targets)}, and {device} is sm_{here[0]}{here[1]}"
        )


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise PackError(f"expected a list, got {data!r:.60}")
    return data


def _fields(data: Any, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != {*names}:
        raise PackError(f"expected {', '.join(names)}, got {data!r:.60}")
    return data


def _numbers(data: Any, count: int) -> tuple[int, ...]:
    found = tuple(NUMBER.get(None, item) for item in _list(data))
    if len(found) != count or any(number < 0 for number in found):
        raise PackError(f"expected {count} numbers, got {data!r:.60}")
    return found


def _dims(data: Any) -> Dims:
    head_dim, head_dim_v = _numbers(data, 2)
    return head_dim, head_dim_v


def _at(schedules: list[Schedule], place: Any) -> Schedule:
    if NUMBER.get(None, place) not in range(len(schedules)):
        raise PackError(f"schedule: expected one of {len(schedules)}, got {place}")
    return schedules[place]


def _schedule(data: Any) -> Schedule:
    try:
        found = Schedule(**data)
        for kernel in KERNELS:
            found.tile(kernel)  # whole
        return found
    except (ScheduleError, TypeError) as error:
        raise PackError(f"schedules: {error}") from None


def _sites(data: Any) -> tuple[tuple[Any, ...], ...]:
    return tuple(_site(item) for item in _list(data))


def _site(data: Any) -> tuple[Any, ...]:
    if not isinstance(data, list) or len(data) != 5:
        raise PackError(f"sites: expected [tensor, number, deterministic, by_batch, by_head], got {data!r:.60}")
    tensor, number, *truths = data
    return TEXT.get(None, tensor), NUMBER.get(None, number), *(TRUTH.get(None, truth) for truth in truths)

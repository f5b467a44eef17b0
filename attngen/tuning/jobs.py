"""What is searched: of each attention that calls are made of, and in each direction, one search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from attngen.language.spec import Spec
from attngen.schedule import Schedule
from attngen.store import Key, Shape, Workload
from attngen.tuning.attends import Part, parts_of
from attngen.tuning.captures import make_captures, save_captures
from attngen.tuning.space import Space
from attngen.tuning.target_device import TargetDevice


@dataclass(frozen=True, eq=False)
class Job:
    """One search: what, in which direction, where."""

    part: Part
    piece: str
    dtype: torch.dtype
    target_device: TargetDevice
    seed: int
    limit: float
    name: str = ""  # of the workload

    @property
    def title(self) -> str:
        """For people."""
        return " ".join(filter(None, [self.name, self.part.name, self.piece, str(self.part.shape)]))

    @property
    def spec(self) -> Spec:
        return self.part.spec

    @property
    def shape(self) -> Shape:
        return self.part.shape

    @property
    def key(self) -> Key:
        device, versions = self.target_device.device, self.target_device.versions
        return Key.of(self.spec.key, self.piece, str(self.dtype), self.shape, device, versions)

    @cached_property
    def values(self) -> dict[str, Any]:
        """The captures, made up where not given, on the CPU; of a part its q_offset too."""
        return self.part.captures | make_captures(self.spec, self.shape, "cpu", self.part.captures, self.seed)

    @cached_property
    def space(self) -> tuple[Space, Schedule]:
        """What may be chosen, and the complete schedule that a point changes."""
        return self.target_device.space(self)

    def has_choices(self) -> bool:
        """The CPU backend has nothing to choose for some pieces."""
        return bool(self.space[0].choices)

    @property
    def identity(self) -> str:
        """A hash of the record's key, the exact shape, what may be chosen, and whether it is measured."""
        choices = {name: list(values) for name, values in self.space[0].choices.items()}
        identity = [repr(self.key), repr(self.shape), self.target_device.kind, choices]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def study(self) -> str:
        """The study's name, for people; equal for equal searches alone."""
        what = self.spec.text.splitlines()[-1][:80]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{what}, {self.piece}, {self.shape}, {dtype}, {self.key.device}, {self.identity}"

    @property
    def about(self) -> dict[str, Any]:
        """The study's attributes."""
        key, versions = self.key, self.target_device.versions
        return {
            "spec": self.spec.text,
            "spec key": key.spec_key,
            "direction": self.piece,
            "shape": str(self.shape),
            "dtype": key.dtype,
            "device": key.device,
            "time is": f"{self.target_device.kind}, in seconds",
            "untuned schedule": self.space[1].decided(),
            "versions": {"driver": key.driver} | asdict(versions),
        }

    def request(self, base: Schedule, folder: Path) -> dict[str, Any]:
        """The worker's first request."""
        where, target = self.target_device.torch_device, self.target_device.target
        small = self.part.small
        captures = self.part.captures
        wide = [n for n, x in captures.items() if isinstance(x, torch.Tensor) and x.dtype == torch.int64]
        return {
            "op": "job",
            "spec": self.spec.text,
            "shape": str(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(where) if where is not None else None,
            "target": target.name if target is not None else None,
            "piece": self.piece,
            "base": base.decided(),
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "captures": str(save_captures(captures, folder / "whole")) if captures else None,
            "whole": self.part.whole,
            "wide": [name for name in wide if name in self.spec.tensors],
            "small": small
            and {"shape": str(small.shape), "captures": str(save_captures(small.captures, folder / "small"))},
        }


def jobs_of(
    workloads: Iterable[Workload],
    target_device: TargetDevice,
    seed: int = 0,
    limit: float = 60.0,
    made_up: list[str] | None = None,
) -> Iterator[Job]:
    """The searches that calls come to, each once. made_up: gets the names of what was made up for them. InputError."""
    seen: set[tuple[Key, Shape]] = set()
    for one in workloads:
        dtype = getattr(torch, one.dtype) if one.dtype else target_device.usual_dtype
        parts, words = parts_of(
            one.spec,
            one.shape,
            dtype,
            one.captures,
            device=target_device.torch_device or torch.device("cpu"),
            patient=target_device.target is None,
            backward="backward" in one.directions,
            seed=seed,
        )
        if made_up is not None:
            made_up += [word for word in words if word not in made_up]
        for part, piece in product(parts, one.directions):
            if piece == "backward" and part.spec.page_size is not None:  # pages are for inference
                continue
            job = Job(part, piece, dtype, target_device, seed, limit, one.name)
            if (job.key, job.shape) not in seen and job.has_choices():
                seen.add((job.key, job.shape))
                yield job

"""The GPU architectures that kernels are generated for, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from attngen.analysis import GPUS
from attngen.errors import ScheduleError
from attngen.schedule.identities import find_gpu


@dataclass(frozen=True)
class Target:
    """A GPU architecture to generate code for.

    name: "sm_90" or "gfx942"; shared_limit: bytes of shared memory a program may use; registers: per SM (32-bit);
    max_warps: resident warps per SM.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    registers: int = 65536
    max_warps: int = 64

    @classmethod
    def named(cls, name: str) -> Target:
        """The target of an architecture ("sm_90") or of a GPU ("H100"). ScheduleError for one that is not known."""
        gpu = find_gpu(name)
        found = TARGETS.get(name if gpu is None else gpu.target)
        if found is None:
            raise ScheduleError(f"target: expected one of {', '.join([*TARGETS, *GPUS])}, got {name!r}")
        return found

    @classmethod
    def of_device(cls, device: torch.device | str) -> Target:
        """The target of a CUDA or ROCm device. ScheduleError for an architecture that is not known."""
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls.named(properties.gcnArchName.split(":")[0])
        return cls.named(f"sm_{properties.major}{properties.minor}")

    @property
    def has_descriptors(self) -> bool:
        """Whether tiles can be loaded through tensor descriptors: sm_90 and above."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90


def _nvidia(version: int, shared_kib: int, max_warps: int) -> Target:
    return Target(f"sm_{version}", "cuda", version, 32, shared_kib * 1024, max_warps=max_warps)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            _nvidia(80, 163, 64),
            _nvidia(86, 99, 48),
            _nvidia(89, 99, 48),
            _nvidia(90, 227, 64),
            _nvidia(100, 227, 64),
            _nvidia(120, 99, 48),
            Target("gfx942", "hip", "gfx942", 64, 64 * 1024, registers=131072, max_warps=32),
        )
    }
)

"""The hardware a record was made on, as part of its key. H100 and H200 are both sm_90 and differ here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Device:
    """Name as the vendor's driver says it; streaming multiprocessors (or CPU threads); GiB (0 for a CPU)."""

    name: str
    units: int
    memory: int = 0
    driver: str = ""


def device_of(device: torch.device | str) -> Device:
    """The Device of a torch device; on a CPU the thread count in use is part of it."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / 2**30)
        return Device(properties.name, properties.multi_processor_count, memory, _driver())
    return Device(_processor(), torch.get_num_threads())


@cache
def _processor() -> str:
    """The CPU's model name; `platform` alone says only 'x86_64' on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            label, _, value = line.partition(":")
            if label.strip() in ("model name", "Model", "cpu model") and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


@cache
def _driver() -> str:
    """The GPU driver's version, or "" where the system does not tell (then it is no part of the key)."""
    import torch

    if torch.version.hip:
        path = Path("/sys/module/amdgpu/version")
        return path.read_text().strip() if path.is_file() else str(torch.version.hip)
    path = Path("/proc/driver/nvidia/version")
    try:
        words = path.read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")

"""How much memory a run takes at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's mallopt


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a run takes at its peak beyond what was held before; on a CPU the growth of the process, None where the
    system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with _from_the_system():
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _status("VmRSS")
            run()
            return max(0, _status("VmHWM") - before)
    except OSError:
        return None


@contextmanager
def _from_the_system() -> Iterator[None]:
    """Large blocks come from the system and go back to it when they are freed. Otherwise the C library keeps them once a process
    has freed some (its threshold grows to 32 MiB), so that what ran before decides how much a run seems to take.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    set_option, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if set_option is None or trim is None:  # not glibc
        yield
        return
    set_option(_MMAP_THRESHOLD, 128 * 1024)
    trim(0)
    try:
        yield
    finally:  # what a process comes to by itself
        set_option(_MMAP_THRESHOLD, 32 * 1024**2)
        set_option(_TRIM_THRESHOLD, 64 * 1024**2)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {name}")

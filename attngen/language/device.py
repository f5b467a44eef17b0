"""What a call asks of the device that it runs on."""

from __future__ import annotations

from functools import lru_cache

import torch

SCHEDULERS = 4  # of a GPU's multiprocessor: each issues instructions of its own warps


@lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side on a GPU if each fills a multiprocessor; elsewhere as many as is nice to test."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def programs_at_once(processors: int, num_warps: int) -> int:
    """How many programs of so many warps run side by side on multiprocessors that have a warp for each of their schedulers."""
    return processors * max(1, SCHEDULERS // num_warps)


@lru_cache(maxsize=32)
def cache_bytes(device: torch.device) -> int:
    """Bytes of a GPU's second-level cache; elsewhere as many as is nice to test."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**22

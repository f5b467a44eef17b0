"""What a call asks of the device that it runs on."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side on a GPU if each fills a multiprocessor; elsewhere as many as is nice to test."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=32)
def cache_bytes(device: torch.device) -> int:
    """Bytes of a GPU's second-level cache; elsewhere as many as is nice to test."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**22

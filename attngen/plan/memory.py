"""Results on the CPU, in pages that cost little to touch for the first time.

A result of 32 MiB is 8192 ordinary pages, each of them a trap into the system when it is first written: more time than a very
sparse attention computes. numpy asks for huge pages (madvise) for large arrays, which Linux grants by default; torch asks
only where its environment says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LARGE = 2**22  # bytes; numpy asks from there on
ALIGNED = 64  # bytes, as torch aligns


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU; a large one's storage is numpy's and cannot be resized."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    import numpy  # for CPUs only, which a GPU's call has no need of

    data = numpy.empty(size + ALIGNED, dtype=numpy.uint8)
    start = -data.ctypes.data % ALIGNED
    return torch.from_numpy(data[start : start + size]).view(dtype).view(shape)


def full(like: torch.Tensor, shape: Sequence[int], fill: float | None) -> torch.Tensor:
    """`like.new_full(shape, fill)` on any device, `like.new_empty(shape)` without a value."""
    if like.device.type != "cpu" or type(like) is not torch.Tensor or torch.compiler.is_compiling():
        return like.new_empty(shape) if fill is None else like.new_full(shape, fill)
    result = empty(shape, like.dtype)
    return result if fill is None else result.fill_(fill)

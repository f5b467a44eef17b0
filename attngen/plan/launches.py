"""Which kernels an attention launches: what runs, compiles, counts and shows them agree by this."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attngen.analysis import Facts
from attngen.schedule import Schedule


def forward_launches(schedule: Schedule) -> tuple[str, ...]:
    """The kernels of a forward, in their order. Where several programs share an output, a second one merges their states."""
    return ("forward",) if schedule.split in (None, 1) else ("forward", "merge")


def backward_launches(facts: Facts, dtype: torch.dtype, captures: Sequence[str] = ()) -> tuple[str, ...]:
    """The kernels of a backward whose delta is there already, in their order; captures: tensors that want a gradient."""
    excess = ("excess",) if facts.restores(dtype) else ()
    return (*excess, "dq", "dkv", *(f"gradient of {name}" for name in captures))

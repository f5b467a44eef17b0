"""FlexAttention's kernel_options as a schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attngen.integrations.flex.warn import warn_once
from attngen.language.schedule import Schedule

_EVERY = {"num_warps": "num_warps", "num_stages": "num_stages", "USE_TMA": "tma"}  # of each kernel
_FORWARD = {"BLOCK_M": "block_m", "BLOCK_N": "block_n"}
# torch's backward is one kernel with two loops: the first makes dk and dv, the second dq.
_BACKWARD = {"BLOCK_M1": "dkv_block_m", "BLOCK_N1": "dkv_block_n", "BLOCK_M2": "dq_block_m", "BLOCK_N2": "dq_block_n"}
_SAME = ("AUTO", "TRITON")  # backends that attngen's kernels are


def schedule_of(options: Iterable[tuple[str, Any]]) -> Schedule:
    """The decisions that the options pin. An option without a meaning here is named in a warning, once. ScheduleError."""
    general: dict[str, Any] = {}
    special: dict[str, Any] = {}  # of one direction: before the general ones
    for name, value in options:
        direction, short = (name[:3], name[4:]) if name.startswith(("fwd_", "bwd_")) else ("", name)
        fields = [_FORWARD[short]] if short in _FORWARD and direction != "bwd" else []
        fields += [_BACKWARD[short]] if short in _BACKWARD and direction != "fwd" else []
        if short in _EVERY:
            prefixes = {"": ("", "dq_", "dkv_"), "fwd": ("",), "bwd": ("dq_", "dkv_")}[direction]
            fields = [prefix + _EVERY[short] for prefix in prefixes]
        if not fields and not (name == "BACKEND" and value in _SAME):
            warn_once(f"kernel_options: {name} has no meaning for attngen's kernels and is ignored")
        (special if direction else general).update({field: value for field in fields if value is not None})
    return Schedule(**{**general, **special})

"""Compiling a kernel for any supported GPU, here or not, by Triton's own compiler."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from attngen.backends.triton.compile_worker import compiled
from attngen.backends.triton.machine_code import MachineCode, nvidia_resources
from attngen.errors import ScheduleError
from attngen.lowering import Source
from attngen.schedule import Target


def compile_source(source: Source, target: Target, dtype: torch.dtype, captured: Mapping[str, str] = {}) -> MachineCode:
    """Compile one generated file for a target. `captured`: kind of each captured tensor ("wide": int64). Raises ScheduleError."""
    return compile_function(
        source.name,
        source.load(),
        {arg.name: arg.triton_type(dtype, captured) for arg in source.args},
        [arg.name for arg in source.args if arg.divisible],
        source.num_warps,
        source.num_stages,
        target,
        [arg.name for arg in source.args if arg.unit],
    )


def compile_function(
    name: str,
    function: Any,
    signature: Mapping[str, str],
    divisible: Collection[str],
    num_warps: int,
    num_stages: int,
    target: Target,
    ones: Collection[str] = (),
) -> MachineCode:
    """A function as `compile_worker.compiled` takes it. ScheduleError where it needs more shared memory than the target has."""
    import triton

    place = target.backend, target.arch, target.warp_size
    try:
        kernel = compiled(function, signature, divisible, num_warps, num_stages, place, ones)
    except triton.runtime.errors.OutOfResources as error:
        raise ScheduleError(f"{name} on {target.name}: {error}; choose smaller blocks or fewer stages") from error
    shared = int(kernel.metadata.shared)
    if shared > target.shared_limit:
        raise ScheduleError(
            f"{name} on {target.name} needs {shared} bytes of shared memory, {shared - target.shared_limit} more than "
            f"the limit of {target.shared_limit}; choose smaller blocks or fewer stages"
        )
    if "cubin" in kernel.asm:
        registers, stack = nvidia_resources(kernel.asm["cubin"])
        return MachineCode(
            name,
            target.name,
            registers,
            stack // 4,
            shared,
            stack,
            kernel.asm["ptx"],
            kernel.asm["cubin"],
            metadata=kernel.metadata._asdict(),
        )
    assembly = kernel.asm["amdgcn"]
    registers, spills, stack = (
        int(match[1]) if (match := re.search(rf"{key}:\s*(\d+)", assembly)) else 0
        for key in (r"\.vgpr_count", r"\.vgpr_spill_count", r"\.private_segment_fixed_size")
    )
    return MachineCode(name, target.name, registers, spills, shared, stack, assembly, kernel.asm["hsaco"])

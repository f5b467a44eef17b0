"""Seconds of a kernel on a GPU, modelled from its machine code: for GPUs that are not here, and to leave out what cannot be good.

A tile takes a multiprocessor at least the cycles of its busiest part (`Loop.pipes`, or the second-level cache, which hands out
the walked rows), and a program at least those that a warp takes alone (`latency`). With P programs on a multiprocessor each hides
a P-th of the other's waiting: busy + (alone - busy) / P for a tile of each. What stands outside of the loops counts once a program.
Programs come in waves, of which the last is not full. No launch is shorter than reading and writing what it needs.

On sm_100 products and what waits for them are not read: there it compares the rest. Left out: bank conflicts, misses of the
second-level cache and of instructions, clocks that fall under load, programs of unequal length, and how far two programs really
overlap. It ranks kernels; it does not predict a clock.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from attngen.analysis import Gpu
from attngen.backends.triton.latency import iteration, once
from attngen.backends.triton.machine_code import Loop, MachineCode
from attngen.schedule import Target

LAUNCH = 5e-6  # seconds, the least a kernel takes
L2_BYTES = (
    24  # that the second-level cache hands a multiprocessor in a cycle: 5.5 TB/s of an H100, shared by all of them
)
RESERVED = 1024  # bytes of shared memory that the system takes for each program
SPILLS = 16  # registers a thread that a schedule may spill; more costs in every tile


@dataclass(frozen=True)
class Stretch:
    """Cycles of a loop's iteration, or of what runs once. busy: of the part of a multiprocessor that is busiest, for all warps of
    a program; alone: until a warp is through if nothing else runs.
    """

    busy: float
    alone: float

    @classmethod
    def of(cls, loop: Loop, num_warps: int, loops: bool = True) -> Stretch:
        """Of machine code with control bits (NVIDIA up to sm_90)."""
        alone = (iteration if loops else once)(loop.code)
        return cls(max(loop.pipes(num_warps).values(), default=0.0), alone)

    def __add__(self, other: Stretch) -> Stretch:
        return Stretch(self.busy + other.busy, self.alone + other.alone)

    def cycles(self, programs: int, fetching: float = 0.0) -> float:
        """That one of so many programs takes a multiprocessor. fetching: cycles of the second-level cache for it."""
        busy = max(self.busy, fetching)
        return busy + max(0.0, self.alone - busy) / programs


@dataclass(frozen=True)
class Resources:
    """What the compiler used for a kernel: registers a thread, registers spilled a thread, bytes of shared memory; and where its
    machine code was read, cycles of a full and of a partial tile, of all programs that share them, and of what stands outside
    of the loops.
    """

    registers: int
    spills: int
    shared: int
    num_warps: int
    full: Stretch | None = None
    partial: Stretch | None = None
    outside: Stretch | None = None

    @classmethod
    def of(cls, made: MachineCode, num_warps: int, parts: int = 1) -> Resources:
        """Of a kernel with one loop, or one over full tiles and one over partial tiles behind it; such loops for each of the
        programs that share an output.
        """
        if not made.controls or not made.loops:
            return cls(made.registers, made.spills, made.shared, num_warps)
        nothing = Stretch(0.0, 0.0)
        full, partial = (
            sum((Stretch.of(loop, num_warps) for loop in loops), nothing)
            for loops in zip(*made.walks(parts), strict=True)
        )
        outside = Stretch.of(made.outside, num_warps, loops=False)
        return cls(made.registers, made.spills, made.shared, num_warps, full, partial, outside)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Resources:
        """What `to_json` made."""
        stretches = {name: Stretch(**data[name]) for name in ("full", "partial", "outside") if data.get(name)}
        return cls(**{**data, **stretches})

    def to_json(self) -> dict[str, Any]:
        """For an answer of another process."""
        return asdict(self)

    def resident(self, target: Target) -> int:
        """Programs that fit one multiprocessor at once."""
        by_warps = target.max_warps // self.num_warps
        granted = -(-max(self.registers, 1) // 8) * 8
        by_registers = target.registers // (granted * self.num_warps * target.warp_size)
        by_shared = (target.shared_limit + RESERVED) // (self.shared + RESERVED)
        return max(0, min(by_warps, by_registers, by_shared))

    def problem(self, target: Target, spills: int = SPILLS) -> str | None:
        """Why the target cannot run it, or should not. spills: registers a thread that it may spill."""
        if self.shared > target.shared_limit:
            return f"needs {self.shared} bytes of shared memory, {target.name} has {target.shared_limit}"
        if self.spills > spills:
            return f"spills {self.spills} registers a thread"
        if self.resident(target) < 1:
            return f"{self.registers} registers a thread: not one program of {self.num_warps} warps fits"
        return None


@dataclass(frozen=True)
class Work:
    """What a launch does. full, partial: tiles; programs; walked: bytes of the rows that a tile walks; moved: bytes that are
    read and written at least.
    """

    full: float
    partial: float
    programs: float
    walked: float = 0.0
    moved: float = 0.0


def clock(gpu: Gpu, units: int) -> float:
    """Hz, from the exponentials that a multiprocessor's 16 lanes do."""
    return gpu.exp / (16 * units)


def cycles(used: Resources, work: Work, target: Target, units: int) -> float:
    """Of a multiprocessor, for a launch on so many of them."""
    assert used.full is not None and used.partial is not None and used.outside is not None
    programs = max(1, min(used.resident(target), math.ceil(work.programs / units)))
    fetching = work.walked / L2_BYTES
    total = work.full * used.full.cycles(programs, fetching) + work.partial * used.partial.cycles(programs, fetching)
    total += work.programs * used.outside.cycles(programs)
    waves = work.programs / (units * programs)
    return total / units * (math.ceil(waves) / waves)


def seconds(used: Resources, work: Work, target: Target, gpu: Gpu, units: int) -> float:
    """Of a launch."""
    return LAUNCH + max(cycles(used, work, target, units) / clock(gpu, units), work.moved / gpu.bandwidth)

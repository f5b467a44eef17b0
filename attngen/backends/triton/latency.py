"""How long one warp takes for a stretch of machine code if nothing else runs: instructions are issued in their order, as the
compiler's control bits and the latencies of what they ask for allow.

The control bits say how many cycles an instruction takes at least, which barrier its result releases, and which barriers it waits
for. Latencies are those that microbenchmarks of the hardware found (arXiv 2402.13499, for A100 and H100). Not in it: other warps
in the same pipes, bank conflicts, misses of the second-level cache, instruction fetches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from attngen.backends.triton.machine_code import MACS, SHARED_BYTES, Instruction

SHARED_LATENCY = 29  # cycles until a word of shared memory is there
GLOBAL_LATENCY = 270  # a line of the second-level cache, where walked tiles are after the first program read them
SPECIAL_LATENCY = 23  # exponentials, shuffles, conversions of other widths
LOCAL_LATENCY = 38  # spilled registers, in the first-level cache
BARRIER = 25  # cycles between the last warp's arrival at a barrier and going on
PRODUCT_LATENCY = 32  # of a product behind the last one that the matrix unit began
TAKEN = 12  # cycles of a branch that is taken, until the next instruction is there
READ = 12  # cycles until operands of a store are read

_LATENCY = {
    "LDS": SHARED_LATENCY,
    "LDSM": SHARED_LATENCY,
    "ATOMS": SHARED_LATENCY,
    "LDG": GLOBAL_LATENCY,
    "LDGSTS": GLOBAL_LATENCY,
    "ATOMG": GLOBAL_LATENCY,
    "LDL": LOCAL_LATENCY,
    "LDC": LOCAL_LATENCY,
}
_PACE = {"MUFU": 8, "SHFL": 2, "LDS": 2, "LDSM": 4, "STS": 2, "STSM": 4}  # cycles of a scheduler that the unit is busy
_DEPBAR = re.compile(r"DEPBAR\.LE \w+, (0x[0-9a-f]+)")


@dataclass
class _Warp:
    """What a warp waits for, in cycles."""

    clock: float = 0.0
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    units: dict[str, float] = field(default_factory=dict)
    copies: float = 0.0  # the last asynchronous copy, and the groups of copies
    groups: list[float] = field(default_factory=list)
    matrix: float = 0.0  # the matrix unit has done everything, and after each group of products
    products: list[float] = field(default_factory=list)

    def issue(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        for barrier in range(6):
            if instruction.waits >> barrier & 1:
                self.clock = max(self.clock, self.barriers[barrier])
        if opcode in _PACE:
            self.clock = max(self.clock, self.units.get(opcode, 0.0))
            self.units[opcode] = self.clock + _PACE[opcode]
        result, read = instruction.signals
        if result < 6:
            ready = self.clock + _LATENCY.get(opcode, SPECIAL_LATENCY)
            self.barriers[result] = max(self.barriers[result], ready)
        if read < 6:
            self.barriers[read] = max(self.barriers[read], self.clock + READ)
        self._asynchronous(instruction)
        self.clock += max(1, instruction.stall)

    def _asynchronous(self, instruction: Instruction) -> None:
        """Copies and products of a group of warps, which barriers of their own count."""
        match instruction.opcode:
            case "LDGSTS":
                self.copies = self.clock + GLOBAL_LATENCY
            case "LDGDEPBAR":
                self.groups.append(self.copies)
            case "HGMMA":
                assert instruction.product is not None
                m, n, k, fetched = instruction.product
                busy = max(m * n * k / MACS["HGMMA"], 2 * k * (n + m * fetched) / SHARED_BYTES)
                self.matrix = max(self.matrix, self.clock) + busy
                if "gsb0" in instruction.text:
                    self.products.append(self.matrix + PRODUCT_LATENCY)
            case "DEPBAR":
                self._wait(self.groups, instruction)
            case "WARPGROUP":
                self._wait(self.products, instruction)
            case "BAR":
                self.clock += BARRIER
            case "BRA":
                self.clock += TAKEN

    def _wait(self, groups: list[float], instruction: Instruction) -> None:
        """Until no more than so many groups are left."""
        found = _DEPBAR.search(instruction.text)
        if found is not None:
            left = int(found[1], 16)
            done, groups[:] = groups[: len(groups) - left], groups[len(groups) - left :]
            self.clock = max([self.clock, *done])


def iteration(code: Sequence[Instruction]) -> float:
    """Cycles of one more iteration of a loop, once loads of earlier ones are under way."""
    warp, ends = _Warp(), list[float]()
    for _ in range(4):
        for instruction in code:
            warp.issue(instruction)
        ends.append(warp.clock)
    return ends[-1] - ends[-2]


def once(code: Sequence[Instruction]) -> float:
    """Cycles of a stretch that runs once."""
    warp = _Warp()
    for instruction in code:
        warp.issue(instruction)
    return warp.clock

"""What machine code says of a kernel without running it: registers, and for each loop its instructions by pipe and the cycles
that they take at least.

The counts are of the disassembly; the cycles are modelled from them. A multiprocessor has four schedulers, each of which issues
an instruction of a warp a cycle, so that a pipe that takes a warp's instruction every n-th cycle takes n of a scheduler's. Not in
the model: latency, bank conflicts, waits at barriers, memory, and what the host does. So it compares loops that do the same
work in different tiles, or in different kernels; it does not predict a clock.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attngen.language.device import SCHEDULERS

WARP_GROUP = 4  # warps whose products Hopper's matrix unit does together
MACS = {"HGMMA": 2048, "HMMA": 1024}  # multiply-adds of half types a cycle and multiprocessor: wgmma of sm_90, mma.sync
MMA_SYNC = 16 * 8 * 16  # multiply-adds of an HMMA.16816, which one warp issues
SHARED_BYTES = 128  # that shared memory hands out in a cycle

# What an opcode is, for the counts; an opcode matches by its first word.
_CLASSES = {
    "mma": ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "IMMA", "BMMA"),
    "exp": ("MUFU",),
    "compare": ("ISETP", "FSETP", "UISETP", "HSETP2", "FMNMX_SEL"),
    "select": ("FSEL", "SEL", "USEL"),
    "load": ("LDG", "LDGSTS", "UBLKCP", "UTMALDG"),
    "shared": ("LDS", "LDSM", "STS", "STSM"),
    "spill": ("LDL", "STL"),
}
# Opcodes of the pipe that does comparisons, selections and logic on half of a warp's lanes a cycle, and conversions with it;
# and of the multiply-add pipes.
_HALF_RATE = frozenset(
    [
        "BMSK",
        "F2F",
        "F2FP",
        "F2I",
        "F2IP",
        "FCHK",
        "FMNMX",
        "FMNMX3",
        "FSEL",
        "FSETP",
        "HMNMX2",
        "HSET2",
        "HSETP2",
        "I2F",
        "I2FP",
        "I2I",
        "IABS",
        "IADD",
        "IADD3",
        "IMNMX",
        "ISCADD",
        "ISETP",
        "LEA",
        "LOP",
        "LOP3",
        "MOV",
        "P2R",
        "PLOP3",
        "PRMT",
        "R2P",
        "SEL",
        "SGXT",
        "SHF",
        "VABSDIFF",
        "VIADD",
        "VIADDMNMX",
        "VIMNMX",
    ]
)
_FULL_RATE = frozenset(
    "FADD FADD32I FFMA FFMA2 FFMA32I FMUL FMUL32I FSWZADD HADD2 HFMA2 HMUL2 IMAD".split()  # noqa: SIM905
)
_EXP_CYCLES = 8  # of a scheduler for a warp's MUFU: 4 lanes a cycle


@dataclass(frozen=True)
class Cycles:
    """Of one tile on a multiprocessor that has one program, modelled.

    matrix: of its products, or of fetching their operands from shared memory, whichever is longer. rest: of everything else.
    """

    matrix: float
    rest: float

    @property
    def overlap(self) -> float:
        """If products hide the rest, or the rest hides them."""
        return max(self.matrix, self.rest)

    @property
    def serial(self) -> float:
        """If neither hides the other."""
        return self.matrix + self.rest


Product = tuple[int, int, int, bool]


@dataclass(frozen=True)
class Instruction:
    """One instruction of a listing. control: the bits by which the compiler tells the hardware when to issue it; 0 where they
    are not known.
    """

    opcode: str  # its first word
    text: str
    control: int = 0

    @property
    def stall(self) -> int:
        """Cycles until the warp's next instruction, at least."""
        return self.control & 15

    @property
    def signals(self) -> tuple[int, int]:
        """The barriers that it releases when its result is there, and when its operands are read; 7 for none."""
        return self.control >> 5 & 7, self.control >> 8 & 7

    @property
    def waits(self) -> int:
        """A bit for each barrier that it waits for."""
        return self.control >> 11 & 63

    @property
    def shared_bytes(self) -> int:
        """That a warp moves from or to shared memory: 8 x 8 matrices of half types, or a word of each lane; nothing where it never
        runs, as what ptxas puts before copies to shared memory.
        """
        if "@!PT" in self.text:
            return 0
        if self.opcode in ("LDSM", "STSM"):
            return 128 * int(self.text.split("M88.")[1][0] if "M88." in self.text else 1)
        if self.opcode in ("LDS", "STS", "LDGSTS"):
            return 512 if ".128" in self.text else 256 if ".64" in self.text else 128
        return 0

    @cached_property
    def product(self) -> Product | None:
        """m, n, k of a product of a group of warps, and whether its first operand comes from shared memory."""
        found = _PRODUCT.search(self.text) if self.opcode == "HGMMA" else None
        return None if found is None else (int(found[1]), int(found[2]), int(found[3]), found[4] is not None)


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code, or what stands outside of them.

    opcodes: instructions by the first word of their opcode. products: m, n and k of each product of a group of warps, and
    whether its first operand comes from shared memory too. code: the instructions in their order.
    """

    opcodes: Mapping[str, int]
    products: tuple[Product, ...] = ()
    code: tuple[Instruction, ...] = ()

    @classmethod
    def of(cls, code: Sequence[Instruction]) -> Loop:
        """Counted."""
        products = tuple(instruction.product for instruction in code if instruction.product is not None)
        return cls(dict(Counter(instruction.opcode for instruction in code)), products, tuple(code))

    @property
    def instructions(self) -> int:
        """All instructions of one iteration."""
        return sum(self.opcodes.values())

    def count(self, kind: str) -> int:
        """Instructions of a class: "mma", "exp", "compare", "select", "load", "shared" or "spill"."""
        return sum(self.opcodes.get(opcode, 0) for opcode in _CLASSES[kind])

    def pipes(self, num_warps: int) -> dict[str, float]:
        """Cycles that each part of a multiprocessor is busy for one iteration of a program with so many warps (NVIDIA up to
        sm_90): "matrix", "fetching" from shared memory by products and by instructions, "issue" of instructions, "multiply-add",
        "logic" (with comparisons, selections and conversions) and "exp".
        """
        each, groups = num_warps / SCHEDULERS, num_warps / WARP_GROUP
        products = sum(m * n * k for m, n, k, _ in self.products) * groups / MACS["HGMMA"]
        products += self.opcodes.get("HMMA", 0) * num_warps * MMA_SYNC / MACS["HMMA"]
        moved = sum(2 * k * (n + m * shared) for m, n, k, shared in self.products) * groups
        moved += sum(instruction.shared_bytes for instruction in self.code) * num_warps
        return {
            "matrix": products,
            "fetching": moved / SHARED_BYTES,
            "issue": self.instructions * each,
            "multiply-add": sum(count for opcode, count in self.opcodes.items() if opcode in _FULL_RATE) * each,
            "logic": 2 * sum(count for opcode, count in self.opcodes.items() if opcode in _HALF_RATE) * each,
            "exp": _EXP_CYCLES * self.opcodes.get("MUFU", 0) * each,
        }

    def cycles(self, num_warps: int) -> Cycles:
        """Of one iteration of a program with so many warps (NVIDIA up to sm_90)."""
        busy = self.pipes(num_warps)
        matrix = max(busy.pop("matrix"), busy.pop("fetching"))
        return Cycles(matrix, max(busy.values()))

    def __str__(self) -> str:
        counts = ", ".join(f"{kind} {self.count(kind)}" for kind in _CLASSES if self.count(kind))
        return f"{self.instructions} instructions: {counts}"


@dataclass(frozen=True)
class MachineCode:
    """A kernel compiled for a target.

    registers: per thread; spills: 32-bit registers spilled per thread; shared: bytes per program; stack: bytes per thread;
    assembly: PTX, or AMD's assembly; binary: a cubin, or a code object; metadata: what else Triton says of it.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    stack: int
    assembly: str
    binary: bytes
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False, kw_only=True)

    def sass(self) -> str:
        """Machine code as text (NVIDIA), by the nvdisasm that ships inside triton; else the assembly."""
        return self._sass

    @cached_property
    def _sass(self) -> str:
        return disassembled(self.binary) if self.target.startswith("sm_") else self.assembly

    @cached_property
    def controls(self) -> tuple[int, ...]:
        """Of each instruction (NVIDIA)."""
        return controls_of(self.binary) if self.target.startswith("sm_") else ()

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The innermost loops that do matrix products, in address order."""
        return product_loops(self.sass(), self.controls)

    def walks(self, parts: int = 1) -> tuple[tuple[Loop, Loop], ...]:
        """The loops over full and over partial tiles of each program that shares an output; one loop serves both where nothing is
        masked. ValueError for less than a loop each.
        """
        count = len(self.loops)
        if count < parts:
            raise ValueError(f"{self.name}: expected {parts} loops with products or more, got {count}")
        runs = [self.loops[part * count // parts : (part + 1) * count // parts] for part in range(parts)]
        return tuple((run[0], run[-1]) for run in runs)

    @cached_property
    def outside(self) -> Loop:
        """What stands before and behind them."""
        return outside(self.sass(), self.controls)


def disassembled(cubin: bytes) -> str:
    """A cubin's machine code as text, by the nvdisasm that ships inside triton."""
    return _tool("nvdisasm", cubin, "-c")


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", cubin, "--dump-resource-usage"))
    assert match is not None
    return int(match[1]), int(match[2])


def product_loops(assembly: str, controls: Sequence[int] = ()) -> tuple[Loop, ...]:
    """The innermost loops that do matrix products, in address order."""
    code, spans = _listing(assembly, controls)
    return tuple(Loop.of(code[first:stop]) for first, stop in _product_spans(code, spans))


def outside(assembly: str, controls: Sequence[int] = ()) -> Loop:
    """What stands before and behind those loops."""
    code, spans = _listing(assembly, controls)
    inside = [range(*span) for span in _product_spans(code, spans)]
    return Loop.of([instruction for place, instruction in enumerate(code) if not any(place in span for span in inside)])


def controls_of(cubin: bytes) -> tuple[int, ...]:
    """The control bits of each instruction, in the order of their addresses: the 21 above bit 105 of its 128, which Triton's
    `tools/disasm.py` decodes too.
    """
    sections, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    headers = [struct.unpack_from("<II8x8xQQ", cubin, sections + number * size) for number in range(count)]
    text = next((h for h in headers if cubin.startswith(b".text.", headers[names][2] + h[0])), None)
    if text is None:
        return ()
    words = struct.unpack_from(f"<{text[3] // 8}Q", cubin, text[2])
    return tuple(word >> 41 & 0x1FFFFF for word in words[1::2])


def _tool(name: str, binary: bytes, *options: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


_LABEL = re.compile(r"\s*(\.L_\w+|\.?L?BB\w+):")
_INSTRUCTION = re.compile(r"\s*(?:/\*([0-9a-f]+)\*/)?\s*(?:@!?U?P\w+\s+)?([A-Za-z_][\w]*)")
_JUMP = re.compile(r"(?:BRA|s_c?branch)\S*.*?(\.L_\w+|\.?L?BB\w+)")
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*\s+R\w+, (gdesc)?")

Span = tuple[int, int]


def _listing(assembly: str, controls: Sequence[int]) -> tuple[list[Instruction], list[Span]]:
    """The instructions, and the innermost loops: from a label to the last branch back to it, without another such pair inside."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    spans: dict[int, int] = {}
    addressed = "/*0000*/" in assembly  # by nvdisasm, among lines that are no instructions
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif (found := _INSTRUCTION.match(line)) and (found[1] or not addressed):
            place = int(found[1], 16) // 16 if found[1] else len(controls)
            code.append(Instruction(found[2], line, controls[place] if place < len(controls) else 0))
            jump = _JUMP.search(line)
            if jump and jump[1] in labels:
                spans[labels[jump[1]]] = len(code)
    every = sorted(spans.items())
    return code, [s for s in every if not any(s[0] <= a and b <= s[1] and (a, b) != s for a, b in every)]


def _product_spans(code: Sequence[Instruction], spans: Sequence[Span]) -> list[Span]:
    products = {*_CLASSES["mma"]}
    return [
        (first, stop)
        for first, stop in spans
        if any(i.opcode in products or i.opcode.startswith("v_mfma") for i in code[first:stop])
    ]

"""What a pack says of one kernel: all that a launch needs, checked field by field, and against the cubin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import PackError
from .elf import read_cubin

# Bytes of shared memory that one program may use, by architecture.
SHARED_LIMITS = {
    target: kib * 1024
    for target, kib in {
        "sm_80": 163,
        "sm_86": 99,
        "sm_87": 163,
        "sm_89": 99,
        "sm_90": 227,
        "sm_100": 227,
        "sm_103": 227,
        "sm_120": 99,
        "sm_121": 99,
    }.items()
}
POINTER_BYTES = 8
SCALAR_BYTES = {"i32": 4, "i64": 8, "fp32": 4}
TRAILING = 2  # pointers that Triton 3.4 and later append: memory for descriptors, memory for a profiler
MOST_ARGUMENTS = 256
MOST_BYTES = 2**26  # of one cubin
MOST_SCRATCH = 2**24  # bytes a program

_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
_FILE = r"kernels/[A-Za-z0-9][A-Za-z0-9_-]{0,127}\.cubin"
_POINTER = r"\*[a-z][a-z0-9]{1,15}"


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    kind: "*bf16" and the like, a pointer; "i32", "i64", "fp32". role, of, dim: what is passed, for who binds the call. divisible:
    whether the kernel takes for granted that the value is a multiple of 16.
    """

    name: str
    kind: str
    role: str
    of: str
    dim: int = 0
    divisible: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return POINTER_BYTES if self.kind.startswith("*") else SCALAR_BYTES[self.kind]

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as `from_json` takes it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, data: object, where: str) -> Argument:
        """Checked. `where` names it in errors. Raises PackError."""
        table = _Table(data, where, [field.name for field in fields(cls)])
        kind = table.text("kind", rf"{_POINTER}|{'|'.join(SCALAR_BYTES)}", "a pointer such as *bf16, or i32, i64, fp32")
        return cls(
            table.text("name", _NAME, "an identifier"),
            kind,
            table.text("role", _NAME, "an identifier"),
            table.text("of", r"[ -~]{0,128}", "at most 128 printable ASCII characters"),
            table.number("dim", 0, 15),
            table.truth("divisible"),
        )


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of a pack.

    symbol: its name in the cubin; file, sha256, size: that cubin, in bytes, "kernels/NAME.cubin" in the pack; target: "sm_90".
    arguments: in order. trailing: how many 64-bit pointers follow them, 0 or 2 (scratch memory, a profiler's memory).
    grid: how many programs a call launches, for who binds the call: names to texts, ints and truth values.
    shared: dynamic shared memory, bytes. scratch, profile_scratch: bytes of global memory that each program needs, and their
    alignment. toolkit: version of the ptxas that made it, "13.4"; abi: of its ELF file.
    """

    symbol: str
    file: str
    sha256: str
    size: int
    target: str
    arguments: tuple[Argument, ...]
    grid: Mapping[str, Any]
    num_warps: int
    num_stages: int
    shared: int
    toolkit: str
    abi: int
    num_ctas: int = 1
    scratch: int = 0
    scratch_alignment: int = 1
    profile_scratch: int = 0
    profile_scratch_alignment: int = 1
    trailing: int = TRAILING

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as `from_json` takes it."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"arguments": [argument.to_json() for argument in self.arguments], "grid": dict(self.grid)}

    @classmethod
    def from_json(cls, data: object, where: str) -> Kernel:
        """Checked: every field there, none besides, of its type and in its range. `where` names it in errors. Raises PackError."""
        table = _Table(data, where, [field.name for field in fields(cls)])
        target = table.text("target", "|".join(SHARED_LIMITS), f"one of {', '.join(SHARED_LIMITS)}")
        kernel = cls(
            symbol=table.text("symbol", _NAME, "an identifier"),
            file=table.text("file", _FILE, "kernels/NAME.cubin with a plain name"),
            sha256=table.text("sha256", "[0-9a-f]{64}", "64 hexadecimal digits"),
            size=table.number("size", 1, MOST_BYTES),
            target=target,
            arguments=tuple(
                Argument.from_json(argument, f"{where}, argument {place}")
                for place, argument in enumerate(table.items("arguments", MOST_ARGUMENTS))
            ),
            grid=table.plain("grid"),
            num_warps=table.number("num_warps", 1, 32),
            num_stages=table.number("num_stages", 0, 64),
            shared=table.number("shared", 0, SHARED_LIMITS[target]),
            toolkit=table.text("toolkit", r"[1-9][0-9]\.[0-9]", "a CUDA version such as 13.4"),
            abi=table.number("abi", 7, 8),
            num_ctas=table.power("num_ctas", 16),
            scratch=table.number("scratch", 0, MOST_SCRATCH),
            scratch_alignment=table.power("scratch_alignment", 4096),
            profile_scratch=table.number("profile_scratch", 0, MOST_SCRATCH),
            profile_scratch_alignment=table.power("profile_scratch_alignment", 4096),
            trailing=table.number("trailing", 0, TRAILING),
        )
        names = [argument.name for argument in kernel.arguments]
        if len(set(names)) < len(names):
            raise PackError(f"{where}: arguments: expected a name for each, got one twice in {', '.join(names)}")
        if kernel.trailing not in (0, TRAILING):
            raise PackError(f"{where}: trailing: expected 0 or {TRAILING}, got {kernel.trailing}")
        if not kernel.trailing and (kernel.scratch or kernel.profile_scratch):
            raise PackError(f"{where}: scratch: expected 0 for a kernel without pointers for it, got {kernel.scratch}")
        return kernel

    def check(self, cubin: bytes, where: str) -> None:
        """Compare with the cubin: architecture, symbol, parameters, threads, blocks of a cluster, versions. Raises PackError."""
        found = read_cubin(cubin, where)
        entry = found.kernels.get(self.symbol)
        if entry is None:
            known = ", ".join(found.kernels) or "none"
            raise PackError(f"{where}: expected a kernel {self.symbol!r} in it, got {known}")
        sizes = [argument.size for argument in self.arguments] + [POINTER_BYTES] * self.trailing
        offsets, total = layout(sizes)
        said = {
            "target": (self.target, found.target),
            "abi": (self.abi, found.abi),
            "toolkit": (self.toolkit, entry.toolkit),
            "parameters": (len(sizes), len(entry.parameters)),
            "sizes of parameters": (sizes, [parameter.size for parameter in entry.parameters]),
            "offsets of parameters": (offsets, [parameter.offset for parameter in entry.parameters]),
            "bytes of parameters": (total, entry.parameter_bytes),
            "threads": (32 * self.num_warps, entry.threads),
            "num_ctas": (self.num_ctas, entry.cluster),
        }
        for name, (expected, got) in said.items():
            if expected != got:
                raise PackError(f"{where}: {name} of {self.symbol}: the manifest says {expected}, the cubin has {got}")


def layout(sizes: list[int]) -> tuple[list[int], int]:
    """Where parameters of these sizes start, each aligned to its size, and how many bytes all take."""
    offsets, end = [], 0
    for size in sizes:
        start = -(-end // size) * size
        offsets.append(start)
        end = start + size
    return offsets, end


class _Table:
    """Fields of a dict that came from JSON, each checked as it is taken."""

    def __init__(self, data: object, where: str, names: list[str]):
        if not isinstance(data, dict):
            raise PackError(f"{where}: expected an object, got {_shown(data)}")
        if set(data) != set(names):
            wrong = sorted(set(data) ^ set(names))
            raise PackError(f"{where}: expected the fields {', '.join(names)}; missing or unknown: {', '.join(wrong)}")
        self.data, self.where = data, where

    def text(self, name: str, pattern: str, expected: str) -> str:
        value = self.data[name]
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            self.refuse(name, expected)
        return value

    def number(self, name: str, least: int, most: int) -> int:
        value = self.data[name]
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, f"an int from {least} to {most}")
        return value

    def power(self, name: str, most: int) -> int:
        value = self.number(name, 1, most)
        if value & (value - 1):
            self.refuse(name, "a power of two")
        return value

    def truth(self, name: str) -> bool:
        value = self.data[name]
        if type(value) is not bool:
            self.refuse(name, "true or false")
        return value

    def items(self, name: str, most: int) -> list[Any]:
        value = self.data[name]
        if not isinstance(value, list) or len(value) > most:
            self.refuse(name, f"a list of at most {most}")
        return value

    def plain(self, name: str) -> dict[str, Any]:
        value = self.data[name]
        if (
            not isinstance(value, dict)
            or len(value) > 64
            or not all(type(x) in (str, int, bool) for x in value.values())
        ):
            self.refuse(name, "an object of texts, ints and truth values")
        return value

    def refuse(self, name: str, expected: str) -> None:
        raise PackError(f"{self.where}: {name}: expected {expected}, got {_shown(self.data[name])}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

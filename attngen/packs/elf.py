"""What a cubin says of its kernels: architecture, toolkit, parameters, threads.

A cubin is a 64-bit little-endian ELF file. Every offset in it is checked before it is followed: the file may come from anybody.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import PackError

MACHINE_CUDA = 190
MOST_SECTIONS = 4096
MOST_SYMBOLS = 65536
MOST_PARAMETERS = 1024

# Attributes of .nv.info.<kernel>: one byte of format, one of attribute, two of a value or of the number of bytes that follow.
_SIZED = 4  # the format with bytes that follow
_PARAMETER, _API_VERSION, _THREADS, _CLUSTER, _PARAMETER_BYTES = 0x17, 0x37, 0x10, 0x3D, 0x19
_GLOBAL_FUNCTION = 0x12  # symbol: global binding, function type


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: where it starts in the parameter block, and its size. Both in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """One kernel of a cubin. toolkit: version of the ptxas that made it, "13.4". threads: per block, 0 if it takes any number;
    cluster: blocks of a cluster. parameter_bytes: the size of the whole parameter block.
    """

    symbol: str
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    toolkit: str
    threads: int = 0
    cluster: int = 1


@dataclass(frozen=True)
class Cubin:
    """A cubin: its architecture ("sm_90"), the version of its ELF dialect (7, 8), and its kernels by symbol."""

    target: str
    abi: int
    kernels: Mapping[str, Entry]


@dataclass(frozen=True)
class _Section:
    name: str
    type: int
    offset: int
    size: int
    link: int


def read_cubin(data: bytes, file: str) -> Cubin:
    """Read a cubin. `file` names it in errors. Raises PackError for what is none, or is damaged."""
    try:
        return _Reader(data).cubin()
    except (struct.error, _DamagedError, UnicodeDecodeError) as error:
        raise PackError(f"{file}: expected a cubin, got a file that is damaged or none: {error}") from None


class _DamagedError(Exception):
    pass


class _Reader:
    def __init__(self, data: bytes):
        self.data = data

    def cubin(self) -> Cubin:
        if self.data[:6] != b"\x7fELF\x02\x01":
            raise _DamagedError("no 64-bit little-endian ELF header")
        dialect, abi = self.data[7:9]
        (machine,) = self.unpack("<H", 18)
        if machine != MACHINE_CUDA:
            raise _DamagedError(f"ELF machine {machine} instead of {MACHINE_CUDA}, CUDA")
        (flags,) = self.unpack("<I", 48)
        # ABI 7 has the architecture in the lowest byte of the flags, ABI 8 in the one above.
        if (dialect, abi) not in ((0x33, 7), (0x41, 8)):
            raise _DamagedError(f"ELF dialect {dialect:#x} of version {abi} is not known")
        arch = flags & 0xFF if abi == 7 else flags >> 8 & 0xFF
        sections = self.sections()
        symbols = set(self.functions(sections))
        found = {}
        for section in sections:
            symbol = section.name.removeprefix(".nv.info.")
            if symbol != section.name and symbol in symbols:
                found[symbol] = self.entry(symbol, section)
        return Cubin(f"sm_{arch}", abi, found)

    def sections(self) -> list[_Section]:
        (start,) = self.unpack("<Q", 40)
        size, count, names_at = self.unpack("<HHH", 58)
        if size != 64 or not 0 < count <= MOST_SECTIONS or names_at >= count:
            raise _DamagedError("no table of sections")
        raw = [self.unpack("<IIQQQQI", start + place * size) for place in range(count)]
        names = self.bytes(raw[names_at][4], raw[names_at][5])
        return [
            _Section(_text(names, name), type_, offset, length, link) for name, type_, _, _, offset, length, link in raw
        ]

    def functions(self, sections: list[_Section]) -> Iterator[str]:
        """The names of its kernels: of the global functions that stand in a section."""
        for section in sections:
            if section.name != ".symtab":
                continue
            if section.link >= len(sections) or section.size % 24 or section.size // 24 > MOST_SYMBOLS:
                raise _DamagedError("no table of symbols")
            strings = sections[section.link]
            names, table = self.bytes(strings.offset, strings.size), self.bytes(section.offset, section.size)
            for name, info, _, place, _, _ in struct.iter_unpack("<IBBHQQ", table):
                if info == _GLOBAL_FUNCTION and 0 < place < len(sections):
                    yield _text(names, name)

    def entry(self, symbol: str, section: _Section) -> Entry:
        parameters: dict[int, Parameter] = {}
        toolkit, threads, cluster, total = 0, 0, 1, 0
        for attribute, short, value in self.attributes(section):
            if attribute == _PARAMETER:
                _, ordinal, offset, packed = struct.unpack("<IHHI", value)
                if ordinal in parameters or len(parameters) >= MOST_PARAMETERS:
                    raise _DamagedError(f"parameter {ordinal} of {symbol} stands twice, or too many")
                parameters[ordinal] = Parameter(offset, packed >> 18)
            elif attribute == _API_VERSION:
                (toolkit,) = struct.unpack("<I", value)
            elif attribute == _THREADS:
                x, y, z = struct.unpack("<III", value)
                threads = x * y * z
            elif attribute == _CLUSTER:
                x, y, z = struct.unpack("<III", value)
                cluster = x * y * z
            elif attribute == _PARAMETER_BYTES:
                total = short
        if sorted(parameters) != list(range(len(parameters))):
            raise _DamagedError(f"the parameters of {symbol} are not numbered from 0")
        ordered = tuple(parameters[ordinal] for ordinal in range(len(parameters)))
        return Entry(symbol, ordered, total, f"{toolkit // 10}.{toolkit % 10}", threads, cluster)

    def attributes(self, section: _Section) -> Iterator[tuple[int, int, bytes]]:
        """(attribute, value of two bytes, bytes that follow) of each."""
        data, at = self.bytes(section.offset, section.size), 0
        while at < len(data):
            form, attribute, short = struct.unpack_from("<BBH", data, at)
            at += 4
            length = short if form == _SIZED else 0
            if at + length > len(data):
                raise _DamagedError(f"{section.name} ends inside an attribute")
            yield attribute, short, data[at : at + length]
            at += length

    def unpack(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(form, self.bytes(offset, struct.calcsize(form)))

    def bytes(self, offset: int, size: int) -> bytes:
        if offset + size > len(self.data):
            raise _DamagedError(f"it ends at byte {len(self.data)}, before byte {offset + size} that it points to")
        return self.data[offset : offset + size]


def _text(strings: bytes, start: int) -> str:
    end = strings.find(b"\0", start)
    if end < 0:
        raise _DamagedError("a name does not end")
    return strings[start:end].decode("ascii")

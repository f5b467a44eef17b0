"""Schedules as values: how a spec is computed, apart from what it computes.

A `Schedule` holds only what somebody decided, so that a spec file, a user, a tuned record and the model can each say a part.
It is written beside a spec, so it belongs to the language; which values are legal for a spec and a target, and who decides
what is left open, is `attngen.schedule`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from attngen.errors import ScheduleError

KERNELS = ("forward", "dq", "dkv")
PREFIXES: Mapping[str, str] = MappingProxyType({"forward": "", "dq": "dq_", "dkv": "dkv_"})  # of the flat names
MOST_SPLITS = 1024
ORDERS = ("by_head", "longest_first")
PRECISIONS = ("ieee", "tf32", "tf32x3")

_UNDECIDED: Any = None  # a default for fields whose annotation says what they are once decided


@dataclass(frozen=True)
class Tile:
    """One kernel's part of a schedule. None: not decided; `Schedule.tile` gives tiles without.

    block_m, block_n: query rows and keys that a program holds at once; num_warps, num_stages: as in Triton.
    tma: the walked tiles are loaded, and gradients stored, through tensor descriptors (sm_90 and above; rows of whole 16-byte
        units).
    warp_specialize: full and partial tiles go through one loop, which the compiler gives to warps of different roles
        (sm_90 and above, with tma; on sm_90 4 warps; forward only).
    persistent: so many programs per multiprocessor, each of which takes one output after the other; 0: a program per output.
    order: of the outputs: "by_head", or "longest_first": the last query tiles (those that see most keys under a causal mask)
        of as many heads as fit the second-level cache, then the ones before them. The default where the mask says that.
    pipeline_edges: where only a few tiles at the edges of intervals are partial, their loop has num_stages too. It loads ahead, and
        the loop over full tiles may take fewer instructions beside it, but some kernels spill; False: one stage.
    disable_licm: as in Triton: a step computes again what no step changes, mostly where in shared memory operands are. That takes
        instructions, but registers only for a moment: a wide head's sums leave few.
    separate_sums: of a key tile one program computes dV and another dK, which needs the logits again. That is a fifth more
        products in the backward, but half as many sums to hold, which wide heads have no registers for (dkv only).
    Raises ScheduleError for values no target can have.
    """

    block_m: int = _UNDECIDED
    block_n: int = _UNDECIDED
    num_warps: int = _UNDECIDED
    num_stages: int = _UNDECIDED
    tma: bool = _UNDECIDED
    warp_specialize: bool = _UNDECIDED
    persistent: int = _UNDECIDED
    order: str = _UNDECIDED
    pipeline_edges: bool = _UNDECIDED
    disable_licm: bool = _UNDECIDED
    separate_sums: bool = _UNDECIDED

    def __post_init__(self) -> None:
        for name, value in self.decided().items():
            _check(name, name, value)

    def decided(self) -> dict[str, Any]:
        """The decisions by name."""
        return {name: value for name in TILE_FIELDS if (value := getattr(self, name)) is not None}

    @cached_property
    def whole(self) -> bool:
        """Whether every field is decided."""
        return all(getattr(self, name) is not None for name in TILE_FIELDS)

    @property
    def parts(self) -> int:
        """Programs that share an output."""
        return 2 if self.separate_sums else 1

    def over(self, other: Tile) -> Tile:
        """These decisions, and `other`'s where this one leaves them open."""
        return replace(other, **self.decided())

    def __str__(self) -> str:
        return _text(self.decided())


TILE_FIELDS = tuple(field.name for field in fields(Tile))


@dataclass(frozen=True, init=False, repr=False)
class Schedule:
    """Decisions about the computation; what is left at None is left to the tuner or the model.

    forward, dq, dkv: a `Tile` for the forward and for the backward's two passes (a query tile walking keys; a key tile walking
        queries). A tile's fields can be written flat too, as spec files and records do: `Schedule(block_m=64)` is
        `Schedule(forward=Tile(block_m=64))`, and `dq_block_m=`, `dkv_num_warps=`, ... are those of the other two. Next to a
        whole tile a flat field replaces that tile's, so that `dataclasses.replace(schedule, block_m=32)` works.
    split: into how many parts a forward program's keys are cut, each a partial state that a second launch merges (1: not at
        all), or "stream": equal runs of key tiles over `programs` programs whatever the lengths (stream-K; None: one per SM,
        or of 1 or 2 warps so many that an SM has 4 warps).
    pack: forward rows are (query, head) pairs of the heads that share keys, so that keys are read once per kv head.
    store: keep the weights P [B, Hq, Nq, Nk] for the backward instead of computing them again from lse: faster on a CPU for
        short lengths, and more memory; see `attngen.schedule.legality.why_not_stored`.
    deterministic: gradients without atomics (default). False allows atomics for scattered captured-tensor gradients.
    precision: of float32 products: "ieee" (default), "tf32" or "tf32x3". Half types are not affected.
    Raises ScheduleError for a name that is none of these and for values no target can have.
    """

    forward: Tile
    dq: Tile
    dkv: Tile
    split: int | str | None
    programs: int | None
    pack: bool | None
    store: bool | None
    deterministic: bool | None
    precision: str | None

    def __init__(
        self,
        *,
        forward: Tile | None = None,
        dq: Tile | None = None,
        dkv: Tile | None = None,
        split: int | str | None = None,
        programs: int | None = None,
        pack: bool | None = None,
        store: bool | None = None,
        deterministic: bool | None = None,
        precision: str | None = None,
        **flat: Any,
    ):
        shared: dict[str, Any] = {
            "split": split,
            "programs": programs,
            "pack": pack,
            "store": store,
            "deterministic": deterministic,
            "precision": precision,
        }
        tiles = _with_flat({"forward": forward, "dq": dq, "dkv": dkv}, flat)
        for name, value in shared.items():
            if value is not None:
                _check(name, name, value)
        for name, value in (shared | tiles).items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # launches are looked up by it
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def over(self, other: Schedule | None) -> Schedule:
        """These decisions, and `other`'s where this one leaves them open."""
        if other is None:
            return self
        tiles: dict[str, Any] = {kernel: getattr(self, kernel).over(getattr(other, kernel)) for kernel in KERNELS}
        return replace(other, **tiles, **self._shared())

    def decided(self) -> dict[str, Any]:
        """The decisions under their flat names, for records and TOML: `Schedule(**schedule.decided()) == schedule`."""
        tiles = {
            PREFIXES[kernel] + name: value
            for kernel in KERNELS
            for name, value in getattr(self, kernel).decided().items()
        }
        return tiles | self._shared()

    def tile(self, kernel: str) -> Tile:
        """The whole tile of "forward", "dq" or "dkv". ScheduleError if its sizes are not decided yet."""
        tile = self._tiles[kernel]
        if not tile.whole:
            missing = [PREFIXES[kernel] + name for name in TILE_FIELDS if getattr(tile, name) is None]
            raise ScheduleError(f"{', '.join(missing)} not decided: complete the schedule for a target first")
        return tile

    @cached_property
    def _tiles(self) -> dict[str, Tile]:  # launches ask at every call
        return {kernel: getattr(self, kernel).over(PLAIN) for kernel in KERNELS}

    def with_tile(self, kernel: str, tile: Tile) -> Schedule:
        """This schedule with another tile for that kernel."""
        tiles: dict[str, Any] = {kernel: tile}
        return replace(self, **tiles)

    def _shared(self) -> dict[str, Any]:
        return {name: value for name in SHARED_FIELDS if (value := getattr(self, name)) is not None}

    def __str__(self) -> str:
        return _text(self.decided())

    def __repr__(self) -> str:
        return f"Schedule({', '.join(f'{name}={value!r}' for name, value in self.decided().items())})"


SHARED_FIELDS = tuple(field.name for field in fields(Schedule) if field.name not in KERNELS)
_FLAT = {PREFIXES[kernel] + name: (kernel, name) for kernel in KERNELS for name in TILE_FIELDS}


def _with_flat(tiles: Mapping[str, Tile | None], flat: Mapping[str, Any]) -> dict[str, Tile]:
    """The three tiles, under what was written flat: "dq_block_m" is `block_m` of dq."""
    for kernel, tile in tiles.items():
        if not isinstance(tile, Tile | None):
            hint = f"{PREFIXES[kernel]}block_m=..."
            raise ScheduleError(f"{kernel}: expected a Tile, got {tile!r}; one field alone is written {hint}")
    given: dict[str, dict[str, Any]] = {kernel: {} for kernel in KERNELS}
    for name, value in flat.items():
        if name not in _FLAT:
            raise ScheduleError(_unknown(name))
        kernel, field = _FLAT[name]
        if value is not None:
            _check(name, field, value)
        given[kernel][field] = value
    return {kernel: replace(tiles[kernel] or Tile(), **given[kernel]) for kernel in KERNELS}


def _unknown(name: str) -> str:
    known = [*KERNELS, *_FLAT, *SHARED_FIELDS]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"the fields of a tile are {', '.join(TILE_FIELDS)}"
    wanted = f"{', '.join([*KERNELS, *SHARED_FIELDS])}, or a tile's field, with dq_ or dkv_ before it for the backward"
    return f"schedule: expected {wanted}; got {name!r}: {hint}"


def _power_of_two(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most and value & (value - 1) == 0


def _between(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _one_of(known: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in known), f"one of {', '.join(known)}"


def _is_split(value: Any) -> bool:
    return value == "stream" or _between(1, MOST_SPLITS)(value)


_FLAG: tuple[Callable[[Any], bool], str] = (lambda value: isinstance(value, bool)), "True or False"
_BLOCK = _power_of_two(16, 4096), "a power of two from 16 to 4096"
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {  # field -> whether a value holds, and what is expected
    "block_m": _BLOCK,
    "block_n": _BLOCK,
    "num_warps": (_power_of_two(1, 16), "1, 2, 4, 8 or 16"),
    "num_stages": (_between(1, 8), "1 to 8"),
    "tma": _FLAG,
    "warp_specialize": _FLAG,
    "persistent": (_between(0, 32), "0 to 32"),
    "order": _one_of(ORDERS),
    "pipeline_edges": _FLAG,
    "disable_licm": _FLAG,
    "separate_sums": _FLAG,
    "split": (_is_split, f'1 to {MOST_SPLITS}, or "stream"'),
    "programs": (_between(1, 65536), "1 to 65536"),
    "pack": _FLAG,
    "store": _FLAG,
    "deterministic": _FLAG,
    "precision": _one_of(PRECISIONS),
}


def _check(name: str, field: str, value: Any) -> None:
    """ScheduleError, with the name as it was written, for a value that the field cannot have."""
    holds, expected = _RULES[field]
    if not holds(value):
        raise ScheduleError(f"{name}: expected {expected}, got {value!r}")


def _text(decided: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in decided.items()) or "undecided"


# What undecided special forms mean.
PLAIN = Tile(
    tma=False,
    warp_specialize=False,
    persistent=0,
    order="by_head",
    pipeline_edges=False,
    disable_licm=False,
    separate_sums=False,
)

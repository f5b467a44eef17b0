"""Schedules: how a spec is computed, apart from what it computes. And the targets that limit them.

A `Schedule` holds only what somebody decided; None means "not decided", and is filled from the tuned record or the
model's choice. `complete()` merges these in that order of authority.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from attngen.errors import ScheduleError

KERNELS = ("forward", "dq", "dkv")
MOST_SPLITS = 1024
ORDERS = ("by_head", "longest_first")
PRECISIONS = ("ieee", "tf32", "tf32x3")


@dataclass(frozen=True)
class Target:
    """A GPU architecture to generate code for.

    name: "sm_90" or "gfx942"; shared_limit: bytes of shared memory a program may use; registers: per SM (32-bit);
    max_warps: resident warps per SM.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    registers: int = 65536
    max_warps: int = 64

    @classmethod
    def named(cls, name: str) -> Target:
        """The target of that name. ScheduleError for one that is not known."""
        if name not in TARGETS:
            raise ScheduleError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
        return TARGETS[name]

    @classmethod
    def of_device(cls, device: Any) -> Target:
        """The target of a torch CUDA or ROCm device."""
        import torch

        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls.named(properties.gcnArchName.split(":")[0])
        return cls.named(f"sm_{properties.major}{properties.minor}")


def _nvidia(version: int, shared_kib: int, max_warps: int) -> Target:
    return Target(f"sm_{version}", "cuda", version, 32, shared_kib * 1024, max_warps=max_warps)


TARGETS = {
    t.name: t
    for t in (
        _nvidia(80, 163, 64),
        _nvidia(86, 99, 48),
        _nvidia(89, 99, 48),
        _nvidia(90, 227, 64),
        _nvidia(100, 227, 64),
        _nvidia(120, 99, 48),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, registers=131072, max_warps=32),
    )
}


@dataclass(frozen=True)
class Tile:
    """One kernel's part of a schedule: query tile x key tile, warps and software-pipeline stages, and what is said at
    `Schedule` about tma, warp_specialize, persistent and order.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    warp_specialize: bool = False
    persistent: int = 0
    order: str = "by_head"


@dataclass(frozen=True)
class Schedule:
    """Decisions about the computation; a field left at None is left to the tuner or the model.

    block_m, block_n: query rows and keys a forward program holds at once; num_warps, num_stages: as in Triton.
    tma: the walked tiles are loaded through tensor descriptors (sm_90 and above; rows of whole 16-byte units).
    warp_specialize: full and partial tiles go through one loop, which the compiler gives to warps of different roles
        (sm_90 and above, with tma; on sm_90 4 warps).
    persistent: so many programs per multiprocessor, each of which takes one output after the other; 0: a program per output.
    order: of the outputs: "by_head", or "longest_first": the last query tiles (those that see most keys under a causal mask)
        of as many heads as fit the second-level cache, then the ones before them.
    dq_*, dkv_*: all of these for the backward's two passes (a query tile walking keys; a key tile walking queries).
    split: into how many parts a forward program's keys are cut, each a partial state that a second launch merges (1: not at
        all), or "stream": equal runs of key tiles over `programs` programs whatever the lengths (stream-K; None: one per SM).
    pack: forward rows are (query, head) pairs of the heads that share keys, so that keys are read once per kv head.
    store: keep the weights P [B, Hq, Nq, Nk] for the backward instead of computing them again from lse: faster on a CPU for
        short lengths, and more memory; see `attngen.schedule.legality.why_not_stored`.
    deterministic: gradients without atomics (default). False allows atomics for scattered captured-tensor gradients.
    precision: of float32 products: "ieee" (default), "tf32" or "tf32x3". Half types are not affected.
    Raises ScheduleError for values no target can have.
    """

    block_m: int | None = None
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    tma: bool | None = None
    warp_specialize: bool | None = None
    persistent: int | None = None
    order: str | None = None
    dq_block_m: int | None = None
    dq_block_n: int | None = None
    dq_num_warps: int | None = None
    dq_num_stages: int | None = None
    dq_tma: bool | None = None
    dq_warp_specialize: bool | None = None
    dq_persistent: int | None = None
    dq_order: str | None = None
    dkv_block_m: int | None = None
    dkv_block_n: int | None = None
    dkv_num_warps: int | None = None
    dkv_num_stages: int | None = None
    dkv_tma: bool | None = None
    dkv_warp_specialize: bool | None = None
    dkv_persistent: int | None = None
    dkv_order: str | None = None
    split: int | str | None = None
    programs: int | None = None
    pack: bool | None = None
    store: bool | None = None
    deterministic: bool | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name in ("deterministic", "pack", "store") or field.name.endswith(("tma", "warp_specialize")):
                _expect(field.name, isinstance(value, bool), "True or False", value)
            elif field.name == "split":
                holds = value == "stream" or (type(value) is int and 1 <= value <= MOST_SPLITS)
                _expect(field.name, holds, f'1 to {MOST_SPLITS}, or "stream"', value)
            elif field.name == "programs":
                _expect(field.name, type(value) is int and 1 <= value <= 65536, "1 to 65536", value)
            elif field.name == "precision":
                _expect(field.name, value in PRECISIONS, f"one of {', '.join(PRECISIONS)}", value)
            elif field.name.endswith("persistent"):
                _expect(field.name, type(value) is int and 0 <= value <= 32, "0 to 32", value)
            elif field.name.endswith("order"):
                _expect(field.name, value in ORDERS, f"one of {', '.join(ORDERS)}", value)
            elif "block" in field.name:
                _expect(field.name, _power_of_two(value, 16, 4096), "a power of two from 16 to 4096", value)
            elif "warps" in field.name:
                _expect(field.name, _power_of_two(value, 1, 16), "1, 2, 4, 8 or 16", value)
            else:
                _expect(field.name, type(value) is int and 1 <= value <= 8, "1 to 8", value)

    def over(self, other: Schedule | None) -> Schedule:
        """These decisions, and `other`'s where this one leaves them open."""
        return self if other is None else replace(other, **self.decided())

    def decided(self) -> dict[str, Any]:
        """The decisions as a plain dict, for records and TOML."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def tile(self, kernel: str) -> Tile:
        """The tile of "forward", "dq" or "dkv". ScheduleError if it is not decided yet."""
        prefix = {"forward": "", "dq": "dq_", "dkv": "dkv_"}[kernel]
        values = {f.name: getattr(self, prefix + f.name) for f in fields(Tile)}
        values = {f.name: f.default if values[f.name] is None else values[f.name] for f in fields(Tile)}
        open_names = [prefix + name for name, value in values.items() if value is MISSING]
        if open_names:
            raise ScheduleError(f"{', '.join(open_names)} not decided: complete the schedule for a target first")
        return Tile(**values)

    def with_tile(self, kernel: str, tile: Tile) -> Schedule:
        """This schedule with that kernel's tile decided."""
        prefix = {"forward": "", "dq": "dq_", "dkv": "dkv_"}[kernel]
        return replace(self, **{prefix + name: value for name, value in asdict(tile).items()})

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.decided().items()) or "undecided"


def complete(
    spec: Any, target: Target, head_dim: int, head_dim_v: int, dtype: Any, *choices: Schedule | None
) -> Schedule:
    """The full schedule: the first of `choices` that decides a field wins, then the model's choice for the target."""
    from attngen.schedule.defaults import default_tile

    schedule = Schedule()
    for choice in choices:
        schedule = schedule.over(choice)
    for kernel in KERNELS:
        chosen = Schedule().with_tile(kernel, default_tile(spec, target, kernel, max(head_dim, head_dim_v), dtype))
        schedule = schedule.over(chosen)
    schedule = schedule.over(Schedule(deterministic=True, precision="ieee"))
    for kernel in KERNELS:
        tile = schedule.tile(kernel)
        for name in ("block_m", "block_n"):
            if getattr(tile, name) > 256:
                raise ScheduleError(f"{kernel} {name}: at most 256 on a GPU, got {getattr(tile, name)}")
        reason = why_not(kernel, tile, target)
        if reason:
            raise ScheduleError(f"{kernel} {reason}")
    return schedule


def why_not(kernel: str, tile: Tile, target: Target) -> str:
    """The reason why a kernel cannot have this tile's special forms on a target; empty if it can."""
    modern = target.backend == "cuda" and isinstance(target.arch, int) and target.arch >= 90
    if tile.tma and not modern:
        return f"tma: {target.name} has no tensor descriptors (sm_90 and above have)"
    if tile.warp_specialize and kernel != "forward":
        return (
            "warp_specialize: the compiler takes the forward only; the backward's loops load lse and delta by pointers"
        )
    if tile.warp_specialize and not tile.tma:
        return "warp_specialize: needs tma=True, since a warp that only loads cannot compute pointers"
    if tile.warp_specialize and target.name == "sm_90" and tile.num_warps != 4:
        return (
            f"warp_specialize: on sm_90 it takes num_warps=4, got {tile.num_warps}: the compiler ignores it with others"
        )
    return ""


def fit(schedule: Schedule, lists: Any, pins: Schedule | None = None) -> Schedule:
    """The schedule with blocks that divide the tiles of a list (`attngen.language.lists.TileLists`); other specs leave it as it is.
    ScheduleError for a pinned block that does not.
    """
    sizes = {"block_m": getattr(lists, "block_m", None), "block_n": getattr(lists, "block_n", None)}
    for prefix in ("", "dq_", "dkv_"):
        for name, size in sizes.items():
            block = getattr(schedule, prefix + name)
            if size is None or block is None or size % block == 0:
                continue
            if pins is not None and getattr(pins, prefix + name) is not None:
                raise ScheduleError(f"{prefix}{name}: expected a divisor of the listed tiles' {size}, got {block}")
            while size % block:
                block //= 2
            schedule = replace(schedule, **{prefix + name: block})
    return schedule


def _power_of_two(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most and value & (value - 1) == 0


def _expect(name: str, holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ScheduleError(f"{name}: expected {expected}, got {got!r}")

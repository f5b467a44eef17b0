"""Which schedule a call runs with, and where it came from: pinned, then the tuned record, then the model's choice: a tile that
ships, one that was found by compiling, or a safe one.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from attngen.analysis import Facts
from attngen.errors import ScheduleError, StoreError
from attngen.language.call import Call
from attngen.language.device import multiprocessors
from attngen.language.schedule import KERNELS, Schedule, Tile
from attngen.language.spec import Spec
from attngen.schedule.completion import complete, complete_on_cpu, fit, ordered
from attngen.schedule.decode import decode_choice
from attngen.schedule.identities import IDENTITIES, gpu_named
from attngen.schedule.legality import check, why_not_stored
from attngen.schedule.shipped import family_of, shipped_tile
from attngen.schedule.target import Target
from attngen.store import (
    MAX_SPEC,
    Device,
    Found,
    Key,
    Record,
    Shape,
    StoreWarning,
    Versions,
    bucket,
    device_of,
    open_store,
    utc_now,
)

HALVES = (torch.float16, torch.bfloat16)
SIZES = ("block_m", "block_n", "num_warps", "num_stages")
DIRECTIONS = ("forward", "backward")  # each has a record of its own
SMALL = Tile(16, 16, 1, 1)
INTERPRETED = Schedule(forward=SMALL, dq=SMALL, dkv=SMALL, deterministic=True, precision="ieee")


def shape_bucket(call: Call) -> tuple[int, ...]:
    """What a tuned record is looked up by besides dtype and head dims: sizes rounded up to powers of two."""
    batch, heads_q, n_q, _ = call.q.shape
    return tuple(bucket(int(size)) for size in (batch, heads_q, call.k.shape[1], n_q, call.n_k))


class Finder(Protocol):
    """Finds tiles by compiling: of the kernels, each with its modelled seconds, and what there is to say about them."""

    def __call__(
        self,
        call: Call,
        facts: Facts,
        target: Target,
        units: int,
        base: Schedule,
        pins: Schedule,
        kernels: Collection[str],
    ) -> tuple[dict[str, tuple[Tile, float]], str]: ...


def choose(
    call: Call, facts: Facts, backend: str, pins: Schedule, db: str | None, find: Finder | None = None
) -> tuple[Schedule, str]:
    """A complete schedule for this call on this backend, and in words where it came from. find: on a GPU, for kernels with
    neither a record nor a tile that ships.
    """
    if pins.store and (reason := why_not_stored(call, backend)):
        raise ScheduleError(f"store: expected False {reason}")
    if backend in ("interpret", "meta"):
        schedule = complete_for(call.spec, "interpreter", call.q.shape[3], call.v.shape[3], call.q.dtype, pins)
        check(call.spec, facts, schedule)
        return fit(schedule, call.spec.lists, pins), "the interpreter's small tiles"
    device, versions = device_identity(call.q.device), generator_versions(backend)
    tuned, origins = _tuned(call, device, versions, db)
    if backend == "cpu":
        return complete_on_cpu(call, facts, pins, tuned), _origin(origins, pins)
    target, processors = Target.of_device(call.q.device), multiprocessors(call.q.device)
    found, words = _found(call, facts, target, processors, pins, tuned, Place(device, versions, db), find)
    return on_gpu(call, facts, target, processors, pins, tuned, found), _origin(origins, pins, words)


def choose_elsewhere(
    call: Call, facts: Facts, target: str, pins: Schedule, db: str | None, find: Finder | None = None
) -> tuple[Schedule, str]:
    """The same for a GPU that is not here: its records, measured or modelled, and then the model. InputError for its name."""
    gpu = gpu_named(target)
    identity, versions, named = IDENTITIES[gpu.name], generator_versions("triton"), Target.named(gpu.target)
    tuned, origins = _tuned(call, identity, versions, db)
    found, words = _found(call, facts, named, identity.units, pins, tuned, Place(identity, versions, db), find)
    return on_gpu(call, facts, named, identity.units, pins, tuned, found), _origin(origins, pins, words)


def _tuned(call: Call, device: Device, versions: Versions, db: str | None) -> tuple[Schedule, list[str]]:
    """What records decide, and which they are, in words."""
    tuned, origins = Schedule(), []
    for direction, found in _records(call, device, versions, db).items():
        tuned = tuned.over(Schedule(**found.record.schedule))
        noisy = ", too noisy (tune again when the machine is idle)" if found.record.noisy else ""
        origins.append(f"{direction}: {found.record.kind} record, {found.how}{noisy}")
    return tuned, origins


def _origin(origins: list[str], pins: Schedule, tiles: str = "") -> str:
    origins = origins or ["the model's choice: no tuned record for this spec, dtype, head dims and device"]
    every = [*([f"pinned: {pins}"] if pins.decided() else []), *origins, *([tiles] if tiles else [])]
    return "; ".join(every)


@dataclass(frozen=True)
class Place:
    """Where what is found by compiling is remembered."""

    device: Device
    versions: Versions
    db: str | None

    def key(self, call: Call, kernel: str) -> Key:
        """Of a kernel's tile: it serves calls of all sizes."""
        shape = Shape(1, 1, 1, 1, 1, int(call.q.shape[3]), int(call.v.shape[3]))
        return Key.of(call.spec.key, f"tile of {kernel}", str(call.q.dtype), shape, self.device, self.versions)

    def recall(self, call: Call, kernel: str) -> Tile | None:
        """What an earlier search found with the same generator and compiler; a driver changes nothing about it."""
        wanted = self.key(call, kernel)
        record = open_store(self.db).lookup(wanted)
        if record is None or why_not_readable(record.record.schedule):
            return None
        key = record.record.key
        if (key.generator, key.triton) != (wanted.generator, wanted.triton):
            return None
        found: Tile = getattr(Schedule(**record.record.schedule), kernel)
        return found

    def remember(self, call: Call, found: Mapping[str, tuple[Tile, float]]) -> None:
        """For other processes; a database that can't be written is said once."""
        records = [
            Record(
                key=self.key(call, kernel),
                schedule=Schedule().with_tile(kernel, tile).decided(),
                seconds=seconds,
                spread=0.0,
                kind="modelled",
                error=0.0,
                made_at=utc_now(),
                source="search at a first call",
                spec=str(call.spec) if len(str(call.spec)) <= MAX_SPEC else "",
            )
            for kernel, (tile, seconds) in found.items()
        ]
        try:
            open_store(self.db).put(*records)
        except StoreError as problem:
            warnings.warn(StoreWarning(f"tiles found by compiling are not remembered: {problem}"), stacklevel=2)


def _found(
    call: Call,
    facts: Facts,
    target: Target,
    processors: int,
    pins: Schedule,
    tuned: Schedule,
    place: Place,
    find: Finder | None,
) -> tuple[Schedule, str]:
    """Tiles of the kernels that nobody decided on and that none ships for: remembered ones, or found now; and in words."""
    if call.q.dtype not in HALVES or 0 in call.q.shape or call.n_k == 0:
        return Schedule(), ""
    base = on_gpu(call, facts, target, processors, pins, tuned)
    decided = pins.over(tuned).over(decode_choice(call, facts, processors))
    head_dim = max(call.q.shape[3], call.v.shape[3])
    origins, missing, tiles = dict[str, list[str]](), list[str](), Schedule()
    for kernel in KERNELS if call.wants_grad else KERNELS[:1]:
        if not {*SIZES} <= getattr(decided, kernel).decided().keys():
            if shipped_tile(call.spec, family_of(target.name), kernel, head_dim) is not None:
                origins.setdefault("ships with attngen", []).append(kernel)
            elif (known := place.recall(call, kernel)) is not None:
                tiles = tiles.with_tile(kernel, known)
                origins.setdefault("found by compiling at an earlier first call, modelled", []).append(kernel)
            else:
                missing.append(kernel)
    said = ""
    if missing and find is not None:
        found, said = find(call, facts, target, processors, base, decided, missing)
        if found:
            place.remember(call, found)
            origins["found by compiling, modelled"] = list(found)
        for kernel, (tile, _) in found.items():
            tiles = tiles.with_tile(kernel, tile)
            missing.remove(kernel)
    if missing:
        origins["a safe one"] = missing
    words = [f"tile of {', '.join(kernels)}: {origin}" for origin, kernels in origins.items()]
    return tiles, "; ".join([*words, *([said] if said else [])])


def on_gpu(
    call: Call,
    facts: Facts,
    target: Target,
    processors: int,
    pins: Schedule,
    tuned: Schedule | None = None,
    found: Schedule | None = None,
) -> Schedule:
    """The complete schedule on a GPU with so many multiprocessors: pins, then the record, then the model. found: tiles by
    compiling.
    """
    decode = decode_choice(call, facts, processors) if call.q.dtype in HALVES else Schedule()
    schedule = complete(call.spec, target, call.q.shape[3], call.v.shape[3], call.q.dtype, pins, tuned, decode, found)
    check(call.spec, facts, schedule)
    return fit(schedule, call.spec.lists, pins)


def complete_for(
    spec: Spec, target: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, pins: Schedule
) -> Schedule:
    """The schedule for a named target, without a database: what cross-compilation and `source` use."""
    if target == "interpreter":
        return ordered(spec, pins.over(INTERPRETED))
    return complete(spec, Target.named(target), head_dim, head_dim_v, dtype, pins)


def _records(call: Call, device: Device, versions: Versions, db: str | None) -> dict[str, Found]:
    """What the database has for this call, by direction; empty if it can't be read (the store warns once)."""
    batch, heads_q, n_q, head_dim = (int(size) for size in call.q.shape)
    if 0 in (batch, heads_q, n_q, call.n_k):
        return {}
    shape = Shape(batch, heads_q, int(call.k.shape[1]), n_q, int(call.n_k), head_dim, int(call.v.shape[3]))
    found, store = {}, open_store(db)
    for direction in DIRECTIONS:
        record = store.lookup(Key.of(call.spec.key, direction, str(call.q.dtype), shape, device, versions))
        if record is not None and not why_not_readable(record.record.schedule):
            found[direction] = record
    return found


def why_not_readable(schedule: dict[str, Any]) -> str:
    """The reason why a record's schedule is none of this version's; empty if it is."""
    try:
        Schedule(**schedule)
    except ScheduleError as error:
        return str(error)
    return ""


def device_identity(device: torch.device) -> Device:
    """The device as records name it; on a CPU the number of threads is part of it."""
    return _identity(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache(maxsize=32)
def _identity(device: torch.device, threads: int) -> Device:
    return device_of(device)


@lru_cache(maxsize=4)
def generator_versions(backend: str) -> Versions:
    """What besides the device decides a schedule's speed, as records name it."""
    if backend == "cpu":
        return Versions(generator=generator_hash("cpu"), torch=str(torch.__version__))
    import triton

    return Versions(generator=generator_hash("triton"), triton=triton.__version__)


@lru_cache(maxsize=4)
def generator_hash(backend: str) -> str:
    """Hash of the code that decides how fast a schedule is: templates, lowering and analysis, or the CPU backend."""
    root = Path(__file__).parent.parent
    folders = ["analysis", "backends"] if backend == "cpu" else ["analysis", "lowering", "templates"]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".jinja"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]

"""Which schedule a call runs with, and where it came from: pinned, then the tuned record, then the model's choice."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attngen.analysis import Facts
from attngen.errors import AttngenError, ScheduleError
from attngen.language.call import Call
from attngen.language.spec import Spec
from attngen.schedule import Schedule, Target, complete, fit
from attngen.schedule.legality import check, decode_choice, why_not_stored

PIECES = {"forward": "", "backward": ("dq_", "dkv_")}


def shape_bucket(call: Call) -> tuple[int, ...]:
    """What a tuned record is looked up by besides dtype and head dims: sizes rounded up to powers of two."""
    from attngen.store import bucket

    batch, heads_q, n_q, _ = call.q.shape
    return tuple(bucket(int(size)) for size in (batch, heads_q, call.k.shape[1], n_q, call.n_k))


def choose(call: Call, facts: Facts, backend: str, pins: Schedule, db: str | None) -> tuple[Schedule, str]:
    """A complete schedule for this call on this backend, and in words where it came from."""
    if pins.store and (reason := why_not_stored(call, backend)):
        raise ScheduleError(f"store: expected False {reason}")
    if backend == "interpret":
        schedule = complete_for(call.spec, "interpreter", call.q.shape[3], call.v.shape[3], call.q.dtype, pins)
        check(call.spec, facts, schedule)
        return fit(schedule, call.spec.lists, pins), "the interpreter's small tiles"
    tuned, origins = Schedule(), []
    for piece, record in _records(call, backend, db).items():
        tuned = tuned.over(Schedule(**record.record.schedule))
        origins.append(f"{piece}: {record.record.kind} record, {record.how}")
    if backend == "cpu":
        from attngen.backends.cpu.passes import default_schedule, fitted

        schedule = fitted(pins.over(tuned).over(default_schedule(call, facts)), call, pins)
    else:
        target, processors = Target.of_device(call.q.device), multiprocessors(call.q.device)
        schedule = on_gpu(call, facts, target, processors, pins, tuned)
    origins = origins or ["the model's choice: no tuned record for this spec, dtype, head dims and device"]
    if pins.decided():
        origins.insert(0, f"pinned: {pins}")
    return schedule, "; ".join(origins)


def on_gpu(
    call: Call, facts: Facts, target: Target, processors: int, pins: Schedule, tuned: Schedule | None = None
) -> Schedule:
    """The complete schedule on a GPU with so many multiprocessors: pins, then the record, then the model."""
    half = call.q.dtype in (torch.float16, torch.bfloat16)
    decode = decode_choice(call, facts, processors) if half else Schedule()
    schedule = complete(call.spec, target, call.q.shape[3], call.v.shape[3], call.q.dtype, pins, tuned, decode)
    check(call.spec, facts, schedule)
    return fit(schedule, call.spec.lists, pins)


@lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side on a GPU if each fills a multiprocessor; elsewhere as many as is nice to test."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def complete_for(
    spec: Spec, target: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, pins: Schedule
) -> Schedule:
    """The schedule for a named target, without a database: what cross-compilation and `source` use."""
    if target == "interpreter":
        small = {"block_m": 16, "block_n": 16, "num_warps": 1, "num_stages": 1}
        tiles: dict[str, Any] = {
            prefix + name: value for prefix in ("", "dq_", "dkv_") for name, value in small.items()
        }
        return pins.over(Schedule(**tiles, deterministic=True, precision="ieee"))
    return complete(spec, Target.named(target), head_dim, head_dim_v, dtype, pins)


def _records(call: Call, backend: str, db: str | None) -> dict[str, Any]:
    """What the database has for this call, by piece; empty if it can't be read (the store warns once)."""
    from attngen.store import Key, Shape, open_store

    if min(call.q.shape[:3]) == 0 or call.n_k == 0:
        return {}
    store = open_store(db)
    shape = Shape(
        *(
            int(x)
            for x in (
                *call.q.shape[:2],
                call.k.shape[1],
                call.q.shape[2],
                call.n_k,
                call.q.shape[3],
                call.v.shape[3],
            )
        )
    )
    device, versions = device_identity(call.q.device), generator_versions(backend)
    found = {}
    for piece in PIECES:
        key = Key.of(call.spec.key, piece, str(call.q.dtype), shape, device, versions)
        record = store.lookup(key)
        if record is not None and _legal(record.record.schedule):
            found[piece] = record
    return found


def _legal(schedule: dict[str, Any]) -> bool:
    try:
        Schedule(**schedule)
    except (AttngenError, TypeError):
        return False
    return True


def device_identity(device: torch.device) -> Any:
    """The device as records name it; on a CPU the number of threads is part of it."""
    return _identity(device, torch.get_num_threads() if device.type == "cpu" else 0)


@lru_cache(maxsize=32)
def _identity(device: torch.device, threads: int) -> Any:
    from attngen.store import device_of

    return device_of(device)


@lru_cache(maxsize=4)
def generator_versions(backend: str) -> Any:
    """What besides the device decides a schedule's speed, as records name it."""
    from attngen.store import Versions

    if backend == "cpu":
        return Versions(generator=generator_hash("cpu"), torch=str(torch.__version__))
    import triton

    return Versions(generator=generator_hash("triton"), triton=triton.__version__)


@lru_cache(maxsize=4)
def generator_hash(backend: str) -> str:
    """Hash of the code that decides how fast a schedule is: templates, lowering and analysis, or the CPU backend."""
    import hashlib

    root = Path(__file__).parent.parent
    folders = ["analysis", "backends"] if backend == "cpu" else ["analysis", "lowering", "templates"]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".jinja"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]

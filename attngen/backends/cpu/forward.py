"""The forward: a partial softmax state per chunk of keys, merged (`attngen.plan.softmax`)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from attngen.backends.cpu.forward_kernels import state_of, write
from attngen.backends.cpu.kernels import kernels
from attngen.backends.cpu.loads import check_loads
from attngen.backends.cpu.logits import dropout_of, logits_of, reaching
from attngen.backends.cpu.parallel import run_jobs
from attngen.backends.cpu.products import product, rows_of
from attngen.backends.cpu.work import Unit, Work
from attngen.plan import softmax as state
from attngen.plan.memory import empty
from attngen.plan.stream_k import stream_k
from attngen.schedule import Schedule
from attngen.schedule.defaults import CPU_CHUNK


def attend(work: Work, schedule: Schedule, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse; P goes to `weights` [B, Hq, Nq, Nk]. Values that are not finite, and logits that the change of base lost,
    are taken with care.
    """
    out, lse = _attend_all(work, schedule, weights)
    if work.finite and work.base != 1.0 and not work.facts.may_be_empty and lse.numel() and work.call.n_k:
        work.finite = bool(lse.amin() > -math.inf)  # a row that has keys and sees none
    if not work.finite:
        out, lse = _attend_all(work, schedule, None)
    return out, lse


def _attend_all(work: Work, schedule: Schedule, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse. If inf or nan shows up in out, `work.finite` is False afterwards and they may be wrong."""
    outputs = work.k.shape[1] * work.q.shape[0] * -(-work.q.shape[2] // work.block_m)
    few = (
        outputs < torch.get_num_threads() and work.keys.visited > 4 * CPU_CHUNK
    )  # a long context, and cores without work
    out = empty((*work.q.shape[:3], work.v.shape[3]), work.q.dtype)
    lse = torch.empty(work.q.shape[:3], dtype=work.real)
    if weights is None and (schedule.split not in (None, 1) or (schedule.split is None and few)):
        _attend_split(work, schedule.split or "stream", schedule.programs or torch.get_num_threads(), lse, out)
        return out, lse

    def job(_: int, part: tuple[range, range]) -> None:
        for units in work.units(*part):
            if not math.isfinite(_attend_units(work, units, lse, out, weights)):
                work.finite = False

    run_jobs(work.jobs(finer=4), job)
    return out, lse


def _attend_split(work: Work, split: int | str, programs: int, lse: torch.Tensor, out: torch.Tensor) -> None:
    """The same with the key chunks of each unit in `split` parts, or all units' in equal runs over `programs`: partial
    states, which are merged.
    """
    pairs, tiles = range(work.q.shape[0] * work.k.shape[1]), range(-(-work.q.shape[2] // work.block_m))
    units = [unit for same in work.units(pairs, tiles) for unit in same]
    parts = _parts([len(unit.chunks.start) for unit in units], split, programs)
    states: list[list[state.State]] = [[] for _ in units]

    def attend_part(_: int, part: tuple[int, range]) -> None:
        number, chunks = part
        states[number].append(state_of_unit(work, units[number], chunks))

    def finish(_: int, number: int) -> None:
        unit, found = units[number], states[number]
        total = found[0] if found else state_of_unit(work, unit, range(0))
        for piece in found[1:]:
            total = state.merge(total, piece, work.base != 1.0)
        if not math.isfinite(_write(work, unit, total, lse, out)):
            work.finite = False

    run_jobs(parts, attend_part)
    run_jobs(range(len(units)), finish)


def _parts(counts: list[int], split: int | str, programs: int) -> list[tuple[int, range]]:
    """(unit, its chunks) of every partial state."""
    parts = []
    if isinstance(split, int):
        for unit, count in enumerate(counts):
            edges = [count * part // split for part in range(split + 1)]
            parts += [(unit, range(a, b)) for a, b in pairwise(edges) if a < b]
        return parts
    runs = stream_k(torch.tensor(counts, dtype=torch.int64), programs)
    starts, begin, first = runs.starts.tolist(), runs.begin.tolist(), runs.first.tolist()
    for program in range(programs if counts else 0):
        for unit in range(first[program], first[program + 1] + 1):
            a, b = (min(max(begin[at] - starts[unit], 0), counts[unit]) for at in (program, program + 1))
            parts += [(unit, range(a, b))] if a < b else []
    return parts


def _attend_units(
    work: Work, units: list[Unit], lse: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None
) -> float:
    """Writes the units' rows of lse [B, Hq, Nq], out [B, Hq, Nq, Dv] and the weights; returns a sum that is finite if they
    are.
    """
    chunks, caps = units[0].chunks, units[0].caps
    if caps is None or not chunks.start:
        return sum(_write(work, unit, state_of_unit(work, unit, range(len(chunks.start))), lse, out) for unit in units)
    given = (
        work.q, work.k, work.v, [unit.place for unit in units], work.scale * work.base, work.log_base,
        chunks.start, chunks.stop, chunks.bundle, caps, chunks.owner, chunks.low, chunks.high, work.sink, lse, out,
    )  # fmt: skip
    return kernels().attend(*given) if weights is None else kernels().attend_storing(*given, weights)


def _write(work: Work, unit: Unit, total: state.State, lse: torch.Tensor, out: torch.Tensor) -> float:
    """Writes a unit's rows from the state of all its keys; returns a sum that is finite if they are."""
    sink = None if work.sink is None else work.sink[unit.at]
    return write(total, work.log_base, sink, lse[unit.at], out[unit.at])


def state_of_unit(work: Work, unit: Unit, chunks: range, values: bool = True) -> state.State:
    """The state of some of a unit's chunks; without its values, o [rows, 0]."""
    q = rows_of(work.q[unit.at], work.factor, work.like)
    current: state.State | None = None
    for n in chunks:
        k, v = work.operands(unit, n)
        v = v if values else v[:, :0]
        scope, blocked = work.scope(unit, n), work.blocked(unit, n)
        if work.checks:
            attended = torch.ones((len(unit.heads), unit.rows, k.shape[0]), dtype=torch.bool)
            for low, high, block in blocked:
                attended[..., low:high] = block.cap > 0
            check_loads(work.checks, scope, attended, work.real)
        _, logits = logits_of(work, unit, q, k, blocked, scope)
        piece = state_of(logits, v, work.log_base)  # logits now holds the weights
        if work.kept != 1.0:
            logits.mul_(dropout_of(work, unit, scope))
        if work.kept != 1.0 or not work.finite:
            piece = piece._replace(o=product(logits, v.t()) if work.finite else reaching(v.t(), logits).t())
        current = piece if current is None else state.merge(current, piece, work.base != 1.0)
    return current or state.empty((len(unit.heads) * unit.rows,), work.v.shape[3] if values else 0, work.real)

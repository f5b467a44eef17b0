"""The embedded backend: forward and backward on any CPU with PyTorch's operators, over the live key intervals only.

A query tile of all heads that share keys walks its chunks of keys. Each chunk gives a partial softmax state, and the states
are merged (`attngen.plan.softmax`); ranges that the analysis calls full never see the mask.

The backward goes over the same chunks once: P = exp(S - lse), dS = P (dP - delta), and the chunks' gradients add up
(Dao 2023). Memory is O(N) in both directions.

A plain score runs in `kernels`, a call per tile; calls of few query rows run in `few`. Scores, dropout and inputs with inf or
nan take the same steps in Python, a chunk at a time.
"""

from __future__ import annotations

import torch

from attngen.analysis import Axis, Facts
from attngen.backends.cpu import backward as tiled_backward
from attngen.backends.cpu import few, rows
from attngen.backends.cpu import forward as tiled_forward
from attngen.backends.cpu.parallel import undisturbed
from attngen.backends.cpu.scopes import walk_scope
from attngen.backends.cpu.weights import normalisers
from attngen.backends.cpu.work import Work
from attngen.language.call import Call
from attngen.language.lists import RowLists
from attngen.schedule import Schedule
from attngen.schedule.defaults import CPU_CHUNK, CPU_ROWS


def forward(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`. InputError if an attended pair loads outside a captured tensor."""
    if isinstance(call.spec.lists, RowLists):
        return rows.forward(call, facts)
    if few.suits(call, facts, schedule):
        with undisturbed():
            found = few.attend(call, facts)
        if found is not None:
            return found
    return tiled_forward.attend(_for_forward(call, facts, schedule), schedule)


def forward_keeping(
    call: Call, facts: Facts, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`forward`, and where the schedule stores them the weights P [B, Hq, Nq, Nk]; not where values are not finite, so that the
    backward computes them with care.
    """
    if not schedule.store:
        return *forward(call, facts, schedule), None
    work = _for_forward(call, facts, schedule)
    weights = torch.zeros((*call.q.shape[:3], call.n_k), dtype=work.real)
    out, lse = tiled_forward.attend(work, Schedule(split=1), weights)
    return out, lse, weights if work.finite else None


def delta(out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None = None) -> torch.Tensor:
    """rowsum(dO * O) - dlse [B, Hq, Nq], in the computing dtype; dlse: None for 0."""
    real = torch.float64 if out.dtype == torch.float64 else torch.float32
    found = torch.empty(out.shape[:3], dtype=real)
    if found.shape[2] <= 1024:
        torch.sum(do.to(real) * out.to(real), -1, out=found)
        return found if dlse is None else found.sub_(dlse)
    # In parts that stay in the cache: the pages of a large temporary cost more than the sums.
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for part in zip(*(t.split(1024) for t in (do[b, h], out[b, h], found[b, h])), strict=True):
                torch.sum(part[0].to(real) * part[1].to(real), -1, out=part[2])
    return found if dlse is None else found.sub_(dlse)


def backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    lse: torch.Tensor,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
    kept: torch.Tensor | None = None,
) -> tiled_backward.Gradients:
    """dq, dk, dv and the gradients of the wanted captures, see `attngen.backends`; sums are made in a fixed order. kept: the
    weights. Of captures only a sink's can want gradients with them.
    """
    if kept is not None:
        return _from_weights(_for_backward(call, facts, schedule, do), kept, lse, delta, do)
    if isinstance(call.spec.lists, RowLists):
        return rows.backward(call, facts, lse, delta, do, wanted)
    if not wanted and few.suits(call, facts, schedule):
        with undisturbed():
            short = few.differentiate(call, facts, lse, delta, do)
        if short is not None:
            return *short, {}
    work = _for_backward(call, facts, schedule, do)
    return tiled_backward.differentiate(work, normalisers(work, lse.to(work.real)), None, delta, do, wanted)


def _from_weights(
    work: Work, weights: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, do: torch.Tensor
) -> tiled_backward.Gradients:
    norms = normalisers(work, lse.to(work.real)) if work.call.spec.sink is not None else None
    return tiled_backward.differentiate(work, norms, weights, delta, do, list(work.facts.sink_grads))


def tables(call: Call, facts: Facts, schedule: Schedule, kernel: str) -> dict[str, torch.Tensor]:
    """Summaries of captured data for the walk of the forward or, "dq", of the backward."""
    queries, keys = Axis("i", call.offset_column, call.q.shape[2]), Axis("j", 0, call.n_k)
    return facts.walk_keys.prepare(walk_scope(call), queries, keys, _rows(schedule, kernel))


def table_tiles(call: Call, schedule: Schedule, kernel: str) -> int:
    """How many tiles those tables are of."""
    return -(-call.q.shape[2] // _rows(schedule, kernel))


def _rows(schedule: Schedule, kernel: str) -> int:
    return (schedule.dq if kernel == "dq" else schedule.forward).block_m or CPU_ROWS


def _for_forward(call: Call, facts: Facts, schedule: Schedule) -> Work:
    return Work(call, facts, _rows(schedule, "forward"), schedule.forward.block_n or CPU_CHUNK, "forward")


def _for_backward(call: Call, facts: Facts, schedule: Schedule, do: torch.Tensor) -> Work:
    work = Work(call, facts, _rows(schedule, "dq"), schedule.dq.block_n or CPU_CHUNK, "dq")
    work.finite = all(bool(t.sum(dtype=work.real).isfinite()) for t in (work.q, work.k, work.v, do))
    return work

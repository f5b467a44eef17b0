"""The embedded backend: forward and backward on any CPU with PyTorch's operators, over the live key intervals only.

A query tile of all heads that share keys walks its chunks of keys. Each chunk gives a partial softmax state, and the states
are merged (`attngen.state.softmax`); ranges that the analysis calls full never see the mask.

The backward goes over the same chunks once: P = exp(S - lse), dS = P (dP - delta), and the chunks' gradients add up
(Dao 2023). Memory is O(N) in both directions.

A plain score runs in `kernels`, a call per tile; calls of few query rows run in `few`. Scores, dropout and inputs with inf or
nan take the same steps in Python, a chunk at a time.
"""

from __future__ import annotations

import torch

from attngen.analysis import Facts
from attngen.backends.cpu import backward as tiled_backward
from attngen.backends.cpu import few, rows
from attngen.backends.cpu import forward as tiled_forward
from attngen.backends.cpu.parallel import undisturbed
from attngen.backends.cpu.weights import measured, normalisers
from attngen.backends.cpu.work import Work
from attngen.errors import InputError
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


def forward_storing(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward`, and the weights P [B, Hq, Nq, Nk] for `backward_stored`; where values are not finite they are empty, so that
    the backward computes them with care.
    """
    work = _for_forward(call, facts, schedule)
    weights = torch.zeros((*call.q.shape[:3], call.n_k), dtype=work.real)
    out, lse = tiled_forward.attend(work, Schedule(split=1), weights)
    return out, lse, weights if work.finite else weights.new_empty(0)


def backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    wanted: list[str],
) -> tiled_backward.Gradients:
    """dq, dk, dv and the gradients of the wanted captures, see `attngen.backends`; sums are made in a fixed order."""
    if call.spec.page_size is not None:
        raise InputError(
            "q", "no gradient: a paged cache is for inference", "a backward through it", "use torch.no_grad()"
        )
    if isinstance(call.spec.lists, RowLists):
        return rows.backward(call, facts, out, lse, grad_out, grad_lse, wanted)
    if not wanted and few.suits(call, facts, schedule):
        with undisturbed():
            short = few.differentiate(call, facts, out, lse, grad_out, grad_lse)
        if short is not None:
            return *short, {}
    work = _for_backward(call, facts, schedule, grad_out)
    return tiled_backward.differentiate(
        work, out, normalisers(work, lse.to(work.real)), None, grad_out, grad_lse, wanted
    )


def backward_stored(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    out: torch.Tensor,
    weights: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
) -> tiled_backward.Gradients:
    """`backward` from the weights that `forward_storing` left. Of captures only a sink's can want gradients: all are given."""
    work = _for_backward(call, facts, schedule, grad_out)
    norms = measured(work) if call.spec.sink is not None else None
    return tiled_backward.differentiate(work, out, norms, weights, grad_out, grad_lse, list(facts.sink_grads))


def _for_forward(call: Call, facts: Facts, schedule: Schedule) -> Work:
    return Work(call, facts, schedule.forward.block_m or CPU_ROWS, schedule.forward.block_n or CPU_CHUNK)


def _for_backward(call: Call, facts: Facts, schedule: Schedule, grad_out: torch.Tensor) -> Work:
    work = Work(call, facts, schedule.dq.block_m or CPU_ROWS, schedule.dq.block_n or CPU_CHUNK)
    work.finite = all(bool(t.sum(dtype=work.real).isfinite()) for t in (work.q, work.k, work.v, grad_out))
    return work

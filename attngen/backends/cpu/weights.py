"""How the backward turns logits into weights: P = base ** (logit - top) * share.

lse is rounded to as many bits as a logit has. Where it is large, that alone moves P by more than everything else: by a factor
of 2 at an lse of 1e7, by the number of keys at one of 1e38 (a row whose bias is the least finite number everywhere). There the
rows' largest logits and sums are found again, by the very operations that give the backward its logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from attngen.backends.cpu.forward import state_of_unit
from attngen.backends.cpu.kernels import kernels
from attngen.backends.cpu.parallel import run_jobs
from attngen.backends.cpu.work import Work

ROUNDING = 2.0**-16  # of P by lse, up to which P is taken from it: that of an lse of 128 in float32


class Normalisers(NamedTuple):
    """top, in the work's base, +inf for a row without a key; share, None for 1; and the sink's own P: all [B, Hq, Nq]."""

    top: torch.Tensor
    share: torch.Tensor | None
    sink: torch.Tensor | None


def shows_in_weights(lse: torch.Tensor) -> bool:
    """Whether some finite lse is so large that its rounding would show."""
    return lse.numel() > 0 and float(lse.abs().amax()) > ROUNDING / torch.finfo(lse.dtype).eps


def normalisers(work: Work, lse: torch.Tensor) -> Normalisers:
    """From lse, [B, Hq, Nq] in natural base, where its rounding does not show; else exactly."""
    size = lse.abs().masked_fill_(lse == -math.inf, 0.0)
    if shows_in_weights(size):
        limits = torch.finfo(work.real)
        work.finite &= float(size.amax()) < limits.max / 2  # base 2 would lose it
        return _measured(work, lse, size > ROUNDING / limits.eps)
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # exp(-inf - inf) is 0
    sink = None if work.sink is None else torch.exp(work.sink - lse)
    return Normalisers(lse * work.base, None, sink)


def _measured(work: Work, lse: torch.Tensor, rows: torch.Tensor) -> Normalisers:
    """Measured for (at least) the chosen `rows`, bool [B, Hq, Nq]; from lse for the others."""
    top, total, found = lse * work.base, torch.ones_like(lse), torch.zeros_like(rows)

    def job(_: int, part: tuple[range, range]) -> None:
        for units in work.units(*part):
            chunks, caps = units[0].chunks, units[0].caps
            units = [unit for unit in units if rows[unit.at].any()]
            if caps is not None and chunks.start:
                kernels().measure(
                    work.q, work.k, [unit.place for unit in units], work.scale * work.base, work.log_base,
                    chunks.start, chunks.stop, chunks.bundle, caps, chunks.owner, chunks.low, chunks.high, top, total,
                )  # fmt: skip
            for unit in units:
                found[unit.at] = True
                if caps is None or not chunks.start:
                    state = state_of_unit(work, unit, range(len(chunks.start)), values=False)
                    top[unit.at], total[unit.at] = (x.view(unit.tile[:2]) for x in (state.m, state.l))

    run_jobs(work.jobs(finer=4), job)
    sink = None
    if work.sink is not None:
        # One more key; in natural base, which every finite logit survives.
        keys = top * work.log_base
        most = torch.maximum(keys, work.sink).clamp(min=torch.finfo(work.real).min)
        weight = torch.exp(work.sink - most)
        total = torch.where(found, total * torch.exp(keys - most) + weight, 1.0)
        sink = torch.where(found, weight / total.clamp(min=1), torch.exp(work.sink - lse))
        top = torch.where(found & (work.sink > keys) & (total > 0), work.sink * work.base, top)
    top.masked_fill_(top == -math.inf, math.inf)
    return Normalisers(top, 1 / total.clamp(min=1), sink)

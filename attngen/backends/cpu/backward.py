"""The backward: P and dS = P (dP - delta) once per chunk of keys; the chunks' gradients add up (Dao 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attngen.backends.cpu.kernels import kernels
from attngen.backends.cpu.loads import scatter
from attngen.backends.cpu.logits import dropout_of, keep, logits_of, reaching, times
from attngen.backends.cpu.parallel import run_jobs
from attngen.backends.cpu.products import add_products, exponential, product, rows_of
from attngen.backends.cpu.scopes import positions
from attngen.backends.cpu.weights import Normalisers
from attngen.backends.cpu.work import Unit, Work
from attngen.language.programs import evaluate
from attngen.plan.memory import empty

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def differentiate(
    work: Work,
    norms: Normalisers | None,
    weights: torch.Tensor | None,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
) -> Gradients:
    """dq, dk, dv and the gradients of the wanted captures; sums are made in a fixed order. Either `norms` or `weights`,
    the stored P [B, Hq, Nq, Nk]; both with a sink. delta [B, Hq, Nq], do [B, Hq, Nq, Dv].
    """
    call, real, jobs = work.call, work.real, work.jobs()
    pairs = work.k.shape[0] * work.k.shape[1]
    delta = delta.to(real)
    given = _Given(do, delta, norms, weights)
    dq, dk, dv = (empty(t.shape, t.dtype) for t in (call.q, call.k, call.v))
    # Else jobs sum the same pairs' gradients, each its own tiles'.
    alone = all(own != jobs[0][0] for own, _ in jobs[1:])
    kept: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in jobs]
    scattered = [name for name in wanted if name in work.facts.load_grads]
    captured = [{name: torch.zeros(call.captures[name].shape, dtype=real) for name in scattered} for _ in jobs]

    def finish(pair: int, shares: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        b, head_kv = divmod(pair, call.k.shape[1])
        sum_k, sum_v = (x[0] if len(x) == 1 else torch.stack(x).sum(0) for x in zip(*shares, strict=True))
        dk[b, head_kv].copy_(sum_k.mul_(1 / work.base).to(dk.dtype).t())
        dv[b, head_kv].copy_(sum_v.to(dv.dtype).t())

    def job(number: int, part: tuple[range, range]) -> None:
        sums = None
        for group in work.groups(part[0]):
            sums = _Sums.zeros(work, len(group), dq, captured[number], sums if alone else None)
            for units in work.units(group, part[1]):
                _differentiate_units(work, units, given, sums)
            for slot, pair in enumerate(group):
                shares = sums.dk[slot], sums.dv[slot]
                if alone:
                    finish(pair, [shares])
                else:
                    kept[number][pair] = shares

    run_jobs(jobs, job)
    if not alone:
        run_jobs(range(pairs), lambda _, pair: finish(pair, [own[pair] for own in kept if pair in own]))
    gradients = {name: torch.stack([own[name] for own in captured]).sum(0) for name in scattered}
    for name in wanted:
        gradients.setdefault(name, torch.zeros(call.captures[name].shape, dtype=real))
    if norms is not None and norms.sink is not None:
        _differentiate_sink(work, norms.sink, delta, gradients)
    return dq, dk, dv, gradients


class _Given(NamedTuple):
    """do [B, Hq, Nq, Dv]; delta [B, Hq, Nq]; how P is normalised; P [B, Hq, Nq, Nk] where it was stored."""

    do: torch.Tensor
    delta: torch.Tensor
    norms: Normalisers | None
    weights: torch.Tensor | None


@dataclass(frozen=True)
class _Sums:
    """Where a unit's shares go: dq [B, Hq, Nq, D]; dk [slots, D, Nk] and dv [slots, Dv, Nk], transposed, because products then
    add to whole rows; captures by name.
    """

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    captured: dict[str, torch.Tensor]

    @classmethod
    def zeros(
        cls, work: Work, slots: int, dq: torch.Tensor, captured: dict[str, torch.Tensor], over: _Sums | None
    ) -> _Sums:
        """For a group of pairs; `over`: another group's, no longer wanted, whose memory serves again if it is as large."""
        if over is not None and over.dk.shape[0] == slots:
            over.dk.zero_()
            over.dv.zero_()
            return over
        dk, dv = (empty((slots, t.shape[3], t.shape[2]), work.real).zero_() for t in (work.k, work.v))
        return cls(dq, dk, dv, captured)


def _differentiate_units(work: Work, units: list[Unit], given: _Given, sums: _Sums) -> None:
    """Writes the units' dq and adds their shares of the other gradients; dk comes out times `work.base`."""
    chunks, caps = units[0].chunks, units[0].caps
    factor, places = work.scale * work.base, [unit.place for unit in units]
    if given.weights is not None:
        kernels().differentiate_stored(
            work.q, given.do, work.k, work.v, places, factor, work.scale, given.delta, given.weights,
            chunks.start, chunks.stop, chunks.bundle, sums.dk, sums.dv, sums.dq,
        )  # fmt: skip
        return
    assert given.norms is not None
    if caps is None:
        for unit in units:
            _differentiate_unit(work, unit, given, given.norms, sums)
        return
    kernels().differentiate(
        work.q, given.do, work.k, work.v, places, factor, work.log_base, work.scale, given.delta,
        given.norms.top, given.norms.share, chunks.start, chunks.stop, chunks.bundle, caps, chunks.owner, chunks.low,
        chunks.high, sums.dk, sums.dv, sums.dq,
    )  # fmt: skip


def _differentiate_unit(work: Work, unit: Unit, given: _Given, norms: Normalisers, sums: _Sums) -> None:
    chunks, at = unit.chunks, unit.at
    q, do = rows_of(work.q[at], work.factor, work.like), rows_of(given.do[at], 1.0, work.like)
    q_t, do_t = (q.t() * work.scale_after).contiguous(), do.t().contiguous()
    delta, top = given.delta[at].reshape(-1, 1), norms.top[at].reshape(-1, 1)
    dq = torch.zeros_like(q)
    for n, (start, stop) in enumerate(zip(chunks.start, chunks.stop, strict=True)):
        k, v = work.operands(unit, n)
        scope, blocked = work.scope(unit, n), work.blocked(unit, n)
        scaled, logits = logits_of(work, unit, q, k, blocked, scope)
        p = exponential(logits.sub_(top), work.log_base)
        if norms.share is not None:
            p.mul_(norms.share[at].reshape(-1, 1))
        p = keep(p, unit, blocked)
        dp, weights = product(do, v), p
        if work.kept != 1.0:
            factors = dropout_of(work, unit, scope)
            weights = p * factors
            dp.mul_(factors)
        ds = keep(dp.sub_(delta).mul_(p), unit, blocked)
        if not work.identity:
            scope["s"] = scaled.view(unit.tile)
            values: dict[Any, Any] = {}
            for name, total in sums.captured.items():
                for load, slope in work.facts.load_grads[name]:
                    share = times(ds, evaluate(slope, scope, values, work.real), unit, blocked)
                    scatter(total, load, share.view(unit.tile), scope, work.real)
            ds = times(ds, evaluate(work.facts.score_ds, scope, values, work.real), unit, blocked)
        dk, dv = sums.dk[unit.slot, :, start:stop], sums.dv[unit.slot, :, start:stop]
        if work.finite:
            add_products(ds, weights, q_t, do_t, k, dq, dk, dv)
        else:
            dv += reaching(do_t, weights.t())
            dk += reaching(q_t, ds.t())
            dq += reaching(k.t(), ds).t()
    sums.dq[at] = dq.mul_(work.scale).view(unit.tile)


def _differentiate_sink(work: Work, p: torch.Tensor, delta: torch.Tensor, gradients: dict[str, torch.Tensor]) -> None:
    """Adds d sink / d load times the sink's dS = P (0 - delta) for each load of a wanted tensor; P and delta [B, Hq, Nq]."""
    named = {name: pairs for name, pairs in work.facts.sink_grads.items() if name in gradients}
    heads = range(work.q.shape[1])
    if not named or work.q.numel() == 0:
        return
    for b in range(work.q.shape[0]):
        ds = (-p[b] * delta[b]).unsqueeze(-1)  # [Hq, Nq, 1]
        scope = {**work.env, **positions(b, heads, work.offsets[b], work.q.shape[2], 0, 1), "q_offset": work.offsets[b]}
        for name, pairs in named.items():
            for load, slope in pairs:
                scatter(gradients[name], load, ds * evaluate(slope, scope, real=work.real), scope, work.real)

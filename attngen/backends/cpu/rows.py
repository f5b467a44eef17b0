"""The CPU backend for lists of single rows (`attngen.language.lists.RowLists`): edges of a graph, keys chosen per query.

One head at a time, its edges by pieces that stay in the cache: gather the rows of q, k and v that an edge joins, multiply,
and add up by query (forward) or by either end (backward). Memory is that of one number per edge of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attngen.analysis import Facts
from attngen.backends.cpu.loads import check_loads, checked_loads, scatter
from attngen.backends.cpu.parallel import run_jobs
from attngen.backends.cpu.weights import shows_in_weights
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.expression import S
from attngen.language.lists import RowLists
from attngen.language.programs import evaluate

PIECE = 2**20  # numbers of a gathered operand


@dataclass(frozen=True)
class Edges:
    """The edges of one list: query rows, key rows and places in query_edges, int64 [E]."""

    row: torch.Tensor
    key: torch.Tensor
    place: torch.Tensor


def forward(call: Call, facts: Facts) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`."""
    work = _Work(call, facts)
    out = torch.zeros((*call.q.shape[:3], call.v.shape[3]), dtype=work.real)
    lse = torch.full(call.q.shape[:3], -torch.inf, dtype=work.real)

    def job(_: int, part: tuple[int, int]) -> None:
        b, h = part
        edges = work.edges(b, h)
        x = work.logits(b, h, edges)[0]
        m, total, p = _softmax(x, edges, work.sink(b, h), call.q.shape[2])
        for piece in _pieces(len(x), call.v.shape[3]):
            _add(out[b, h], edges.row[piece], _weighted(work.v[b, h // call.group], edges.key[piece], p[piece]))
        out[b, h] /= total.clamp(min=torch.finfo(work.real).tiny).unsqueeze(-1)
        lse[b, h] = m + torch.log(total)

    run_jobs(work.jobs, job)
    return out.to(call.q.dtype), lse


def backward(
    call: Call,
    facts: Facts,
    lse: torch.Tensor,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Gradients, see `attngen.backends`; sums are made in a fixed order."""
    work, real, group = _Work(call, facts), _real(call), call.group
    do, lse, delta = (t.to(real) for t in (do, lse, delta))
    dq, dk, dv = (torch.zeros(t.shape, dtype=real) for t in (call.q, call.k, call.v))
    gradients = {name: torch.zeros(call.captures[name].shape, dtype=real) for name in wanted}
    lock_free = [(b, kv) for b in range(call.q.shape[0]) for kv in range(call.k.shape[1])]
    # A gradient that several heads add to is summed per job, then over jobs in their order.
    captured = [{name: torch.zeros_like(total) for name, total in gradients.items()} for _ in lock_free]

    def job(number: int, part: tuple[int, int]) -> None:
        b, kv = part
        sums = captured[number]
        for h in range(kv * group, (kv + 1) * group):
            edges = work.edges(b, h)
            x, scaled = work.logits(b, h, edges)
            p = work.weights(b, h, edges, x, lse[b, h])
            dp = _dots(do[b, h], edges.row, work.v[b, kv], edges.key)
            ds = torch.where(p > 0, p * (dp - delta[b, h][edges.row]), 0.0)
            if "edge_weight" in sums:
                weights = sums["edge_weight"]
                weights[b % weights.shape[0], work.list_head(weights, h)].scatter_add_(0, edges.place, ds)
            if not work.identity:
                scope = {**work.scope(b, h, edges), "s": scaled}
                for name in (name for name in sums if name in facts.load_grads):
                    for load, slope in facts.load_grads[name]:
                        share = torch.where(p > 0, ds * evaluate(slope, scope, real=real), 0.0)
                        scatter(sums[name], load, share.view(1, 1, -1), scope, real)
                ds = torch.where(p > 0, ds * evaluate(facts.score_ds, scope, real=real), 0.0)
            ds = ds * work.scale
            for at in _pieces(len(x), max(call.q.shape[3], call.v.shape[3])):
                row, key = edges.row[at], edges.key[at]
                _add(dq[b, h], row, _weighted(work.k[b, kv], key, ds[at]))
                _add(dk[b, kv], key, _weighted(work.q[b, h], row, ds[at]))
                _add(dv[b, kv], key, _weighted(do[b, h], row, p[at]))

    run_jobs(lock_free, job)
    for name, total in gradients.items():
        for own in captured:
            total += own[name]
    _add_sink_gradients(work, lse, delta, gradients)
    return dq.to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype), gradients


class _Work:
    """A call made ready: operands in the computing dtype, lists, and what expressions read."""

    def __init__(self, call: Call, facts: Facts):
        if call.spec.dropout is not None:
            raise InputError("dropout", "none, for keys listed by row", "a probability", "leave out dropout=")
        assert isinstance(call.spec.lists, RowLists)
        self.lists = call.spec.lists
        self.call, self.facts, self.spec, self.real = call, facts, call.spec, _real(call)
        self.q, self.k, self.v = (t.detach().to(self.real) for t in (call.q, call.k, call.v))
        self.identity = bool(self.spec.score == S)
        self.scale = call.scale
        self.offsets: list[int] = torch.as_tensor(call.q_offset).expand(call.q.shape[0]).tolist()
        captures = {n: t.detach().to(self.real) if t.is_floating_point() else t for n, t in call.captures.items()}
        self.env: dict[str, Any] = {**captures, **call.params}
        self.checks = checked_loads(self.spec.score, isinstance(call.q_offset, torch.Tensor))
        self.jobs = [(b, h) for b in range(call.q.shape[0]) for h in range(call.q.shape[1])]

    def list_head(self, tensor: torch.Tensor, h: int) -> int:
        """Which list of [B', H', ...] is head h's."""
        lists = tensor.shape[1]
        return 0 if lists == 1 else h if self.lists.by_query_head else h // self.call.group

    def _of(self, name: str, b: int, h: int) -> torch.Tensor:
        tensor = self.env[name]
        return tensor[b % tensor.shape[0], self.list_head(tensor, h)]

    def edges(self, b: int, h: int) -> Edges:
        """All edges of a head, query by query."""
        runs = self._of("query_runs", b, h).long()
        first, count = runs[:, 0], runs[:, 1]
        row = torch.repeat_interleave(torch.arange(len(count)), count)
        place = torch.arange(len(row)) + (first - (count.cumsum(0) - count))[row]
        return Edges(row, self._of("query_edges", b, h)[place].long(), place)

    def scope(self, b: int, h: int, edges: Edges) -> dict[str, Any]:
        """What expressions read at the edges."""
        place = {"b": b, "h": h, "i": edges.row + self.offsets[b], "j": edges.key, "q_offset": self.offsets[b]}
        return {**self.env, **place}

    def logits(self, b: int, h: int, edges: Edges) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [E] after score, weight and mask; scaled logits before them), natural base."""
        scaled = _dots(self.q[b, h], edges.row, self.k[b, h // self.call.group], edges.key).mul_(self.scale)
        scope, x = self.scope(b, h, edges), scaled
        mask = torch.as_tensor(evaluate(self.spec.mask, scope, real=self.real))
        if self.checks:
            check_loads(self.checks, scope, mask, self.real)
        if not self.identity:
            x = torch.as_tensor(evaluate(self.spec.score, {**scope, "s": scaled}, real=self.real)).expand_as(scaled)
        if self.lists.weighted:
            x = x + self._of("edge_weight", b, h)[edges.place]
        return torch.where(mask, x, -torch.inf), scaled

    def weights(self, b: int, h: int, edges: Edges, x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """P [E] from logits x [E] and lse [Nq]; by its own sums where the rounding of lse would show in it."""
        dead = lse.isneginf()
        if shows_in_weights(lse.masked_fill(dead, 0.0)):
            _, total, p = _softmax(x, edges, self.sink(b, h), len(lse))
            return p / total.clamp(min=1)[edges.row]
        return torch.exp(x - torch.where(dead, torch.inf, lse)[edges.row])

    def sink(self, b: int, h: int) -> torch.Tensor | None:
        """The sink's logits [Nq]."""
        if self.spec.sink is None:
            return None
        rows = torch.arange(self.call.q.shape[2])
        scope = {**self.env, "b": b, "h": h, "i": rows + self.offsets[b], "q_offset": self.offsets[b]}
        value = torch.as_tensor(evaluate(self.spec.sink, scope, real=self.real)).to(self.real)
        return value.expand(self.call.q.shape[2])


def _softmax(
    x: torch.Tensor, edges: Edges, sink: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits x [E]: (largest [rows], 0 for a row without a key; sums of exp(x - largest) [rows]; these numbers [E])."""
    m = x.new_full((rows,), -torch.inf).scatter_reduce_(0, edges.row, x, "amax")
    m = m if sink is None else torch.maximum(m, sink)
    m = torch.where(m.isneginf(), 0.0, m)
    p = torch.exp(x - m[edges.row])
    total = torch.zeros_like(m).scatter_add_(0, edges.row, p)
    return m, total if sink is None else total + torch.exp(sink - m), p


def _add_sink_gradients(
    work: _Work, lse: torch.Tensor, delta: torch.Tensor, gradients: dict[str, torch.Tensor]
) -> None:
    """A sink is a key with value 0: its dS is P * (0 - delta)."""
    for b, h in work.jobs:
        sink = work.sink(b, h)
        if sink is None:
            return
        dead = lse[b, h].isneginf()  # of a sink of -inf, in a row without a key
        ds = (-torch.exp(sink - torch.where(dead, torch.inf, lse[b, h])) * delta[b, h]).view(1, -1, 1)
        position = torch.arange(len(sink)).view(-1, 1) + work.offsets[b]
        scope = {**work.env, "b": b, "h": h, "i": position, "q_offset": work.offsets[b]}
        for name, pairs in work.facts.sink_grads.items():
            for load, slope in pairs if name in gradients else ():
                scatter(gradients[name], load, ds * evaluate(slope, scope, real=work.real), scope, work.real)


def _real(call: Call) -> torch.dtype:
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


def _pieces(length: int, width: int) -> Iterator[slice]:
    size = max(1, PIECE // width)
    return (slice(start, start + size) for start in range(0, length, size))


def _dots(a: torch.Tensor, at_a: torch.Tensor, b: torch.Tensor, at_b: torch.Tensor) -> torch.Tensor:
    """a[at_a] . b[at_b] [E], for a, b [rows, D]."""
    out = a.new_empty(len(at_a))
    for at in _pieces(len(at_a), a.shape[1]):
        torch.sum(a.index_select(0, at_a[at]).mul_(b.index_select(0, at_b[at])), 1, out=out[at])
    return out


def _weighted(x: torch.Tensor, at: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight * x[at], 0 where the weight is 0, whatever x holds there."""
    rows = x.index_select(0, at)
    none = (weight == 0).unsqueeze(-1)
    return rows.mul_(weight.unsqueeze(-1)).masked_fill_(none, 0.0)


def _add(total: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> None:
    """total[at] += rows, in the order of the rows; scatter_add_ takes a third of the time of index_add_."""
    total.scatter_add_(0, at.unsqueeze(-1).expand_as(rows), rows)

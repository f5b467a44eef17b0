"""The embedded backend: forward and backward on any CPU with PyTorch's operators, over the live key intervals only.

A query tile of all heads that share keys walks its chunks of keys. Each chunk gives a partial softmax state, and the states
are merged (`attngen.state`); ranges that the analysis calls full never see the mask. Logits are kept in base 2, which costs
nothing where the scale is folded into q: torch's exp2 is several times faster than its exp.

The backward goes over the same chunks once: given lse and delta, P = exp(S - lse), dS = P (dP - delta), and the chunks'
gradients add up (Dao 2023). Memory is O(N) in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attngen import state
from attngen.analysis import Facts
from attngen.backends.cpu_parallel import product, run_jobs, split_jobs
from attngen.backends.cpu_tiles import Blocked, Chunk, Keys, Masks, check_loads, checked_loads, is_identity, positions
from attngen.expression import Load, evaluate, uniform
from attngen.inputs import Call
from attngen.schedule import Schedule

LOG2E = 1 / math.log(2)
ROWS, CHUNK = 256, 1024  # default tile: its logits stay in a core's second-level cache


def default_schedule(call: Call, facts: Facts) -> Schedule:
    """Query rows per head and keys per chunk of the forward (block_m, block_n) and the backward (dq_block_m, dq_block_n)."""
    rows = min(max(32, ROWS // _power_of_two(call.group)), max(32, _power_of_two(call.q.shape[2])))
    return Schedule(block_m=rows, block_n=CHUNK, dq_block_m=rows, dq_block_n=CHUNK // 2)


def forward(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`. InputError if an attended pair loads outside a captured tensor."""
    work = Work(call, facts, schedule.block_m or ROWS, schedule.block_n or CHUNK)
    batch, heads, n_q, _ = call.q.shape
    out = call.q.new_empty((batch, heads, n_q, call.v.shape[3]))
    top = torch.full((batch, heads, n_q, 1), -math.inf, dtype=work.real)
    total = torch.zeros((batch, heads, n_q, 1), dtype=work.real)

    def job(_: int, part: tuple[range, range]) -> None:
        masks = work.masks()
        for unit in work.units(*part):
            m, l, o = _attend(work, unit, masks)
            shape, at = (len(unit.heads), unit.rows, -1), unit.index
            top[at], total[at] = m.view(shape), l.view(shape)
            # The largest logit adds 1 to l: it is 0 for a row without a key and at least 1 for any other.
            torch.div(o.view(shape), l.view(shape).clamp_(min=1), out=out[at])

    run_jobs(work.jobs, job)
    lse = total.log2_().add_(top).mul_(1 / LOG2E).squeeze(-1)
    return out, lse


def backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    wanted: list[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """dq, dk, dv and the gradients of the wanted captures, see `attngen.backends`; sums are made in a fixed order."""
    work = Work(call, facts, schedule.dq_block_m or ROWS, schedule.dq_block_n or CHUNK // 2, grad_out)
    real, pairs = work.real, work.k.shape[0] * work.k.shape[1]
    delta = (grad_out.to(real) * out.to(real)).sum(-1).sub_(grad_lse.to(real)).unsqueeze(-1)
    # A row without a key: exp2(-inf - inf) is 0.
    lse = lse.to(real).masked_fill(lse == -math.inf, math.inf)
    lse2 = (lse * LOG2E).unsqueeze(-1)
    dq = torch.empty(call.q.shape, dtype=call.q.dtype)
    jobs, sharing = work.jobs, 1
    if pairs:
        sharing = sum(1 for own, _ in jobs if 0 in own)  # how many jobs share a pair: each sums on its own
    dk = torch.zeros((sharing, pairs, call.k.shape[3], call.k.shape[2]), dtype=real)  # transposed: products add whole rows
    dv = torch.zeros((sharing, pairs, call.v.shape[3], call.v.shape[2]), dtype=real)
    scatters = [name for name in wanted if name in facts.load_grads]
    captured = [{name: torch.zeros(call.captures[name].shape, dtype=real) for name in scatters} for _ in jobs]

    def job(number: int, part: tuple[range, range]) -> None:
        masks, slot = work.masks(), number % sharing
        for unit in work.units(*part):
            at = unit.index
            sums = _Sums(dk[slot, unit.pair], dv[slot, unit.pair], captured[number])
            dq[at] = _differentiate(work, unit, masks, delta[at], lse2[at], sums).view(len(unit.heads), unit.rows, -1)

    run_jobs(jobs, job)
    gradients = {name: torch.stack([own[name] for own in captured]).sum(0) for name in scatters}
    for name in wanted:
        gradients.setdefault(name, torch.zeros(call.captures[name].shape, dtype=real))
    if call.spec.sink is not None:
        _differentiate_sink(work, lse, delta, gradients)
    dk = dk.sum(0).mul_(1 / work.base).view(*call.k.shape[:2], *dk.shape[2:]).mT
    dv = dv.sum(0).view(*call.v.shape[:2], *dv.shape[2:]).mT
    return dq, dk.to(call.k.dtype).contiguous(), dv.to(call.v.dtype).contiguous(), gradients


# -- what a call looks like to the loops ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A tile of `rows` queries of the heads that share one (batch, kv head) `pair`, and the keys it visits."""

    pair: int
    b: int
    heads: range
    start: int  # its first query's row
    rows: int
    first: int  # and position
    chunks: tuple[Chunk, ...]

    @property
    def index(self) -> tuple[int, slice, slice]:
        """Where its rows are in [B, Hq, Nq, ...]."""
        return self.b, slice(self.heads.start, self.heads.stop), slice(self.start, self.start + self.rows)


class Work:
    """A call made ready: k and v as contiguous rows of the computing dtype, key chunks of every tile, jobs for the cores."""

    def __init__(self, call: Call, facts: Facts, block_m: int, chunk: int, grad_out: torch.Tensor | None = None):
        self.call, self.facts, self.spec = call, facts, call.spec
        self.real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        self.k, self.v = (t.detach().to(self.real).contiguous() for t in (call.k, call.v))
        self.q, self.grad_out = call.q.detach(), grad_out
        captures = {n: t.detach().to(self.real) if t.is_floating_point() else t for n, t in call.captures.items()}
        self.env: dict[str, Any] = {**captures, **call.params}
        self.identity = is_identity(self.spec.score)
        self.base = LOG2E if self.identity else 1.0  # with the identity score, q's factor brings logits to base 2
        self.scale = self.spec.scale_for(call.q.shape[3])
        # inf and nan spoil a sum where they are multiplied by 0: with any of them around, masked pairs are left out by hand.
        self.finite = all(bool(t.sum().isfinite()) for t in (self.q, self.k, self.v, *([] if grad_out is None else [grad_out])))
        self.block_m = block_m
        self.keys = Keys(call, facts, block_m, chunk)
        by_offset = isinstance(call.q_offset, torch.Tensor)
        self.checks = checked_loads(self.spec.score, by_offset)
        self.offsets = call.q_offset.tolist() if isinstance(call.q_offset, torch.Tensor) else [call.q_offset] * call.q.shape[0]
        self.keep_probability = 1.0
        if self.spec.dropout is not None:
            self.keep_probability = 1.0 - float(evaluate(self.spec.dropout, self.env, real=torch.float64))

    @cached_property
    def jobs(self) -> list[tuple[range, range]]:
        """(pairs, tiles) for each thread."""
        batch, heads, n_q, head_dim = self.q.shape
        tiles = -(-n_q // self.block_m)
        work = self.keys.visited * min(self.block_m, max(n_q, 1)) * (head_dim + self.v.shape[3]) * batch * heads
        return split_jobs(batch * self.k.shape[1], tiles, work)

    def masks(self) -> Masks:
        """Masks for one job; threads share none."""
        return Masks(self.call, self.env, self.real)

    def units(self, pairs: range, tiles: range) -> Iterator[Unit]:
        """Tile by tile, so that what the mask gives for a tile serves all heads."""
        n_q, group, heads_kv = self.q.shape[2], self.call.group, self.k.shape[1]
        for tile in tiles:
            start = tile * self.block_m
            rows = min(self.block_m, n_q - start)
            for pair in pairs:
                b, head = pair // heads_kv, pair % heads_kv * group
                several = range(head, head + group)
                for heads in (several[n : n + 1] for n in range(group)) if self.keys.by_head else [several]:
                    yield Unit(pair, b, heads, start, rows, start + self.offsets[b], self.keys.chunks(b, heads[0], tile))

    def rows(self, tensor: torch.Tensor, unit: Unit, factor: float = 1.0) -> torch.Tensor:
        """The unit's rows of [B, Hq, Nq, ...] times a factor: [heads x rows, ...] contiguous, in the computing dtype."""
        found = tensor[unit.index].to(self.real)
        found = found * factor if factor != 1.0 else found
        return found.reshape(len(unit.heads) * unit.rows, -1).contiguous()

    def operands(self, unit: Unit, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's k [keys, D] and v [keys, Dv]."""
        b, head = unit.b, unit.pair % self.k.shape[1]
        return self.k[b, head, chunk.start : chunk.stop], self.v[b, head, chunk.start : chunk.stop]

    def scope(self, unit: Unit, chunk: Chunk) -> dict[str, Any]:
        """What expressions on the chunk's pairs read: captures, params, b, h, i, j. Empty if nothing but the mask does."""
        if self.identity and self.keep_probability == 1.0:
            return {}
        return {**self.env, **positions(unit.b, unit.heads, unit.first, unit.rows, chunk.start, chunk.stop)}

    def blocked(self, unit: Unit, chunk: Chunk, masks: Masks) -> list[tuple[int, int, Blocked]]:
        """The masks of a chunk with their column ranges."""
        return [
            (low, high, masks.blocked(unit.b, unit.heads, unit.first, unit.rows, chunk.start + low, chunk.start + high))
            for low, high in chunk.partial
        ]


# -- forward ----------------------------------------------------------------------------------------------------------


def _attend(work: Work, unit: Unit, masks: Masks) -> state.State:
    """The softmax state of a unit's rows, logits in base 2: m, l [heads x rows, 1], o [heads x rows, Dv]."""
    q = work.rows(work.q, unit, work.scale * work.base)
    current = _sink_state(work, unit)
    for chunk in unit.chunks:
        k, v = work.operands(unit, chunk)
        env = work.scope(unit, chunk)
        blocked = work.blocked(unit, chunk, masks)
        if work.checks:
            _check(work, unit, chunk, blocked, env)
        _, logits = _logits(work, unit, q, k, blocked, env)
        m = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(work.real).min)  # -inf - -inf would be nan
        p = logits.sub_(m).exp2_()
        l = p.sum(-1, keepdim=True)
        if work.keep_probability != 1.0:
            p.mul_(_dropout(work, unit, env))
        piece = state.State(m, l, product(p, v.t()) if work.finite else _reaching(v.t(), p).t())
        current = piece if current is None else state.merge(current, piece, torch.exp2)
    return state.empty((len(unit.heads) * unit.rows,), work.v.shape[3], work.real) if current is None else current


def _logits(
    work: Work, unit: Unit, q: torch.Tensor, k: torch.Tensor, blocked: list[tuple[int, int, Blocked]], env: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scaled logits before the score, logits after score and mask in base 2), [heads x rows, keys]; one tensor where the
    score is the identity.
    """
    scaled = logits = product(q, k)
    tile = (len(unit.heads), unit.rows, k.shape[0])
    if not work.identity:
        value = torch.as_tensor(evaluate(work.spec.score, {**env, "s": scaled.view(tile)}, real=work.real))
        logits = (value * LOG2E).expand(tile).contiguous().view(scaled.shape)
    for low, high, block in blocked:
        columns = logits.view(tile)[..., low:high]
        if work.identity and work.finite:
            torch.minimum(columns, block.cap, out=columns)
        else:  # drops nan as well; masked_fill_ branches per element and takes ten times as long
            _bits(columns).bitwise_and_(block.keep)
            columns.add_(block.cap.clamp(max=0))
    return scaled, logits


def _sink_state(work: Work, unit: Unit) -> state.State | None:
    """A sink is a key of its own with value 0."""
    if work.spec.sink is None:
        return None
    logit = _sink(work, unit.b, unit.heads, unit.first, unit.rows).mul_(LOG2E).view(-1, 1)
    return state.State(logit, torch.ones_like(logit), logit.new_zeros((logit.shape[0], work.v.shape[3])))


def _sink(work: Work, b: int, heads: range, first: int, rows: int) -> torch.Tensor:
    """The sink's logits [heads, rows], natural base."""
    env = {**work.env, **positions(b, heads, first, rows, 0, 1)}
    check_loads(checked_loads(work.spec.sink, isinstance(work.call.q_offset, torch.Tensor)), env, None, work.real)
    value = torch.as_tensor(evaluate(work.spec.sink, env, real=work.real)).to(work.real)
    return value.expand(len(heads), rows, 1).squeeze(-1).clone(memory_format=torch.contiguous_format)


def _dropout(work: Work, unit: Unit, env: dict[str, Any]) -> torch.Tensor:
    """0 or 1 / (1 - p) for each weight: [heads x rows, keys]."""
    kept = uniform(env["seed"], env["b"], env["h"], env["i"], env["j"]) >= 1.0 - work.keep_probability
    return (kept.to(work.real) / work.keep_probability).reshape(len(unit.heads) * unit.rows, -1)


def _check(work: Work, unit: Unit, chunk: Chunk, blocked: list[tuple[int, int, Blocked]], env: dict[str, Any]) -> None:
    attended = torch.ones((len(unit.heads), unit.rows, chunk.stop - chunk.start), dtype=torch.bool)
    for low, high, block in blocked:
        attended[..., low:high] = block.keep != 0
    check_loads(work.checks, env, attended, work.real)


# -- backward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Where a unit adds its shares: dk [D, Nk] and dv [Dv, Nk] of its pair, gradients of captures by name."""

    dk: torch.Tensor
    dv: torch.Tensor
    captured: dict[str, torch.Tensor]


def _differentiate(
    work: Work, unit: Unit, masks: Masks, delta: torch.Tensor, lse2: torch.Tensor, sums: _Sums
) -> torch.Tensor:
    """dq [heads x rows, D] of a unit; its shares of the other gradients are added to `sums`."""
    assert work.grad_out is not None
    q, do = work.rows(work.q, unit, work.scale * work.base), work.rows(work.grad_out, unit)
    q_t, do_t = q.t().contiguous(), do.t().contiguous()
    delta, lse2 = delta.reshape(-1, 1), lse2.reshape(-1, 1)
    tile = (len(unit.heads), unit.rows, -1)
    careful = not (work.finite and work.identity)
    multiply = product if work.finite else _reaching
    dq = torch.zeros_like(q)
    for chunk in unit.chunks:
        k, v = work.operands(unit, chunk)
        env = work.scope(unit, chunk)
        blocked = work.blocked(unit, chunk, masks)
        scaled, logits = _logits(work, unit, q, k, blocked, env)
        p = logits.sub_(lse2).exp2_()
        if careful:
            _keep(p.view(tile), blocked)
        dp = product(do, v)
        kept = p
        if work.keep_probability != 1.0:
            factor = _dropout(work, unit, env)
            kept = p * factor
            dp.mul_(factor)
        sums.dv[:, chunk.start : chunk.stop] += multiply(do_t, kept.t())
        ds = dp.sub_(delta).mul_(p)
        if careful:
            _keep(ds.view(tile), blocked)
        if not work.identity:
            scope, values = {**env, "s": scaled.view(tile)}, {}
            for name, total in sums.captured.items():
                for load, slope in work.facts.load_grads[name]:
                    share = _keep((ds.view(tile) * evaluate(slope, scope, values, work.real)), blocked)
                    _scatter(total, load, share, scope, work.real)
            ds = _keep(ds.view(tile) * evaluate(work.facts.score_ds, scope, values, work.real), blocked).reshape(ds.shape)
        dq += product(ds, k.t()) if work.finite else _reaching(k.t(), ds).t()
        sums.dk[:, chunk.start : chunk.stop] += multiply(q_t, ds.t())
    return dq.mul_(work.scale)


def _differentiate_sink(work: Work, lse: torch.Tensor, delta: torch.Tensor, gradients: dict[str, torch.Tensor]) -> None:
    """Adds d sink / d load times the sink's dS = P (0 - delta) for each load of a wanted tensor."""
    named = {name: pairs for name, pairs in work.facts.sink_grads.items() if name in gradients}
    heads = range(work.q.shape[1])
    if not named or work.q.numel() == 0:
        return
    for b in range(work.q.shape[0]):
        first, rows = work.offsets[b], work.q.shape[2]
        ds = -torch.exp(_sink(work, b, heads, first, rows) - lse[b]).unsqueeze(-1) * delta[b]  # [Hq, Nq, 1]
        scope = {**work.env, **positions(b, heads, first, rows, 0, 1)}
        for name, pairs in named.items():
            for load, slope in pairs:
                _scatter(gradients[name], load, ds * evaluate(slope, scope, real=work.real), scope, work.real)


def _scatter(total: torch.Tensor, load: Load, share: torch.Tensor, env: dict[str, Any], real: torch.dtype) -> None:
    """Add share [heads, rows, keys] to the elements of `total` that the load reads."""
    index: Any = 0
    for place, size, stride in zip(load.indices, total.shape, total.stride(), strict=True):
        index = index + torch.as_tensor(evaluate(place, env, real=real)).clamp(0, max(size - 1, 0)) * stride
    index = index.view((1,) * (3 - index.ndim) + tuple(index.shape))
    # Sum first over what the element does not depend on: a slope per head is one number, not heads x rows x keys.
    sums = [d for d in range(3) if index.shape[d] == 1 and share.shape[d] != 1]
    share = share.sum(sums, keepdim=True) if sums else share
    if total.numel():
        total.view(-1).index_add_(0, index.expand(share.shape).reshape(-1), share.reshape(-1))


def _keep(x: torch.Tensor, blocked: list[tuple[int, int, Blocked]]) -> torch.Tensor:
    """Set masked pairs of x [heads, rows, keys] to 0 in place, whatever they hold."""
    for low, high, block in blocked:
        _bits(x[..., low:high]).bitwise_and_(block.keep)
    return x


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def _reaching(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """values [m, k] @ weights [n, k].T, in which inf and nan of `values` reach only where the weight is not 0."""
    broken = ~values.isfinite()
    result = product(values.masked_fill(broken, 0).contiguous(), weights)
    reached = product(broken.to(values.dtype).contiguous(), (weights != 0).to(values.dtype)) > 0
    return result.masked_fill_(reached, math.nan)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()

"""The embedded backend: forward and backward on any CPU with PyTorch's operators, over the live key intervals only.

A query tile of all heads that share keys walks its chunks of keys. Each chunk gives a partial softmax state, and the states
are merged (`attngen.state.softmax`); ranges that the analysis calls full never see the mask.

The backward goes over the same chunks once: given lse and delta, P = exp(S - lse), dS = P (dP - delta), and the chunks'
gradients add up (Dao 2023). Memory is O(N) in both directions.

A plain score runs in `cpu_kernels`, a call per unit. Scores, dropout and inputs with inf or nan take the same steps here,
a chunk at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from attngen.analysis import Axis, Facts
from attngen.backends.cpu import rows as cpu_rows
from attngen.backends.cpu.kernels import add_products, kernels, product, rows_of, state_of, write
from attngen.backends.cpu.parallel import run_jobs, split_jobs
from attngen.backends.cpu.tiles import (
    Blocked,
    Chunks,
    Keys,
    ListedKeys,
    Masks,
    check_loads,
    checked_loads,
    positions,
    walk_env,
)
from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.expression import Load, S, evaluate, uniform
from attngen.language.lists import RowLists, TileLists
from attngen.plan.memory import empty
from attngen.plan.stream_k import stream_k
from attngen.schedule import Schedule, fit
from attngen.state import softmax as state

LOG2E = 1 / math.log(2)
ROWS, CHUNK = 128, 1024  # default tile: its logits stay in a core's second-level cache
LARGEST_MASK = 2**24  # elements of a tile's masks up to which all are held at once


def default_schedule(call: Call, facts: Facts) -> Schedule:
    """Query rows per head and keys per chunk of the forward (block_m, block_n) and the backward (dq_block_m, dq_block_n)."""
    # Closed forms cost nothing to find, so that short tiles waste least; where data decides, each tile has to be looked at.
    most = ROWS if not facts.spec.tensors else 2 * ROWS
    rows = min(max(32, most // _power_of_two(call.group)), max(32, _power_of_two(call.q.shape[2])))
    return Schedule(block_m=rows, block_n=CHUNK, dq_block_m=rows, dq_block_n=CHUNK)


def fitted(schedule: Schedule, call: Call, pins: Schedule) -> Schedule:
    """The schedule with query tiles that divide listed ones; chunks of keys are runs of them. ScheduleError for a pin."""
    if not isinstance(call.spec.lists, TileLists):
        return schedule
    chunk = max(schedule.block_n or CHUNK, schedule.dq_block_n or CHUNK)
    return fit(schedule, replace(call.spec.lists, block_n=chunk), pins)


def forward(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, see `attngen.backends`. InputError if an attended pair loads outside a captured tensor."""
    if isinstance(call.spec.lists, RowLists):
        return cpu_rows.forward(call, facts)
    work = Work(call, facts, schedule.block_m or ROWS, schedule.block_n or CHUNK)
    out, lse = _forward(work, schedule)
    return (out, lse) if work.finite else _forward(work, schedule)


def forward_storing(call: Call, facts: Facts, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward`, and the weights P [B, Hq, Nq, Nk] for `backward_stored`; where values are not finite they are empty, so that
    the backward computes them with care.
    """
    work = Work(call, facts, schedule.block_m or ROWS, schedule.block_n or CHUNK)
    weights = torch.zeros((*call.q.shape[:3], call.n_k), dtype=work.real)
    out, lse = _forward(work, Schedule(split=1), weights)
    if work.finite:
        return out, lse, weights
    return *_forward(work, Schedule(split=1)), weights.new_empty(0)


def delta(call: Call, out: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor) -> torch.Tensor:
    """rowsum(dO * O) - dlse [B, Hq, Nq], in the computing dtype."""
    real = torch.float64 if out.dtype == torch.float64 else torch.float32
    found = torch.empty(out.shape[:3], dtype=real)
    # In parts that stay in the cache: the pages of a large temporary cost more than the sums.
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            for rows in zip(*(t.split(1024) for t in (do[b, h], out[b, h], found[b, h])), strict=True):
                torch.sum(rows[0].to(real) * rows[1].to(real), -1, out=rows[2])
    return found.sub_(dlse.to(real))


def backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    lse: torch.Tensor,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """dq, dk, dv and the gradients of the wanted captures, see `attngen.backends`; sums are made in a fixed order."""
    if call.spec.page_size is not None:
        raise InputError(
            "q", "no gradient: a paged cache is for inference", "a backward through it", "use torch.no_grad()"
        )
    if isinstance(call.spec.lists, RowLists):
        return cpu_rows.backward(call, facts, lse, delta, do, wanted)
    return _backward(call, facts, schedule, lse, None, delta, do, wanted)


def backward_stored(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    weights: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    do: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """`backward` from the weights that `forward_storing` left; nothing is captured by the specs that have them."""
    return _backward(call, facts, schedule, lse, weights, delta, do, [])


def tables(call: Call, facts: Facts, schedule: Schedule, kernel: str) -> dict[str, torch.Tensor]:
    """Summaries of captured data for the walk of the forward or, "dq", of the backward."""
    queries, keys = Axis("i", call.offset_column, call.q.shape[2]), Axis("j", 0, call.n_k)
    return facts.walk_keys.prepare(walk_env(call), queries, keys, _block(schedule, kernel))


def table_tiles(call: Call, schedule: Schedule, kernel: str) -> int:
    """How many tiles those tables are of."""
    return -(-call.q.shape[2] // _block(schedule, kernel))


def _block(schedule: Schedule, kernel: str) -> int:
    return (schedule.dq_block_m if kernel == "dq" else schedule.block_m) or ROWS


def _backward(
    call: Call,
    facts: Facts,
    schedule: Schedule,
    lse: torch.Tensor,
    weights: torch.Tensor | None,
    delta: torch.Tensor,
    do: torch.Tensor,
    wanted: list[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    work = Work(call, facts, schedule.dq_block_m or ROWS, schedule.dq_block_n or CHUNK, "dq")
    work.finite = all(bool(t.sum(dtype=work.real).isfinite()) for t in (work.q, work.k, work.v, do))
    real, pairs, jobs = work.real, work.k.shape[0] * work.k.shape[1], work.jobs()
    delta = delta.to(real).unsqueeze(-1)
    lse = lse.to(real).masked_fill(lse == -math.inf, math.inf)  # a row without a key: exp(-inf - inf) is 0
    given = _Given(do, delta, (lse * LOG2E).unsqueeze(-1), weights)
    dq, dk, dv = (empty(t.shape, t.dtype) for t in (call.q, call.k, call.v))
    # Else jobs sum the same pairs' gradients, each its own tiles'.
    alone = all(own != jobs[0][0] for own, _ in jobs[1:])
    kept: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in jobs]
    scattered = [name for name in wanted if name in facts.load_grads]
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
                _differentiate(work, units, given, sums)
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
    if call.spec.sink is not None:
        _differentiate_sink(work, lse, delta, gradients)
    return dq, dk, dv, gradients


# -- what a call looks like to the loops ------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A tile of `rows` queries of the heads that share one (batch, kv head), and the keys it visits."""

    slot: int  # which of its group's (batch, kv head) pairs it has
    b: int
    head_kv: int
    heads: range
    rows: int
    first: int  # its first query's position
    start: int  # and row
    chunks: Chunks
    masks: Masks
    caps: list[torch.Tensor] | None  # the masks of all chunks, for `cpu_kernels`; None: taken chunk by chunk

    @property
    def at(self) -> tuple[int, slice, slice]:
        """Where its rows are in [B, Hq, Nq, ...]."""
        return self.b, slice(self.heads.start, self.heads.stop), slice(self.start, self.start + self.rows)

    @property
    def place(self) -> list[int]:
        """The same for `cpu_kernels`."""
        return [self.b, self.head_kv, self.heads.start, len(self.heads), self.start, self.rows, self.slot]

    @property
    def tile(self) -> tuple[int, int, int]:
        """Shape of [heads x rows, ...] with its rows apart."""
        return len(self.heads), self.rows, -1


class Work:
    """A call made ready: k and v as contiguous rows of the computing dtype, key chunks of every tile, jobs for the cores."""

    def __init__(self, call: Call, facts: Facts, block_m: int, chunk: int, kernel: str = "forward"):
        self.call, self.facts, self.spec = call, facts, call.spec
        self.real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        self.q = call.q.detach()
        # Pages are copied chunk by chunk, as they are visited.
        whole = (lambda t: t) if call.spec.page_size is not None else (lambda t: t.to(self.real).contiguous())
        self.k, self.v = (whole(t.detach()) for t in (call.k, call.v))
        captures = {n: t.detach().to(self.real) if t.is_floating_point() else t for n, t in call.captures.items()}
        self.env: dict[str, Any] = {**captures, **call.params}
        self.identity = bool(self.spec.score == S)
        self.base = LOG2E if self.identity else 1.0  # with the identity score, q's factor brings logits to base 2
        self.scale = self.spec.scale_for(call.q.shape[3])
        # inf and nan spoil a sum where they meet a weight of 0. While none has been seen, masked pairs take part in products;
        # else they are left out by hand.
        self.finite = True
        self.block_m = block_m
        self.keys: Any = (
            ListedKeys(call, self.spec.lists, block_m, chunk)
            if isinstance(self.spec.lists, TileLists)
            else Keys(call, facts, block_m, chunk, kernel)
        )
        self.by_offset = isinstance(call.q_offset, torch.Tensor)
        self.offsets: list[int] = torch.as_tensor(call.q_offset).expand(call.q.shape[0]).tolist()
        self.masks = Masks(call, self.env, self.real)
        self.checks = checked_loads(self.spec.score, self.by_offset)
        self.kept = 1.0  # probability that dropout keeps a weight
        if self.spec.dropout is not None:
            self.kept = 1.0 - float(evaluate(self.spec.dropout, self.env, real=torch.float64))

    @property
    def plain(self) -> bool:
        """Whether units run in `cpu_kernels`."""
        return self.identity and self.finite and self.kept == 1.0 and self.spec.page_size is None

    def jobs(self, finer: int = 1) -> list[tuple[range, range]]:
        """(pairs, tiles) of each job."""
        batch, heads, n_q, head_dim = self.q.shape
        tiles = -(-n_q // self.block_m)
        work = self.keys.visited * min(self.block_m, n_q) * (head_dim + self.v.shape[3]) * heads
        return split_jobs(batch * self.k.shape[1], tiles, work, finer)

    def groups(self, pairs: range) -> list[range]:
        """Pairs to compute together, tile by tile: those of a batch, where masks or chunks serve all of them; else single
        ones, whose sums stay in the cache.
        """
        if self.keys.by_head or self.masks.by_head:
            return [pairs[at : at + 1] for at in range(len(pairs))]
        edges = [at for at, pair in enumerate(pairs) if at == 0 or self._batch(pair) != self._batch(pairs[at - 1])]
        return [pairs[a:b] for a, b in pairwise([*edges, len(pairs)])]

    def _batch(self, pair: int) -> int:
        return pair // self.k.shape[1]

    def units(self, pairs: range, tiles: range) -> Iterator[list[Unit]]:
        """Tile by tile, so that what the mask gives for a tile serves all heads: lists of units with the same chunks and masks."""
        masks = self.masks if self.masks.by_distance else Masks(self.call, self.env, self.real, self.masks)
        n_q, group, heads_kv = self.q.shape[2], self.call.group, self.k.shape[1]
        each = 1 if self.keys.by_head else group
        for tile in tiles:
            start, stop = tile * self.block_m, min((tile + 1) * self.block_m, n_q)
            units: list[Unit] = []
            for slot, pair in enumerate(pairs):
                b, head_kv = divmod(pair, heads_kv)
                first = start + self.offsets[b]
                for head in range(head_kv * group, (head_kv + 1) * group, each):
                    heads = range(head, head + each)
                    shared = not (self.keys.by_head or masks.by_head) and units and units[-1].b == b
                    if units and not shared:
                        yield units
                        units = []
                    if not shared:
                        chunks = self.keys.chunks(b, head, tile)
                        caps = self._caps(masks, chunks, b, heads, first, stop - start)
                    units.append(Unit(slot, b, head_kv, heads, stop - start, first, start, chunks, masks, caps))
            if units:
                yield units

    def _caps(
        self, masks: Masks, chunks: Chunks, b: int, heads: range, first: int, rows: int
    ) -> list[torch.Tensor] | None:
        if not self.plain or (sum(chunks.high) - sum(chunks.low)) * rows > LARGEST_MASK:
            return None
        return [masks.of(chunks, x, b, heads, first, rows).cap for x in range(len(chunks.owner))]

    def operands(self, unit: Unit, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunk n's k [keys, D] and v [keys, Dv]."""
        start, stop, size = unit.chunks.start[n], unit.chunks.stop[n], self.spec.page_size
        if size is None:
            at = unit.b, unit.head_kv, slice(start, stop)
            return self.k[at], self.v[at]
        first = start // size
        # Entries that no attended key needs may hold anything.
        pages = self.env["page_table"][unit.b, first : -(-stop // size)].long().clamp(0, self.k.shape[0] - 1)
        rows = slice(start - first * size, stop - first * size)
        k, v = (t[:, unit.head_kv].index_select(0, pages).flatten(0, 1)[rows].to(self.real) for t in (self.k, self.v))
        return k, v

    def scope(self, unit: Unit, n: int) -> dict[str, Any]:
        """What expressions on chunk n's pairs read: captures, params, b, h, i, j."""
        chunks = unit.chunks
        return {**self.env, **positions(unit.b, unit.heads, unit.first, unit.rows, chunks.start[n], chunks.stop[n])}

    def blocked(self, unit: Unit, n: int) -> list[tuple[int, int, Blocked]]:
        """The masks of chunk n with their column ranges."""
        chunks = unit.chunks
        return [
            (chunks.low[x], chunks.high[x], unit.masks.of(chunks, x, unit.b, unit.heads, unit.first, unit.rows))
            for x, owner in enumerate(chunks.owner)
            if owner == n
        ]


# -- forward ----------------------------------------------------------------------------------------------------------


def _forward(work: Work, schedule: Schedule, weights: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse. If inf or nan shows up in out, `work.finite` is False afterwards and they may be wrong. P goes to
    `weights`.
    """
    outputs = work.k.shape[1] * work.q.shape[0] * -(-work.q.shape[2] // work.block_m)
    few = outputs < torch.get_num_threads() and work.keys.visited > 4 * CHUNK  # a long context, and cores without work
    if schedule.split not in (None, 1) or (schedule.split is None and few):
        return _forward_split(work, schedule.split or "stream", schedule.programs or torch.get_num_threads())
    out = empty((*work.q.shape[:3], work.v.shape[3]), work.q.dtype)
    lse = torch.empty(work.q.shape[:3], dtype=work.real)

    def job(_: int, part: tuple[range, range]) -> None:
        for units in work.units(*part):
            if not math.isfinite(_attend(work, units, lse, out, weights)):
                work.finite = False

    run_jobs(work.jobs(finer=4), job)
    return out, lse


def _forward_split(work: Work, split: int | str, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the key chunks of each unit in `split` parts, or all units' in equal runs over `programs`: partial
    states, which are merged.
    """
    out = empty((*work.q.shape[:3], work.v.shape[3]), work.q.dtype)
    lse = torch.empty(work.q.shape[:3], dtype=work.real)
    pairs, tiles = range(work.q.shape[0] * work.k.shape[1]), range(-(-work.q.shape[2] // work.block_m))
    units = [unit for same in work.units(pairs, tiles) for unit in same]
    parts = _parts([len(unit.chunks.start) for unit in units], split, programs)
    states: list[list[state.State]] = [[] for _ in units]

    def attend(_: int, part: tuple[int, range]) -> None:
        number, chunks = part
        found = _unit_state(work, units[number], chunks, None)
        if found is not None:
            states[number].append(found)

    def finish(_: int, number: int) -> None:
        total = _sink_state(work, units[number])
        for found in states[number]:
            total = found if total is None else state.merge(total, found, base_2=True)
        if not math.isfinite(_write(work, units[number], total, lse, out)):
            work.finite = False

    run_jobs(parts, attend)
    run_jobs(range(len(units)), finish)
    return out, lse


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


def _attend(
    work: Work, units: list[Unit], lse: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None = None
) -> float:
    """Writes the units' rows of lse [B, Hq, Nq], out [B, Hq, Nq, Dv] and the weights; returns a sum that is finite if they
    are.
    """
    chunks, caps = units[0].chunks, units[0].caps
    if weights is not None and caps is not None and chunks.start:
        return kernels().attend_storing(
            work.q, work.k, work.v, [unit.place for unit in units], work.scale * work.base, chunks.start, chunks.stop,
            chunks.bundle, caps, chunks.owner, chunks.low, chunks.high, lse, out, weights,
        )  # fmt: skip
    if caps is None or not chunks.start or work.spec.sink is not None:
        return sum(_attend_unit(work, unit, lse, out) for unit in units)
    return kernels().attend(
        work.q, work.k, work.v, [unit.place for unit in units], work.scale * work.base,
        chunks.start, chunks.stop, chunks.bundle, caps, chunks.owner, chunks.low, chunks.high, lse, out,
    )  # fmt: skip


def _attend_unit(work: Work, unit: Unit, lse: torch.Tensor, out: torch.Tensor) -> float:
    total = _unit_state(work, unit, range(len(unit.chunks.start)), _sink_state(work, unit))
    return _write(work, unit, total, lse, out)


def _write(work: Work, unit: Unit, total: state.State | None, lse: torch.Tensor, out: torch.Tensor) -> float:
    """Writes a unit's rows from their whole state; returns a sum that is finite if they are."""
    total = total or state.empty((len(unit.heads) * unit.rows,), work.v.shape[3], work.real)
    return write(total, lse[unit.at], out[unit.at])


def _unit_state(work: Work, unit: Unit, chunks: range, current: state.State | None) -> state.State | None:
    """The state of some of a unit's chunks, merged with `current`."""
    q = rows_of(work.q[unit.at], work.scale * work.base, work.k.new_empty((), dtype=work.real))
    for n in chunks:
        k, v = work.operands(unit, n)
        scope, blocked = work.scope(unit, n), work.blocked(unit, n)
        if work.checks:
            attended = torch.ones((len(unit.heads), unit.rows, k.shape[0]), dtype=torch.bool)
            for low, high, block in blocked:
                attended[..., low:high] = block.cap > 0
            check_loads(work.checks, scope, attended, work.real)
        _, logits = _logits(work, unit, q, k, blocked, scope)
        piece = state_of(logits, v)  # logits now holds the weights
        if work.kept != 1.0:
            logits.mul_(_dropout(work, unit, scope))
        if work.kept != 1.0 or not work.finite:
            piece = piece._replace(o=product(logits, v.t()) if work.finite else _reaching(v.t(), logits).t())
        current = piece if current is None else state.merge(current, piece, base_2=True)
    return current


def _logits(
    work: Work,
    unit: Unit,
    q: torch.Tensor,
    k: torch.Tensor,
    blocked: list[tuple[int, int, Blocked]],
    scope: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scaled logits before the score, logits after score and mask in base 2), [heads x rows, keys]; one tensor where the
    score is the identity.
    """
    scaled = logits = product(q, k)
    if not work.identity:
        tile = scaled.view(unit.tile)
        value = torch.as_tensor(evaluate(work.spec.score, {**scope, "s": tile}, real=work.real))
        logits = (value * LOG2E).expand(tile.shape).reshape(scaled.shape).contiguous()
    for low, high, block in blocked:
        # Bits, so that nan goes as well; masked_fill_ branches per element and takes ten times as long.
        columns = logits.view(unit.tile)[..., low:high]
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
    scope = {**work.env, **positions(b, heads, first, rows, 0, 1)}
    check_loads(checked_loads(work.spec.sink, work.by_offset), scope, None, work.real)
    value = torch.as_tensor(evaluate(work.spec.sink, scope, real=work.real)).to(work.real)
    return value.expand(len(heads), rows, 1).squeeze(-1).clone(memory_format=torch.contiguous_format)


def _dropout(work: Work, unit: Unit, scope: dict[str, Any]) -> torch.Tensor:
    """0 or 1 / (1 - p) for each weight: [heads x rows, keys]."""
    kept = uniform(scope["seed"], scope["b"], scope["h"], scope["i"], scope["j"]) >= 1.0 - work.kept
    return (kept.to(work.real) / work.kept).reshape(len(unit.heads) * unit.rows, -1)


# -- backward ---------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """do [B, Hq, Nq, Dv]; delta and lse (base 2) [B, Hq, Nq, 1]; P [B, Hq, Nq, Nk] where it was stored."""

    grad_out: torch.Tensor
    delta: torch.Tensor
    lse: torch.Tensor
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


def _differentiate(work: Work, units: list[Unit], given: _Given, sums: _Sums) -> None:
    """Writes the units' dq and adds their shares of the other gradients; dk comes out times `work.base`."""
    chunks, caps = units[0].chunks, units[0].caps
    if given.weights is not None:
        kernels().differentiate_stored(
            work.q, given.grad_out, work.k, work.v, [unit.place for unit in units], work.scale * work.base, work.scale,
            given.delta, given.weights, chunks.start, chunks.stop, chunks.bundle, sums.dk, sums.dv, sums.dq,
        )  # fmt: skip
        return
    if caps is None:
        for unit in units:
            _differentiate_unit(work, unit, given, sums)
        return
    kernels().differentiate(
        work.q, given.grad_out, work.k, work.v, [unit.place for unit in units], work.scale * work.base, work.scale,
        given.delta, given.lse, chunks.start, chunks.stop, chunks.bundle, caps, chunks.owner, chunks.low, chunks.high,
        sums.dk, sums.dv, sums.dq,
    )  # fmt: skip


def _differentiate_unit(work: Work, unit: Unit, given: _Given, sums: _Sums) -> None:
    factor, chunks = work.scale * work.base, unit.chunks
    at = unit.at
    q, do = rows_of(work.q[at], factor, work.k), rows_of(given.grad_out[at], 1.0, work.k)
    q_t, do_t = q.t().contiguous(), do.t().contiguous()
    delta, lse = given.delta[at].reshape(-1, 1), given.lse[at].reshape(-1, 1)
    dq = torch.zeros_like(q)
    for n, (start, stop) in enumerate(zip(chunks.start, chunks.stop, strict=True)):
        k, v = work.operands(unit, n)
        scope, blocked = work.scope(unit, n), work.blocked(unit, n)
        scaled, logits = _logits(work, unit, q, k, blocked, scope)
        p = _keep(logits.sub_(lse).exp2_(), unit, blocked)
        dp, weights = product(do, v), p
        if work.kept != 1.0:
            factors = _dropout(work, unit, scope)
            weights = p * factors
            dp.mul_(factors)
        ds = _keep(dp.sub_(delta).mul_(p), unit, blocked)
        if not work.identity:
            scope["s"] = scaled.view(unit.tile)
            values: dict[Any, Any] = {}
            for name, total in sums.captured.items():
                for load, slope in work.facts.load_grads[name]:
                    share = _times(ds, evaluate(slope, scope, values, work.real), unit, blocked)
                    _scatter(total, load, share.view(unit.tile), scope, work.real)
            ds = _times(ds, evaluate(work.facts.score_ds, scope, values, work.real), unit, blocked)
        dk, dv = sums.dk[unit.slot, :, start:stop], sums.dv[unit.slot, :, start:stop]
        if work.finite:
            add_products(ds, weights, q_t, do_t, k, dq, dk, dv)
        else:
            dv += _reaching(do_t, weights.t())
            dk += _reaching(q_t, ds.t())
            dq += _reaching(k.t(), ds).t()
    sums.dq[at] = dq.mul_(work.scale).view(unit.tile)


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


def _scatter(total: torch.Tensor, load: Load, share: torch.Tensor, scope: dict[str, Any], real: torch.dtype) -> None:
    """Add share [heads, rows, keys] to the elements of `total` that the load reads."""
    index: Any = torch.zeros((), dtype=torch.int64)
    for place, size, stride in zip(load.indices, total.shape, total.stride(), strict=True):
        index = index + torch.as_tensor(evaluate(place, scope, real=real)).clamp(0, max(size - 1, 0)) * stride
    index = index.view((1,) * (3 - index.ndim) + tuple(index.shape))
    # Sum first over what the element does not depend on: a slope per head is one number, not heads x rows x keys.
    sums = [d for d in range(3) if index.shape[d] == 1 and share.shape[d] != 1]
    share = share.sum(sums, keepdim=True) if sums else share
    if total.numel():
        total.view(-1).index_add_(0, index.expand(share.shape).reshape(-1), share.reshape(-1))


def _times(x: torch.Tensor, slope: Any, unit: Unit, blocked: list[tuple[int, int, Blocked]]) -> torch.Tensor:
    """x [heads x rows, keys] times a derivative that may be anything on masked pairs."""
    return _keep((x.view(unit.tile) * slope).view(x.shape), unit, blocked)


def _keep(x: torch.Tensor, unit: Unit, blocked: list[tuple[int, int, Blocked]]) -> torch.Tensor:
    """Set masked pairs of x [heads x rows, keys] to 0 in place, whatever they hold."""
    for low, high, block in blocked:
        _bits(x.view(unit.tile)[..., low:high]).bitwise_and_(block.keep)
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

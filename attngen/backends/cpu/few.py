"""Calls of few query rows, such as a decoding step: torch's fused attention over the live keys of all heads at once.

At so few rows an operator's price is more than its arithmetic: here a call takes one for all heads, where `forward` takes ten
for each kv head; the backward takes five products. Query heads that share keys are rows of one product.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import torch

from attngen.analysis import Facts
from attngen.backends.cpu.loads import check_loads, checked_loads
from attngen.backends.cpu.parallel import SMALL
from attngen.backends.cpu.scopes import environment, offsets_of, real_of, sinks_of
from attngen.backends.cpu.tiles import Keys, joined
from attngen.backends.cpu.weights import shows_in_weights
from attngen.language.call import Call
from attngen.language.expression import B, S
from attngen.language.programs import evaluate
from attngen.schedule import Schedule

# Query rows that share keys, and multiply-adds of their product, up to which this is faster than tiles.
ROWS, WORK = 64, 2**21

Result = tuple[torch.Tensor, torch.Tensor]


def suits(call: Call, facts: Facts, schedule: Schedule) -> bool:
    """Whether `attend` may be asked."""
    batch, _, n_q, head_dim = call.q.shape
    rows = n_q * call.group
    if not 0 < rows <= ROWS or rows * call.n_k * head_dim > WORK or batch == 0:
        return False
    if call.v.shape[3] != head_dim or schedule.split not in (None, 1) or not _adds_to_logits(facts):
        return False
    if not _has_fused():
        return False
    cores, pairs = torch.get_num_threads(), batch * call.k.shape[1]
    return pairs >= cores or 2 * pairs * rows * call.n_k * head_dim < SMALL  # else keys are shared out among the cores


@lru_cache(maxsize=256)
def _adds_to_logits(facts: Facts) -> bool:
    """Whether logits are q.k and what does not depend on it."""
    spec = facts.spec
    plain = spec.lists is None and spec.page_size is None and spec.dropout is None
    return plain and (bool(spec.score == S) or facts.form == "additive")


@lru_cache(maxsize=256)
def _differs_by_batch(facts: Facts) -> bool:
    return B in facts.spec.mask.free_symbols | facts.spec.score.free_symbols


def attend(call: Call, facts: Facts) -> Result | None:
    """out and lse, see `attngen.backends`; None where values are not finite, rows see no key or heads see different ones."""
    n_q, head_dim = call.q.shape[2:]
    keys = Keys(call, facts, n_q, call.n_k)
    if keys.by_head:
        return None
    real, batch, group, env = real_of(call), call.q.shape[0], call.group, environment(call, real_of(call))
    # Every view costs as much as the arithmetic on a few keys: only what changes something is done.
    q = call.q if call.q.dtype == real else call.q.to(real)
    q = q if group == 1 else q.reshape(batch, call.k.shape[1], group * n_q, head_dim)
    scale, offsets, found = call.scale, offsets_of(call), []
    apart = keys.by_batch or _differs_by_batch(facts)
    for b in range(batch) if apart else (0,):
        runs = sorted(keys.runs(b, 0, 0))
        if not runs:
            return None
        own = (x.narrow(0, b, 1) if apart else x for x in (q, call.k, call.v))
        q_rows, k, v = next(own), _rows(next(own), runs, real), _rows(next(own), runs, real)
        added = _added(call, facts, env, b, offsets[b], runs, real)
        found.append(_FUSED(q_rows, k, v, attn_mask=added, scale=scale))
    out, lse = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    # The fused operator gives lse 0 to rows without a key.
    if not math.isfinite(out.sum().item()) or not lse.all().item():
        return None
    if group * n_q > 1:
        out, lse = out.reshape(call.q.shape).contiguous(), lse.reshape(call.q.shape[:3]).contiguous()
    if call.spec.sink is not None:
        if shows_in_weights(lse):
            return None
        total = torch.logaddexp(lse, sinks_of(call, env, offsets, real))
        out, lse = out * torch.exp(lse - total).unsqueeze(-1), total
    return out if call.q.dtype == real else out.to(call.q.dtype), lse


def differentiate(
    call: Call, facts: Facts, lse: torch.Tensor, delta: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """dq, dk, dv; None where `attend` would give None, or where P needs more than lse (see `weights`)."""
    keys = Keys(call, facts, call.q.shape[2], call.n_k)
    if keys.by_head or not lse.isfinite().all().item() or shows_in_weights(lse):
        return None
    real, batch, env, scale = real_of(call), call.q.shape[0], environment(call, real_of(call)), call.scale
    folded = batch, call.k.shape[1], call.group * call.q.shape[2]
    q, do = (x.to(real).reshape(*folded, -1) for x in (call.q, do))
    lse, delta, q = lse.reshape(*folded, 1), delta.reshape(*folded, 1), q * scale
    found, offsets, apart = [], offsets_of(call), keys.by_batch or _differs_by_batch(facts)
    for b in range(batch) if apart else (0,):
        runs = sorted(keys.runs(b, 0, 0))
        if not runs:
            return None
        at = slice(b, b + 1) if apart else slice(None)
        k, v = _rows(call.k[at], runs, real), _rows(call.v[at], runs, real)
        logits = q[at] @ k.mT
        added = _added(call, facts, env, b, offsets[b], runs, real)
        logits = logits if added is None else logits.add_(added)
        p = logits.sub_(lse[at]).exp_()
        ds = (do[at] @ v.mT).sub_(delta[at]).mul_(p)
        dk, dv = (_spread(rows, runs, call.n_k) for rows in (ds.mT @ q[at], p.mT @ do[at]))
        found.append(((ds @ k).mul_(scale), dk, dv))
    dq, dk, dv = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    if not math.isfinite((dq.sum() + dk.sum() + dv.sum()).item()):
        return None
    return dq.reshape(call.q.shape).to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype)


def _rows(x: torch.Tensor, runs: list[tuple[int, int, bool]], real: torch.dtype) -> torch.Tensor:
    """x [B, H, N, D] of the runs of keys, in the computing dtype."""
    if len(runs) == 1:
        start, stop, _ = runs[0]
        rows = x if stop - start == x.shape[2] else x.narrow(2, start, stop - start)
    else:
        rows = torch.cat([x.narrow(2, start, stop - start) for start, stop in joined(runs)], 2)
    rows = rows if rows.dtype == real else rows.to(real)
    return rows if rows.stride(3) == 1 else rows.contiguous()


def _spread(rows: torch.Tensor, runs: list[tuple[int, int, bool]], length: int) -> torch.Tensor:
    """The reverse: [B, H, N, D], 0 outside the runs."""
    if rows.shape[2] == length:
        return rows
    edges = joined(runs)
    total = rows.new_zeros((*rows.shape[:2], length, rows.shape[3]))
    for (start, stop), part in zip(edges, rows.split([stop - start for start, stop in edges], 2), strict=True):
        total[:, :, start:stop] = part
    return total


def _added(
    call: Call,
    facts: Facts,
    env: dict[str, Any],
    b: int,
    offset: int,
    runs: list[tuple[int, int, bool]],
    real: torch.dtype,
) -> torch.Tensor | None:
    """What the score adds to the logits of the live keys, and -inf where the mask says so: [1, Hkv or 1, rows, keys]; None for
    nothing. InputError if an attended pair loads outside a captured tensor.
    """
    spec, rows = call.spec, call.q.shape[2]
    scored = spec.score != S
    if not scored and not any(partial for _, _, partial in runs):
        return None
    heads = torch.arange(call.q.shape[1]).view(-1, 1, 1)
    scope = {**env, "b": b, "h": heads, "i": torch.arange(offset, offset + rows).view(-1, 1), "q_offset": offset}
    columns = []
    for start, stop, partial in runs:
        scope["j"] = torch.arange(start, stop)
        allowed = torch.as_tensor(evaluate(spec.mask, scope, real=real)) if partial else torch.tensor(True)
        value: Any = 0.0
        if scored:
            check_loads(checked_loads(spec.score, isinstance(call.q_offset, torch.Tensor)), scope, allowed, real)
            value = evaluate(spec.score, {**scope, "s": torch.zeros((), dtype=real)}, real=real)
        value = torch.where(allowed, torch.as_tensor(value, dtype=real), -math.inf)
        columns.append(value.expand(value.shape[0] if value.dim() == 3 else 1, rows, stop - start))
    most = max(x.shape[0] for x in columns)
    added = torch.cat([x.expand(most, -1, -1) for x in columns], -1) if len(columns) > 1 else columns[0]
    if most == 1:
        return added.expand(call.group, -1, -1).reshape(1, 1, rows * call.group, -1)
    return added.reshape(1, call.k.shape[1], rows * call.group, -1)


_FUSED: Any = getattr(getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None), "default", None)


@cache
def _has_fused() -> bool:
    """Whether this torch has the operator, and it does what is wanted of it here."""
    try:
        q, k = torch.zeros(1, 1, 2, 8), torch.ones(1, 1, 3, 8)
        added = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf] * 3])
        out, lse = _FUSED(q, k, k, attn_mask=added.view(1, 1, 2, 3), scale=1.0)
        seen = torch.allclose(out[0, 0, 0], k[0, 0, 0]) and torch.allclose(lse[0, 0, 0], torch.tensor(2.0).log())
        return bool(seen and not lse[0, 0, 1])
    except (AttributeError, RuntimeError, TypeError):
        return False

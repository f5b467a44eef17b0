"""Dense attention, straight from the definition. Slow, O(Nq * Nk) memory, any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from attngen.language.call import Call, bind
from attngen.language.expression import Load, S
from attngen.language.listed_pairs import as_log_weight, without_pages
from attngen.language.programs import evaluate, tensor_of, uniform
from attngen.language.spec import Spec


def plain(
    spec: Spec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int | torch.Tensor = 0,
    **captures: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of a spec without a key set by ordinary PyTorch operations in q's own dtype: the yardstick for the error of
    half types.
    """
    return written_out(bind(spec, q, k, v, q_offset=q_offset, captures=captures), q.dtype)


def written_out(call: Call, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense`, with lists as weights of all pairs and pages as rows."""
    if call.spec.page_size is None and call.spec.lists is None:
        return dense(call, dtype)
    log_weight = as_log_weight(call)
    return dense(without_pages(call), dtype, None if log_weight is None else log_weight.to(dtype))


def dense(
    call: Call, dtype: torch.dtype, log_weight: torch.Tensor | None = None, gain: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, computed in `dtype`: out [B, Hq, Nq, Dv], lse [B, Hq, Nq].

    Of a key set: `log_weight` is added to the logits (-inf: not attended) and `gain` multiplies keys and values, both
    broadcasting to [B, Hq, Nq, Nk].
    """
    spec, env = call.spec, dense_env(call, dtype)
    keys, values = (t.to(dtype).repeat_interleave(call.group, 1) for t in (call.k, call.v))
    logits = (call.q.to(dtype) @ keys.mT) * call.scale
    if gain is not None:
        logits = logits * gain
    mask = torch.broadcast_to(tensor_of(evaluate(spec.mask, env, real=dtype), call.q.device), logits.shape)
    if log_weight is not None:
        mask = mask & ~log_weight.isneginf()
    if spec.score != S:
        # Of attended pairs only: elsewhere a score may be undefined, and nan would come back through its derivative.
        pairs = mask.nonzero(as_tuple=True)
        axes = ("b", "h", "i", "j", "q_offset")
        places = {axis: torch.broadcast_to(env[axis], logits.shape)[pairs] for axis in axes}
        scores = _value(spec.score, {**env, **places, "s": logits[pairs]}, dtype, call)
        logits = torch.zeros_like(logits).index_put(pairs, scores.expand(pairs[0].shape))
    if log_weight is not None:
        logits = logits + torch.where(log_weight.isneginf(), 0.0, log_weight)
    logits = torch.where(mask, logits, -torch.inf)
    columns = [logits]
    if spec.sink is not None:  # one more key, whose value is 0
        columns.append(torch.broadcast_to(_value(spec.sink, env, dtype, call), (*logits.shape[:-1], 1)))
    table = torch.cat(columns, -1)
    empty = ~table.isfinite().any(-1, keepdim=True) & ~table.isnan().any(-1, keepdim=True)
    table = torch.where(empty, 0.0, table)  # rows that see no key: any finite numbers, replaced at the end
    if table.shape[-1] == 0:
        return values.new_zeros((*logits.shape[:-1], values.shape[-1])), logits.new_full(logits.shape[:-1], -torch.inf)
    lse = torch.where(empty.squeeze(-1), -torch.inf, logsumexp(table, -1))
    weights = torch.where(empty, 0.0, torch.softmax(table, -1))[..., : logits.shape[-1]]
    if spec.dropout is not None:
        probability = float(evaluate(spec.dropout, env, real=dtype))
        draws = uniform(env["seed"], env["b"], env["h"], env["i"], env["j"])
        weights = torch.where(draws >= probability, weights / (1 - probability), 0.0)
    if gain is not None:
        weights = weights * gain
    broken = ~values.isfinite()
    if not broken.any():
        return weights @ values, lse
    # A pair that is masked out contributes nothing, whatever the value holds: 0 * inf must not become nan.
    reached = (mask & (weights != 0)).to(dtype) @ broken.to(dtype) > 0
    return torch.where(reached, torch.nan, weights @ torch.where(broken, 0.0, values)), lse


def logsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    """torch.logsumexp with a gradient that sums to 1 however large x is: torch takes exp(x - result), whose last digit may be
    more than the log of the sum.
    """
    top = x.detach().amax(dim, keepdim=True)
    shift = torch.where(top.isfinite(), top, 0.0)
    return torch.logsumexp(x - shift, dim) + shift.squeeze(dim)


def _value(expr: Any, env: dict[str, Any], dtype: torch.dtype, call: Call) -> torch.Tensor:
    return tensor_of(evaluate(expr, env, real=dtype), call.q.device).to(dtype)


def dense_env(call: Call, dtype: torch.dtype, read: Iterable[Any] | None = None) -> dict[str, Any]:
    """Positions, params and captures of a call as `dtype` / int64 tensors that broadcast over [B, Hq, Nq, Nk]. `read`: of the
    captures only those that these expressions read.
    """
    device = call.q.device
    batch, heads, n_q = call.q.shape[:3]
    offset = tensor_of(call.q_offset, device).reshape(-1, 1, 1, 1)
    env: dict[str, Any] = {
        "b": torch.arange(batch, device=device).view(-1, 1, 1, 1),
        "h": torch.arange(heads, device=device).view(1, -1, 1, 1),
        "i": torch.arange(n_q, device=device).view(1, 1, -1, 1) + offset,
        "j": torch.arange(call.k.shape[2], device=device).view(1, 1, 1, -1),
        "q_offset": offset,
        **call.params,
    }
    names = call.captures if read is None else {load.name for expr in read for load in expr.atoms(Load)}
    for name in names:
        tensor = call.captures[name]
        kind = dtype if tensor.is_floating_point() else tensor.dtype if tensor.dtype == torch.bool else torch.int64
        env[name] = tensor.to(kind)  # sums of narrow integers would wrap
    return env

"""The oracle: what any spec means, dense and in float64. Slow, O(Nq * Nk) memory, any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attngen.language.call import Call, bind, for_all_batches
from attngen.language.programs import evaluate, tensor_of
from attngen.language.spec import Spec
from attngen.plan.forward import split
from attngen.reference.dense import dense, dense_env, logsumexp, written_out
from attngen.reference.edges import COPIED
from attngen.reference.keysets import DEFINITIONS


def oracle(
    spec: Spec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int | torch.Tensor = 0,
    **captures: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense float64 attention; differentiable by autograd in q, k, v and float captures.

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv] of any dtype. Returns out [B, Hq, Nq, Dv] and lse [B, Hq, Nq],
    both float64; a row that sees no key has out 0 and lse -inf. Raises InputError for arguments that do not fit the spec.
    """
    if isinstance(captures.get("seed"), torch.Tensor):
        spec = spec.with_seed_on_device
    k, v = for_all_batches(spec, q, k, v)
    if spec.keys is None:
        return written_out(bind(spec, q, k, v, q_offset=q_offset, captures=captures), torch.float64)
    call, given = split(spec, q, k, v, q_offset, captures)
    if spec.keys.name == "union":
        return _union(call, given)
    if spec.keys.name in COPIED:
        call = COPIED[spec.keys.name](spec.keys, call, given)
    with q.device:  # the definitions make tensors of their own
        log_weight, gain = DEFINITIONS[spec.keys.name](spec.keys, call, given)
    return dense(call, torch.float64, log_weight, gain)


def _union(call: Call, given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over all pieces' logits together, from each piece's own."""
    keys = call.spec.keys
    results = []
    for spec in keys.specs:  # type: ignore[union-attr]
        names = {*spec.tensors, *spec.call_params, *(() if spec.keys is None else spec.keys.captures())}
        both = {n: value for n, value in {**call.captures, **call.params, **given}.items() if n in names}
        results.append(oracle(spec, call.q, call.k, call.v, q_offset=call.q_offset, **both))
    if call.spec.sink is not None:
        env = dense_env(call, torch.float64)
        sink = tensor_of(evaluate(call.spec.sink, env, real=torch.float64), call.q.device).double()
        sink = sink.expand(*call.q.shape[:3], 1).squeeze(-1)
        results.append((torch.zeros_like(results[0][0]), sink))
    lses = torch.stack([lse for _, lse in results])
    none = lses.isneginf().all(0)
    finite = torch.where(none, 0.0, lses)
    lse = torch.where(none, -torch.inf, logsumexp(finite, 0))
    weights = torch.where(lses.isneginf(), 0.0, torch.softmax(finite, 0))
    out = sum(weight.unsqueeze(-1) * piece for weight, (piece, _) in zip(weights, results, strict=True))
    return out, lse  # type: ignore[return-value]

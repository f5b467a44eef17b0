"""The key sets' definitions, dense and in float64: log-weights per pair, built row by row from what each set means, with
nothing of the fast path. For tests and small inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call, bind
from attngen.language.programs import evaluate, tensor_of
from attngen.language.spec import Spec
from attngen.plan.forward import split
from attngen.plan.keysets.hyper import Draws, layout_of
from attngen.reference.dense import dense_env
from attngen.reference.edges import DEFINITIONS as OF_EDGES
from attngen.reference.tiles import DEFINITIONS as OF_TILES

Weights = tuple[torch.Tensor, torch.Tensor | None]  # log-weight and gain, broadcasting to [B, Hq, Nq, Nk]


def attended(
    spec: Spec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: Any, captures: Mapping[str, Any]
) -> torch.Tensor:
    """Which pairs a spec attends: bool [B, Hq, Nq, Nk]."""
    if spec.keys is None:
        call, given = bind(spec, q, k, v, q_offset=q_offset, captures=captures), dict[str, Any]()
    else:
        call, given = split(spec, q, k, v, q_offset, captures)
    mask = tensor_of(evaluate(spec.mask, dense_env(call, torch.float64), real=torch.float64), q.device)
    if spec.keys is not None:
        with q.device:
            mask = mask & ~DEFINITIONS[spec.keys.name](spec.keys, call, given)[0].isneginf()
    return mask.expand(*q.shape[:3], k.shape[2])


def _log(weights: torch.Tensor) -> torch.Tensor:
    return torch.where(weights > 0, torch.log(torch.where(weights > 0, weights, 1.0)), -torch.inf)


def _need(given: Mapping[str, Any], name: str) -> Any:
    if given.get(name) is None:
        raise InputError(name, "a value", "nothing", f"pass {name}=... at the call")
    return given[name]


def _heads(x: torch.Tensor, call: Call) -> torch.Tensor:
    return x.repeat_interleave(call.q.shape[1] // x.shape[1], 1)


def _qk_sparse(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """Both the query and the key are kept."""
    keep_q, keep_k = _need(given, "keep_q"), _heads(_need(given, "keep_k"), call)
    return _log((keep_q.unsqueeze(-1) & keep_k.unsqueeze(-2)).double()), None


def _hash_sparse(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """The query's bucket is the key's."""
    q_bucket, k_bucket = _need(given, "q_bucket"), _heads(_need(given, "k_bucket"), call)
    return _log((q_bucket.unsqueeze(-1) == k_bucket.unsqueeze(-2)).double()), None


def _codebook(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """A key weighs as many tokens as it stands for."""
    return _log(_heads(_need(given, "count"), call).double()).unsqueeze(-2), None


def _gather(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """A key weighs the sum of exp(log_weight) over the places of the list that name it."""
    index = _heads(_need(given, "index"), call).long()
    log_weight = given.get("log_weight")
    each = (
        torch.ones(index.shape, dtype=torch.float64) if log_weight is None else _heads(log_weight, call).double().exp()
    )
    each = torch.where(index >= 0, each, 0.0)
    total = torch.zeros((*call.q.shape[:2], call.k.shape[2]), dtype=torch.float64)
    if index.dim() == 4:
        total = total.unsqueeze(2).repeat(1, 1, index.shape[2], 1)
    total = total.scatter_add(-1, index.clamp(min=0), each)
    return _log(total if index.dim() == 4 else total.unsqueeze(-2)), None


# -- HyperAttention ---------------------------------------------------------------------------------------------------


def _hyper(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """1 inside a block, (times drawn) * (keys outside) / (draws outside) elsewhere; the random numbers are the call's."""
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    weights = torch.zeros((*call.q.shape[:2], n_q, n_k), dtype=torch.float64)
    layout = layout_of(keys, call.spec, n_q, n_k)
    if layout is None or 0 in weights.shape:
        return torch.zeros(weights.shape, dtype=torch.float64), None
    draws = Draws(call, _need(given, "seed"))
    q_bucket, k_bucket = _gray_places(call.q, draws.projections), _heads(_gray_places(call.k, draws.projections), call)
    drawn = []
    for pairs in layout.pairs:
        sampled = keys.samples > 0 and pairs.k_size > pairs.k_block
        drawn.append(draws.samples(pairs, keys.samples) if sampled else None)

    def pair(b: int, h: int, queries: range, rows: range, blocks: tuple[int, int], samples: Any) -> None:
        q_place = {r: p for p, r in enumerate(sorted(queries, key=lambda r: (int(q_bucket[b, h, r]), r)))}
        k_order = sorted(rows, key=lambda r: (int(k_bucket[b, h, r]), r))
        k_place = {r: p for p, r in enumerate(k_order)}
        for row in queries:
            block = q_place[row] // blocks[0]
            own = [r for r in rows if k_place[r] // blocks[1] == block]
            weights[b, h, row, own] = 1.0
            if samples is None:
                continue
            outside = [k_order[int(p)] for p in samples if int(p) // blocks[1] != block]
            for r in outside:
                weights[b, h, row, r] += (len(rows) - len(own)) / len(outside)

    def part(b: int, h: int, start: int, level: int) -> None:
        size = layout.leaf << level
        if level == 0:
            weights[b, h, start : start + size, start : start + size] = 1.0
            return
        half = size // 2
        part(b, h, start, level - 1)
        part(b, h, start + half, level - 1)
        queries = range(start + half, min(start + size, n_q))
        if queries:
            own = drawn[level - 1]
            samples = None if own is None else own[b, h, start // size]
            pair(b, h, queries, range(start, start + half), (keys.block, keys.block), samples)

    for b in range(weights.shape[0]):
        for h in range(weights.shape[1]):
            if layout.levels:
                part(b, h, 0, layout.levels)
            else:
                blocks = (-(-n_q * keys.block // n_k), keys.block)
                pair(b, h, range(n_q), range(n_k), blocks, None if drawn[0] is None else drawn[0][b, h, 0])
    return _log(weights), None


def _gray_places(x: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
    """The place of each row's code in the Gray sequence, read off a table of it."""
    codes = [place ^ (place >> 1) for place in range(1 << projections.shape[1])]
    places = torch.empty(len(codes), dtype=torch.int64)
    places[torch.tensor(codes)] = torch.arange(len(codes))
    bits = (x.detach().float() @ projections) > 0
    return places[sum(bits[..., bit].long() << bit for bit in range(bits.shape[-1]))]


# -- SPARSEK ----------------------------------------------------------------------------------------------------------


def _sparse_k(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """Outside of the window: p = clip(u - tau, 0, 1) with sum p = k over all keys (or those up to the query), attended where
    p > 0, with keys and values times p. Inside: as they are.
    """
    u = _heads(_need(given, "u"), call).double()
    n_q, n_k = call.q.shape[2], call.k.shape[2]
    position = torch.arange(n_q).view(1, 1, -1) + call.offset_column
    distance = position.unsqueeze(-1) - torch.arange(n_k)
    seen = distance >= 0 if keys.incremental else torch.ones_like(distance, dtype=torch.bool)
    seen = seen.expand(*u.shape[:2], -1, -1)
    p = _clipped(u.unsqueeze(-2).expand(seen.shape), seen, keys.k)
    chosen = seen & (p > 0)
    if keys.window is not None:
        near = (distance.abs() < keys.window).expand(seen.shape) & seen
        p, chosen = torch.where(near, 1.0, p), chosen | near
    return torch.where(chosen, 0.0, -torch.inf).double(), p


def _clipped(u: torch.Tensor, seen: torch.Tensor, k: int) -> torch.Tensor:
    """clip(u - tau, 0, 1) that sums to k over the seen keys (all ones if there are no more than k), tau by bisection."""
    if 0 in seen.shape:
        return seen.double()
    seen = seen & ~u.isneginf()
    values = torch.where(seen, u.detach(), -torch.inf)
    high = values.amax(-1, keepdim=True)
    low = torch.where(seen, u.detach(), torch.inf).amin(-1, keepdim=True) - 1
    for _ in range(200):
        tau = (low + high) / 2
        enough = (values - tau).clamp(0, 1).sum(-1, keepdim=True) >= k
        low, high = torch.where(enough, tau, low), torch.where(enough, high, tau)
    few = seen.sum(-1, keepdim=True) <= k
    ones = seen & (values - low >= 1 - 1e-12)
    part = seen & (values - low > 1e-12) & ~ones
    size = part.sum(-1, keepdim=True)
    total = torch.where(part, u, 0.0).sum(-1, keepdim=True)
    tau = (total - (k - ones.sum(-1, keepdim=True))) / size.clamp(min=1)
    p = torch.where(ones, 1.0, torch.where(part, u - tau, 0.0))
    return torch.where(few, seen.double(), p)


DEFINITIONS: dict[str, Callable[[Any, Call, Mapping[str, Any]], Weights]] = {
    "qk_sparse": _qk_sparse,
    "hash_sparse": _hash_sparse,
    "codebook": _codebook,
    "gather": _gather,
    "hyper": _hyper,
    "sparse_k": _sparse_k,
    **OF_TILES,
    **OF_EDGES,
}

"""SPARSEK attention (arXiv 2406.16747): each head attends the k keys (softly) that its own scores u choose.

p = clip(u - tau, 0, 1) with tau such that sum p = k: the Euclidean projection of u onto {p: 0 <= p <= 1, sum p = k}. Keys
with p > 0 are attended, with key and value times p; u gets a gradient through p.

The incremental form has a p for every query, over the keys up to it. tau only rises with the query, so that a key once
dropped stays dropped: a chunk of queries needs the keys that were alive at its start, and its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from attngen.errors import InputError
from attngen.language.call import MAX_HEAD_DIM, Call
from attngen.language.checks import check_tensor, checked, require
from attngen.language.keysets.listed import SparseK
from attngen.plan.keysets.permuted import KEPT, attend_kept, kept_first, to_query_heads
from attngen.plan.moves import Parts, Rows, flat_rows
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result

CHUNK = 128  # queries that share a list of keys in the incremental form
STEP = 8  # chunks whose lists are found at once
LARGEST = 2**20  # entries for which thresholds are found at once, per (batch, head) at least one chunk's
CHUNKED = ("k_position", "start", "batch", "length")  # what the mask of a chunk reads of its list


def plan_sparse_k(keys: SparseK, planner: Planner) -> Result:
    """The chosen keys, and with a window those near the query, merged."""
    if 0 in (planner.sizes.n_q, planner.sizes.n_k):
        return _window(keys, planner)
    chosen = _plan_incremental(keys, planner) if keys.incremental else _plan_chosen(keys, planner)
    return chosen if keys.window is None else planner.merge(_window(keys, planner), chosen)


def _window(keys: SparseK, planner: Planner) -> Result:
    """The window's piece; nothing without one."""

    def build() -> dict[str, Any]:
        from attngen.language.expression import absolute
        from attngen.language.moved import i, j

        near = absolute(i - j) < (keys.window or 0)
        mask = planner.mask & near & (j <= i) if keys.incremental else planner.mask & near
        return {"mask": mask, "score": planner.score}

    return planner.attend("window", "window", build, "q", "k", "v", offset=True)


def _scores(call: Call, u: Any) -> torch.Tensor:
    u = check_tensor("u", u, "float", tuple(call.k.shape[:3]), "[B, Hkv, Nk]", call.q.device)
    return u if u.dtype == torch.float64 else u.float()


def _checked_scores(call: Call, given: Mapping[str, Any]) -> torch.Tensor:
    u = _scores(call, given.get("u"))
    if checked() and u.numel():
        require("u", u < torch.inf, "scores that are finite, or -inf for keys that are not there", u.detach())
    return u.detach()


# -- one choice for all queries ---------------------------------------------------------------------------------------


def _plan_chosen(keys: SparseK, planner: Planner) -> Result:
    found = planner.prepare("choose keys", partial(_choose, keys.k), ("u",), ("k_rows", *KEPT))
    k = planner.take("chosen keys", "k", Rows(), found["k_rows"])
    v = planner.take("chosen values", "v", Rows(), found["k_rows"])
    k, v = planner.derive("times p", partial(_scaled, keys.k), (k, v, "u", found["k_rows"]), ("keys p", "values p"))
    return attend_kept(planner, found, "q", k, v, keys.window)


def _choose(k: int, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with p > 0 first, in order."""
    u = _checked_scores(call, given)
    rows, position, count = kept_first(weights(u, k) > 0, call.waits)
    queries = torch.arange(call.q.shape[2], device=u.device) + call.offset_column
    heads = call.q.shape[:2]
    return {
        "k_rows": flat_rows(rows, call.k.shape[2]),
        "k_position": to_query_heads(position, call).to(torch.int32),
        "k_count": to_query_heads(count, call),
        "q_position": queries.expand(*heads, -1).to(torch.int32),
        "q_count": torch.full(heads, call.q.shape[2], dtype=torch.int32, device=u.device),
    }


def _scaled(
    size: int, call: Call, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The chosen keys and values times their p."""
    p = weights(_scores(call, u), size).reshape(-1)[rows].unsqueeze(-1)
    return (k * p).to(k.dtype), (v * p).to(v.dtype)


# -- a choice for every query -----------------------------------------------------------------------------------------


def _plan_incremental(keys: SparseK, planner: Planner) -> Result:
    """Chunks of queries as batches, on their own lists of keys. p depends on the pair, and values times p are no attention:
    where p is u - tau the values u * v and v are summed apart, as out = sum P u v - tau sum P v, with u and tau less a
    reference near them, so that only what tau changes within a chunk cancels.
    """
    sizes = planner.sizes
    chunks = -(-sizes.n_q // CHUNK)
    lists = ("index", "rows", *CHUNKED)
    found = planner.prepare("list alive keys", partial(_list_alive, keys), ("u",), lists)
    thresholds = ("u of pairs", "tau", "tau + 1", "tau over reference", "factors")
    derived = planner.derive(
        "thresholds", partial(_thresholds, keys.k), ("u", found["index"], found["rows"]), thresholds
    )
    u, tau, whole, above, factors = derived
    q = planner.take("query chunks", "q", Parts(chunks, CHUNK))
    k = planner.take("alive keys", "k", Rows(unique=False), found["rows"])
    v = planner.take("alive values", "v", Rows(unique=False), found["rows"])
    names = {"u": u, "tau": tau, "tau_whole": whole, **{name: found[name] for name in CHUNKED}}

    def build(full: bool) -> dict[str, Any]:
        from attngen.language.moved import b, h, i, j, moved, s

        u_, tau_, whole_ = (planner.tensor(name, 3, None) for name in ("u", "tau", "tau_whole"))
        position, start, length_ = (
            planner.tensor(name, d) for name, d in (("k_position", 3), ("start", 1), ("length", 1))
        )
        places = {"b": planner.tensor("batch", 1)[b], "i": i + start[b], "j": position[b, h, j]}
        distance = places["i"] - places["j"]
        p = u_[b, h, j] - tau_[b, h, i]
        mask = moved(planner.mask, **places) & (distance >= (keys.window or 0)) & (places["j"] < length_[b])
        score = moved(planner.score, **places)
        if not full:
            score = type(score)(score.sym.xreplace({s.sym: s.sym * p.sym}), {**score.declared, **p.declared})
        above_, below = u_[b, h, j] >= whole_[b, h, i], u_[b, h, j] < whole_[b, h, i]
        return {"mask": mask & (above_ if full else (p > 0) & below), "score": score}

    whole_part = planner.attend("p = 1", "p = 1", partial(build, True), q, k, v, names)
    (weighed,) = planner.derive("values p", _weighed, (v, factors), ("values u",))
    if 2 * sizes.head_dim_v <= MAX_HEAD_DIM:
        (both,) = planner.derive("both values", _beside, (weighed, v), ("values u, values",))
        part = planner.attend("p < 1", "p < 1", partial(build, False), q, k, both, names)
        firsts: tuple[str, ...] = (part.out,)
        lse = part.lse
    else:
        first = planner.attend("p < 1, u", "p < 1", partial(build, False), q, k, weighed, names)
        second = planner.attend("p < 1", "p < 1", partial(build, False), q, k, v, names)
        firsts, lse = (first.out, second.out), first.lse
    part = planner.difference("p v", firsts, lse, above)
    merged = planner.merge(whole_part, part, name="merge chunks")
    return planner.put("in place", merged, Parts(chunks, CHUNK), None, sizes.shapes["q"])


def _list_alive(keys: SparseK, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of each chunk of queries the keys that were alive at its start and its own, and where chunks lie."""
    u, (batch, heads, n, _) = _checked_scores(call, given), call.k.shape
    if call.q.shape[2] != n or isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0:
        got = f"{call.q.shape[2]} queries, {n} keys, q_offset {call.q_offset}"
        raise InputError("q", "as many queries as keys and no q_offset, for incremental=True", got)
    past = survivors(u, keys.k, CHUNK, keys.capacity)
    own = _own(n, u.device)
    chunks = own.shape[0]
    index = torch.cat([past, own.expand(batch, heads, -1, -1)], -1)  # [B, Hkv, chunks, past + CHUNK]
    # What is not there comes last, in tiles that nobody visits.
    index = torch.where((index >= 0) & (index < n), index, n).sort(-1).values
    rows = flat_rows(index.clamp(max=n - 1), n)
    word: dict[str, Any] = {"dtype": torch.int32, "device": u.device}
    return {
        "index": index,
        "rows": rows.transpose(1, 2).flatten(0, 1),
        "k_position": _folded(index, call).to(torch.int32),
        "start": own[:, 0].to(torch.int32).repeat(batch),
        "batch": torch.arange(batch, **word).repeat_interleave(chunks),
        "length": torch.full((batch * chunks,), n, **word),
    }


def _own(n: int, device: torch.device) -> torch.Tensor:
    """The positions of each chunk's queries, [chunks, CHUNK]."""
    chunks = -(-n // CHUNK)
    return torch.arange(chunks * CHUNK, device=device).view(chunks, CHUNK)


def _folded(x: torch.Tensor, call: Call) -> torch.Tensor:
    """[B, Hkv, chunks, ...] -> [B * chunks, Hq, ...]."""
    return to_query_heads(x, call).transpose(1, 2).flatten(0, 1)


def _thresholds(k: int, call: Call, u: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> tuple[Any, ...]:
    """Scores of the listed keys, tau of every query, tau + 1, tau less a reference near it, and scores less the same."""
    u, n = _scores(call, u), call.k.shape[2]
    own = _own(n, u.device)
    scores = u.gather(-1, index.clamp(max=n - 1).flatten(2)).view(index.shape)
    tau = _Thresholds.apply(scores, index, own, k)  # [B, Hkv, chunks, CHUNK]
    reference, lowest = _reference(tau, own < n)
    factors = torch.maximum(scores - reference, lowest).clamp(max=1).transpose(1, 2).flatten(0, 1)
    above = torch.where(tau.isfinite(), tau - reference, 0.0)
    tau = _folded(tau, call)
    # tau + 1 is compared with u as it is, so that rounding puts no pair in both pieces or in neither.
    return _folded(scores, call), tau, tau.detach() + 1, _folded(above, call), factors


def _weighed(call: Call, v: torch.Tensor, factors: torch.Tensor) -> tuple[torch.Tensor]:
    return ((v * factors.unsqueeze(-1)).to(v.dtype),)


def _beside(call: Call, weighed: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.cat([weighed, v], -1),)


class _Thresholds(torch.autograd.Function):
    """tau of every query, [B, H, chunks, CHUNK], from the scores [B, H, chunks, L] of its chunk's list. The keys' positions
    [B, H, chunks, L] say which of them it sees: those not behind its own, [chunks, CHUNK]. A few chunks at a time, so that
    memory does not hold an entry per query and key.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, position: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
        tau, start, size = (scores.new_empty((*scores.shape[:3], own.shape[1])) for _ in range(3))
        for part in _parts(scores, own):
            seen = position[:, :, part].unsqueeze(-2) <= own[part].unsqueeze(-1)
            u = torch.where(seen, scores[:, :, part].unsqueeze(-2), -torch.inf)
            found = _segment(u, k)
            inside = found.inside(u)
            tau[:, :, part], start[:, :, part] = found.threshold(u, inside, k), found.start.squeeze(-1)
            size[:, :, part] = inside.sum(-1)
        ctx.save_for_backward(scores, position, own, start, size)
        return tau

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """d tau / d u is 1 / size for each of the entries that tau is a mean of."""
        scores, position, own, start, size = ctx.saved_tensors
        share = (grads[0] / size.clamp(min=1)).unsqueeze(-2)
        total = torch.empty_like(scores)
        for part in _parts(scores, own):
            seen = position[:, :, part].unsqueeze(-2) <= own[part].unsqueeze(-1)
            u = torch.where(seen, scores[:, :, part].unsqueeze(-2), -torch.inf)
            inside = _Segment(start[:, :, part].unsqueeze(-1)).inside(u)
            total[:, :, part] = (share[:, :, part] @ inside.to(scores.dtype)).squeeze(-2)
        return total, None, None, None


def _reference(tau: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each chunk's thresholds [B, H, chunks, CHUNK] the largest, and how far below it the least is: [B, H, chunks, 1]. A
    score that is chosen in part lies between the least and 1 over the largest. Queries of no position are left out.
    """
    tau, known = tau.detach(), real & tau.isfinite()
    reference = torch.where(known, tau, -torch.inf).amax(-1, keepdim=True)
    reference = torch.where(reference.isfinite(), reference, 0.0)
    lowest = torch.where(known, tau - reference, 0.0).amin(-1, keepdim=True)
    return reference, lowest


def _parts(scores: torch.Tensor, own: torch.Tensor) -> list[slice]:
    each = max(1, LARGEST // max(1, own.shape[1] * scores.shape[-1] * scores.shape[0] * scores.shape[1]))
    return [slice(at, at + each) for at in range(0, own.shape[0], each)]


class _Segment(NamedTuple):
    """The piece of sum clip(u - tau, 0, 1) on which it is k, [..., 1]; infinite where every entry is chosen whole, and then
    `few` is that tau.
    """

    start: torch.Tensor
    few: torch.Tensor | None = None

    def inside(self, u: torch.Tensor) -> torch.Tensor:
        """The entries strictly between 0 and 1 on it."""
        return (u > self.start) & (u - 1 <= self.start)  # as the kink was rounded

    def threshold(self, u: torch.Tensor, inside: torch.Tensor, k: int) -> torch.Tensor:
        """tau [...]: differentiable in u."""
        assert self.few is not None
        size, whole = inside.sum(-1, keepdim=True), (u - 1 > self.start).sum(-1, keepdim=True)
        tau = (torch.where(inside, u, 0.0).sum(-1, keepdim=True) - (k - whole)) / size.clamp(min=1)
        every = self.start == torch.inf
        return torch.where(every, self.few, torch.where(size > 0, tau, self.start)).squeeze(-1)


def threshold(u: torch.Tensor, k: int) -> torch.Tensor:
    """tau [...] with sum clip(u - tau, 0, 1) = k over the last dimension of u, exact by sorting, differentiable in u; where
    there are at most k finite entries, two less than the least of them, so that each is clipped to 1. Entries of -inf are absent.
    """
    segment = _segment(u.detach(), k)
    return segment.threshold(u, segment.inside(u), k)


@torch.no_grad()
def _segment(u: torch.Tensor, k: int) -> _Segment:
    """The sum falls piecewise linearly in tau with kinks at u and u - 1: the last kink at which it still is k or more starts
    the piece that holds tau; on it, tau is a mean of the entries strictly between.
    """
    ordered = u.sort(dim=-1).values
    present = ordered.isfinite()
    few = present.sum(-1, keepdim=True) <= k
    least = torch.where(present, ordered, torch.inf).amin(-1, keepdim=True) - 2
    if u.shape[-1] > k:
        # With tau so low that entry k + 1 were 1, the sum would pass k: what lies below is never chosen, and must not
        # cancel the others in a sum.
        ordered = torch.maximum(ordered, ordered[..., -k - 1, None] - 2)
    known = torch.where(present, ordered, 0.0).double()
    total = torch.nn.functional.pad(known.cumsum(-1), (1, 0))
    kinks = torch.cat([ordered, ordered - 1], -1).sort(dim=-1).values
    # Entries from place `low` on exceed tau, from place `high` on by 1 or more.
    low = torch.searchsorted(ordered, kinks, right=True)
    high = torch.searchsorted(ordered - 1, kinks)
    n = u.shape[-1]
    sums = (n - high) + total.gather(-1, high) - total.gather(-1, low) - (high - low) * kinks.double()
    enough = (sums >= k) & kinks.isfinite()
    place = torch.where(enough, torch.arange(2 * n, device=u.device), -1).amax(-1, keepdim=True)
    start = kinks.gather(-1, place.clamp(min=0))
    return _Segment(torch.where(few, torch.inf, start), least)


def weights(u: torch.Tensor, k: int) -> torch.Tensor:
    """SPARSEK's p = clip(u - tau, 0, 1), summing to k over the last dimension, of u's shape; differentiable."""
    return (u - threshold(u, k).unsqueeze(-1)).clamp(0, 1)


def survivors(u: torch.Tensor, k: int, chunk: int, capacity: int | None = None) -> torch.Tensor:
    """For each chunk of queries the earlier keys that its first one may still choose: int64 [B, H, chunks, m] in ascending
    order, -1 for none; O(N * m / chunk) memory. m is `capacity`, and scores that leave more are an InputError (asserted on
    the device); without a capacity the longest list, about k, whose length the host has to wait for.
    """
    if capacity is not None:
        found, longest = _scan(u, k, chunk, min(capacity, u.shape[-1]))
        wanted = f"scores that leave at most capacity={capacity} earlier keys to choose from"
        require("u", longest <= capacity, wanted, longest, "of them in (batch, head)")
        return found
    size = min(u.shape[-1], 2 * k + chunk)
    while True:
        found, longest = _scan(u, k, chunk, size)
        most = int(longest.max()) if longest.numel() else 0
        if most <= size:
            return found[..., : max(1, most)]
        size = min(u.shape[-1], 2 * most)


@torch.no_grad()
def _scan(u: torch.Tensor, k: int, chunk: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(lists of at most `size` keys, how long the longest of each (batch, head) would have been): right if none was cut."""
    batch, heads, n = u.shape
    kept = torch.full((batch, heads, size), -1, device=u.device)
    lists, longest = [kept.unsqueeze(-2)], torch.zeros((batch, heads), dtype=torch.int64, device=u.device)
    for begin in range(0, n - chunk, STEP * chunk):
        starts = torch.arange(begin + chunk, min(begin + STEP * chunk, n - 1) + 1, chunk, device=u.device)
        fresh = torch.arange(begin, min(begin + STEP * chunk, n), device=u.device).expand(batch, heads, -1)
        known = torch.cat([kept, fresh], -1)
        values = torch.where(known >= 0, u.gather(-1, known.clamp(min=0)), -torch.inf).unsqueeze(-2)
        values = torch.where(known.unsqueeze(-2) < starts.unsqueeze(-1), values, -torch.inf)  # [B, H, starts, entries]
        alive = values > threshold(values, k).unsqueeze(-1)
        longest = torch.maximum(longest, alive.sum(-1).amax(-1))
        order = torch.argsort(~alive, dim=-1, stable=True)[..., :size]
        found = torch.where(alive, known.unsqueeze(-2), -1).gather(-1, order)
        found = torch.nn.functional.pad(found, (0, size - found.shape[-1]), value=-1)
        lists.append(found)
        kept = found[..., -1, :]
    return torch.cat(lists, -2), longest


FAMILIES[SparseK] = Family(plan_sparse_k)

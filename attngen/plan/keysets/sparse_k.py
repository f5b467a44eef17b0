"""SPARSEK attention (arXiv 2406.16747): each head attends the k keys (softly) that its own scores u choose.

p = clip(u - tau, 0, 1) with tau such that sum p = k: the Euclidean projection of u onto {p: 0 <= p <= 1, sum p = k}. Keys
with p > 0 are attended, with key and value times p; u gets a gradient through p.

The incremental form has a p for every query, over the keys up to it. tau only rises with the query, so that a key once
dropped stays dropped: a chunk of queries needs the keys that were alive at its start, and its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from attngen.backends.rows import flat_rows, take, take_flat
from attngen.errors import InputError, SpecError
from attngen.language.checks import checked, require
from attngen.language.expression import absolute
from attngen.plan.keysets.base import (
    KeySet,
    Pieces,
    Result,
    b,
    check_tensor,
    h,
    i,
    j,
    moved,
    offset_column,
    positive,
    s,
    to_query_heads,
)
from attngen.plan.keysets.permuted import attend_kept, kept_first
from attngen.state.merging import merge

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec

CHUNK = 128  # queries that share a list of keys in the incremental form
STEP = 8  # chunks whose lists are found at once
LARGEST = 2**20  # entries for which thresholds are found at once, per (batch, head) at least one chunk's


@dataclass(frozen=True)
class SparseK(KeySet):
    """See `sparse_k`."""

    k: int
    window: int | None = None
    incremental: bool = False
    capacity: int | None = None

    name: ClassVar[str] = "sparse_k"
    prepared: ClassVar[tuple[str, ...]] = ("u",)
    used: ClassVar[tuple[str, ...]] = ("u",)

    def __post_init__(self) -> None:
        positive("sparse_k: k", self.k)
        if self.window is not None:
            positive("sparse_k: window", self.window)
        if not isinstance(self.incremental, bool):
            raise SpecError(f"sparse_k: incremental is True or False, got {self.incremental!r}")
        if self.capacity is not None:
            positive("sparse_k: capacity", self.capacity)
            if not self.incremental:
                raise SpecError("sparse_k: capacity is for incremental=True, which makes lists of earlier keys")

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        u = self._scores(call, given)
        if checked() and u.numel():
            require("u", u < torch.inf, "scores that are finite, or -inf for keys that are not there", u.detach())
        if 0 in (call.q.shape[2], call.k.shape[2]):
            return {}
        if self.incremental:
            if call.q.shape[2] != call.k.shape[2] or isinstance(call.q_offset, torch.Tensor) or call.q_offset != 0:
                got = f"{call.q.shape[2]} queries, {call.k.shape[2]} keys, q_offset {call.q_offset}"
                raise InputError("q", "as many queries as keys and no q_offset, for incremental=True", got)
            return {"past": survivors(u, self.k, CHUNK, self.capacity), "planned": u.detach()}
        rows, position, count = kept_first(weights(u, self.k) > 0)
        queries = torch.arange(call.q.shape[2], device=u.device) + offset_column(call)
        heads = call.q.shape[:2]
        return {
            "planned": u.detach(),
            "k_rows": rows,
            "k_position": to_query_heads(position, call).to(torch.int32),
            "k_count": to_query_heads(count, call),
            "q_position": queries.expand(*heads, -1).to(torch.int32),
            "q_count": torch.full(heads, call.q.shape[2], dtype=torch.int32, device=u.device),
        }

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call = pieces.call
        u = self._scores(call, given)
        if 0 in (call.q.shape[2], call.k.shape[2]):
            return pieces.attend("window", self._near(pieces), call.q, call.k, call.v, call.q_offset)
        require(
            "u", u.detach() == plan["planned"], "the scores that the plan was made from: it holds what they chose", u
        )
        chosen = self._incremental(pieces, plan, u) if self.incremental else self._chosen(pieces, plan, u)
        if self.window is None:
            return chosen
        return merge(pieces.attend("window", self._near(pieces), call.q, call.k, call.v, call.q_offset), chosen)

    def _scores(self, call: Call, given: Mapping[str, Any]) -> torch.Tensor:
        u = check_tensor("u", given.get("u"), "float", tuple(call.k.shape[:3]), "[B, Hkv, Nk]", call.q.device)
        return u if u.dtype == torch.float64 else u.float()

    def _near(self, pieces: Pieces) -> Any:
        """The window's piece; nothing without one."""
        near = absolute(i - j) < (self.window or 0)
        mask = pieces.mask & near & (j <= i) if self.incremental else pieces.mask & near
        return lambda: {"mask": mask, "score": pieces.score}

    def _chosen(self, pieces: Pieces, plan: Mapping[str, Any], u: torch.Tensor) -> Result:
        call, rows = pieces.call, plan["k_rows"]
        p = weights(u, self.k).gather(-1, rows).unsqueeze(-1)
        k, v = ((take(x, rows) * p).to(x.dtype) for x in (call.k, call.v))
        far = None if self.window is None else absolute(i - j) >= self.window
        return attend_kept(pieces, plan, call.q, k, v, far)

    def _incremental(self, pieces: Pieces, plan: Mapping[str, Any], u: torch.Tensor) -> Result:
        """Chunks of queries as batches, on their own lists of keys. p depends on the pair, and values times p are no
        attention: where p is u - tau the values u * v and v are summed apart, as out = sum P u v - tau sum P v, with u and
        tau less a reference near them, so that only what tau changes within a chunk cancels.
        """
        call, past = pieces.call, plan["past"]
        batch, heads_kv, n = u.shape
        chunks = -(-n // CHUNK)
        length = chunks * CHUNK
        q = torch.nn.functional.pad(call.q, (0, 0, 0, length - n))
        own = torch.arange(length, device=u.device).view(chunks, CHUNK)
        index = torch.cat([past, own.expand(batch, heads_kv, -1, -1)], -1)  # [B, Hkv, chunks, past + CHUNK]
        # What is not there comes last, in tiles that nobody visits.
        index = torch.where((index >= 0) & (index < n), index, n).sort(-1).values
        rows = index.clamp(max=n - 1)
        scores = u.gather(-1, rows.flatten(2)).view(rows.shape)
        tau = _Thresholds.apply(scores, index, own, self.k)  # [B, Hkv, chunks, CHUNK]
        flat = flat_rows(rows, n).transpose(1, 2).flatten(0, 1)
        (k,), (v,) = (take_flat(x, flat) for x in (call.k, call.v))

        def fold(x: torch.Tensor) -> torch.Tensor:
            """[B, Hkv, chunks, ...] -> [B * chunks, Hq, ...]."""
            return to_query_heads(x, call).transpose(1, 2).flatten(0, 1)

        q = q.unflatten(2, (chunks, CHUNK)).transpose(1, 2).flatten(0, 1)
        reference, lowest = _reference(tau, own < n)
        factors = torch.maximum(scores - reference, lowest).clamp(max=1).transpose(1, 2).flatten(0, 1)
        above_reference = torch.where(tau.isfinite(), tau - reference, 0.0)
        scores, tau, above_reference = fold(scores), fold(tau), fold(above_reference)
        extra = {
            "u": scores,
            "tau": tau,
            # Compared with u as it is, so that rounding puts no pair in both pieces or in neither.
            "tau_whole": tau.detach() + 1,
            "k_position": fold(index).to(torch.int32),
            "start": own[:, 0].to(torch.int32).repeat(batch),
            "batch": torch.arange(batch, device=u.device, dtype=torch.int32).repeat_interleave(chunks),
            "length": torch.full((batch * chunks,), n, dtype=torch.int32, device=u.device),
        }

        def build(full: bool) -> Any:
            u_, tau_, whole_ = (pieces.tensor(name, 3, None) for name in ("u", "tau", "tau_whole"))
            position, start, length_ = (
                pieces.tensor(name, d) for name, d in (("k_position", 3), ("start", 1), ("length", 1))
            )
            places = {"b": pieces.tensor("batch", 1)[b], "i": i + start[b], "j": position[b, h, j]}
            distance = places["i"] - places["j"]
            p = u_[b, h, j] - tau_[b, h, i]
            mask = moved(pieces.mask, **places) & (distance >= (self.window or 0)) & (places["j"] < length_[b])
            score = moved(pieces.score, **places)
            if not full:
                score = type(score)(score.sym.xreplace({s.sym: s.sym * p.sym}), {**score.declared, **p.declared})
            above, below = u_[b, h, j] >= whole_[b, h, i], u_[b, h, j] < whole_[b, h, i]
            return lambda: {"mask": mask & (above if full else (p > 0) & below), "score": score}

        whole = pieces.attend("p = 1", build(True), q, k, v, **extra)
        weighed = (v * factors.unsqueeze(-1)).to(v.dtype)
        if 2 * v.shape[-1] <= 256:
            out, lse = pieces.attend("p < 1", build(False), q, k, torch.cat([weighed, v], -1), **extra)
            first, second = out.chunk(2, -1)
        else:
            first, lse = pieces.attend("p < 1", build(False), q, k, weighed, **extra)
            second, _ = pieces.attend("p < 1", build(False), q, k, v, **extra)
        part = (first - above_reference.unsqueeze(-1) * second).to(v.dtype)
        out, lse = merge(whole, (part, lse))
        out, lse = (x.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
        return out[:, :, :n], lse[:, :, :n]


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


def sparse_k(k: int, window: int | None = None, incremental: bool = False, capacity: int | None = None) -> SparseK:
    """SPARSEK: `Spec(keys=ag.sparse_k(512, window=256, incremental=True), mask=ag.causal())`, called with
    u= float [B, Hkv, Nk], a score per key.

    k: how much is chosen: sum p = k (everything, as it is, where there are no more than k keys). window: keys closer than
    this are attended besides, as they are, and not chosen. incremental: p is made for every query from the keys up to it
    (causal language models); else once from all keys. A score of -inf stands for a key that is not there. Gradients flow to u
    (arXiv 2406.16747).

    incremental=True makes, for every 128 queries, a list of the earlier keys that they may choose: about k of them, more
    where many scores differ by less than 1. capacity: the longest list; longer ones raise an InputError, asserted on the
    device. Without it lists are as long as the scores need, for which `plan` (or each call, without a plan) waits for the
    device once.
    """
    return SparseK(k, window, incremental, capacity)

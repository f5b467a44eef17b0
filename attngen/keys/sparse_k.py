"""SPARSEK attention (arXiv 2406.16747): each head attends the k keys (softly) that its own scores u choose.

p = clip(u - tau, 0, 1) with tau such that sum p = k: the Euclidean projection of u onto {p: 0 <= p <= 1, sum p = k}. Keys
with p > 0 are attended, with key and value times p; u gets a gradient through p.

The incremental form has a p for every query, over the keys up to it. tau only rises with the query, so that a key once
dropped stays dropped: a chunk of queries needs the keys that were alive at its start, and its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import InputError, SpecError
from attngen.expression import absolute
from attngen.keys.base import (
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
from attngen.keys.checks import checked, require
from attngen.keys.permuted import attend_kept, kept_first
from attngen.keys.rows import flat_rows, take, take_flat
from attngen.merging import merge

if TYPE_CHECKING:
    from attngen.inputs import Call
    from attngen.spec import Spec

CHUNK = 128  # queries that share a list of keys in the incremental form


@dataclass(frozen=True)
class SparseK(KeySet):
    """See `sparse_k`."""

    k: int
    window: int | None = None
    incremental: bool = False

    name: ClassVar[str] = "sparse_k"
    prepared: ClassVar[tuple[str, ...]] = ("u",)
    used: ClassVar[tuple[str, ...]] = ("u",)

    def __post_init__(self) -> None:
        positive("sparse_k: k", self.k)
        if self.window is not None:
            positive("sparse_k: window", self.window)
        if not isinstance(self.incremental, bool):
            raise SpecError(f"sparse_k: incremental is True or False, got {self.incremental!r}")

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
            return {"past": survivors(u, self.k, CHUNK)}
        rows, position, count = kept_first(weights(u, self.k) > 0)
        queries = torch.arange(call.q.shape[2], device=u.device) + offset_column(call)
        heads = call.q.shape[:2]
        return {
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
        attention: where p is u - tau the values u * v and v are summed apart, as out = sum P u v - tau sum P v.
        """
        call, past = pieces.call, plan["past"]
        batch, heads_kv, n = u.shape
        chunks, _heads = -(-n // CHUNK), call.q.shape[1]
        length = chunks * CHUNK
        q = torch.nn.functional.pad(call.q, (0, 0, 0, length - n))
        own = torch.arange(length, device=u.device).view(chunks, CHUNK)
        index = torch.cat(
            [past, own.expand(batch, heads_kv, -1, -1)], -1
        )  # [B, Hkv, chunks, past + CHUNK], -1 for none
        valid = (index >= 0) & (index < n)
        rows = index.clamp(0, n - 1)
        scores = u.gather(-1, rows.flatten(2)).view(rows.shape)
        tau = self._thresholds(scores, index, valid, own)  # [B, Hkv, chunks, CHUNK]
        flat = flat_rows(rows, n).transpose(1, 2).flatten(0, 1)
        (k,), (v,) = (take_flat(x, flat) for x in (call.k, call.v))

        def fold(x: torch.Tensor) -> torch.Tensor:
            """[B, Hkv, chunks, ...] -> [B * chunks, Hq, ...]."""
            return to_query_heads(x, call).transpose(1, 2).flatten(0, 1)

        q = q.unflatten(2, (chunks, CHUNK)).transpose(1, 2).flatten(0, 1)
        scores, tau = fold(scores), fold(tau)
        extra = {
            "u": scores,
            "tau": tau,
            # Compared with u as it is, so that rounding puts no pair in both pieces or in neither.
            "tau_whole": tau.detach() + 1,
            "k_position": fold(torch.where(valid, index, n)).to(torch.int32),
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
        weighed = v * u.gather(-1, rows.flatten(2)).view(rows.shape).transpose(1, 2).flatten(0, 1).unsqueeze(-1).to(
            v.dtype
        )
        if 2 * v.shape[-1] <= 256:
            out, lse = pieces.attend("p < 1", build(False), q, k, torch.cat([weighed, v], -1), **extra)
            first, second = out.chunk(2, -1)
        else:
            first, lse = pieces.attend("p < 1", build(False), q, k, weighed, **extra)
            second, _ = pieces.attend("p < 1", build(False), q, k, v, **extra)
        part = (first - tau.unsqueeze(-1) * second).to(v.dtype)
        out, lse = merge(whole, (part, lse))
        out, lse = (x.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
        return out[:, :, :n], lse[:, :, :n]

    def _thresholds(
        self, scores: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """tau of every query, [B, Hkv, chunks, CHUNK]: O(N * (past + CHUNK)) memory."""
        seen = valid.unsqueeze(-2) & (index.unsqueeze(-2) <= own.unsqueeze(-1))
        return threshold(torch.where(seen, scores.unsqueeze(-2), -torch.inf), self.k)


def threshold(u: torch.Tensor, k: int) -> torch.Tensor:
    """tau [...] with sum clip(u - tau, 0, 1) = k over the last dimension of u, exact by sorting, differentiable in u; where
    there are at most k finite entries, two less than the least of them, so that each is clipped to 1. Entries of -inf are absent.

    The sum falls piecewise linearly in tau with kinks at u and u - 1: the last kink at which it still is k or more starts
    the piece that holds tau; on it, tau is a mean of the entries strictly between.
    """
    with torch.no_grad():
        ordered = u.detach().sort(dim=-1).values
        present = ordered.isfinite()
        if (
            u.shape[-1] > k
        ):  # with tau so low that entry k + 1 were 1, the sum would pass k: what lies below is never chosen,
            ordered = torch.maximum(ordered, ordered[..., -k - 1, None] - 2)  # and must not cancel the others in a sum
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
        few = present.sum(-1, keepdim=True) <= k
        least = torch.where(present, ordered, torch.inf).amin(-1, keepdim=True) - 2
        # On the piece right of the kink: above it by less than 1 (included), by 1 or more (excluded: it shrinks there).
        whole = u - 1 > start  # as the kink was rounded
        part = (u > start) & ~whole
        size = part.sum(-1, keepdim=True)
    tau = (torch.where(part, u, 0.0).sum(-1, keepdim=True) - (k - whole.sum(-1, keepdim=True))) / size.clamp(min=1)
    return torch.where(few, least, torch.where(size > 0, tau, start)).squeeze(-1)


def weights(u: torch.Tensor, k: int) -> torch.Tensor:
    """SPARSEK's p = clip(u - tau, 0, 1), summing to k over the last dimension, of u's shape; differentiable."""
    return (u - threshold(u, k).unsqueeze(-1)).clamp(0, 1)


def survivors(u: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """For each chunk of queries the earlier keys that its first one may still choose: int64 [B, H, chunks, m] in ascending
    order, -1 for none. m is the longest list: about k, O(N * m / chunk) memory.
    """
    batch, heads, n = u.shape
    kept = torch.empty((batch, heads, 0), dtype=torch.int64, device=u.device)
    lists = []
    for start in range(0, n, chunk):
        lists.append(kept)
        fresh = torch.arange(start, min(start + chunk, n), device=u.device).expand(batch, heads, -1)
        known = torch.cat([kept, fresh], -1)
        values = torch.where(known >= 0, u.gather(-1, known.clamp(min=0)), -torch.inf)
        alive = (known >= 0) & (values > threshold(values, k).unsqueeze(-1))
        order = torch.argsort(~alive, dim=-1, stable=True)[..., : max(1, int(alive.sum(-1).max()))]
        kept = torch.where(alive, known, -1).gather(-1, order)
    longest = max((x.shape[-1] for x in lists), default=0)
    pad = torch.nn.functional.pad
    return torch.stack([pad(x, (0, longest - x.shape[-1]), value=-1) for x in lists], 2)


def sparse_k(k: int, window: int | None = None, incremental: bool = False) -> SparseK:
    """SPARSEK: `Spec(keys=ag.sparse_k(512, window=256, incremental=True), mask=ag.causal())`, called with
    u= float [B, Hkv, Nk], a score per key.

    k: how much is chosen: sum p = k (everything, as it is, where there are no more than k keys). window: keys closer than
    this are attended besides, as they are, and not chosen. incremental: p is made for every query from the keys up to it
    (causal language models); else once from all keys. A score of -inf stands for a key that is not there. Gradients flow to u
    (arXiv 2406.16747).

    incremental=True waits for the device once per 128 queries, to keep its lists as short as what can still be chosen, and
    its thresholds take O(N (k + 128)) memory per head while they are made.
    """
    return SparseK(k, window, incremental)

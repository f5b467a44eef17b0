"""Sparse causal flash attention (SCFA, arXiv 2306.01160): queries and keys sorted so that what belongs together is a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.backends.rows import put, take
from attngen.language.expression import Expr
from attngen.plan.keysets.base import (
    KeySet,
    Pieces,
    Result,
    b,
    by_distance,
    check_range,
    check_tensor,
    h,
    i,
    j,
    moved,
    moved_by,
    offset_column,
    positive,
    split_causal,
    to_query_heads,
)

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec

LIMIT = 2**31 - 1


@dataclass(frozen=True)
class QKSparse(KeySet):
    """Dropped queries and keys. keep_q bool [B, Hq, Nq], keep_k bool [B, Hkv, Nk]."""

    name: ClassVar[str] = "qk_sparse"
    prepared: ClassVar[tuple[str, ...]] = ("keep_q", "keep_k")

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        device, shape = call.q.device, call.q.shape
        keep_q = check_tensor("keep_q", given.get("keep_q"), "bool", tuple(shape[:3]), "[B, Hq, Nq]", device)
        keep_k = check_tensor("keep_k", given.get("keep_k"), "bool", tuple(call.k.shape[:3]), "[B, Hkv, Nk]", device)
        q_rows, q_position, q_count = kept_first(keep_q)
        k_rows, k_position, k_count = kept_first(keep_k)
        return {
            "q_rows": q_rows,
            "k_rows": k_rows,
            "q_position": (q_position + offset_column(call)).to(torch.int32),
            "k_position": to_query_heads(k_position, call).to(torch.int32),
            "q_count": q_count,
            "k_count": to_query_heads(k_count, call),
        }

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call = pieces.call
        q = take(call.q, plan["q_rows"])
        k, v = take(call.k, plan["k_rows"]), take(call.v, plan["k_rows"])
        out, lse = attend_kept(pieces, plan, q, k, v)
        return put(out, lse, plan["q_rows"], call.q.shape[2])


def kept_first(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with the kept ones first, in order: (rows int64 [B, H, n], their positions, how many are kept int32 [B, H]).

    n is the largest count where knowing it is free (on the CPU), all rows elsewhere. The position of a row that is not
    kept is that of the last kept one, so that it widens no range.
    """
    rows = torch.argsort(~keep, dim=-1, stable=True)
    count = keep.sum(-1, keepdim=True)
    if keep.device.type == "cpu" and keep.numel():
        rows = rows[..., : max(1, int(count.max()))]
    place = torch.arange(rows.shape[-1], device=keep.device).expand_as(rows)
    position = rows.gather(-1, torch.minimum(place, (count - 1).clamp(min=0)))
    return rows, position, count.squeeze(-1).to(torch.int32)


def attend_kept(
    pieces: Pieces,
    plan: Mapping[str, Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: Expr | None = None,
) -> Result:
    """Attention of the first q_count queries to the first k_count keys of each (b, h), masked on original positions."""

    def build() -> dict[str, Any]:
        q_position, k_position = pieces.tensor("q_position", 3), pieces.tensor("k_position", 3)
        q_count, k_count = pieces.tensor("q_count", 2), pieces.tensor("k_count", 2)
        places = {"i": q_position[b, h, i], "j": k_position[b, h, j]}
        mask = pieces.mask if extra is None else pieces.mask & extra
        kept = (i < q_count[b, h]) & (j < k_count[b, h])
        return {"mask": moved(mask, **places) & kept, "score": moved(pieces.score, **places)}

    names = ("q_position", "k_position", "q_count", "k_count")
    return pieces.attend(("kept", extra is None), build, q, k, v, **{name: plan[name] for name in names})


@dataclass(frozen=True)
class HashSparse(KeySet):
    """Attention inside buckets. q_bucket int [B, Hq, Nq], k_bucket int [B, Hkv, Nk], at least 0, and below `buckets` where
    that is given (which saves memory traffic on a GPU).
    """

    buckets: int | None = None

    name: ClassVar[str] = "hash_sparse"
    prepared: ClassVar[tuple[str, ...]] = ("q_bucket", "k_bucket")

    def __post_init__(self) -> None:
        if self.buckets is not None:
            positive("hash_sparse: buckets", self.buckets)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        device, limit = call.q.device, self.buckets or LIMIT
        found = {}
        for name, shape, dims in (
            ("q_bucket", call.q.shape, "[B, Hq, Nq]"),
            ("k_bucket", call.k.shape, "[B, Hkv, Nk]"),
        ):
            found[name] = check_tensor(name, given.get(name), "int", tuple(shape[:3]), dims, device)
            check_range(name, found[name], 0, limit, "bucket numbers")
        q_bucket, q_rows = found["q_bucket"].sort(dim=-1, stable=True)
        k_bucket, k_rows = found["k_bucket"].sort(dim=-1, stable=True)
        q_position, k_position = q_rows + offset_column(call), to_query_heads(k_rows, call)
        # In sorted order the positions rise only inside a bucket; with this stride added per bucket they rise throughout,
        # and differ by the same amounts where the buckets are the same. So they find ranges that raw positions would not.
        stride, shift = 2**32, 2**30  # an offset may be negative: shifted positions lie in 0 .. stride - 1
        if not isinstance(call.q_offset, torch.Tensor):
            shift = abs(call.q_offset)
            stride = 2 * shift + call.q.shape[2] + call.k.shape[2] + 1
        highest = self.buckets
        if highest is None and device.type == "cpu":
            highest = 1 + max((int(t.max()) for t in found.values() if t.numel()), default=0)
        word = torch.int32 if highest is not None and (highest + 2) * stride < LIMIT else torch.int64
        first = q_bucket.long() * stride
        return {
            "q_rows": q_rows,
            "k_rows": k_rows,
            "q_position": q_position.to(torch.int32),
            "k_position": k_position.to(torch.int32),
            "q_rank": (first + shift + q_position).to(word),
            "k_rank": (to_query_heads(k_bucket, call).long() * stride + shift + k_position).to(word),
            "bucket_start": first.to(word),
            "bucket_stop": (first + stride).to(word),
        }

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        names = ("q_position", "k_position", "q_rank", "k_rank", "bucket_start", "bucket_stop")

        def build() -> dict[str, Any]:
            q_position, k_position, q_rank, k_rank, start, stop = (pieces.tensor(name, 3) for name in names)
            positions = {"i": q_position[b, h, i], "j": k_position[b, h, j]}
            ranks = {"i": q_rank[b, h, i], "j": k_rank[b, h, j]}
            mask = moved_by(pieces.mask, lambda atom: ranks if by_distance(atom) else positions) & (
                ranks["j"] >= start[b, h, i]
            )
            if split_causal(pieces.spec.mask) is None:  # a causal mask ends the bucket itself
                mask = mask & (ranks["j"] < stop[b, h, i])
            return {"mask": mask, "score": moved(pieces.score, **positions)}

        call = pieces.call
        q = take(call.q, plan["q_rows"])
        k, v = take(call.k, plan["k_rows"]), take(call.v, plan["k_rows"])
        out, lse = pieces.attend("buckets", build, q, k, v, **{name: plan[name] for name in names})
        return put(out, lse, plan["q_rows"], call.q.shape[2])


def qk_sparse() -> QKSparse:
    """Per (b, h) some queries and keys are dropped: `Spec(keys=ag.qk_sparse(), mask=ag.causal())`, called with
    keep_q= bool [B, Hq, Nq] and keep_k= bool [B, Hkv, Nk]. A dropped query's out is 0 and its lse -inf; dropped queries and
    keys get no gradient (arXiv 2306.01160).
    """
    return QKSparse()


def hash_sparse(buckets: int | None = None) -> HashSparse:
    """A query sees the keys of its own bucket: `Spec(keys=ag.hash_sparse(), mask=ag.causal())`, called with
    q_bucket= int [B, Hq, Nq] and k_bucket= int [B, Hkv, Nk], numbers of at least 0 (below `buckets` if given);
    `ag.lsh_buckets` makes them (arXiv 2306.01160).
    """
    return HashSparse(buckets)


def lsh_buckets(q: torch.Tensor, k: torch.Tensor, n: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q_bucket [B, Hq, Nq] and k_bucket [B, Hkv, Nk], int32 in 0 .. n - 1: argmax([x R, -x R]) with a random R [D, n / 2]
    shared by q and k (the cross-polytope hash; arXiv 2306.01160). n is even. Raises InputError.
    """
    from attngen.errors import InputError

    if isinstance(n, bool) or not isinstance(n, int) or n < 2 or n % 2:
        raise InputError("n", "an even int of at least 2", repr(n))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError("seed", "an int from 0 to 2**63 - 1", repr(seed))
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or x.shape[-1] != q.shape[-1]:
            got = f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(name, "a tensor [B, H, N, D] with the D of q", got)
    generator = torch.Generator(q.device).manual_seed(seed)
    directions = torch.randn(q.shape[-1], n // 2, generator=generator, device=q.device)

    def bucket(x: torch.Tensor) -> torch.Tensor:
        projected = x.detach().float() @ directions
        high, low = projected.max(-1), projected.min(-1)
        return torch.where(high.values >= -low.values, high.indices, low.indices + n // 2).to(torch.int32)

    return bucket(q), bucket(k)

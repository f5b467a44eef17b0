"""Sparse causal flash attention (SCFA, arXiv 2306.01160): queries and keys sorted so that what belongs together is a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.checks import check_range, check_tensor
from attngen.language.keysets.sorted import HashSparse, QKSparse
from attngen.plan.moves import Rows, flat_rows
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result

if TYPE_CHECKING:
    pass

LIMIT = 2**31 - 1
KEPT = ("q_position", "k_position", "q_count", "k_count")
BUCKETS = ("q_position", "k_position", "q_rank", "k_rank", "bucket_start", "bucket_stop")


def to_query_heads(x: torch.Tensor, call: Call) -> torch.Tensor:
    """[B, Hkv, ...] -> [B, Hq, ...]."""
    return x if call.group == 1 else x.repeat_interleave(call.group, 1)


# -- dropped queries and keys -----------------------------------------------------------------------------------------


def plan_kept(keys: QKSparse, planner: Planner) -> Result:
    """Kept rows first; queries, keys and values taken in that order; results back to where the queries were."""
    found = planner.prepare("kept first", prepare_kept, keys.prepared, ("q_rows", "k_rows", *KEPT))
    q = planner.take("kept queries", "q", Rows(), found["q_rows"])
    k = planner.take("kept keys", "k", Rows(), found["k_rows"])
    v = planner.take("kept values", "v", Rows(), found["k_rows"])
    result = attend_kept(planner, found, q, k, v)
    return planner.put("in place", result, Rows(), found["q_rows"], planner.sizes.shapes["q"])


def prepare_kept(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The order of rows, int64 [B, H, n] in all of a tensor's rows, their positions, and how many of each head are kept."""
    device, shape = call.q.device, call.q.shape
    keep_q = check_tensor("keep_q", given.get("keep_q"), "bool", tuple(shape[:3]), "[B, Hq, Nq]", device)
    keep_k = check_tensor("keep_k", given.get("keep_k"), "bool", tuple(call.k.shape[:3]), "[B, Hkv, Nk]", device)
    q_rows, q_position, q_count = kept_first(keep_q, call.waits)
    k_rows, k_position, k_count = kept_first(keep_k, call.waits)
    return {
        "q_rows": flat_rows(q_rows, shape[2]),
        "k_rows": flat_rows(k_rows, call.k.shape[2]),
        "q_position": (q_position + call.offset_column).to(torch.int32),
        "k_position": to_query_heads(k_position, call).to(torch.int32),
        "q_count": q_count,
        "k_count": to_query_heads(k_count, call),
    }


def kept_first(keep: torch.Tensor, waits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with the kept ones first, in order: (rows int64 [B, H, n], their positions, how many are kept int32 [B, H]).

    n is the largest count where knowing it is free (`waits`), all rows elsewhere. The position of a row that is not
    kept is that of the last kept one, so that it widens no range.
    """
    rows = torch.argsort(~keep, dim=-1, stable=True)
    count = keep.sum(-1, keepdim=True)
    if waits and keep.numel():
        rows = rows[..., : max(1, int(count.max()))]
    place = torch.arange(rows.shape[-1], device=keep.device).expand_as(rows)
    position = rows.gather(-1, torch.minimum(place, (count - 1).clamp(min=0)))
    return rows, position, count.squeeze(-1).to(torch.int32)


def attend_kept(
    planner: Planner, captures: Mapping[str, str], q: str, k: str, v: str, window: int | None = None
) -> Result:
    """Attention of the first q_count queries to the first k_count keys of each (b, h), masked on original positions. window: pairs
    that are nearer are not in it.
    """

    def build() -> dict[str, Any]:
        from attngen.language.expression import absolute
        from attngen.language.moved import b, h, i, j, moved

        q_position, k_position = planner.tensor("q_position", 3), planner.tensor("k_position", 3)
        q_count, k_count = planner.tensor("q_count", 2), planner.tensor("k_count", 2)
        places = {"i": q_position[b, h, i], "j": k_position[b, h, j]}
        mask = planner.mask if window is None else planner.mask & (absolute(i - j) >= window)
        kept = (i < q_count[b, h]) & (j < k_count[b, h])
        return {"mask": moved(mask, **places) & kept, "score": moved(planner.score, **places)}

    return planner.attend("kept", ("kept", window), build, q, k, v, {name: captures[name] for name in KEPT})


# -- buckets ----------------------------------------------------------------------------------------------------------


def plan_buckets(keys: HashSparse, planner: Planner) -> Result:
    """Queries and keys sorted by bucket; a query tile walks the keys of the buckets that it touches."""
    make = partial(prepare_buckets, keys)
    found = planner.prepare("sort by bucket", make, keys.prepared, ("q_rows", "k_rows", *BUCKETS))
    q = planner.take("queries by bucket", "q", Rows(), found["q_rows"])
    k = planner.take("keys by bucket", "k", Rows(), found["k_rows"])
    v = planner.take("values by bucket", "v", Rows(), found["k_rows"])

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, by_distance, h, i, j, moved, moved_by, split_causal

        q_position, k_position, q_rank, k_rank, start, stop = (planner.tensor(name, 3) for name in BUCKETS)
        positions = {"i": q_position[b, h, i], "j": k_position[b, h, j]}
        ranks = {"i": q_rank[b, h, i], "j": k_rank[b, h, j]}
        mask = moved_by(planner.mask, lambda atom: ranks if by_distance(atom) else positions) & (
            ranks["j"] >= start[b, h, i]
        )
        if split_causal(planner.spec.mask) is None:  # a causal mask ends the bucket itself
            mask = mask & (ranks["j"] < stop[b, h, i])
        return {"mask": mask, "score": moved(planner.score, **positions)}

    result = planner.attend("buckets", "buckets", build, q, k, v, {name: found[name] for name in BUCKETS})
    return planner.put("in place", result, Rows(), found["q_rows"], planner.sizes.shapes["q"])


def prepare_buckets(keys: HashSparse, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The order of rows, int64 [B, H, N] in all of a tensor's rows, their positions and ranks, and where buckets start and stop."""
    device, limit = call.q.device, keys.buckets or LIMIT
    found = {}
    for name, shape, dims in (
        ("q_bucket", call.q.shape, "[B, Hq, Nq]"),
        ("k_bucket", call.k.shape, "[B, Hkv, Nk]"),
    ):
        found[name] = check_tensor(name, given.get(name), "int", tuple(shape[:3]), dims, device)
        check_range(name, found[name], 0, limit, "bucket numbers")
    q_bucket, q_rows = found["q_bucket"].sort(dim=-1, stable=True)
    k_bucket, k_rows = found["k_bucket"].sort(dim=-1, stable=True)
    q_position, k_position = q_rows + call.offset_column, to_query_heads(k_rows, call)
    # In sorted order the positions rise only inside a bucket; with this stride added per bucket they rise throughout,
    # and differ by the same amounts where the buckets are the same. So they find ranges that raw positions would not.
    stride, shift = 2**32, 2**30  # an offset may be negative: shifted positions lie in 0 .. stride - 1
    if not isinstance(call.q_offset, torch.Tensor):
        shift = abs(call.q_offset)
        stride = 2 * shift + call.q.shape[2] + call.k.shape[2] + 1
    highest = keys.buckets
    if highest is None and call.waits:
        highest = 1 + max((int(t.max()) for t in found.values() if t.numel()), default=0)
    word = torch.int32 if highest is not None and (highest + 2) * stride < LIMIT else torch.int64
    first = q_bucket.long() * stride
    return {
        "q_rows": flat_rows(q_rows, call.q.shape[2]),
        "k_rows": flat_rows(k_rows, call.k.shape[2]),
        "q_position": q_position.to(torch.int32),
        "k_position": k_position.to(torch.int32),
        "q_rank": (first + shift + q_position).to(word),
        "k_rank": (to_query_heads(k_bucket, call).long() * stride + shift + k_position).to(word),
        "bucket_start": first.to(word),
        "bucket_stop": (first + stride).to(word),
    }


def lsh_buckets(q: torch.Tensor, k: torch.Tensor, n: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """q_bucket [B, Hq, Nq] and k_bucket [B, Hkv, Nk], int32 in 0 .. n - 1: argmax([x R, -x R]) with a random R [D, n / 2]
    shared by q and k (the cross-polytope hash; arXiv 2306.01160). n is even. Raises InputError.
    """
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


FAMILIES[QKSparse] = Family(plan_kept)
FAMILIES[HashSparse] = Family(plan_buckets)

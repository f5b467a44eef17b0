"""Which pattern a head's attention follows, estimated from a few queries and from averages of tiles.

Everything streams over chunks of keys or of query tiles: memory is O(N) per head, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from attngen.errors import InputError

A_SHAPE, LINES, CLUSTER = 0, 1, 2
KINDS = ("a_shape", "vertical_slash", "block_cluster")
SCORES = 2**22  # scores computed at a time


@dataclass(frozen=True, eq=False)
class Estimate:
    """What `ag.estimate` found, for `ag.adaptive`. All tensors are int64 on the inputs' device but for `mass`.

    kind [B, H]: 0 a-shape, 1 vertical-slash, 2 block-cluster, the one of the largest mass; mass float32 [B, H, 3]: the share
    of the last queries' attention that each covers. A-shape: the first `sink` keys and distances below `window`.
    vertical [B, H, Kv]: keys; band [B, H, m]: runs of distances, number x is x * block .. (x + 1) * block - 1. index
    [B, H, tiles_q, K]: key tiles per query tile, -1 for none.
    """

    block: int
    sink: int
    window: int
    n_k: int
    kind: torch.Tensor
    mass: torch.Tensor
    vertical: torch.Tensor
    band: torch.Tensor
    index: torch.Tensor

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What it holds for: (block, B, Hq, tiles_q, Nk, device)."""
        return self.block, *self.index.shape[:3], self.n_k, str(self.kind.device)


def estimate(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block: int = 64,
    budget: int = 1024,
    sink: int | None = None,
    last: int = 64,
    scale: float | None = None,
    q_offset: int = 0,
) -> Estimate:
    """Which pattern covers most of each head's causal attention, at `budget` keys visited per query (SparseAccelerate,
    arXiv 2412.06198; MInference, 2407.02490). q [B, Hq, Nq, D], k [B, Hkv, Nk, D]; use it as
    `attn(q, k, v, estimate=est)` with `Spec(keys=ag.adaptive(block), mask=ag.causal())`.

    a-shape: the first `sink` keys (None: block, and at most a quarter of the budget) and the last budget - sink.
    vertical-slash: the budget / 2 keys, and the runs of `block` distances, that get most of the `last` queries' attention;
    a run counts as 2 * block keys, since it touches two tiles of a row. block-cluster: budget / block tiles per query tile
    with the largest product of their mean query and mean key. The mass each covers is measured with the last queries.
    Raises InputError.
    """
    for name, value, least in (
        ("block", block, 16),
        ("budget", budget, 2),
        ("last", last, 1),
        ("q_offset", q_offset, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name, f"an int of at least {least}", repr(value))
    if budget < 4 * block:
        raise InputError("budget", f"at least 4 * block = {4 * block}", budget)
    sink = min(block, budget // 4) if sink is None else sink
    if isinstance(sink, bool) or not isinstance(sink, int) or not 0 <= sink < budget:
        raise InputError("sink", f"an int from 0 to {budget - 1}", repr(sink))
    _check(q, k)
    with torch.no_grad():
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        sample = _Sample(q, k, min(last, q.shape[2]), scale, q_offset)
        column, distance = sample.marginals(block)
        n_k = k.shape[2]
        vertical = column.topk(min(budget // 2, n_k), -1).indices
        bands = distance.unflatten(-1, (-1, block)).sum(-1)
        band = bands.topk(min(max(1, (budget - budget // 2) // (2 * block)), bands.shape[2]), -1).indices
        index = _clusters(q, k, block, budget // block, q_offset)
        mass = sample.covered(block, sink, budget - sink, vertical, band, index)
        return Estimate(block, sink, budget - sink, n_k, mass.argmax(-1), mass, vertical, band, index)


def _check(q: Any, k: Any) -> None:
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            got = f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(name, "4 dimensions [batch, heads, length, head dim]", got)
        if 0 in x.shape:
            raise InputError(name, "at least one row, to estimate from", f"shape {list(x.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1] or k.device != q.device:
        raise InputError("k", f"batch, head dim and device like q's {list(q.shape)}, heads that divide", list(k.shape))


class _Sample:
    """The attention of the last queries, a chunk of keys at a time."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, rows: int, scale: float, q_offset: int):
        self.q, self.k, self.rows, self.scale = q[:, :, -rows:], k, rows, scale
        self.first_row, self.end = q.shape[2] - rows, q_offset + q.shape[2]  # positions end before `end`
        self.position = torch.arange(self.end - rows, self.end, device=q.device)
        self.chunk = max(64, SCORES // (q.shape[0] * q.shape[1] * rows))
        lse = torch.full((*q.shape[:2], rows), -torch.inf, device=q.device)
        for _, logits in self._logits():
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
        self.lse = torch.where(lse.isneginf(), 0.0, lse).unsqueeze(-1)

    def _logits(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(keys [C], logits float32 [B, H, rows, C], -inf for keys after the query)."""
        batch, heads, kv_heads = self.q.shape[0], self.q.shape[1], self.k.shape[1]
        packed = self.q.float().reshape(batch, kv_heads, -1, self.q.shape[3])
        for start in range(0, self.k.shape[2], self.chunk):
            part = self.k[:, :, start : start + self.chunk].float()
            key = torch.arange(start, start + part.shape[2], device=part.device)
            logits = (packed @ part.mT).view(batch, heads, self.rows, -1) * self.scale
            yield key, torch.where(self.position.unsqueeze(-1) >= key, logits, -torch.inf)

    def weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(keys [C], attention weights [B, H, rows, C])."""
        for key, logits in self._logits():
            yield key, torch.exp(logits - self.lse)

    def marginals(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention that each key gets [B, H, Nk], and each distance [B, H, whole blocks of distances]."""
        lead, n_k, device = self.q.shape[:2], self.k.shape[2], self.q.device
        column = torch.zeros((*lead, n_k), device=device)
        line = torch.zeros((*lead, n_k + self.rows - 1), device=device)  # of distance end - 1 - place
        start = 0
        for key, weight in self.weights():
            stop = start + len(key)
            column[..., start:stop] = weight.sum(2)
            # Rows from the last to the first, each shifted by one more: what is equally far apart stands in a column.
            skewed = torch.nn.functional.pad(weight.flip(2), (0, self.rows)).flatten(2)[..., : -self.rows]
            line[..., start : stop + self.rows - 1] += skewed.unflatten(-1, (self.rows, -1)).sum(2)
            start = stop
        place = self.end - 1 - torch.arange(-(-self.end // block) * block, device=device)
        inside = (place >= 0) & (place < line.shape[2])
        return column, torch.where(inside, line[..., place.clamp(0, line.shape[2] - 1)], 0.0)

    def covered(
        self, block: int, sink: int, window: int, vertical: torch.Tensor, band: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        """The share of the attention inside each of the three patterns, [B, H, 3]."""
        lead, device = self.q.shape[:2], self.q.device
        row_tile = torch.arange(self.first_row, self.first_row + self.rows, device=device) // block
        first_tile, tiles_k = self.first_row // block, -(-self.k.shape[2] // block)
        column = torch.zeros((*lead, self.k.shape[2]), dtype=torch.bool, device=device).scatter_(-1, vertical, True)
        bands = torch.zeros((*lead, -(-self.end // block)), dtype=torch.bool, device=device).scatter_(-1, band, True)
        listed = index[:, :, first_tile:]
        tile = torch.zeros((*listed.shape[:3], tiles_k + 1), dtype=torch.bool, device=device)
        tile = tile.scatter_(-1, torch.where(listed < 0, tiles_k, listed), True)
        total = torch.zeros((*lead, 3), device=device)
        for key, weight in self.weights():
            distance = self.position.unsqueeze(-1) - key  # [rows, C]
            inside = (
                (key < sink) | (distance < window),
                column[..., key].unsqueeze(2) | bands[..., distance.clamp(min=0) // block],
                tile[:, :, row_tile - first_tile][..., key // block],
            )
            total += torch.stack([torch.where(hit, weight, 0.0).sum((2, 3)) for hit in inside], -1)
        return total / self.rows


# -- averages of tiles ------------------------------------------------------------------------------------------------


def pooled(x: torch.Tensor, block: int) -> torch.Tensor:
    """The mean row of each tile of `block` rows: x [B, H, N, D] -> float32 [B, H, tiles, D]."""
    ragged = -x.shape[2] % block
    total = torch.nn.functional.pad(x, (0, 0, 0, ragged)).unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
    size = torch.full((total.shape[2], 1), float(block), device=x.device)
    if ragged:
        size[-1] = block - ragged
    return total / size


def tile_scores(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Products of q [B, Hq, tiles_q, D] and k [B, Hkv, tiles_k, D], some query tiles at a time: (query tiles [R], scores
    [B, Hq, R, tiles_k]).
    """
    batch, heads, tiles_q, dim = q.shape
    rows = max(1, SCORES // max(1, batch * heads * k.shape[2]))
    for start in range(0, tiles_q, rows):
        part = q[:, :, start : start + rows]
        packed = part.reshape(batch, k.shape[1], -1, dim)
        row = torch.arange(start, start + part.shape[2], device=q.device)
        yield row, (packed @ k.mT).view(batch, heads, len(row), -1)


def _clusters(q: torch.Tensor, k: torch.Tensor, block: int, most: int, q_offset: int) -> torch.Tensor:
    tiles_k, found = -(-k.shape[2] // block), []
    for row, score in tile_scores(pooled(q, block), pooled(k, block)):
        last = q_offset + ((row + 1) * block).clamp(max=q.shape[2]) - 1
        seen = torch.arange(tiles_k, device=q.device) * block <= last.unsqueeze(-1)
        best = torch.where(seen, score, -torch.inf).topk(min(most, tiles_k), -1)
        found.append(torch.where(best.values.isneginf(), -1, best.indices))
    return torch.cat(found, 2)

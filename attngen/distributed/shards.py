"""Who has which part of a sequence: layouts of shards over the ranks of a process group, and what a ring has to move.

Positions are those of the whole sequence. A rank's shard is one run of them ("contiguous"), or two ("paired": chunk r and
chunk 2W - 1 - r of 2W, so that a causal mask gives every rank the same work). Shards may have any lengths, 0 included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from attngen.errors import InputError

LAYOUTS = ("contiguous", "paired")


def spans(sizes: Sequence[int], layout: str = "contiguous") -> list[list[range]]:
    """The positions of each rank's rows in their order, for shards of `sizes` rows: one range a rank, or two if paired.

    Paired, the first ceil(n / 2) rows of a shard are its head; the heads stand in the order of ranks, then the tails in the
    opposite order. Raises InputError for an unknown layout.
    """
    check_layout(layout)
    if layout == "contiguous":
        return [[part] for part in _runs(sizes)]
    heads = [-(-size // 2) for size in sizes]
    tails = [size - head for size, head in zip(sizes, heads, strict=True)]
    parts = _runs([*heads, *reversed(tails)])
    world = len(heads)
    return [[parts[rank], parts[2 * world - 1 - rank]] for rank in range(world)]


def equal_sizes(length: int, world: int) -> list[int]:
    """Lengths of shards that differ by at most one row (by two, paired, so that chunks differ by at most one)."""
    return [length // world + (rank < length % world) for rank in range(world)]


def positions(rank: int, sizes: Sequence[int], layout: str = "contiguous") -> torch.Tensor:
    """int64 [sizes[rank]]: the position of each row of a rank's shard, e.g. for rotary embeddings."""
    return torch.cat([torch.arange(part.start, part.stop) for part in spans(sizes, layout)[rank]])


def shard(
    x: torch.Tensor, rank: int, sizes: int | Sequence[int], layout: str = "contiguous", dim: int = 2
) -> torch.Tensor:
    """A rank's part of a whole tensor along `dim`. sizes: the shards' lengths, or how many ranks there are. Differentiable.
    Raises InputError if the lengths do not add up.
    """
    if isinstance(sizes, int):
        sizes = equal_sizes(x.shape[dim], sizes)
    if sum(sizes) != x.shape[dim]:
        raise InputError("sizes", f"lengths that add up to {x.shape[dim]}", list(sizes))
    return torch.cat([x.narrow(dim, part.start, len(part)) for part in spans(sizes, layout)[rank]], dim)


def unshard(shards: Sequence[torch.Tensor], layout: str = "contiguous", dim: int = 2) -> torch.Tensor:
    """The whole tensor from the shards of all ranks, in the order of ranks. Differentiable."""
    parts = []
    for x, own in zip(shards, spans([x.shape[dim] for x in shards], layout), strict=True):
        parts += [
            (part.start, len(part), piece) for part, piece in zip(own, x.split([*map(len, own)], dim), strict=True)
        ]
    return torch.cat([piece for _, _, piece in sorted(parts, key=lambda part: part[:2])], dim)


@dataclass(frozen=True, eq=False)
class Shards:
    """What the ranks of a ring agreed on for calls of given sizes (and data, where the mask reads some).

    q, k: for each rank the ranges of its rows' positions. tiles: int64 [W, W] on the CPU, how many 128 x 128 tiles of the
    queries of rank r (row) on the keys of rank s (column) have to be computed, over batches and heads.
    live: for each rank s, which of [own q ranges][k ranges of s] have any. of: what else it was made for.
    """

    rank: int
    q: list[list[range]]
    k: list[list[range]]
    tiles: torch.Tensor
    live: list[list[list[bool]]]
    of: tuple[Any, ...]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.q)

    @property
    def hops(self) -> list[int]:
        """How many neighbours each rank's keys have to be handed on to: none beyond the last rank that sees them."""
        seen = (self.tiles > 0).tolist()
        return [max(t for t in range(self.world) if t == 0 or seen[(s + t) % self.world][s]) for s in range(self.world)]

    @property
    def balance(self) -> float:
        """Tiles of the mean rank over those of the busiest one, which everybody waits for."""
        each = self.tiles.sum(1).double()
        return float(each.mean() / each.max()) if each.any() else 1.0

    def n_k(self, rank: int) -> int:
        """Length of a rank's keys."""
        return sum(map(len, self.k[rank]))


def check_layout(layout: str) -> None:
    """InputError for an unknown layout."""
    if layout not in LAYOUTS:
        raise InputError("layout", f"one of {', '.join(LAYOUTS)}", repr(layout))


def _runs(sizes: Sequence[int]) -> list[range]:
    return [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

"""Ways of moving rows: what `Take` and `Put` steps do to tensors [B, H, N, *].

Each has three forms: `apply` takes rows out of a tensor, `back` adds rows to the tensor they were taken from (the gradient of
`apply`), and `put` puts results to their places. An index holds row numbers in all of a tensor's B * H * N rows, so that a
move is one gather whatever the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import pad

from attngen.plan.memory import full

Shape = Sequence[int]


class Move(Protocol):
    """Moves rows of [B, H, N, *]. index: None for moves that need none. fill: what stands in rows that nobody fills."""

    def shape(self, own: Shape, index: Shape | None) -> tuple[int, ...]:
        """The first three sizes after `apply`, from those before."""
        ...

    def apply(self, x: torch.Tensor, index: torch.Tensor | None, fill: float = 0.0) -> torch.Tensor: ...

    def put(self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, fill: float) -> torch.Tensor:
        """Rows of `y` in their places of a new tensor with these first three sizes."""
        ...

    def back(
        self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, total: torch.Tensor | None
    ) -> torch.Tensor:
        """`total` (None: zeros, with these first three sizes) plus the rows of `y` in their places; it may be changed."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows by index, int64 [B', H', n]. unique: no row is taken twice."""

    unique: bool = True

    def shape(self, own: Shape, index: Shape | None) -> tuple[int, ...]:
        assert index is not None
        return tuple(index)

    def apply(self, x: torch.Tensor, index: torch.Tensor | None, fill: float = 0.0) -> torch.Tensor:
        assert index is not None
        rest = x.shape[3:]
        return x.reshape(-1, *rest).index_select(0, index.reshape(-1)).view(*index.shape, *rest)

    def put(self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, fill: float) -> torch.Tensor:
        assert index is not None
        rest, flat = y.shape[3:], index.reshape(-1)
        rows = shape[0] * shape[1] * shape[2]
        result = full(y, (rows, *rest), None if flat.shape[0] == rows else fill)
        return result.index_copy_(0, flat, y.reshape(-1, *rest)).view(*shape, *rest)

    def back(
        self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, total: torch.Tensor | None
    ) -> torch.Tensor:
        if self.unique and total is None:
            return self.put(y, index, shape, 0.0)
        assert index is not None
        rest = y.shape[3:]
        if total is None:
            total = full(y, (*shape, *rest), 0.0)
        into, flat, rows = total.view(-1, *rest), index.reshape(-1), y.reshape(-1, *rest)
        if total.is_cuda:  # sorts instead of atomics: the same sum every time
            into.index_put_((flat,), rows, accumulate=True)
        else:  # a third of the time of index_add_
            into.scatter_add_(0, flat.unsqueeze(-1).expand_as(rows), rows)
        return total


@dataclass(frozen=True)
class Pad:
    """Rows behind the last one, up to `length`."""

    length: int

    def shape(self, own: Shape, index: Shape | None) -> tuple[int, ...]:
        return (*own[:2], self.length)

    def apply(self, x: torch.Tensor, index: torch.Tensor | None, fill: float = 0.0) -> torch.Tensor:
        return _padded(x, self.length, fill)

    def put(self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, fill: float) -> torch.Tensor:
        return y[:, :, : shape[2]]

    def back(
        self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, total: torch.Tensor | None
    ) -> torch.Tensor:
        own = y[:, :, : shape[2]]
        return own if total is None else total.add_(own)


@dataclass(frozen=True)
class Parts:
    """`count` equal parts of `length` rows, padded where the last ones lack some, as batches: [B * count, H, length]."""

    count: int
    length: int

    def shape(self, own: Shape, index: Shape | None) -> tuple[int, ...]:
        return own[0] * self.count, own[1], self.length

    def apply(self, x: torch.Tensor, index: torch.Tensor | None, fill: float = 0.0) -> torch.Tensor:
        x = _padded(x, self.count * self.length, fill)
        return x.unflatten(2, (self.count, self.length)).transpose(1, 2).flatten(0, 1)

    def put(self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, fill: float) -> torch.Tensor:
        return y.unflatten(0, (shape[0], self.count)).transpose(1, 2).flatten(2, 3)[:, :, : shape[2]]

    def back(
        self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, total: torch.Tensor | None
    ) -> torch.Tensor:
        own = self.put(y, None, shape, 0.0)
        return own if total is None else total.add_(own)


@dataclass(frozen=True)
class Samples:
    """The rows of the `count` samples that share a context, one after the other: [B, H, n] -> [B / count, H, count * n]."""

    count: int

    def shape(self, own: Shape, index: Shape | None) -> tuple[int, ...]:
        return own[0] // self.count, own[1], self.count * own[2]

    def apply(self, x: torch.Tensor, index: torch.Tensor | None, fill: float = 0.0) -> torch.Tensor:
        return x.unflatten(0, (-1, self.count)).transpose(1, 2).flatten(2, 3)

    def put(self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, fill: float) -> torch.Tensor:
        return y.unflatten(2, (self.count, shape[2])).transpose(1, 2).flatten(0, 1)

    def back(
        self, y: torch.Tensor, index: torch.Tensor | None, shape: Shape, total: torch.Tensor | None
    ) -> torch.Tensor:
        own = self.put(y, None, shape, 0.0)
        return own if total is None else total.add_(own)


def flat_rows(index: torch.Tensor, length: int) -> torch.Tensor:
    """Row numbers in all of [B, H, length, *] for index [B, H, ...] within each (b, h)."""
    batch, heads = index.shape[:2]
    base = torch.arange(batch * heads, device=index.device) * length
    return index + base.view(batch, heads, *(1 for _ in index.shape[2:]))


def shared_rows(index: torch.Tensor, heads: int, length: int) -> torch.Tensor:
    """The same for [B, heads, length, *] and an index [B, H, n] of H >= heads lists: the lists of a group share a head's rows."""
    grouped = index.unflatten(1, (heads, index.shape[1] // heads))
    return flat_rows(grouped, length).flatten(1, 2)


def _padded(x: torch.Tensor, length: int, fill: float) -> torch.Tensor:
    if x.shape[2] == length:
        return x
    return pad(x, (0, 0) * (x.dim() - 3) + (0, length - x.shape[2]), value=fill)

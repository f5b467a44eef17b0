"""Gradients of captured tensors: for each place that a score loads from, what a kernel leaves behind.

A pair (i, j) contributes w = P * (dP - delta) * d score / d load to the loaded element. Which pairs share an element
decides how the contributions are added up, always in a fixed order:

| the load's indices use | kind    | the kernel's buffer, float32 |
|---|---|---|
| neither i nor j        | "total" | [B, heads, query tiles]: sums over the tile's rows and its keys |
| i                      | "rows"  | [B, heads, n_q] |
| j                      | "keys"  | [B, heads, n_k]; a key tile walks the queries |
| i and j, in one index  | "bins"  | [B, heads, query tiles, size of that dimension]; zeroed before |
| i and j, otherwise     | "pairs" | [B or 1, heads or 1, n_q, n_k]; zeroed before; summed over batch or heads that share elements |

With a list of keys per query a tile is one query, "pairs" are added with atomics (a key may be listed twice), and the
weights of listed keys are a site of their own: "edges", [B, list heads, listed keys], zeroed before.

`collect` adds a buffer up to the tensor's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from attngen.language.programs import INDEX, ROW, Node, evaluate, names_in, tensor_of

CAPTURED = "captured "  # before the name of a captured tensor among a kernel's tensors, which it may be called like
B, H, I, J = (INDEX[axis] for axis in "bhij")


def buffer_name(tensor: str, number: int) -> str:
    """What the buffer of a tensor's site is called among a kernel's tensors."""
    return f"gradient {number} of {tensor}"


@dataclass(frozen=True)
class CaptureSite:
    """One load of a captured tensor in the score, and how its gradient is collected.

    tensor, number, deterministic: which one it is. kind: see the module. dims: for "bins" and "atomic", the tensor's dimensions whose
    index depends on i or j. indices: of the load. by_batch, by_head: whether each batch, each head, has elements of its own.
    """

    tensor: str
    number: int
    deterministic: bool
    kind: str
    dims: tuple[int, ...] = ()
    indices: tuple[Node, ...] = ()
    by_batch: bool = True
    by_head: bool = True

    @property
    def by_keys(self) -> bool:
        """Whether a key tile walks the queries."""
        return self.kind == "keys"

    @property
    def over_batches(self) -> bool:
        """Whether batches share its pairs, so that a program of dq takes a query tile of each of them in turn."""
        return self.kind == "pairs" and not self.by_batch

    def buffer_shape(
        self, batch: int, heads: int, n_q: int, n_k: int, block_m: int, sizes: tuple[int, ...]
    ) -> list[int]:
        """Shape of the float32 buffer that the kernel writes. heads: of the list for "edges". `sizes`: the captured tensor's shape."""
        tiles, bins = -(-n_q // block_m), [sizes[d] for d in self.dims]
        if self.kind == "pairs":
            return [batch if self.by_batch else 1, heads if self.by_head else 1, n_q, n_k]
        inner = {
            "edges": [*sizes[2:]],
            "total": [tiles],
            "rows": [n_q],
            "keys": [n_k],
            "bins": [tiles, *bins],
            "atomic": bins,
        }
        return [batch, heads, *inner[self.kind]]

    def within(self, batch: int, heads: int, offsets: bool) -> CaptureSite:
        """The same in calls of that many batches and query heads: a single one has elements of its own, whatever the indices use.
        offsets: whether each batch has its own q_offset; then rows of one number are at different positions.
        """
        if self.kind != "pairs":  # the other buffers don't depend on it
            return self
        moved = offsets and any("i" in names_in(index) for index in self.indices if index != ROW)
        by_batch = self.by_batch or batch == 1 or moved
        return replace(self, by_batch=by_batch, by_head=self.by_head or heads == 1)

    @property
    def buffer(self) -> str:
        """What its buffer is called among a kernel's tensors."""
        return buffer_name(self.tensor, self.number)

    @property
    def zeroed(self) -> bool:
        """Whether the buffer has to be zero before the launch; otherwise every element is written."""
        return self.kind in ("pairs", "bins", "atomic", "edges")


EDGE_WEIGHTS = CaptureSite("edge_weight", 0, True, "edges")


@dataclass(frozen=True)
class SinkSlope:
    """A load of a captured tensor in the sink: its indices, and the sink's derivative by it."""

    indices: tuple[Node, ...]
    slope: Node


def collect(
    site: CaptureSite, buffer: torch.Tensor, tensor: torch.Tensor, env: Mapping[str, Any], shifted: bool = False
) -> torch.Tensor:
    """The gradient of the captured tensor (float32, its shape) from the kernel's buffer.

    `env`: params and captures by name; "b" [B, 1, 1, 1], "h" [1, H, 1, 1], "i" [B or 1, 1, n_q, 1] and "j" [1, 1, 1, n_k],
    original positions, and "q_offset". `shifted`: whether query rows stand elsewhere than at positions 0, 1, ...
    """
    if site.kind == "edges":
        return buffer.sum_to_size(tensor.shape)
    if site.kind == "bins":
        buffer = buffer.sum(2)
    elif site.kind == "total":
        buffer = buffer.sum(2)[..., None, None]
    elif site.kind == "rows":
        buffer = buffer[..., None]
    elif site.kind == "keys":
        buffer = buffer[..., None, :]
    binned = site.dims if site.kind in ("bins", "atomic") else ()
    # What each dimension of the buffer, and of the tensor, runs over: a symbol, an index expression, or a binned dimension.
    axes: list[Any] = [B, H, *binned] if binned else [B, H, I, J]
    indices: list[Any] = [d if d in binned else index for d, index in enumerate(site.indices)]
    places = [I if index is ROW else index for index in indices]
    if len(set(places)) == len(places) and set(places) <= set(axes) and not (shifted and I in indices):
        gone = [axis for axis, what in enumerate(axes) if what not in places]
        left = [what for what in axes if what in places]
        summed = buffer.sum(gone) if gone else buffer
        return _padded(summed.permute([left.index(place) for place in places]), tensor.shape)
    index = [_lookup(place, size, axes, buffer, env) for place, size in zip(indices, tensor.shape, strict=True)]
    return buffer.new_zeros(tensor.shape).index_put_(tuple(index), buffer, accumulate=True)


def _lookup(place: Any, size: int, axes: list[Any], buffer: torch.Tensor, env: Mapping[str, Any]) -> torch.Tensor:
    """For every element of the buffer, its index in one dimension of the tensor."""
    if isinstance(place, int):
        shape = [size if axis == place else 1 for axis in axes]
        return torch.arange(size, device=buffer.device).view(shape).expand(buffer.shape)
    value = tensor_of(evaluate(place, env), buffer.device).clamp(0, size - 1).long()
    if value.dim() == 4:
        value = value.view(*value.shape[:2], *(value.shape[2:] if I in axes else [1] * (len(axes) - 2)))
    return value.expand(buffer.shape)


def _padded(gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A tensor may be longer than the lengths that index it."""
    if gradient.shape == shape:
        return gradient
    out = gradient.new_zeros(shape)
    out[tuple(slice(0, n) for n in gradient.shape)] = gradient
    return out

"""Gradients of captured tensors: one launch per place that a score loads from, and what the launch leaves behind.

A pair (i, j) contributes w = P * (dP - delta) * d score / d load to the loaded element. Which pairs share an element
decides how the contributions are added up, always in a fixed order:

| the load's indices use | kind    | the kernel's buffer, float32 |
|---|---|---|
| neither i nor j        | "total" | [B, heads, query tiles]: sums over the tile's rows and its keys |
| i                      | "rows"  | [B, heads, n_q] |
| j                      | "keys"  | [B, heads, n_k]; a key tile walks the queries |
| i and j, in one index  | "bins"  | [B, heads, query tiles, size of that dimension]; zeroed before |
| i and j, otherwise     | "pairs" | [B or 1, heads or 1, n_q, n_k]; zeroed before; summed over batch or heads that no index uses |

With a list of keys per query a tile is one query, "pairs" are added with atomics (a key may be listed twice), and the
weights of listed keys are a site of their own: "edges", [B, list heads, listed keys], zeroed before.

`collect` adds a buffer up to the tensor's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attngen.language.expression import ROW, B, H, I, J
from attngen.language.programs import evaluate, tensor_of


@dataclass(frozen=True)
class Site:
    """One load of a captured tensor in the score, and the score's derivative by it.

    kind: see the module. dims: for "bins" and "atomic", the tensor's dimensions whose index depends on i or j.
    """

    load: Any
    slope: Any
    kind: str
    dims: tuple[int, ...]

    @property
    def tensor(self) -> str:
        """The captured tensor's name."""
        return str(self.load.name)

    @property
    def by_keys(self) -> bool:
        """Whether a key tile walks the queries."""
        return self.kind == "keys"

    def uses(self, symbol: Any) -> bool:
        """Whether an index of the load depends on this symbol."""
        return any(symbol in index.free_symbols for index in self.load.indices)

    def buffer_shape(
        self, batch: int, heads: int, n_q: int, n_k: int, block_m: int, sizes: tuple[int, ...]
    ) -> list[int]:
        """Shape of the float32 buffer that the kernel's argument `grad` points to. `sizes`: the captured tensor's shape."""
        tiles, bins = -(-n_q // block_m), [sizes[d] for d in self.dims]
        if self.kind == "pairs":
            return [batch if self.uses(B) else 1, heads if self.uses(H) else 1, n_q, n_k]
        inner = {"total": [tiles], "rows": [n_q], "keys": [n_k], "bins": [tiles, *bins], "atomic": bins}
        return [batch, heads, *inner[self.kind]]

    @property
    def zeroed(self) -> bool:
        """Whether the buffer has to be zero before the launch; otherwise every element is written."""
        return self.kind in ("pairs", "bins", "atomic", "edges")


# The weights of listed keys are added to the score: their slope is 1.
EDGES = Site(None, 1, "edges", ())


def sites(load_grads: Any, deterministic: bool = True) -> tuple[Site, ...]:
    """The sites of one captured tensor; `load_grads` are pairs (Load, derivative). Not deterministic: what would be
    "bins" or scattered "pairs" is added with atomics into [B, heads, sizes of the dimensions that depend on i or j]."""
    return tuple(_site(load, slope, deterministic) for load, slope in load_grads)


def _site(load: Any, slope: Any, deterministic: bool) -> Site:
    dims = tuple(d for d, index in enumerate(load.indices) if index.free_symbols & {I, J})
    used = frozenset().union(*[load.indices[d].free_symbols & {I, J} for d in dims])
    plain = [I if load.indices[d] == ROW else load.indices[d] for d in dims]
    if not used:
        kind = "total"
    elif used == {I}:
        kind = "rows"
    elif used == {J}:
        kind = "keys"
    elif sorted(plain, key=str) == [I, J]:
        kind = "pairs"
    elif not deterministic:
        kind = "atomic"
    else:
        kind = "bins" if len(dims) == 1 else "pairs"
    return Site(load, slope, kind, dims)


def collect(
    site: Site, buffer: torch.Tensor, tensor: torch.Tensor, env: Mapping[str, Any], shifted: bool = False
) -> torch.Tensor:
    """The gradient of the captured tensor (float32, its shape) from the kernel's buffer.

    `env`: params and captures by name; "b" [B, 1, 1, 1], "h" [1, H, 1, 1], "i" [B or 1, 1, n_q, 1] and "j" [1, 1, 1, n_k],
    original positions, and "q_offset". `shifted`: whether query rows stand elsewhere than at positions 0, 1, ...
    """
    if site.kind in ("total", "bins"):
        buffer = buffer.sum(2)
    if site.kind in ("total", "rows"):
        buffer = buffer.view(*buffer.shape[:2], -1, 1)
    elif site.kind == "keys":
        buffer = buffer.view(*buffer.shape[:2], 1, -1)
    binned = site.dims if site.kind in ("bins", "atomic") else ()
    # What each dimension of the buffer, and of the tensor, runs over: a symbol, an index expression, or a binned dimension.
    axes = [B, H, *binned] if binned else [B, H, I, J]
    indices = [d if d in binned else index for d, index in enumerate(site.load.indices)]
    places = [I if index == ROW else index for index in indices]
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

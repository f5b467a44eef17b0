"""Plausible captures for each key set, so that it can be drawn from its text alone."""

from __future__ import annotations

from typing import Any

import torch

from attngen.errors import InputError
from attngen.language.keyset import KeySet
from attngen.plan.keysets.estimate import estimate


def made_up(
    keys: KeySet, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, q_offset: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """Values for what a key set takes at the call, and for each what it is, in words. InputError for one it does not know."""
    values: dict[str, Any] = {}
    words = []
    maker = _Maker(keys, q, k, v, q_offset)
    for name in keys.captures():
        if name in keys.optional and (keys.name, name) not in _NEEDED:
            continue
        make = getattr(maker, name, None)
        if make is None:
            raise InputError(
                name, "a capture that a picture can make up", f"one of {keys.name}", "draw another key set"
            )
        values[name], how = make()
        words.append(f"{name} = {how}")
    return values, words


# Optional at the call, because something else may be given instead of them.
_NEEDED = {("block_sparse", "layout"), ("graph", "crow"), ("graph", "col")}


class _Maker:
    """One method per capture: its value, and what it is."""

    def __init__(self, keys: KeySet, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: int):
        self.keys, self.q, self.k, self.v, self.q_offset = keys, q, k, v, q_offset
        self.generator = torch.Generator().manual_seed(1)

    def _random(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def _keep(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return torch.rand(x.shape[:3], generator=self.generator) < 0.5, "a random half"

    def keep_q(self) -> Any:
        return self._keep(self.q)

    def keep_k(self) -> Any:
        return self._keep(self.k)

    def q_bucket(self) -> Any:
        return self._random(min(8, getattr(self.keys, "buckets", None) or 8), *self.q.shape[:3]), "random buckets"

    def k_bucket(self) -> Any:
        return self._random(min(8, getattr(self.keys, "buckets", None) or 8), *self.k.shape[:3]), "random buckets"

    def seed(self) -> Any:
        return 0, "0"

    def count(self) -> Any:
        return self._random(4, *self.k.shape[:3]), "random, 0 to 3"

    def u(self) -> Any:
        return torch.randn(self.k.shape[:3], generator=self.generator), "random"

    def _grid(self) -> tuple[int, int]:
        block_m, block_n = self.keys.block  # type: ignore[attr-defined]
        return -(-self.q.shape[2] // block_m), -(-self.k.shape[2] // block_n)

    def layout(self) -> Any:
        tiles_q, tiles_k = self._grid()
        share = torch.rand((1, 1, tiles_q, tiles_k), generator=self.generator)
        return (share < 0.25) | torch.eye(tiles_q, tiles_k, dtype=torch.bool), "the diagonal and a random quarter"

    def index(self) -> Any:
        if self.keys.name == "block_cluster":
            tiles_q, tiles_k = self._grid()
            return self._random(tiles_k, 1, 1, tiles_q, 4), "4 random tiles a row"
        most = max(1, self.k.shape[2] // 16)
        return self._random(self.k.shape[2], *self.k.shape[:2], most), f"{most} random rows"

    def vertical(self) -> Any:
        return self._random(self.k.shape[2], *self.q.shape[:2], 8), "8 random keys"

    def slash(self) -> Any:
        near = torch.arange(self.q.shape[2] // 32).expand(*self.q.shape[:2], -1)
        far = self._random(self.q.shape[2] + self.q_offset, *self.q.shape[:2], 6)
        return torch.cat([near, far], -1), f"distances below {near.shape[2]} and 6 random ones"

    def estimate(self) -> Any:
        block = self.keys.block  # type: ignore[attr-defined]
        return estimate(self.q, self.k, block=block, budget=4 * block, q_offset=self.q_offset), "of these q and k"

    def page_table(self) -> Any:
        pages, batch = self.k.shape[0] // self.q.shape[0], self.q.shape[0]
        order = torch.randperm(pages * batch, generator=self.generator)
        return order.view(batch, pages), "all pages, in a random order"

    def prefix_k(self) -> Any:
        return self._prefix(self.k), "random, as long as k"

    def prefix_v(self) -> Any:
        return self._prefix(self.v), "random, as long as v"

    def _prefix(self, own: torch.Tensor) -> Any:
        levels: int = self.keys.levels  # type: ignore[attr-defined]
        parts = [torch.randn((1, *own.shape[1:]), generator=self.generator).to(own.dtype) for _ in range(levels)]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def crow(self) -> Any:
        return torch.arange(0, 6 * self.q.shape[2] + 1, 6), "6 edges a row"

    def col(self) -> Any:
        picked = self._random(self.k.shape[2], self.q.shape[2], 6).sort(-1).values
        return picked.flatten(), "random keys"

"""Batches of serving engines, and dense attention over them in float64, request by request, that shares nothing with attngen."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """An attention, and the requests of a batch: of each the keys that are cached already, and the new queries."""

    requests: tuple[tuple[int, int], ...] = ((30, 1), (7, 1), (64, 1), (0, 21), (12, 9), (5, 9))
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block: int = 16
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False
    causal: bool | tuple[bool, ...] = True

    @property
    def scale(self) -> float:
        return 0.3

    @property
    def rows(self) -> int:
        return sum(new for _, new in self.requests)

    @property
    def lengths(self) -> list[int]:
        return [cached + new for cached, new in self.requests]

    @property
    def starts(self) -> list[int]:
        """The row of each request's first query, and the end."""
        return [0, *torch.tensor([new for _, new in self.requests]).cumsum(0).tolist()]

    @property
    def slopes(self) -> list[float] | None:
        return [2.0 ** -(1 + head) for head in range(self.heads)] if self.alibi else None

    def sinks_of(self, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.linspace(-1, 2, self.heads).to(dtype) if self.sinks else None


CASES = {
    "grouped heads": Case(),
    "a kv head for each": Case(kv_heads=4),
    "one kv head": Case(kv_heads=1, block=32),
    "only decoding": Case(requests=((30, 1), (7, 1), (0, 1))),
    "decoding between prefills": Case(requests=((3, 1), (0, 8), (9, 1), (1, 1))),
    "some tokens each": Case(requests=((30, 4), (7, 4), (64, 4))),  # speculative decoding
    "requests that fill up": Case(requests=((30, 1), (7, 1), (0, 0), (0, 5), (0, 0))),
    "large blocks": Case(block=64),
    "window": Case(window=9),
    "window of a block": Case(window=16, block=16),
    "soft-cap": Case(soft_cap=2.0),
    "alibi": Case(alibi=True),
    "sinks": Case(sinks=True, window=20),
    "all of it": Case(window=11, soft_cap=3.0, alibi=True, sinks=True, block=32, kv_heads=1),
    "full": Case(causal=False),
    "full, window, alibi": Case(causal=False, window=6, alibi=True),
    "full for some": Case(causal=(True, True, False, False, True, False), window=8, sinks=True, alibi=True),
}


@dataclass
class Inputs:
    """What an engine hands over. q [rows, Hq, D], k and v [rows, Hkv, D] of the new tokens, old_k and old_v of each request's cached
    ones, table int32 [requests, blocks], slots int64 [rows].
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    old: list[tuple[torch.Tensor, torch.Tensor]]
    table: torch.Tensor
    slots: torch.Tensor
    blocks: int

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(1)

        def values(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, case.head_dim, generator=generator).to(dtype)

        needed = [-(-length // case.block) for length in case.lengths]
        blocks = sum(needed) + 3
        order = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()  # an engine never gives away block 0
        table = torch.full(
            (len(needed), max(needed) + 2), 9999, dtype=torch.int32
        )  # columns that nobody reads hold anything
        slots = []
        for row, count in enumerate(needed):
            own = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
            table[row, :count] = own
            position = torch.arange(case.requests[row][0], case.lengths[row])
            slots.append(own.long()[position // case.block] * case.block + position % case.block)
        old = [(values(cached, case.kv_heads), values(cached, case.kv_heads)) for cached, _ in case.requests]
        q, k, v = (values(case.rows, heads) for heads in (case.heads, case.kv_heads, case.kv_heads))
        return cls(q, k, v, old, table, torch.cat(slots), blocks)

    def cached_slots(self, case: Case, row: int) -> torch.Tensor:
        position = torch.arange(case.requests[row][0])
        return self.table[row].long()[position // case.block] * case.block + position % case.block


def dense(case: Case, inputs: Inputs) -> torch.Tensor:
    """[rows, Hq, D] in float64."""
    found = []
    for row, (start, end) in enumerate(zip(case.starts, case.starts[1:], strict=False)):
        k, v = (
            torch.cat([old, new[start:end]]).double().repeat_interleave(case.heads // case.kv_heads, 1)
            for old, new in zip(inputs.old[row], (inputs.k, inputs.v), strict=True)
        )
        causal = case.causal[row] if isinstance(case.causal, tuple) else case.causal
        position = torch.arange(case.lengths[row])
        distance = position[case.requests[row][0] :, None] - position[None, :]
        seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if case.window is not None:
            seen = seen & (distance.abs() < case.window)
        s = torch.einsum("qhd,khd->hqk", inputs.q[start:end].double(), k) * case.scale
        if case.soft_cap is not None:
            s = case.soft_cap * torch.tanh(s / case.soft_cap)
        if case.alibi:
            s = s - torch.tensor(case.slopes, dtype=torch.float64)[:, None, None] * distance.abs()
        s = s.masked_fill(~seen, -torch.inf)
        if case.sinks:
            sink = case.sinks_of(inputs.q.dtype).double()[:, None, None].expand(-1, end - start, 1)
            p = torch.cat([s, sink], -1).softmax(-1)[..., :-1]
        else:
            p = s.softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", p, v))
    return torch.cat(found)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())

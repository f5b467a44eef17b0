"""Attention of serving engines (vLLM, SGLang): a batch of requests over a cache in pages.

A batch mixes requests that decode, with a query each, and requests that prefill, with any number. Requests that lie side by side and
have equally many queries are one call: all that decode are one, and one that prefills is one. So no row is padded, neither the queries
nor the cache are copied, and nothing of the size of all pairs is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch

from attngen.integrations.layers import Layer, layer_spec
from attngen.language.expression import Expr, Tensor
from attngen.language.keysets.cached import paged
from attngen.language.moved import b, h, i, j, s
from attngen.language.patterns import alibi, causal, window
from attngen.language.spec import Spec
from attngen.runtime.attention import CompiledAttention, compile
from attngen.runtime.preparation import Preparation

SLOPE, FULL = (
    "slope",
    "full",
)  # captures besides a layer's: ALiBi's slopes float [H], and requests that see all keys bool [B]


@dataclass(frozen=True)
class Kind:
    """What an engine's attention is besides its values. alibi: slopes are added. mixed: each request is causal or not, see FULL.
    page_size: of the cache, None for keys that lie packed beside the queries.
    """

    layer: Layer
    alibi: bool = False
    mixed: bool = False
    page_size: int | None = None

    @property
    def spec(self) -> Spec:
        """Its spec. SpecError for sizes that are not positive."""
        mask, layer = self.layer.mask, self.layer
        if self.mixed:
            mask = causal() | Tensor(FULL, 1, "bool")[b]
            mask = mask if layer.window is None else mask & window(layer.window)
        keys = None if self.page_size is None else paged(self.page_size, head_major=True)
        return layer_spec(mask, soft_cap=layer.soft_cap, scores=self._alibi, sinks=int(layer.sinks), keys=keys)

    @property
    def _alibi(self) -> list[Expr]:
        if not self.alibi:
            return []
        slope = Tensor(SLOPE, 1)
        return [alibi(slope) if self.layer.causal and not self.mixed else s - slope[h] * abs(i - j)]


@lru_cache(maxsize=1024)
def attention_of(kind: Kind, backend: str = "auto") -> CompiledAttention:
    """What computes attention of a kind."""
    return compile(kind.spec, backend=backend)


@dataclass(frozen=True)
class Run:
    """Requests first .. first + count - 1, with n_q queries each. row: of the first query among all."""

    first: int
    count: int
    row: int
    n_q: int


def runs_of(starts: Sequence[int]) -> Iterator[Run]:
    """Neighbours with equally many queries. starts: the row of each request's first query, and the end; a request without queries,
    which fills up a batch, is left out.
    """
    first = 0
    for n_q, same in groupby(end - start for start, end in pairwise(starts)):
        count = len(list(same))
        if n_q > 0:
            yield Run(first, count, starts[first], n_q)
        first += count


@dataclass
class Batch:
    """The requests of one forward, for every layer that has this page table.

    starts: see `runs_of`, on the host. page_table int [requests, pages]: of the cache [pages, Hkv, page size, *]. k_len int
    [requests]: keys of each, its queries' own the last of them. full bool [requests]: see FULL, None where the kind says it.
    """

    starts: Sequence[int]
    page_table: torch.Tensor
    k_len: torch.Tensor
    full: torch.Tensor | None = None
    _prepared: dict[Any, Preparation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._calls = [(run, self._lengths(run)) for run in runs_of(self.starts)]

    def _lengths(self, run: Run) -> dict[str, Any]:
        own = slice(run.first, run.first + run.count)
        found = {"page_table": self.page_table[own], "k_len": self.k_len[own]}
        found |= {} if self.full is None else {FULL: self.full[own]}
        return {**found, "q_offset": found["k_len"] - run.n_q}

    @torch.no_grad()
    def attend(
        self,
        attn: CompiledAttention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        captures: Mapping[str, Any],
    ) -> None:
        """Write attention into out [rows, Hq, Dv]. q [rows, Hq, D], k [pages, Hkv, page size, D], v likewise; captures: the kind's, of
        all requests. What a call prepares, the checked page table, serves the layers that follow. Raises InputError.
        """
        for place, (run, lengths) in enumerate(self._calls):
            rows = slice(run.row, run.row + run.count * run.n_q)
            queries = q[rows].unflatten(0, (run.count, run.n_q)).transpose(1, 2)
            key = (place, attn.handle, q.shape[1], k.shape[:2])
            if key not in self._prepared:
                self._prepared[key] = attn.prepare(queries, k, v, **lengths)
            found = attn(queries, k, v, plan=self._prepared[key], scale=scale, **lengths, **captures)
            out[rows].unflatten(0, (run.count, run.n_q)).copy_(found.transpose(1, 2))


@torch.no_grad()
def attend_packed(
    attn: CompiledAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    captures: Mapping[str, Any],
    starts: torch.Tensor,
) -> None:
    """The same of keys [rows, Hkv, D] beside the queries, as encoders have them. starts int [requests + 1], on the device."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    found = attn(q, k, v, cu_q=starts, cu_k=starts, scale=scale, **captures)
    out.copy_(found[0].transpose(0, 1))


def table_width(longest: int, page_size: int, most: int) -> int:
    """How many columns of a page table `most` wide a batch needs: a power of two, so that sizes seldom change as sequences grow."""
    pages = -(-longest // page_size)
    return min(most, 1 << max(0, pages - 1).bit_length())


def write_pages(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Put new keys [rows, Hkv, D] and values [rows, Hkv, Dv] into a cache [pages, Hkv, page size, D + Dv]. slots int [rows]: page *
    page size + place in the page; a negative one writes nothing.

    A row that writes nothing writes what slot 0 holds: so nobody waits for the device to count them. Engines keep page 0 for that.
    """
    new = torch.cat([k, v], -1).to(pages.dtype)
    place = slots.clamp(min=0)
    page, inside = place // pages.shape[2], place % pages.shape[2]
    pages[page, :, inside] = torch.where((slots >= 0).view(-1, 1, 1), new, pages[page, :, inside])

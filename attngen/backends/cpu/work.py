"""What a call looks like to the CPU backend's loops: units of query rows, the keys they visit, jobs for the cores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from attngen.analysis import Facts
from attngen.backends.cpu.loads import checked_loads
from attngen.backends.cpu.masks import Blocked, Masks
from attngen.backends.cpu.parallel import split_jobs
from attngen.backends.cpu.scopes import environment, offsets_of, positions, real_of, sinks_of
from attngen.backends.cpu.tiles import Chunks, Keys, ListedKeys
from attngen.language.call import Call
from attngen.language.expression import S
from attngen.language.lists import TileLists
from attngen.language.programs import evaluate

LN2 = math.log(2)
LOG2E = 1 / LN2
LARGEST_MASK = 2**24  # elements of a tile's masks up to which all are held at once


class Unit(NamedTuple):
    """A tile of `rows` queries of the heads that share one (batch, kv head), and the keys it visits."""

    slot: int  # which of its group's (batch, kv head) pairs it has
    b: int
    head_kv: int
    heads: range
    rows: int
    first: int  # its first query's position
    start: int  # and row
    chunks: Chunks
    masks: Masks
    caps: list[torch.Tensor] | None  # the masks of all chunks, for `kernels`; None: taken chunk by chunk

    @property
    def at(self) -> tuple[int, slice, slice]:
        """Where its rows are in [B, Hq, Nq, ...]."""
        return self.b, slice(self.heads.start, self.heads.stop), slice(self.start, self.start + self.rows)

    @property
    def place(self) -> list[int]:
        """The same for `kernels`."""
        return [self.b, self.head_kv, self.heads.start, len(self.heads), self.start, self.rows, self.slot]

    @property
    def tile(self) -> tuple[int, int, int]:
        """Shape of [heads x rows, ...] with its rows apart."""
        return len(self.heads), self.rows, -1


class Work:
    """A call made ready: k and v as contiguous rows of the computing dtype, key chunks of every tile, jobs for the cores."""

    def __init__(self, call: Call, facts: Facts, block_m: int, chunk: int, kernel: str = "forward"):
        self.call, self.facts, self.spec = call, facts, call.spec
        self.real = real_of(call)
        self.q = call.q.detach()
        # Pages are copied chunk by chunk, as they are visited.
        whole = (lambda t: t) if call.spec.page_size is not None else (lambda t: t.to(self.real).contiguous())
        self.k, self.v = (whole(t.detach()) for t in (call.k, call.v))
        self.env = environment(call, self.real)
        self.like = torch.empty(0, dtype=self.real)
        self.identity = bool(self.spec.score == S)
        self.scale = call.scale
        # inf and nan spoil a sum where they meet a weight of 0. While none has been seen, masked pairs take part in products;
        # else they are left out by hand.
        self.finite = True
        self.block_m = block_m
        self.keys: Any = (
            ListedKeys(call, self.spec.lists, block_m, chunk)
            if isinstance(self.spec.lists, TileLists)
            else Keys(call, facts, block_m, chunk, kernel)
        )
        self.by_offset = isinstance(call.q_offset, torch.Tensor)
        self.offsets = offsets_of(call)
        self.masks = Masks(call, self.env, self.real)
        self.checks = checked_loads(self.spec.score, self.by_offset)
        self.kept = 1.0  # probability that dropout keeps a weight
        if self.spec.dropout is not None:
            self.kept = 1.0 - float(evaluate(self.spec.dropout, self.env, real=torch.float64))

    @property
    def base(self) -> float:
        """What brings a logit to the base that the loops compute in. With the identity score q's factor brings logits to base
        2. Natural base where a score gives them, or where they may be too large for another.
        """
        return LOG2E if self.identity and self.finite else 1.0

    @cached_property
    def scale_after(self) -> float:
        """What products of q and k are multiplied with: 1 where q was before, which costs less and rounds twice."""
        return self.scale if self.facts.steps else 1.0

    @property
    def factor(self) -> float:
        """What q is multiplied with before its products with k."""
        return 1.0 if self.facts.steps else self.scale * self.base

    @property
    def log_base(self) -> float:
        """The natural logarithm of that base."""
        return LN2 if self.identity and self.finite else 1.0

    @cached_property
    def sink(self) -> torch.Tensor | None:
        """The sink's logits [B, Hq, Nq], in natural base."""
        if self.spec.sink is None:
            return None
        return sinks_of(self.call, self.env, self.offsets, self.real)

    @property
    def plain(self) -> bool:
        """Whether units run in `kernels`."""
        return self.identity and self.finite and self.kept == 1.0 and self.spec.page_size is None

    def jobs(self, finer: int = 1) -> list[tuple[range, range]]:
        """(pairs, tiles) of each job."""
        batch, heads, n_q, head_dim = self.q.shape
        tiles = -(-n_q // self.block_m)
        work = self.keys.visited * min(self.block_m, n_q) * (head_dim + self.v.shape[3]) * heads
        return split_jobs(batch * self.k.shape[1], tiles, work, finer)

    def groups(self, pairs: range) -> list[range]:
        """Pairs to compute together, tile by tile: those of a batch, where masks or chunks serve all of them; else single
        ones, whose sums stay in the cache.
        """
        if self.keys.by_head or self.masks.by_head:
            return [pairs[at : at + 1] for at in range(len(pairs))]
        edges = [at for at, pair in enumerate(pairs) if at == 0 or self._batch(pair) != self._batch(pairs[at - 1])]
        return [pairs[a:b] for a, b in pairwise([*edges, len(pairs)])]

    def _batch(self, pair: int) -> int:
        return pair // self.k.shape[1]

    def units(self, pairs: range, tiles: range) -> Iterator[list[Unit]]:
        """Tile by tile, so that what the mask gives for a tile serves all heads: lists of units with the same chunks and masks."""
        masks = self.masks if self.masks.by_distance else Masks(self.call, self.env, self.real, self.masks)
        n_q, group, heads_kv = self.q.shape[2], self.call.group, self.k.shape[1]
        each = 1 if self.keys.by_head else group
        for tile in tiles:
            start, stop = tile * self.block_m, min((tile + 1) * self.block_m, n_q)
            units: list[Unit] = []
            for slot, pair in enumerate(pairs):
                b, head_kv = divmod(pair, heads_kv)
                first = start + self.offsets[b]
                for head in range(head_kv * group, (head_kv + 1) * group, each):
                    heads = range(head, head + each)
                    shared = not (self.keys.by_head or masks.by_head) and units and units[-1].b == b
                    if units and not shared:
                        yield units
                        units = []
                    if not shared:
                        chunks = self.keys.chunks(b, head, tile)
                        caps = self._caps(masks, chunks, b, heads, first, stop - start)
                    units.append(Unit(slot, b, head_kv, heads, stop - start, first, start, chunks, masks, caps))
            if units:
                yield units

    def _caps(
        self, masks: Masks, chunks: Chunks, b: int, heads: range, first: int, rows: int
    ) -> list[torch.Tensor] | None:
        if not self.plain or (sum(chunks.high) - sum(chunks.low)) * rows > LARGEST_MASK:
            return None
        return [masks.of(chunks, x, b, heads, first, rows).cap for x in range(len(chunks.owner))]

    def operands(self, unit: Unit, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunk n's k [keys, D] and v [keys, Dv]."""
        start, stop, size = unit.chunks.start[n], unit.chunks.stop[n], self.spec.page_size
        if size is None:
            at = unit.b, unit.head_kv, slice(start, stop)
            return self.k[at], self.v[at]
        first = start // size
        # Entries that no attended key needs may hold anything.
        pages = self.env["page_table"][unit.b, first : -(-stop // size)].long().clamp(0, self.k.shape[0] - 1)
        rows = slice(start - first * size, stop - first * size)
        k, v = (t[:, unit.head_kv].index_select(0, pages).flatten(0, 1)[rows].to(self.real) for t in (self.k, self.v))
        return k, v

    def scope(self, unit: Unit, n: int) -> dict[str, Any]:
        """What expressions on chunk n's pairs read: captures, params, b, h, i, j."""
        chunks = unit.chunks
        place = positions(unit.b, unit.heads, unit.first, unit.rows, chunks.start[n], chunks.stop[n])
        return {**self.env, **place, "q_offset": self.offsets[unit.b]}

    def blocked(self, unit: Unit, n: int) -> list[tuple[int, int, Blocked]]:
        """The masks of chunk n with their column ranges."""
        chunks = unit.chunks
        return [
            (chunks.low[x], chunks.high[x], unit.masks.of(chunks, x, unit.b, unit.heads, unit.first, unit.rows))
            for x, owner in enumerate(chunks.owner)
            if owner == n
        ]

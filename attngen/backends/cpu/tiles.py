"""What a query tile visits on the CPU: runs of keys, cut into chunks, and where a chunk needs the mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from attngen.analysis import Axis, Facts, run
from attngen.analysis.tiles import Segments
from attngen.backends.cpu.scopes import offsets_of, walk_scope
from attngen.language.call import Call
from attngen.language.lists import TileLists

GRAIN = 32  # keys: the walk's bounds are rounded to this, not to the chunk
FEW_TILES = 16  # walked one by one
SHORT, LONG = 256, 1024  # keys of a chunk that is worth bundling, and of a bundle


def grain_of(block_m: int, rows: int) -> int:
    """What the walk's bounds are rounded to for tiles of `block_m` rows, of a call that has `rows`."""
    # Bounds that are rounded to less than the tile's rows leave no less to the mask.
    return min(GRAIN, 1 << (min(block_m, rows) - 1).bit_length()) if rows else GRAIN


class Chunks(NamedTuple):
    """The keys a query tile visits, start[n] .. stop[n] - 1 in ascending order, and where it needs the mask: in columns
    low[x] .. high[x] - 1 of chunk owner[x]. Lists, because the inner loops take them as they are.
    """

    start: list[int]
    stop: list[int]
    owner: list[int]
    low: list[int]
    high: list[int]

    @property
    def bundle(self) -> list[int]:
        """Which chunks are taken together: the first of each bundle, and how many there are. Short ones are bundled."""
        first, keys = [], LONG
        for n, (start, stop) in enumerate(zip(self.start, self.stop, strict=True)):
            keys += stop - start
            if keys > LONG or stop - start > SHORT:
                first.append(n)
                keys = stop - start if stop - start <= SHORT else LONG
        return [*first, len(self.start)]


class Keys:
    """The key chunks of every query tile of a call, by the walk program: for few tiles on plain integers, for many with one
    tensor operation for all.
    """

    def __init__(self, call: Call, facts: Facts, block_m: int, chunk: int, kernel: str = "forward"):
        self.length, self.chunk, self.block_m, self.rows = call.n_k, max(GRAIN, chunk), block_m, call.q.shape[2]
        self.grain = grain_of(block_m, self.rows)
        self.scalar = facts.program_keys.scalar
        self._places = call.q.shape[0], call.q.shape[1], -(-self.rows // block_m)
        if self.scalar is not None:
            by_offset = isinstance(call.q_offset, torch.Tensor)
            self.by_batch, self.by_head = by_offset or self.scalar.by_batch, self.scalar.by_head
            if math.prod(self._every) <= FEW_TILES:
                self._env, self._offsets = {**call.captures, **call.params}, offsets_of(call)
                return
        self.scalar = None
        self._run_all(call, facts, kernel)

    @property
    def _every(self) -> tuple[int, int, int]:
        """How many batches, heads and tiles may visit different keys."""
        batch, heads, tiles = self._places
        return batch if self.by_batch else min(batch, 1), heads if self.by_head else min(heads, 1), tiles

    @property
    def visited(self) -> int:
        """Keys that all tiles visit together, those of a tile once for all heads that share them."""
        if self.scalar is None:
            every = self._places[0], *self._every[1:]
            return sum(int(count.expand(every).sum()) for _, count in self._counted) * self.grain
        runs = [run for b, h, tile in product(*map(range, self._every)) for run in self.runs(b, h, tile)]
        return sum(stop - start for start, stop, _ in runs) * (1 if self.by_batch else self._places[0])

    def _run_all(self, call: Call, facts: Facts, kernel: str) -> None:
        queries, keys = Axis("i", call.offset_column, self.rows), Axis("j", 0, self.length)
        scope, tables = walk_scope(call), call.tables.get(kernel)
        full, partial = run(
            facts.walk_keys, facts.program_keys, scope, queries, keys, self.block_m, self.grain, tables=tables
        )
        self.by_head = any(x.shape[1] > 1 for segment in (*full, *partial) for x in segment)
        self.by_batch = any(x.shape[0] > 1 for segment in (*full, *partial) for x in segment)
        self._counted = (*full, *partial)
        self._segments = [*_lists(full, False), *_lists(partial, True)]

    def runs(self, b: int, h: int, tile: int) -> list[tuple[int, int, bool]]:
        """Disjoint runs of keys of a tile, in no order: (start, stop, whether the mask is needed)."""
        if self.scalar is not None:
            first, last = tile * self.block_m, min((tile + 1) * self.block_m, self.rows) - 1
            offset = self._offsets[b]
            env = {**self._env, "q_offset": offset}
            return self.scalar.runs(env, first + offset, last + offset, self.length, self.grain, b, h)
        runs = []
        for firsts, counts, partial in self._segments:
            first, count = _at(firsts, b, h, tile), _at(counts, b, h, tile)
            if count > 0:
                runs.append((first * self.grain, min((first + count) * self.grain, self.length), partial))
        return runs

    def chunks(self, b: int, h: int, tile: int) -> Chunks:
        """Chunks of a tile. A chunk has at most `chunk` keys and crosses no gap."""
        return cut(self.runs(b, h, tile), self.chunk)


class ListedKeys:
    """The same from lists of tiles (`attngen.language.lists.TileLists`); block_m divides theirs."""

    def __init__(self, call: Call, lists: TileLists, block_m: int, chunk: int):
        self.length, self.chunk, self.lists = call.n_k, max(lists.block_n, chunk), lists
        self._tiles_per_row = lists.block_m // block_m
        tiles, runs = call.captures["query_tiles"], call.captures["query_runs"]
        self.by_head = max(tiles.shape[1], runs.shape[1]) > 1
        batch = call.q.shape[0] if max(tiles.shape[0], runs.shape[0]) == 1 else 1
        self.visited = int(runs[..., 1:].sum()) * self._tiles_per_row * lists.block_n * batch
        self._tiles, self._runs = tiles.tolist(), runs.tolist()

    def chunks(self, b: int, h: int, tile: int) -> Chunks:
        """Chunks of a tile; neighbouring listed tiles share one."""
        first, full, partial = _at(self._runs, b, h, tile // self._tiles_per_row)
        own = self._tiles[b if len(self._tiles) > 1 else 0]
        own = own[h if len(own) > 1 else 0][first : first + full + partial]
        size = self.lists.block_n
        runs = [(n * size, min((n + 1) * size, self.length), at >= full) for at, n in enumerate(own)]
        return cut(runs, self.chunk)


def cut(runs: list[tuple[int, int, bool]], size: int) -> Chunks:
    """Disjoint runs of keys (start, stop, whether the mask is needed), as chunks of at most `size` keys."""
    chunks = Chunks([], [], [], [], [])
    for start, stop, partial in sorted(runs):
        while start < stop:
            if not (chunks.stop and chunks.stop[-1] == start and start - chunks.start[-1] < size):
                chunks.start.append(start)
                chunks.stop.append(start)
            begin = chunks.start[-1]
            chunks.stop[-1] = min(stop, begin + size)
            if partial:
                chunks.owner.append(len(chunks.start) - 1)
                chunks.low.append(start - begin)
                chunks.high.append(chunks.stop[-1] - begin)
            start = chunks.stop[-1]
    return chunks


def joined(runs: list[tuple[int, int, bool]]) -> list[tuple[int, int]]:
    """Sorted disjoint runs of keys as (start, stop) without neighbours."""
    found: list[tuple[int, int]] = []
    for start, stop, _ in runs:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def _lists(segments: Segments, partial: bool) -> Iterator[tuple[Any, Any, bool]]:
    for first, count in segments:
        yield first.tolist(), count.tolist(), partial


def _at(nested: Any, b: int, h: int, tile: int) -> Any:
    by_batch = nested[b if len(nested) > 1 else 0]
    by_head = by_batch[h if len(by_batch) > 1 else 0]
    return by_head[tile if len(by_head) > 1 else 0]

"""Definitions of the key sets made of tiles, dense, one tile or pair at a time, with nothing of the lists. For tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from attngen.analysis import tile_map
from attngen.language.call import Call
from attngen.language.programs import uniform

Weights = tuple[torch.Tensor, torch.Tensor | None]


def _from_pairs(pairs: torch.Tensor) -> Weights:
    return torch.where(pairs, 0.0, -torch.inf).double(), None


def _from_tiles(call: Call, block: Any, live: Callable[[int, int, int, int], bool]) -> Weights:
    """Pairs of the tiles for which live(b, h, r, c)."""
    (batch, heads, n_q, _), n_k = call.q.shape, call.k.shape[2]
    pairs = torch.zeros((batch, heads, n_q, n_k), dtype=torch.bool)
    block_m, block_n = block
    for b in range(batch):
        for h in range(heads):
            for r in range(-(-n_q // block_m)):
                for c in range(-(-n_k // block_n)):
                    if live(b, h, r, c):
                        pairs[b, h, r * block_m : (r + 1) * block_m, c * block_n : (c + 1) * block_n] = True
    return _from_pairs(pairs)


def _grid(call: Call, block: Any) -> tuple[int, int]:
    return -(-call.q.shape[2] // block[0]), -(-call.k.shape[2] // block[1])


def _at(x: torch.Tensor, b: int, h: int) -> torch.Tensor:
    return x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]


def _block_sparse(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """The layout is true, or the tile is among the row's first counts."""
    if given.get("layout") is not None:
        return _from_tiles(call, keys.block, lambda b, h, r, c: bool(_at(given["layout"], b, h)[r, c]))

    def listed(b: int, h: int, r: int, c: int) -> bool:
        return c in _at(given["indices"], b, h)[r, : int(_at(given["counts"], b, h)[r])].tolist()

    return _from_tiles(call, keys.block, listed)


def _block_cluster(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """The row names the tile."""
    return _from_tiles(call, keys.block, lambda b, h, r, c: c in _at(given["index"], b, h)[r].tolist())


def _butterfly(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """The places differ by nothing or by one power of two."""
    tiles_q, tiles_k = _grid(call, keys.block)
    side = keys.size or 1
    while keys.size is None and side < max(tiles_q, tiles_k):
        side *= 2
    steps = {0} | {1 << n for n in range(20) if 1 << n < side and (keys.levels is None or n < keys.levels)}

    def live(b: int, h: int, r: int, c: int) -> bool:
        if r < keys.global_rows or c < keys.global_columns:
            return True
        return ((r * side // tiles_q) ^ (c * side // tiles_k) if keys.size else r ^ c) in steps

    return _from_tiles(call, keys.block, live)


def _big_bird(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """A set of tiles per row; the random ones by Floyd's sampling, with the numbers of (seed, 0, head, row, draw)."""
    tiles_q, tiles_k = _grid(call, keys.block)
    drawn: dict[tuple[int, int], set[int]] = {}
    for h in range(call.q.shape[1]):
        for r in range(tiles_q):
            center = r * tiles_k // tiles_q
            near = set(range(center - keys.window // 2, center - keys.window // 2 + keys.window))
            left = [c for c in range(keys.globals, tiles_k) if c not in near]
            chosen: set[int] = set()
            for number in range(keys.random):
                last = len(left) - keys.random + number
                if last >= 0:
                    pick = int(float(uniform(keys.seed, 0, h, r, number)) * (last + 1))
                    chosen.add(last if pick in chosen else pick)
            drawn[h, r] = near | {left[place] for place in chosen}
    return _from_tiles(call, keys.block, lambda b, h, r, c: r < keys.globals or c < keys.globals or c in drawn[h, r])


def _positions(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """i [B or 1, 1, Nq, 1] and j [Nk]."""
    i = (torch.arange(call.q.shape[2]).view(1, 1, -1) + call.offset_column).unsqueeze(-1)
    return i, torch.arange(call.k.shape[2])


def _longformer(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """|i - j| is one of 0, dilation, 2 * dilation, ..., at most window // 2 times; or one of the two is global."""
    i, j = _positions(call)
    near = torch.zeros(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool)
    for step in range(keys.window // 2 + 1):
        near |= (i - j).abs() == step * keys.dilation
    return _from_pairs(near | (i < keys.globals) | (j < keys.globals))


def _a_shape(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """Not after the query, and first or near."""
    i, j = _positions(call)
    return _from_pairs((i >= j) & ((j < keys.sink) | (i - j < keys.window)))


def _vertical_slash(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """j is in vertical, or i - j in slash."""
    i, j = _positions(call)
    pairs = torch.zeros((*call.q.shape[:3], call.k.shape[2]), dtype=torch.bool)
    for column in given["vertical"].unbind(-1):
        pairs |= j == column[..., None, None]
    for distance in given["slash"].unbind(-1):
        pairs |= (i - j == distance[..., None, None]) & (distance >= 0)[..., None, None]
    return _from_pairs(pairs)


def _adaptive(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """What each head's kind means."""
    found = given["estimate"]
    i, j = _positions(call)
    distance = i - j
    shape = (*call.q.shape[:3], call.k.shape[2])
    near = ((j < found.sink) | ((distance >= 0) & (distance < found.window))).expand(shape)
    lines = torch.zeros(shape, dtype=torch.bool)
    for column in found.vertical.unbind(-1):
        lines |= j == column[..., None, None]
    for band in found.band.unbind(-1):
        lines |= (distance >= 0) & (distance // keys.block == band[..., None, None])
    clusters = ~_block_cluster(_Square(keys.block), call, {"index": found.index})[0].isneginf()
    return _from_pairs(torch.stack([near, lines, clusters], -1).gather(-1, _spread(found.kind, shape)).squeeze(-1))


class _Square:
    def __init__(self, size: int):
        self.block = (size, size)


def _spread(kind: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return kind[..., None, None].expand(shape).unsqueeze(-1)


def _pruned(keys: Any, call: Call, given: Mapping[str, Any]) -> Weights:
    """The rule of `ag.pruned`, tile by tile."""
    (batch, heads, n_q, _), n_k = call.q.shape, call.k.shape[2]
    tiles_q, tiles_k = _grid(call, keys.block)
    read = {symbol.name for symbol in call.spec.mask.free_symbols}
    captures: dict[str, Any] = {name: x for name, x in {**call.captures, **call.params}.items() if name in read}
    kept = torch.zeros((batch, heads, tiles_q, tiles_k), dtype=torch.bool)
    if 0 in kept.shape:
        return _from_tiles(call, keys.block, lambda b, h, r, c: False)
    for b in range(batch):
        importance = []
        for h in range(heads):
            tiles = tile_map(call.spec, n_q, n_k, *keys.block, b=b, h=h, q_offset=call.q_offset, **captures)
            q, q_step = _integers(call.q[b, h], keys.block[0])
            k, k_step = _integers(call.k[b, h // call.group], keys.block[1])
            score, total = (q.double() @ k.double().T).long().tolist(), 0  # exact: CUDA has no products of integers
            for r in range(tiles_q):
                seen = [c for c in range(tiles_k) if tiles[r, c] > 0]
                ranked = sorted((-score[r][c], c) for c in seen)
                best = [c for _, c in ranked[: math.ceil(keys.keep * len(seen) - 1e-6)]]
                kept[b, h, r, best] = True
                total += sum(abs(score[r][c]) for c in best)
            importance.append(total * q_step * k_step)
        order = sorted((-value, h) for h, value in enumerate(importance))
        kept[b, [h for _, h in order[math.ceil(keys.heads * heads - 1e-6) :]]] = False
    return _from_tiles(call, keys.block, lambda b, h, r, c: bool(kept[b, h, r, c]))


def _integers(x: torch.Tensor, block: int) -> tuple[torch.Tensor, float]:
    mean = torch.stack([part.detach().float().mean(0) for part in x.split(block)])
    step = float(mean.abs().max() / 127)
    return torch.round(mean / (step or 1.0)).long(), step


DEFINITIONS: dict[str, Callable[[Any, Call, Mapping[str, Any]], Weights]] = {
    "block_sparse": _block_sparse,
    "block_cluster": _block_cluster,
    "butterfly": _butterfly,
    "big_bird": _big_bird,
    "longformer": _longformer,
    "a_shape": _a_shape,
    "vertical_slash": _vertical_slash,
    "adaptive": _adaptive,
    "pruned": _pruned,
}

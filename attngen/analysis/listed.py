"""What lists visit (`attngen.language.lists`), counted and drawn: a spec that has them walks no interval of its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from attngen.analysis.tiles import EMPTY, FULL, PARTIAL
from attngen.errors import InputError
from attngen.language.lists import Lists, RowLists, TileLists


def listed_pairs(lists: Lists, captures: Mapping[str, Any], batch: int, heads: int, n_q: int, n_k: int) -> int:
    """Pairs that the lists visit over all batches and query heads: of listed tiles all their keys, of listed rows each key.
    captures: the lists' tensors, by their names.
    """
    runs = captures["query_runs"].cpu().long()
    repeat = batch * heads // max(runs.shape[0] * runs.shape[1], 1)
    if isinstance(lists, RowLists):
        return int(runs[..., 1].sum()) * repeat
    rows = _cut(n_q, lists.block_m)
    pairs = int((runs[..., 1:].sum(-1) * rows).sum()) * lists.block_n * repeat
    return min(pairs, batch * heads * n_q * n_k)  # the last key tile may reach past the end


def listed_map(
    lists: Lists, captures: Mapping[str, Any], n_q: int, n_k: int, block_m: int, block_n: int, b: int, h: int
) -> torch.Tensor:
    """Of one batch and one head of the lists: int8 [ceil(n_q / block_m), ceil(n_k / block_n)], 0 nothing is listed, 1 some, 2 all
    of it and without the mask. Rows list single keys: what they list is never full. InputError for blocks that are not so many
    listed tiles.
    """
    unit_m, unit_n = (lists.block_m, lists.block_n) if isinstance(lists, TileLists) else (1, 1)
    for name, block, unit in (("block_m", block_m, unit_m), ("block_n", block_n, unit_n)):
        if block % unit:
            raise InputError(name, f"a multiple of the listed tiles' {unit}", block)
    elements = "query_tiles" if isinstance(lists, TileLists) else "query_edges"
    listed, runs = (captures[name].cpu() for name in (elements, "query_runs"))
    listed, runs = (x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)].long() for x in (listed, runs))
    down, across = block_m // unit_m, block_n // unit_n  # listed units of a cell
    shape = -(-n_q // block_m), -(-n_k // block_n)
    some, whole = torch.zeros(shape, device="cpu"), torch.zeros(shape, device="cpu")
    counts = runs[:, 1:].sum(-1)
    row = torch.arange(len(runs), device="cpu").repeat_interleave(counts)
    place = torch.arange(len(row), device="cpu") - (counts.cumsum(0) - counts)[row]  # in its row's list
    at = row // down, listed[runs[row, 0] + place] // across
    some.index_put_(at, torch.ones(()), accumulate=True)
    if isinstance(lists, TileLists):
        whole.index_put_(at, (place < runs[row, 1]).float(), accumulate=True)
    # A ragged last key tile stands among the partial ones, where a loop has to look; it is drawn as such.
    units = _cut(len(runs), down).view(-1, 1) * _cut(-(-n_k // unit_n), across)
    return torch.where(whole == units, FULL, torch.where(some > 0, PARTIAL, EMPTY)).to(torch.int8)


def _cut(length: int, block: int) -> torch.Tensor:
    """Sizes of the blocks of an axis; the last one ends with it."""
    return (length - torch.arange(0, length, block, device="cpu")).clamp(max=block)

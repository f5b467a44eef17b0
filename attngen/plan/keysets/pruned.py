"""Hybrid dynamic pruning: a cheap score of tiles keeps the best ones of each row, and gates whole heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from attngen.language.call import Call
from attngen.language.keysets.tiles import Pruned
from attngen.plan.keysets.estimate import pooled, tile_scores
from attngen.plan.keysets.tiles import EMPTY, Live, Segments, bind_mask, grid, live

if TYPE_CHECKING:
    from attngen.language.spec import Spec


LEVELS = 127  # averages are rounded to integers of this size: 8 bits, whose products float32 sums exactly in any order
ROUNDING = 1e-6  # taken off before rounding up, so that 0.1 * 30 is 3


@live.register(Pruned)
def _(keys: Pruned, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
    tiles_q, tiles_k = grid(keys.block, call)
    device, lead = call.q.device, call.q.shape[:2]
    if tiles_q == 0 or tiles_k == 0 or 0 in lead:
        return Live(torch.zeros((1, 1, 0), device=device), torch.zeros((1, 1, 0), device=device))
    q, q_step = _rounded(pooled(call.q, keys.block[0]))
    k, k_step = _rounded(pooled(call.k, keys.block[1]))
    segments = Segments(bind_mask(spec, call), keys.block)
    column = torch.arange(tiles_k, device=device)
    most = _share(keys.keep, tiles_k)
    total = torch.zeros(lead, dtype=torch.int64, device=device)
    found = []
    for row, score in tile_scores(q, k):
        entry = row.repeat_interleave(tiles_k).view(1, 1, -1)
        state = segments.state(entry, column.repeat(len(row)).view(1, 1, -1))
        seen = (state != EMPTY).unflatten(-1, (len(row), tiles_k))
        count = torch.ceil(seen.sum(-1, keepdim=True) * float(keys.keep) - ROUNDING)
        # One integer orders by score, and equal scores by the tile's number.
        score = score.long()
        order = torch.where(seen, score * tiles_k + (tiles_k - 1 - column), torch.iinfo(torch.int64).min)
        best = order.topk(most, -1).indices
        kept = torch.arange(most, device=device) < count
        total += torch.where(kept, score.gather(-1, best).abs(), 0).sum((2, 3))
        found.append(torch.where(kept, best, -1).expand(*lead, -1, -1))
    tile = torch.cat(found, 2)
    importance = total * q_step * k_step.repeat_interleave(call.group, 1)
    ranked = importance.sort(dim=-1, descending=True, stable=True).indices[:, : _share(keys.heads, lead[1])]
    gate = torch.zeros(lead, dtype=torch.bool, device=device).scatter_(-1, ranked, True)
    tile = torch.where(gate.view(*lead, 1, 1), tile, -1)
    rows = torch.arange(tiles_q, device=device).repeat_interleave(most)
    return Live(rows.view(1, 1, -1), tile.flatten(2))


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, as float32, and the step float64 [B, H] that they count."""
    step = x.abs().amax((2, 3)) / LEVELS
    return torch.round(x / torch.where(step > 0, step, 1.0)[..., None, None]), step.double()


def _share(share: float, count: int) -> int:
    return math.ceil(share * count - ROUNDING)

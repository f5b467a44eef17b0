"""Hybrid dynamic pruning: a cheap score of tiles keeps the best ones of each row, and gates whole heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.errors import SpecError
from attngen.plan.keysets.estimate import pooled, tile_scores
from attngen.plan.keysets.tiles import EMPTY, Block, Live, Segments, Tiles, bind_mask, read_block

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec

LEVELS = 127  # averages are rounded to integers of this size: 8 bits, whose products float32 sums exactly in any order
ROUNDING = 1e-6  # taken off before rounding up, so that 0.1 * 30 is 3


@dataclass(frozen=True)
class Pruned(Tiles):
    """The best tiles of each row of tiles, in the best heads."""

    keep: float
    block: Block = (64, 64)
    heads: float = 1.0

    name: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        read_block(self.name, self.block)
        for place in ("keep", "heads"):
            value = getattr(self, place)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise SpecError(f"pruned: {place} is a share from 0 to 1, got {value!r}")

    def live(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> Live:
        tiles_q, tiles_k = self.grid(call)
        device, lead = call.q.device, call.q.shape[:2]
        if tiles_q == 0 or tiles_k == 0 or 0 in lead:
            return Live(torch.zeros((1, 1, 0), device=device), torch.zeros((1, 1, 0), device=device))
        q, q_step = _rounded(pooled(call.q, self.block[0]))
        k, k_step = _rounded(pooled(call.k, self.block[1]))
        segments = Segments(bind_mask(spec, call), self.block)
        column = torch.arange(tiles_k, device=device)
        most = _share(self.keep, tiles_k)
        total = torch.zeros(lead, dtype=torch.int64, device=device)
        found = []
        for row, score in tile_scores(q, k):
            entry = row.repeat_interleave(tiles_k).view(1, 1, -1)
            state = segments.state(entry, column.repeat(len(row)).view(1, 1, -1))
            seen = (state != EMPTY).unflatten(-1, (len(row), tiles_k))
            count = torch.ceil(seen.sum(-1, keepdim=True) * float(self.keep) - ROUNDING)
            # One integer orders by score, and equal scores by the tile's number.
            score = score.long()
            order = torch.where(seen, score * tiles_k + (tiles_k - 1 - column), torch.iinfo(torch.int64).min)
            best = order.topk(most, -1).indices
            kept = torch.arange(most, device=device) < count
            total += torch.where(kept, score.gather(-1, best).abs(), 0).sum((2, 3))
            found.append(torch.where(kept, best, -1).expand(*lead, -1, -1))
        tile = torch.cat(found, 2)
        importance = total * q_step * k_step.repeat_interleave(call.group, 1)
        ranked = importance.sort(dim=-1, descending=True, stable=True).indices[:, : _share(self.heads, lead[1])]
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


def pruned(keep: float, block: Any = (64, 64), heads: float = 1.0) -> Pruned:
    """Pruning by a cheap score, after Hybrid Dynamic Pruning (arXiv 2407.12893): `Spec(keys=ag.pruned(keep=0.25),
    mask=ag.causal())`. Nothing is given at the call; the choice gets no gradient. The rule:

    1. The rows of q in each query tile and of k in each key tile (`block`) are averaged. For each (b, head) the averages
       are divided by their step, (the largest absolute number among them) / 127, and rounded to integers.
    2. The score of tile (r, c) is the product of the two rows of integers.
    3. Of the n tiles of row r that the mask leaves (those where `ag.tile_map` is not 0), the ceil(keep * n) with the
       largest score are kept; of equal ones the lower c.
    4. A head's importance is the sum of |score| over its kept tiles, times its step of q and its step of k. In each batch
       the ceil(heads * H) most important heads are kept, of equal ones the lower; a dropped head has out 0 and lse -inf
       and costs nothing.

    Raises SpecError.
    """
    return Pruned(keep, read_block("pruned", block), heads)

"""Stream-K: equal runs of key tiles over a fixed number of programs, whatever the lengths (LeanAttention, arXiv 2405.10480).

The tiles of all outputs stand in one sequence. Each program takes a run of it; runs differ in length by at most one tile. A
program that has all of an output's tiles writes the result. Where an output is shared, each of its programs writes a partial
softmax state (`attngen.plan.softmax`), and a second launch merges them: no program ever waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attngen.errors import InputError


class Runs(NamedTuple):
    """Who computes what: int32 tensors on one device. T tiles, G programs.

    The state that program c has of output o, if it shares it, lies in slot c + o. Going through the sequence c or o grows from
    one state to the next, so that slots are unique and below `slots(outputs, programs)`, and those of an output contiguous.
    """

    starts: torch.Tensor  # [outputs + 1]: the sequence number of each output's first tile, and T
    begin: torch.Tensor  # [G + 1]: that of each program's first tile, and T; programs without tiles come last
    first: torch.Tensor  # [G + 1]: the output that has tile begin[c]; the last output for begin[c] = T
    owners: torch.Tensor  # [outputs, 2]: first and last program of each output; 0, -1 for an output without tiles


def stream_k(counts: torch.Tensor, programs: int) -> Runs:
    """Equal runs over `programs` programs for outputs of counts[o] >= 0 tiles.

    counts: int32 or int64 [outputs], below 2^31 in all; never read on the host. Programs 0 .. T % G - 1 have one tile more
    than the others. Raises InputError for another kind of tensor or fewer than one program.
    """
    if counts.dim() != 1 or counts.dtype not in (torch.int32, torch.int64):
        raise InputError("counts", "int32 or int64 [outputs]", f"{counts.dtype} {list(counts.shape)}")
    if isinstance(programs, bool) or not isinstance(programs, int) or programs < 1:
        raise InputError("programs", "an int of at least 1", repr(programs))
    counts = counts.long()
    ends = counts.cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    number = torch.arange(programs + 1, device=counts.device)
    total = starts[-1]
    # Not floor(c * T / G), which is as equal: there a program without tiles could stand between two owners of one output.
    begin = number * (total // programs) + torch.minimum(number, total % programs)
    first = _holder(starts, begin).clamp(max=max(len(counts) - 1, 0))
    owners = torch.stack([_holder(begin, starts[:-1]), _holder(begin, ends - 1)], -1)
    nobody = torch.arange(0, -2, -1, device=counts.device)
    owners = torch.where((counts > 0).unsqueeze(-1), owners, nobody)
    return Runs(starts.int(), begin.int(), first.int(), owners.int())


def slots(outputs: int, programs: int) -> int:
    """How many places for partial states suffice."""
    return max(outputs + programs - 1, 1)


def shared(runs: Runs) -> torch.Tensor:
    """bool [outputs]: whether the states of several programs have to be merged."""
    return runs.owners[:, 0] < runs.owners[:, 1]


def balance(tiles: int, programs: int) -> float:
    """Share of the programs' time that is work: T / (G ceil(T / G)), 1 for no tiles."""
    return tiles / (programs * -(-tiles // programs)) if tiles else 1.0


def _holder(starts: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """The last interval that starts at or before a tile: of intervals that start at one place all but the last are empty."""
    return torch.searchsorted(starts, tile, right=True) - 1

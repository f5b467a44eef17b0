"""The model's choice for decoding: a forward of few query rows, whose time is that of reading the keys."""

from __future__ import annotations

import math

from attngen.analysis import Facts
from attngen.language.call import Call
from attngen.language.device import programs_at_once
from attngen.language.expression import B, loads
from attngen.language.schedule import PLAIN, Schedule, Tile
from attngen.schedule.legality import why_not_packed

DECODE_ROWS = 64  # query rows times heads of a group up to which a call counts as decoding
GOOD = 0.85  # of the best wave efficiency: more splits than that needs only add states to merge
FULL = 0.8  # of the programs that run at once: with that many outputs nothing is split whose lengths are equal
SHORT = 2**17  # bytes of an output's keys and values that one program reads sooner than several and a second launch
MERGING = 5  # tiles that a processor reads while states are written and a second launch merges them


def decode_choice(call: Call, facts: Facts, processors: int) -> Schedule:
    """For a forward of few query rows: pack where that is legal, a decode tile, and splits that fill the processors; where
    lengths differ by batch, stream-K instead, and also where outputs fill the processors but end at very different times.
    Nothing for other calls.
    """
    spec, (batch, heads, n_q, head_dim) = call.spec, call.q.shape
    pack = call.group > 1 and not why_not_packed(spec, facts)
    rows = n_q * (call.group if pack else 1)
    if spec.lists is not None or not 0 < rows <= DECODE_ROWS:
        return Schedule()
    tile = decode_tile(rows, max(head_dim, call.v.shape[3])).over(PLAIN)  # special forms are of larger tiles
    outputs = batch * (call.k.shape[1] if pack else heads)
    tiles, at_once = -(-call.n_k // tile.block_n), programs_at_once(processors, tile.num_warps)
    short = call.n_k * (head_dim + call.v.shape[3]) * call.k.element_size() <= SHORT
    split: int | str = 1 if short else even_splits(outputs, tiles, at_once)
    ragged = any(B in load.free_symbols for load in loads(spec.mask)) and not facts.walk_keys.needs_tables
    if ragged and not short and (split != 1 or streams(outputs, tiles, at_once)):
        split = "stream"
    return Schedule(forward=tile, split=split, pack=pack)


def decode_tile(rows: int, head_dim: int) -> Tile:
    """The tile for so many rows: long key tiles, and stages to have several of them on their way. Every warp reads all queries and
    all weights from shared memory, so few warps make a program, and several programs share a multiprocessor (`places`).
    """
    if rows > 16:  # more than 32 rows spill
        return Tile(32, 64 if head_dim <= 64 else 32 if head_dim <= 128 else 16, 8, 2)
    return Tile(16, 64, 2, 4) if head_dim <= 64 else Tile(16, 64, 2, 3) if head_dim <= 128 else Tile(16, 32, 4, 2)


def even_splits(outputs: int, tiles: int, processors: int) -> int:
    """The fewest splits whose last wave of programs is nearly as full as that of the best number of splits (FlashDecoding).
    processors: programs that run at once.
    """
    if outputs == 0 or tiles <= 4 or outputs >= FULL * processors:
        return 1

    def efficiency(splits: int) -> float:
        waves = outputs * splits / processors
        return waves / math.ceil(waves)

    most = range(1, min(tiles, 128) + 1)
    best = max(efficiency(splits) for splits in most)
    return next(splits for splits in most if efficiency(splits) >= GOOD * best)


def streams(outputs: int, tiles: int, processors: int) -> bool:
    """Whether equal runs of tiles end well before whole outputs of unlike lengths do. Lengths are on the device: they may be
    anything up to `tiles`, half of it on average, and the last output to start is as long as any.
    """
    share = outputs * tiles / 2 / processors
    last = max(tiles, share + tiles / 2)
    return share + MERGING < GOOD * last

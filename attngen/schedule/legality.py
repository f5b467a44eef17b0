"""Which special forms of a forward a spec can have: heads of a GQA group packed into its rows, keys cut into parts whose
states merge, specialised warps. Legality with reasons, and the model's choice for decoding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attngen.errors import ScheduleError
from attngen.language.expression import B, H, J, S, loads
from attngen.language.lists import RowLists
from attngen.schedule import Schedule
from attngen.schedule.defaults import decode_tile

if TYPE_CHECKING:
    from attngen.analysis import Facts
    from attngen.language.call import Call
    from attngen.language.spec import Spec

DECODE_ROWS = 64  # query rows times heads of a group up to which a call counts as decoding
GOOD = 0.85  # of the best wave efficiency: more splits than that needs only add states to merge
FULL = 0.8  # of the processors: with that many outputs nothing is split


def why_not_packed(spec: Spec, facts: Facts) -> str:
    """The reason why the heads of a group cannot share a tile's walk; empty if they can."""
    if spec.lists is not None:
        return "its lists say which keys a head sees"
    if H in spec.mask.free_symbols:
        return "the mask depends on h, and packed heads walk the same keys"
    if facts.walk_keys.needs_tables:
        return "the mask's walk reads captured data in tables of whole query tiles"
    return ""


def why_not_specialised(spec: Spec) -> str:
    """The reason why a forward cannot go through the one loop of specialised warps; empty if it can."""
    if spec.mask != True or spec.lists is not None or spec.page_size is not None:  # noqa: E712  a sympy condition
        return (
            "with a mask: the values go from memory into the products untouched, so that one that is masked out and not "
            "finite would reach the output"
        )
    if spec.dropout is not None or any(J in load.free_symbols for load in loads(spec.score)):
        return "with dropout, or with captured data that depends on j: the loop may hold no pointers"
    return ""


MOST_STORED = 2048  # keys: their weights for a tile of queries are one piece of work


def why_not_stored(call: Call, backend: str) -> str:
    """The reason why the weights cannot be kept for the backward, or should not; empty if they can."""
    spec = call.spec
    if backend != "cpu":
        return (
            "on a GPU: a weight written once and read by both passes is at least 6 bytes, for which memory takes longer than "
            "the matrix units for two products of any head dim up to 256 (modelled for an H200: 4 times as long at 64)"
        )
    if spec.score != S or spec.dropout is not None or spec.lists is not None or spec.page_size is not None:
        return "with a score, dropout, lists or pages: their derivatives need the logits too"
    if call.n_k > MOST_STORED:
        return f"for more than {MOST_STORED} keys: memory would grow with the square of the length"
    return ""


def check(spec: Spec, facts: Facts, schedule: Schedule) -> None:
    """ScheduleError for pack, split or warp_specialize where they make no sense."""
    if schedule.warp_specialize and (reason := why_not_specialised(spec)):
        raise ScheduleError(f"warp_specialize: expected False {reason}")
    if schedule.split not in (None, 1) and (schedule.persistent or schedule.order == "longest_first"):
        raise ScheduleError("split: goes with persistent=0 and order='by_head', since it shares out the tiles itself")
    if schedule.pack and not isinstance(spec.lists, RowLists):
        reason = why_not_packed(spec, facts)
        if reason:
            raise ScheduleError(f"pack: expected False, since {reason}")
    if schedule.programs is not None and schedule.split != "stream":
        raise ScheduleError(f"programs: goes with split='stream', got split={schedule.split!r}")


def even_splits(outputs: int, tiles: int, processors: int) -> int:
    """The fewest splits whose last wave of programs is nearly as full as that of the best number of splits (FlashDecoding)."""
    if outputs == 0 or tiles <= 4 or outputs >= FULL * processors:
        return 1

    def efficiency(splits: int) -> float:
        waves = outputs * splits / processors
        return waves / math.ceil(waves)

    most = range(1, min(tiles, 128) + 1)
    best = max(efficiency(splits) for splits in most)
    return next(splits for splits in most if efficiency(splits) >= GOOD * best)


def decode_choice(call: Call, facts: Facts, processors: int) -> Schedule:
    """For a forward of few query rows: pack where that is legal, a decode tile, and splits that fill the processors;
    stream-K where lengths differ by batch. Nothing for other calls.
    """
    spec, (batch, heads, n_q, head_dim) = call.spec, call.q.shape
    pack = call.group > 1 and not why_not_packed(spec, facts)
    rows = n_q * (call.group if pack else 1)
    if spec.lists is not None or not 0 < rows <= DECODE_ROWS:
        return Schedule()
    tile = decode_tile(rows, max(head_dim, call.v.shape[3]))
    outputs = batch * (call.k.shape[1] if pack else heads)
    ragged = any(B in load.free_symbols for load in loads(spec.mask))
    split: int | str = even_splits(outputs, -(-call.n_k // tile.block_n), processors)
    if ragged and split != 1 and not facts.walk_keys.needs_tables:
        split = "stream"
    return Schedule(split=split, pack=pack).with_tile("forward", tile)

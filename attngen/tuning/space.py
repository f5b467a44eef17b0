"""What the tuner may choose from: named values, and which combinations are legal before anything is compiled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attngen.analysis import facts
from attngen.errors import ScheduleError
from attngen.language.lists import Lists, RowLists, TileLists
from attngen.language.schedule import PREFIXES, TILE_FIELDS, Schedule, Tile
from attngen.language.spec import Spec
from attngen.schedule.decode import DECODE_ROWS
from attngen.schedule.legality import (
    WIDE,
    registers_held,
    why_not_listed,
    why_not_packed,
    why_not_specialised,
    why_not_split,
    why_not_targeted,
)
from attngen.schedule.target import Target
from attngen.store import Shape, bucket

Point = dict[str, Any]  # a choice of one value per name; plain JSON
PIECES = {"forward": ("",), "backward": ("dq_", "dkv_")}  # record piece -> prefixes of the schedule's fields
KERNEL_OF = {prefix: kernel for kernel, prefix in PREFIXES.items()}
MAX_ENUMERATED = 50_000


@dataclass(frozen=True)
class Space:
    """`choices`: the values of each name, in order. `fixed`: what is not searched. `illegal`: a reason, or None."""

    choices: Mapping[str, tuple[Any, ...]]
    start: Point
    illegal: Callable[[Point], str | None] = lambda point: None

    @property
    def size(self) -> int:
        """Combinations, legal or not."""
        return math.prod(len(values) for values in self.choices.values())

    def points(self) -> Iterable[Point]:
        """Every legal point, in order."""
        for values in itertools.product(*self.choices.values()):
            point = dict(zip(self.choices, values, strict=True))
            if self.illegal(point) is None:
                yield point

    def holds(self, point: Point) -> bool:
        """Whether the point is one of this space's, and legal."""
        inside = point.keys() == self.choices.keys() and all(point[n] in v for n, v in self.choices.items())
        return inside and self.illegal(point) is None

    def around(self, best: Iterable[Point]) -> Space:
        """The part of this space that the best points span, and one value further on either side.

        Keeping the best trials and tightening the ranges keeps the search cheap when suggesting a trial has become
        as slow as measuring one (arXiv 2309.04510).
        """
        best = list(best)
        choices = {}
        for name, values in self.choices.items():
            places = [values.index(point[name]) for point in best]
            choices[name] = values[max(0, min(places) - 1) : max(places) + 2] if places else values
        start = self.start if all(self.start[n] in v for n, v in choices.items()) else dict(best[0])
        return replace(self, choices=choices, start=start)


def special_forms(spec: Spec, shape: Shape, target: Target, piece: str) -> dict[str, tuple[Any, ...]]:
    """What this spec and target allow besides tiles: tensor descriptors, specialised warps, persistent programs, the order of
    outputs, loading ahead at the edges of intervals, for wide heads what takes fewer registers, and for few query rows packed heads
    and split keys.
    """
    wide = max(shape.head_dim, shape.head_dim_v) >= WIDE
    forms: dict[str, tuple[Any, ...]] = {}
    for prefix in PIECES[piece]:
        forms |= {f"{prefix}tma": (False, True)} if target.has_descriptors else {}
        forms |= {f"{prefix}persistent": (0, 1, 2), f"{prefix}order": ("by_head", "longest_first")}
        if spec.lists is None and not facts(spec).walk_of(KERNEL_OF[prefix]).needs_tables:
            forms[f"{prefix}pipeline_edges"] = (False, True)
        forms |= {f"{prefix}disable_licm": (False, True)} if wide else {}
        forms |= {"dkv_separate_sums": (False, True)} if wide and prefix == "dkv_" else {}
    if piece == "forward":
        group = shape.heads_q // max(shape.heads_kv, 1)
        if target.has_descriptors and not why_not_specialised(spec):
            forms["warp_specialize"] = (False, True)
        pack = group > 1 and not why_not_packed(spec, facts(spec))
        if shape.n_q * (group if pack else 1) <= DECODE_ROWS:  # as `decode_choice` counts
            forms["split"] = (1, 2, 4, 8, 16, 32, 64, "stream")
            forms |= {"pack": (False, True)} if pack else {}
    return forms


def gpu_space(
    piece: str,
    shape: Shape,
    element: int,
    target: Target,
    start: Schedule,
    pins: Schedule | None = None,
    forms: Mapping[str, tuple[Any, ...]] | None = None,
    lists: Lists | None = None,
) -> Space:
    """Tiles, warps and stages of a piece's kernels on a GPU, and the special forms that it can have (`special_forms`).

    element: bytes of q's dtype; start: a complete schedule, the model's choice, whose tile is always legal; pins: what the
    spec has decided, which is not searched; lists: the spec's, whose tiles the blocks have to divide.
    Legality here is arithmetic: registers for the accumulators, shared memory for the stages; what the compiler really uses
    decides later. Raises ScheduleError when the pins leave nothing legal.
    """
    pinned = pins.decided() if pins is not None else {}
    begin = pins.over(start).decided() if pins is not None else start.decided()
    stages = (1, 2) if target.backend == "hip" else (1, 2, 3, 4)
    special: dict[str, tuple[Any, ...]] = {}
    for name, values in (forms or {}).items():
        begin.setdefault(name, values[0])
        special[name] = (pinned[name],) if name in pinned else _ordered({*values, begin[name]})
    # Rows of a tile are those of one head, or where heads may be packed those of a whole group.
    rows, keys = _blocks(shape.n_q), _blocks(shape.n_k)
    group = shape.heads_q // max(shape.heads_kv, 1) if True in special.get("pack", ()) else 1
    every = {"block_m": _blocks(shape.n_q * group), "block_n": keys, "num_warps": (2, 4, 8), "num_stages": stages}
    choices: dict[str, tuple[Any, ...]] = {}
    for prefix in PIECES[piece]:
        for name, values in every.items():
            full = prefix + name
            values = _dividing(lists, name, values)
            choices[full] = (pinned[full],) if full in pinned else _ordered({*values, begin[full]})
    choices |= special
    chosen = {
        prefix: tuple(begin[prefix + name] for name in every)
        for prefix in PIECES[piece]
        if not any(prefix + name in pinned for name in every)
    }

    def illegal(point: Point) -> str | None:
        for prefix in PIECES[piece]:
            m, n, warps, depth = tile = tuple(point[prefix + name] for name in every)
            separate = bool(point.get(prefix + "separate_sums"))
            reason = _tile_reason(prefix, m, n, warps, depth, shape, element, target, separate)
            if reason and tile != chosen.get(prefix):
                return reason
            own = {name: point[prefix + name] for name in TILE_FIELDS if prefix + name in point}
            if reason := why_not_targeted(KERNEL_OF[prefix], Tile(**own), target):
                return prefix + reason
        if reason := why_not_split(point.get("split"), point.get("persistent"), point.get("order")):
            return f"split: {reason}"
        if point.get("pack") is False and point["block_m"] > max(rows[-1], begin["block_m"]):
            return f"block_m: {point['block_m']} rows, and a head alone has {shape.n_q}"
        return None

    return _checked(Space(choices, {name: begin[name] for name in choices}, illegal), piece)


def cpu_space(
    piece: str, shape: Shape, start: Schedule, pins: Schedule | None = None, lists: Lists | None = None
) -> Space:
    """The CPU backend's query and key blocks. `start`: the backend's own choice, with the piece's blocks decided. lists: the
    spec's; of listed tiles a query tile is a part, chunks of keys are runs of them; listed rows have no tiles, and one choice.
    """
    pinned = pins.decided() if pins is not None else {}
    begin = pins.over(start).decided() if pins is not None else start.decided()
    every = {"block_m": _blocks(shape.n_q, 32, 2048), "block_n": _blocks(shape.n_k, 64, 4096)}
    choices = {}
    for prefix in PIECES[piece]:
        for name, values in every.items():
            full = prefix + name
            if full in begin:
                found = _dividing(lists, name, values) if name == "block_m" else values
                found = () if isinstance(lists, RowLists) else found
                choices[full] = (pinned[full],) if full in pinned else tuple(sorted({*found, begin[full]}))
    return _checked(Space(choices, {name: begin[name] for name in choices}), piece)


def _blocks(length: int, least: int = 16, most: int = 256) -> tuple[int, ...]:
    """Powers of two; a block beyond the whole length only wastes work."""
    top = max(least, min(most, bucket(length)))
    return tuple(size for size in (2**e for e in range(4, 13)) if least <= size <= top)


def _dividing(lists: Lists | None, name: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """Of a block's values those that walk the listed tiles."""
    if not isinstance(lists, TileLists) or name not in ("block_m", "block_n"):
        return values
    return tuple(value for value in values if not why_not_listed(name, value, getattr(lists, name)))


def _ordered(values: set[Any]) -> tuple[Any, ...]:
    """Numbers by size, then words: neighbours in a space are one step apart."""
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))


def _tile_reason(
    prefix: str, m: int, n: int, warps: int, stages: int, shape: Shape, element: int, target: Target, separate: bool
) -> str | None:
    d, dv = shape.head_dim, shape.head_dim_v
    threads = warps * target.warp_size
    held = registers_held(KERNEL_OF[prefix], m, n, threads, d, dv, separate)
    if held > 224:
        return f"{prefix}tile {m} x {n} needs {held} registers a thread for its sums"
    if m * n < 4 * threads:
        return f"{prefix}tile {m} x {n} leaves {warps} warps without work"
    # The walked side is staged; one stage is the least that any pipeline holds.
    walked = (m if prefix == "dkv_" else n) * (d + dv) * element
    shared = walked * max(1, stages - 1)
    if shared > target.shared_limit:
        return f"{prefix}stages need {shared} bytes of shared memory, {target.name} has {target.shared_limit}"
    return None


def _checked(space: Space, piece: str) -> Space:
    if space.size <= MAX_ENUMERATED and next(iter(space.points()), None) is None:
        raise ScheduleError(f"{piece}: the schedule's pins leave no legal choice")
    return space

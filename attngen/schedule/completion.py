"""From what was decided to a complete schedule: the model's choice fills what is open, and listed tiles bound the blocks."""

from __future__ import annotations

from dataclasses import replace

import torch

from attngen.analysis import Facts
from attngen.analysis import facts as analyse
from attngen.errors import ScheduleError
from attngen.language.call import Call
from attngen.language.lists import Lists, TileLists
from attngen.language.schedule import KERNELS, PLAIN, PREFIXES, Schedule, Tile
from attngen.language.spec import Spec
from attngen.schedule.defaults import default_on_cpu, default_order, default_tile
from attngen.schedule.legality import check_targeted, why_not_listed
from attngen.schedule.target import Target

SHARED = Schedule(deterministic=True, precision="ieee")  # what undecided shared fields mean on a GPU


def complete(
    spec: Spec, target: Target, head_dim: int, head_dim_v: int, dtype: torch.dtype, *choices: Schedule | None
) -> Schedule:
    """The full schedule: the first of `choices` that decides a field wins, then the model's choice for the target.
    ScheduleError for a tile that the target cannot have.
    """
    schedule = Schedule()
    for choice in choices:
        schedule = schedule.over(choice)
    schedule = ordered(spec, schedule.over(SHARED))
    for kernel in KERNELS:
        default = default_tile(spec, target, kernel, max(head_dim, head_dim_v), dtype)
        schedule = schedule.with_tile(kernel, getattr(schedule, kernel).over(default).over(PLAIN))
    check_targeted(schedule, target)
    return schedule


def ordered(spec: Spec, schedule: Schedule) -> Schedule:
    """The schedule with an order of outputs for every kernel."""
    known = analyse(spec)
    for kernel in KERNELS:
        default = Tile(order=default_order(known, kernel, schedule))
        schedule = schedule.with_tile(kernel, getattr(schedule, kernel).over(default))
    return schedule


def complete_on_cpu(call: Call, facts: Facts, pins: Schedule, *choices: Schedule | None) -> Schedule:
    """The same for the CPU backend, which only takes blocks; its chunks of keys are runs of whole listed tiles."""
    schedule = pins
    for choice in choices:
        schedule = schedule.over(choice)
    return fit(schedule.over(default_on_cpu(call, facts)), call.spec.lists, pins, ("block_m",))


def fit(
    schedule: Schedule,
    lists: Lists | None,
    pins: Schedule | None = None,
    blocks: tuple[str, ...] = ("block_m", "block_n"),
) -> Schedule:
    """The schedule with blocks that divide the tiles of a list; specs without one leave it as it is. Blocks are halved until
    they do; ScheduleError for a pinned one that does not.
    """
    if not isinstance(lists, TileLists):
        return schedule
    for kernel in KERNELS:
        tile: Tile = getattr(schedule, kernel)
        for name in blocks:
            block, listed = getattr(tile, name), getattr(lists, name)
            if (reason := why_not_listed(name, block, listed)) and pins and getattr(getattr(pins, kernel), name):
                raise ScheduleError(PREFIXES[kernel] + reason)
            while why_not_listed(name, block, listed):
                block //= 2
            tile = replace(tile, **{name: block})
        schedule = schedule.with_tile(kernel, tile)
    return schedule

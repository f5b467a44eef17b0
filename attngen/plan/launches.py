"""Which kernels an attention launches: what runs, compiles, counts and shows them agree by this.

The gradient of a captured tensor is a sum of dS, which dq has of a query tile and dkv of a key tile: there it is added up, and no
kernel finds P and dS again. What no program of either has wholly gets a launch of its own, "capture".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch

from attngen.analysis.capture_sites import EDGE_WEIGHTS, CaptureSite
from attngen.language.lists import Lists, RowLists
from attngen.language.schedule import Schedule, Tile

MANY = 2  # batches or heads: more than one


@dataclass(frozen=True)
class Launch:
    """A kernel, and the places of captured tensors whose gradients it adds up."""

    kernel: str
    sites: tuple[CaptureSite, ...] = ()

    @property
    def by_keys(self) -> bool:
        """Whether a program has a tile of keys and walks queries."""
        return self.kernel == "dkv" or (self.kernel == "capture" and self.sites[0].by_keys)

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(site.tensor for site in self.sites))
        return f"gradient of {names}" if self.kernel == "capture" else " + ".join(filter(None, (self.kernel, names)))


def forward_launches(schedule: Schedule) -> tuple[str, ...]:
    """The kernels of a forward, in their order. Where several programs share an output, a second one merges their states."""
    return ("forward",) if schedule.split in (None, 1) else ("forward", "merge")


def backward_launches(
    facts: Any,
    lists: Lists | None,
    dtype: torch.dtype,
    schedule: Schedule,
    wanted: Collection[str] = (),
    batch: int = MANY,
    heads: int = MANY,
    offsets: bool = False,
    kept: bool = True,
) -> tuple[Launch, ...]:
    """The kernels of a backward whose delta is there already, in their order. facts: of the spec, or what its calls know of it;
    lists: of the spec; wanted: captured tensors that want a gradient; batch, heads: of the call, where it matters whether they are 1;
    offsets: whether its q_offset is a tensor, a number for each batch; kept: whether the forward left what a large lse lacks, which is
    found again otherwise.

    A kernel adds up gradients of one tensor, or of all that the spec loads: so it has few variants, and a pack can have all.
    """
    learned = learned_of(facts, lists)
    named = [name for name in learned if name in wanted]
    carried = named if len(named) == len(learned) else named[:1]
    beside: dict[str, list[CaptureSite]] = {"dq": [], "dkv": [], "capture": []}
    for name in named:
        for site in _sites(facts, lists, schedule, name):
            site = site.within(batch, heads, offsets)
            kernel = _carrier(site, lists, schedule.tile("dq")) if name in carried else "capture"
            beside[kernel].append(site)
    return (
        *((Launch("excess"),) if facts.restores(dtype) and not kept else ()),
        *(Launch(kernel, tuple(beside[kernel])) for kernel in ("dq", "dkv")),
        *(Launch("capture", (site,)) for site in beside["capture"]),
    )


def every_backward_launch(
    facts: Any, lists: Lists | None, dtype: torch.dtype, schedule: Schedule
) -> tuple[Launch, ...]:
    """All that some backward launches, whichever captured tensors want a gradient, of one batch or head and of more."""
    learned = learned_of(facts, lists)
    few = (wanted for count in range(3) for wanted in combinations(learned, count))
    sizes = product((*few, learned), (1, MANY), (1, MANY), (False, True))
    every = (backward_launches(facts, lists, dtype, schedule, *own, kept=False) for own in sizes)
    return tuple(dict.fromkeys(launch for launches in every for launch in launches))


def learned_of(facts: Any, lists: Lists | None) -> tuple[str, ...]:
    """The captured tensors whose gradients kernels add up: those that the score loads, and the weights of listed keys."""
    weights = [EDGE_WEIGHTS.tensor] if isinstance(lists, RowLists) and lists.weighted else []
    return (*weights, *(name for name in sorted(facts.learned) if facts.sites_of(name, True)))


def _sites(facts: Any, lists: Lists | None, schedule: Schedule, name: str) -> tuple[CaptureSite, ...]:
    if isinstance(lists, RowLists) and name == EDGE_WEIGHTS.tensor:
        return (EDGE_WEIGHTS,)
    return tuple(facts.sites_of(name, schedule.deterministic is not False))


def _carrier(site: CaptureSite, lists: Lists | None, dq: Tile) -> str:
    """The kernel that adds it up. With a list of keys per query dq's tile is the heads of one query, so only what heads share is
    its own. Where batches share elements, a program of dq takes a query tile of each of them in turn. Where heads do, that would
    leave few programs.
    """
    if isinstance(lists, RowLists):
        return "dq" if site.kind == EDGE_WEIGHTS.kind else "capture"
    if site.over_batches and (dq.persistent or dq.order != "by_head"):
        return "capture"  # its programs go another way
    if site.kind == "pairs" and not site.by_head:
        return "capture"
    return "dkv" if site.by_keys else "dq"

"""Facts: what symbolic analysis knows about a spec before any kernel is chosen.

    mask -> alternatives of constraints (normal) -> intervals per tile (intervals, tables) -> tile programs (walk)

It loads when something of it is first used: a call of a pack needs none of the symbolic part.

Every stage errs on one side only: a tile called empty has no attended pair, a tile called full has no masked one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attngen.analysis.cost import GPUS, Cost, Gpu
    from attngen.analysis.intervals import Interval
    from attngen.analysis.maps import tile_map
    from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST
    from attngen.analysis.spec_facts import LARGE, NOTICED, WEIGHT, Facts, facts
    from attngen.analysis.summaries import Axis
    from attngen.analysis.tables import Table
    from attngen.analysis.tiles import EMPTY, FULL, PARTIAL, paint, run
    from attngen.analysis.walk import Segment, Walk, WalkProgram

_MODULES = {
    "GPUS": "cost",
    "Cost": "cost",
    "Gpu": "cost",
    "LARGE": "spec_facts",
    "NOTICED": "spec_facts",
    "WEIGHT": "spec_facts",
    "Facts": "spec_facts",
    "facts": "spec_facts",
    "Interval": "intervals",
    "tile_map": "maps",
    "BEGIN": "order",
    "BLOCK": "order",
    "END": "order",
    "FIRST": "order",
    "LAST": "order",
    "Axis": "summaries",
    "Table": "tables",
    "EMPTY": "tiles",
    "FULL": "tiles",
    "PARTIAL": "tiles",
    "paint": "tiles",
    "run": "tiles",
    "Segment": "walk",
    "Walk": "walk",
    "WalkProgram": "walk",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


__all__ = [
    "BEGIN",
    "BLOCK",
    "EMPTY",
    "END",
    "FIRST",
    "FULL",
    "GPUS",
    "LARGE",
    "LAST",
    "NOTICED",
    "PARTIAL",
    "WEIGHT",
    "Axis",
    "Cost",
    "Facts",
    "Gpu",
    "Interval",
    "Segment",
    "Table",
    "Walk",
    "WalkProgram",
    "facts",
    "paint",
    "run",
    "tile_map",
]

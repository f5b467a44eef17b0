"""Facts: what symbolic analysis knows about a spec before any kernel is chosen.

    mask -> alternatives of constraints (normal) -> intervals per tile (intervals, tables) -> tile programs (walk)

Every stage errs on one side only: a tile called empty has no attended pair, a tile called full has no masked one.
"""

from attngen.analysis.cost import GPUS, Cost, Gpu
from attngen.analysis.facts import LARGE, NOTICED, WEIGHT, Facts, facts
from attngen.analysis.intervals import Interval
from attngen.analysis.maps import tile_map
from attngen.analysis.order import BEGIN, BLOCK, END, FIRST, LAST
from attngen.analysis.tables import Axis, Table
from attngen.analysis.tiles import EMPTY, FULL, PARTIAL, paint, run
from attngen.analysis.walk import Segment, Walk, WalkProgram

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

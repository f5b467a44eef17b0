"""How it is computed: targets, what is legal, what is chosen. The values themselves are `attngen.language.schedule`."""

from attngen.language.schedule import KERNELS, Schedule, Tile
from attngen.schedule.completion import complete, fit
from attngen.schedule.target import TARGETS, Target

__all__ = ["KERNELS", "TARGETS", "Schedule", "Target", "Tile", "complete", "fit"]

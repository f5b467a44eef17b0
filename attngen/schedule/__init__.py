"""How it is computed: schedules, targets, what is legal, what is chosen."""

from attngen.schedule.schedule import KERNELS, TARGETS, Schedule, Target, Tile, complete, fit, why_not

__all__ = ["KERNELS", "TARGETS", "Schedule", "Target", "Tile", "complete", "fit", "why_not"]

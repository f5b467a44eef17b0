"""Is an implementation right? Where benchmarks look for it; the tuner's package does the work."""

from attngen.tuning.check import Group, Reference, WrongResult

__all__ = ["Group", "Reference", "WrongResult"]

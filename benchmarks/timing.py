"""What the benchmarks time with: the tuner's race for the suites and `ranks`, and plain rounds in turn for the tables of a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from attngen.tuning.race import Race, Timing, race
from attngen.tuning.stopwatch import Candidate, Clock, DeviceStopwatch, HostStopwatch, Stopwatch, stopwatch_for

__all__ = [
    "Candidate", "Clock", "DeviceStopwatch", "HostStopwatch", "Race", "Stopwatch", "Timing", "interleaved", "race",
    "ratio", "stopwatch_for",
]  # fmt: skip


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 11,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
    repeat: int = 1,
) -> dict[str, Timing]:
    """Run every candidate once a round, in turn, so that a disturbance hits all of them; `warmup` rounds do not count.

    `repeat`: runs of a candidate at its turn. With 1 each run starts in the caches and pages that another candidate left;
    with more, most runs follow one of their own kind, as in a program that uses one implementation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in [item for item in candidates.items() for _ in range(repeat)]:
            start = clock()
            run()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return {name: Timing.of(runs) for name, runs in seconds.items()}


def ratio(timings: Mapping[str, Timing], ours: str, peer: str) -> float:
    """How many times faster `ours` is than `peer`, by medians."""
    return timings[peer].median / timings[ours].median

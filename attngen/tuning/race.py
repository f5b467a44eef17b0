"""Timing candidates against each other on a machine that does other things too."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from attngen.tuning.stopwatch import Candidate, Clock, Stopwatch


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    p20: float
    p80: float
    best: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Order statistics of the runs."""
        ordered = sorted(seconds)

        def at(part: float) -> float:
            return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

        return cls(statistics.median(ordered), at(0.2), at(0.8), ordered[0], len(ordered))


def race(
    candidates: Mapping[str, Candidate],
    stopwatch: Stopwatch,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 60),
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Candidates in turn, each round beginning with another, until `seconds` are used: (timings, reasons of those that
    failed). One warm-up round does not count, nor do its seconds, in which a candidate may compile; at least rounds[0] and
    at most rounds[1] do.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    failed: dict[str, str] = {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds[1] + 1):
            if number == 1:
                start = clock()
            if number > rounds[0] and clock() - start > seconds:
                break
            running = [name for name in candidates if name not in failed]
            if not running:
                break
            turn = number % len(running)
            for name in running[turn:] + running[:turn]:
                try:
                    took = stopwatch(candidates[name].prepare, candidates[name].run)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    continue
                if number:
                    times[name].append(took)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(runs) for name, runs in times.items() if runs and name not in failed}, failed

"""Timing candidates against each other on a machine that does other things too: what the tuner and the benchmarks measure with.

A GPU begins at a clock that it cannot hold: a race first warms up, until laps take as long as those before. Laps are mirrored
(A B C, C B A), so that a drift costs each candidate the same. Who is faster is said by ratios of times within a mirrored pair of
laps, since a clock that changes between pairs leaves these as they are.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from attngen.tuning.stopwatch import Candidate, Clock, Stopwatch

WINDOW = 1 / 8  # of the longest that a warm-up may take: its laps are compared with those of the window before
STEADY = 0.02  # relative difference of two windows' typical laps
WARM_UP = 2.0  # times the race's seconds: a warm-up's end, whatever the clock does
LONGEST = 5.0  # seconds of a warm-up: in these a GPU's clock has settled
MOST_LAPS = 1000  # of a window, where the host's clock hardly moves


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    p20: float
    p80: float
    best: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Order statistics of the runs."""
        ordered = sorted(seconds)

        def at(part: float) -> float:
            return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

        return cls(statistics.median(ordered), at(0.2), at(0.8), ordered[0], len(ordered))


@dataclass(frozen=True)
class Race:
    """times: seconds of each candidate, lap by lap; fewer of one that dropped out. failed: reasons of those that broke. steady:
    whether the warm-up ended with laps that take as long as those before."""

    times: Mapping[str, Sequence[float]]
    failed: Mapping[str, str]
    steady: bool

    @property
    def timings(self) -> dict[str, Timing]:
        return {name: Timing.of(seconds) for name, seconds in self.times.items()}

    def ratio(self, name: str, other: str) -> float:
        """How many times as long as `other` the candidate takes. KeyError for one that was not timed."""
        return paired_ratio(self.times[name], self.times[other])


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Seconds of two candidates lap by lap: the median of their ratios, each of a lap there and one back. Of all laps together
    where the clock is too coarse for a pair, and inf (1 for both) where it never moved.
    """
    both = list(zip(times, others, strict=False))
    pairs = [[sum(side) for side in zip(*both[at : at + 2], strict=True)] for at in range(0, max(1, len(both) - 1), 2)]
    if all(min(pair) > 0 for pair in pairs):
        return statistics.median(one / other for one, other in pairs)
    one, other = (sum(side) for side in zip(*both, strict=True))
    return one / other if other else math.inf if one else 1.0


def race(
    candidates: Mapping[str, Candidate],
    stopwatch: Stopwatch,
    seconds: float = 1.0,
    laps: tuple[int, int] = (5, 60),
    clock: Clock = time.perf_counter,
    *,
    late: float = float("inf"),
    hopeless: float = float("inf"),
    strict: bool = False,
) -> Race:
    """Candidates in mirrored laps until `seconds` are used. The first lap, in which a candidate may compile, and those of the
    warm-up neither count nor use up the seconds.

    laps: at least and at most so many count. late: seconds after which one counted lap must do. hopeless: times slower than the
    fastest after two laps, then a candidate drops out. strict: raise what a candidate raises; else it is in `failed`.
    """
    course, start = _Course(candidates, stopwatch, strict), clock()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with _no_collecting():
        course.lap()
        steady = _warm_up(course, seconds, clock, start + late)
        course.laps, end = 0, clock() + seconds
        while course.racing and course.laps < laps[1]:
            now = clock()
            if (course.laps >= laps[0] and now >= end) or (course.laps >= 1 and now >= start + late):
                break
            for name, took in course.lap().items():
                times[name].append(took)
            if course.laps == 2 and course.racing:
                fastest = min(min(times[name]) for name in course.racing)
                course.racing = [name for name in course.racing if min(times[name]) < hopeless * fastest]
    return Race({name: found for name, found in times.items() if name not in course.failed}, course.failed, steady)


class _Course:
    """The candidates that still race. laps: how many were run."""

    def __init__(self, candidates: Mapping[str, Candidate], stopwatch: Stopwatch, strict: bool):
        self.candidates, self.stopwatch, self.strict = candidates, stopwatch, strict
        self.racing, self.failed, self.laps = list(candidates), dict[str, str](), 0

    def lap(self) -> dict[str, float]:
        """Seconds of each candidate: a lap there, the next one back, and the next pair begins with another."""
        turn = self.laps // 2 % max(1, len(self.racing))
        there = [*self.racing[turn:], *self.racing[:turn]]
        took = dict[str, float]()
        for name in there[::-1] if self.laps % 2 else there:
            try:
                took[name] = self.stopwatch(self.candidates[name].prepare, self.candidates[name].run)
            except Exception as error:
                if self.strict:
                    raise
                self.failed[name] = f"{type(error).__name__}: {error}"
        self.racing = [name for name in self.racing if name not in self.failed]
        self.laps += 1
        return took


def _warm_up(course: _Course, seconds: float, clock: Clock, late: float) -> bool:
    """Laps until two windows in succession have the same typical one; whether they had in time."""
    longest = min(LONGEST, WARM_UP * seconds)
    end, before, course.laps = min(late, clock() + longest), float("inf"), 0
    while course.racing and clock() < end:
        window, found = clock() + WINDOW * longest, list[float]()
        while not found or (found[-1] > 0 and len(found) < MOST_LAPS and clock() < window):
            found.append(sum(course.lap().values()))
        typical = statistics.median(found)
        if abs(typical - before) <= STEADY * before < float("inf"):
            return True
        before = typical
    return False


@contextmanager
def _no_collecting() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()

"""Timing candidates against each other on a machine that does other things too."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

Clock = Callable[[], float]

FLUSH_BYTES = 512 * 2**20  # written before each run on a GPU, more than any L2 holds
MOST_FLUSHES = 64


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


# -- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """`run(prepare())` is what is timed, without `prepare`: for a backward, that is its forward."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Stopwatch(Protocol):
    """Seconds of one `run(prepare())`, `prepare` not counted."""

    def __call__(self, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> float: ...


class HostStopwatch:
    """For a CPU: the clock on the wall."""

    def __init__(self, clock: Clock = time.perf_counter):
        self.clock = clock

    def __call__(self, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> float:
        given = prepare()
        start = self.clock()
        result = run(given)
        end = self.clock()
        del result
        return end - start


class DeviceStopwatch:
    """For a GPU: events around the run, with a cold L2. The writes that flush the L2 also keep the device busy while the
    host issues the run's launches, so that what is timed is the device's work unless the run waits for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.flush_seconds = min(self._events(self.flush.zero_) for _ in range(5))
        self._issued: WeakKeyDictionary[Callable[[Any], Any], float] = WeakKeyDictionary()

    def __call__(self, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> float:
        given = prepare()
        torch.cuda.synchronize(self.device)
        issued = self._issued.get(run, 0.0)  # how long launching took the host last time
        for _ in range(min(MOST_FLUSHES, 1 + int(1.5 * issued / self.flush_seconds))):
            self.flush.zero_()

        def timed() -> Any:
            start = time.perf_counter()
            result = run(given)
            self._issued[run] = time.perf_counter() - start
            return result

        return self._events(timed)

    def _events(self, run: Callable[[], Any]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        result = run()
        last.record()
        last.synchronize()
        del result
        return float(first.elapsed_time(last)) / 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch of a device."""
    return DeviceStopwatch(device) if device.type == "cuda" else HostStopwatch()


def race(
    candidates: Mapping[str, Candidate],
    stopwatch: Stopwatch,
    seconds: float = 1.0,
    rounds: tuple[int, int] = (5, 60),
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Candidates in turn, each round beginning with another, until `seconds` are used: (timings, reasons of those that
    failed). One warm-up round does not count; at least rounds[0] and at most rounds[1] do.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    failed: dict[str, str] = {}
    start = clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds[1] + 1):
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

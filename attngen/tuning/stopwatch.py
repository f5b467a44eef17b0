"""Seconds of one run, on the host's clock or on a GPU's: what the tuner and the benchmarks time with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

Clock = Callable[[], float]

FLUSH_BYTES = 512 * 2**20  # written before each run on a GPU, more than any L2 holds
FLUSH_RUNS = 5  # of the flush itself, to know how long it takes
MOST_FLUSHES = 64


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

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter):
        self.device, self.clock = device, clock
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.flush_seconds = min(self._events(self.flush.zero_) for _ in range(FLUSH_RUNS))
        self._issued: WeakKeyDictionary[Callable[[Any], Any], float] = WeakKeyDictionary()

    def __call__(self, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> float:
        given = prepare()
        torch.cuda.synchronize(self.device)
        issued = self._issued.get(run, 0.0)  # how long launching took the host last time
        for _ in range(min(MOST_FLUSHES, 1 + int(1.5 * issued / self.flush_seconds))):
            self.flush.zero_()

        def timed() -> Any:
            start = self.clock()
            result = run(given)
            self._issued[run] = self.clock() - start
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


def stopwatch_for(device: torch.device, clock: Clock = time.perf_counter) -> Stopwatch:
    """The stopwatch of a device. clock: the host's."""
    return DeviceStopwatch(device, clock) if device.type == "cuda" else HostStopwatch(clock)

"""Trying schedules: the protocols the search works against, and measuring in a process of its own (`backends/worker.py`).

A candidate may hang, crash or run out of memory: the search sees an Outcome either way.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from attngen.backends.worker import Worker, WorkerDied
from attngen.store import NOISY
from attngen.tuning.race import WARM_UP, paired_ratio
from attngen.tuning.space import Point

STATUSES = ("ok", "wrong", "failed", "timeout", "crashed", "memory")


@dataclass(frozen=True)
class Outcome:
    """What came of trying a schedule. seconds: median, in terms of the race's fastest (`summarise`); spread: (80th - 20th
    percentile) / median; error: the oracle check's error over what its rule allows; reason: why it is not ok."""

    status: str
    seconds: float = float("inf")
    spread: float = 0.0
    error: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def noisy(self) -> bool:
        """Whether it was timed, and so unevenly that the median says little."""
        return self.ok and self.spread > NOISY


class Measurer(Protocol):
    """Tries schedules. `kind` is what its records are called: "measured" or "modelled"."""

    kind: str

    def measure(self, points: Sequence[Point], patience: float = 1.0) -> list[Outcome]:
        """One outcome per point; those that can run and are right are timed in turns. `patience`: seconds for it."""
        ...

    def close(self) -> None: ...


def summarise(times: Sequence[float], error: float, fastest: Sequence[float] | None = None) -> Outcome:
    """Median and spread of repeated times. fastest: those of the race's fastest, lap by lap: seconds are then its median times the
    ratio within the laps, so that outcomes of one race compare as the laps did."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    spread = (high - low) / median if median else 0.0
    if fastest is not None and median and (best := statistics.median(fastest)):
        median = best * paired_ratio(times, fastest)
    return Outcome("ok", median, spread, error)


class WorkerMeasurer:
    """Measures schedules in a worker (see bench.py for what the worker does)."""

    kind = "measured"

    def __init__(self, worker: Worker):
        self.worker = worker
        self._prepared: dict[str, float] = {}  # point -> check error, of the worker now alive
        self._starts = 0

    def measure(self, points: Sequence[Point], patience: float = 1.0) -> list[Outcome]:
        """As the protocol says; the first point is the newcomer that is blamed when a race breaks off."""
        outcomes = [self._prepare(point) for point in points]
        racing = [place for place, outcome in enumerate(outcomes) if outcome.ok]
        for place in racing:  # preparing a later point may have cost the worker, and with it the earlier ones
            outcomes[place] = self._prepare(points[place])
        racing = [place for place in racing if outcomes[place].ok]
        if not racing:
            return outcomes
        request = {"op": "race", "points": [points[place] for place in racing], "patience": patience}
        try:
            answer = self.worker.ask(request, self.worker.limit + (1 + WARM_UP) * patience)
        except WorkerDied as death:
            answer = {"status": death.status, "reason": death.reason}
        if answer["status"] != "ok":
            # The newcomer stands first, and the others have run before: it takes the blame, they run again.
            newcomer, *rest = racing
            outcomes[newcomer] = Outcome(answer["status"], reason=answer["reason"])
            for place, outcome in zip(rest, self.measure([points[p] for p in rest], patience), strict=True):
                outcomes[place] = outcome
            return outcomes
        fastest = min(answer["times"], key=statistics.median)
        for place, times in zip(racing, answer["times"], strict=True):
            outcomes[place] = summarise(times, outcomes[place].error, fastest)
        return outcomes

    def _prepare(self, point: Point) -> Outcome:
        """Compile and check against the oracle, once per worker."""
        if self._starts != self.worker.starts or not self.worker.alive:
            self._prepared.clear()
        name = json.dumps(point, sort_keys=True)
        if name not in self._prepared:
            try:
                answer = self.worker.ask({"op": "prepare", "point": point})
            except WorkerDied as death:
                return Outcome(death.status, reason=death.reason)
            finally:
                self._starts = self.worker.starts
            if answer["status"] != "ok":
                return Outcome(answer["status"], error=answer.get("error", 0.0), reason=answer["reason"])
            self._prepared[name] = answer["error"]
        return Outcome("ok", error=self._prepared[name])

    def close(self) -> None:
        self.worker.close()

"""The search itself: suggest, refuse by the model, measure against the best so far, keep. Knows no device."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from attngen.tuning.measure import Measurer, Outcome
from attngen.tuning.space import MAX_ENUMERATED, Point, Space
from attngen.tuning.study import PRUNED, Tried
from attngen.tuning.trials import POLL, Asked, Trials

FINALISTS = 3  # measured again at the end
TIGHTEN_AFTER = 30  # trials before the ranges may be tightened
TIGHTEN_KEEP = 10  # best trials that are kept then
FIRST_GUESSES = 5  # of the model, tried before the sampler takes over
AGAIN = 2  # times that a final race is run again, each for twice as long, if its winner's times are too far apart


class Modeller(Protocol):
    """What is known about a schedule without running it."""

    def guess(self, point: Point) -> float:
        """Estimated seconds, cheaply: decides which points come first."""
        ...

    def bound(self, point: Point) -> float:
        """Seconds that the point cannot beat."""
        ...

    def refuse(self, point: Point) -> str | None:
        """Why the point is not worth measuring (spills, too much shared memory); may compile for it."""
        ...


class NoModel:
    """Refuses nothing."""

    def guess(self, point: Point) -> float:
        return 0.0

    def bound(self, point: Point) -> float:
        return 0.0

    def refuse(self, point: Point) -> str | None:
        return None


@dataclass
class Progress:
    """Where a search stands; given to `watch` after every change. best: the best so far, whose time is that of the races on the
    way, each in terms of the one before; kept: what won the final race, with the time that the record gets.
    """

    trials: int = 0  # asked for
    done: int = 0
    failed: int = 0
    pruned: int = 0
    resumed: int = 0  # of `done`, from earlier calls
    best: Tried | None = None
    kept: Tried | None = None
    now: str = ""


@dataclass(frozen=True)
class Result:
    """best: what won the final race, or None; final: all outcomes of that race, best first; why it ended."""

    best: Tried | None
    final: tuple[Tried, ...]
    progress: Progress
    ended: str  # "trials", "exhausted", "timeout", "interrupted"
    failures: tuple[Tried, ...] = field(default=())


class Interrupts:
    """Ctrl-C ends a search between steps: inside a database's or a journal's write it would leave half a step behind.

    While `waiting` for a measurement, it takes effect at once; and at the second time, anywhere.
    """

    def __init__(self) -> None:
        self.pending = self._waiting = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: object) -> None:
        if self._waiting or self.pending:
            raise KeyboardInterrupt
        self.pending = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came."""
        if self.pending:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, Ctrl-C is raised at once."""
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False


@dataclass
class Search:
    """One search over a space. `first`: points to try before any other, the incumbent foremost."""

    space: Space
    measurer: Measurer
    trials: Trials
    wanted: int  # trials in all
    model: Modeller = field(default_factory=NoModel)
    first: Sequence[Point] = ()
    deadline: float = float("inf")
    tighten: bool = True
    patience: float = 0.5
    watch: Callable[[Progress], None] = lambda progress: None
    keep: Callable[[Tried], None] = lambda tried: None  # called with each new best
    clock: Callable[[], float] = time.monotonic
    seed: int = 0

    def run(self) -> Result:
        """Until `wanted` trials are finished, nothing legal is left, the deadline, or Ctrl-C."""
        self._random = random.Random(self.seed)
        self._progress = Progress(self.wanted)
        self._narrow = self.space
        self._measuring = 0.0
        queue = self._opening()
        self._count(self.trials.history())
        self._progress.resumed = self._progress.done
        ended = "interrupted"
        final: tuple[Tried, ...] = ()
        with Interrupts() as self._interrupts, self.trials:
            try:
                ended = self._loop(queue)
                self._progress.now = "final race"
                self.watch(self._progress)
                final = self._final()
            except KeyboardInterrupt:
                ended = "interrupted"
        failures = tuple(t for t in self.trials.history() if not t.outcome.ok and t.outcome.status != PRUNED)
        best = next((tried for tried in final if tried.outcome.ok), self._progress.best)
        self._progress.kept, self._progress.now = best, ""
        self.watch(self._progress)
        return Result(best, final, self._progress, ended, failures)

    def _loop(self, queue: list[Point]) -> str:
        while True:
            self._interrupts.check()
            others = self.trials.others()  # before the history: what ends in between is counted twice, and not missed
            history = self.trials.history()
            self._count(history)
            self.watch(self._progress)
            if self._progress.done >= self.wanted and not others:
                return "trials"
            if self.clock() >= self.deadline:
                return "timeout"
            if self._progress.done + len(others) >= self.wanted:
                self._wait(others)
                continue
            self._maybe_tighten(history)
            seen = {_name(tried.point) for tried in history} | {_name(point) for point in others}
            wanted = next((p for p in queue if _name(p) not in seen and self._narrow.holds(p)), None)
            point = wanted or self._next(seen)
            if point is not None:
                self._try(self.trials.ask(self.space, point))
            elif others:
                self._wait(others)
            else:
                return "exhausted"

    def _wait(self, others: Sequence[Point]) -> None:
        """The last trials are with other tuners: see what comes of them, so that all know the same before the final race."""
        self._progress.now = f"waiting for trials of other tuners: {len(others)}"
        self.watch(self._progress)
        with self._interrupts.waiting():
            time.sleep(POLL)

    def _next(self, seen: set[str]) -> Point | None:
        """A point that is legal and new: the sampler's, else one near the best, else any."""
        for _ in range(4):
            point = self.trials.suggest(self._narrow)
            if _name(point) not in seen and self._narrow.illegal(point) is None:
                return point
        best = self._progress.best
        near = [] if best is None else [p for p in _neighbours(self._narrow, best.point) if _name(p) not in seen]
        return min(near, key=self.model.guess) if near else self._any_new(seen)

    def _any_new(self, seen: set[str]) -> Point | None:
        for space in (self._narrow, self.space):
            if space.size <= MAX_ENUMERATED:
                fresh = [point for point in space.points() if _name(point) not in seen]
                if fresh:
                    if space is not self._narrow:  # the tightened part is used up
                        self._widen()
                    return self._random.choice(fresh)
                continue
            for _ in range(2000):
                point = {name: self._random.choice(values) for name, values in space.choices.items()}
                if _name(point) not in seen and space.illegal(point) is None:
                    return point
        return None

    def _try(self, asked: Asked) -> None:
        try:
            outcome = self._outcome(asked.point)
        except BaseException:
            self.trials.forget(asked)
            raise
        self.trials.tell(asked, outcome)
        best = self._progress.best
        if outcome.ok and (best is None or outcome.seconds < best.outcome.seconds):
            self._progress.best = Tried(asked.point, outcome)
            self.keep(self._progress.best)

    def _outcome(self, point: Point) -> Outcome:
        """Refused by the model, or measured."""
        best = self._progress.best
        if best is not None and self.model.bound(point) >= best.outcome.seconds:
            return Outcome(PRUNED, reason="its speed-of-light bound is above the best time")
        with self._interrupts.waiting():
            reason = self.model.refuse(point)
        if reason is not None:
            return Outcome(PRUNED, reason=reason)
        self._progress.now = ", ".join(f"{name}={value}" for name, value in point.items())
        self.watch(self._progress)
        start = self.clock()
        with self._interrupts.waiting():
            outcome = self._measure(point, best)
        self._measuring += self.clock() - start
        return outcome

    def _measure(self, point: Point, best: Tried | None) -> Outcome:
        """The newcomer's time, in a race with the best so far: a drifting clock or a warm machine favours neither."""
        if best is None:
            (outcome,) = self.measurer.measure([point], self.patience)
            return outcome
        outcome, again = self.measurer.measure([point, best.point], self.patience)
        if outcome.ok and again.ok and again.seconds > 0:
            return replace(outcome, seconds=outcome.seconds * best.outcome.seconds / again.seconds)
        return outcome

    def _final(self) -> tuple[Tried, ...]:
        """The best few, the incumbent and the untuned schedule once more, side by side and for longer: by one tuner, for all.

        A winner whose own times are too far apart (`Outcome.noisy`: a machine that is busy with something else) may have won by
        chance: the race is run again, and of all races the one with the quietest winner counts. If that is noisy too it is kept
        all the same, for it is the best that is known; the record's spread says so, and so do the report and a warning.
        """
        finalists = [tried.point for tried in self._good(self.trials.history(), FINALISTS)]
        if not finalists:
            return ()
        points = list(finalists)
        for other in (*self.first[:1], self.space.start):
            if self.space.holds(other) and other not in points:
                points.append(other)
        return self.trials.share_race(finalists, self.space, partial(self._races, points), self._interrupts.waiting)

    def _races(self, points: Sequence[Point]) -> tuple[Tried, ...]:
        """The final race, again where its winner is noisy."""
        races = [self._race(points, 4 * self.patience)]
        while races[-1][0].outcome.noisy and len(races) <= AGAIN and self.clock() < self.deadline:
            self._progress.now = f"final race again: times {races[-1][0].outcome.spread:.0%} apart"
            self.watch(self._progress)
            races.append(self._race(points, 4 * self.patience * 2 ** len(races)))
        return min(races, key=lambda race: (not race[0].outcome.ok, race[0].outcome.spread))

    def _race(self, points: Sequence[Point], patience: float) -> tuple[Tried, ...]:
        """All of them side by side, the fastest first."""
        with self._interrupts.waiting():
            outcomes = self.measurer.measure(points, patience)
        tried = [Tried(point, outcome) for point, outcome in zip(points, outcomes, strict=True)]
        return tuple(sorted(tried, key=lambda one: (not one.outcome.ok, one.outcome.seconds)))

    def _opening(self) -> list[Point]:
        """What is tried first: the incumbent, the model's choice, and the model's best guesses."""
        queue = [*self.first, self.space.start]
        if self.space.size <= MAX_ENUMERATED and not isinstance(self.model, NoModel):
            queue += sorted(self.space.points(), key=self.model.guess)[:FIRST_GUESSES]
        return [point for point in queue if self.space.holds(point)]

    def _count(self, history: Iterable[Tried]) -> None:
        """Recount from the study: with a fleet, others add to it."""
        progress, found = self._progress, count(history)
        progress.done, progress.failed, progress.pruned = found.done, found.failed, found.pruned
        best, known = found.best, progress.best
        if best is None or not self.space.holds(best.point):
            return
        if known is None or best.outcome.seconds < known.outcome.seconds:
            progress.best = best

    def _maybe_tighten(self, history: list[Tried]) -> None:
        if not self.tighten or self._narrow is not self.space or self._progress.done < TIGHTEN_AFTER:
            return
        if self.trials.asking > self._measuring:
            best = self._good(history, TIGHTEN_KEEP)
            if best:
                self._narrow = self.space.around([tried.point for tried in best])
                self.trials.tighten(self._narrow, best)

    def _widen(self) -> None:
        self._narrow, self.tighten = self.space, False
        self.trials.tighten(self.space, self._good(self.trials.history(), TIGHTEN_KEEP))

    def _good(self, history: Iterable[Tried], count: int) -> list[Tried]:
        good = [tried for tried in history if tried.outcome.ok and self.space.holds(tried.point)]
        return sorted(good, key=lambda tried: tried.outcome.seconds)[:count]


def count(history: Iterable[Tried]) -> Progress:
    """What a study's trials amount to. Points that the model refused are not trials."""
    progress = Progress()
    for tried in history:
        if tried.outcome.status == PRUNED:
            progress.pruned += 1
            continue
        progress.done += 1
        progress.failed += not tried.outcome.ok
        best = progress.best
        if tried.outcome.ok and (best is None or tried.outcome.seconds < best.outcome.seconds):
            progress.best = tried
    return progress


def _neighbours(space: Space, point: Point) -> Iterable[Point]:
    """Legal points that differ in one choice, by one step."""
    for name, values in space.choices.items():
        if point.get(name) not in values:
            continue
        place = values.index(point[name])
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                near = point | {name: values[other]}
                if space.illegal(near) is None:
                    yield near


def _name(point: Point) -> str:
    return json.dumps(point, sort_keys=True)

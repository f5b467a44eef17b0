"""Races on a fake clock: they warm up until laps are steady, run mirrored, and compare within a pair of laps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attngen.tuning.measure import summarise
from attngen.tuning.race import LONGEST, WARM_UP, paired_ratio, race
from attngen.tuning.stopwatch import Candidate, HostStopwatch
from tests.tuning.test_search import Clock


class Track:
    """Candidates whose runs take so many seconds times what the machine's clock makes of them."""

    def __init__(self, costs: dict[str, float], slowdown: Callable[[float], float] = lambda now: 1.0):
        self.clock, self.slowdown, self.order = Clock(), slowdown, list[str]()
        self.candidates = {name: self._candidate(name, cost) for name, cost in costs.items()}

    def _candidate(self, name: str, cost: float) -> Candidate:
        def run(_: object) -> None:
            self.order.append(name)
            self.clock.now += cost * self.slowdown(self.clock.now)

        return Candidate(lambda: None, run)

    def race(self, seconds: float, laps: tuple[int, int] = (5, 60), **given):
        return race(self.candidates, HostStopwatch(self.clock), seconds, laps, self.clock, **given)


def test_laps_are_mirrored_and_each_pair_begins_with_another():
    track = Track({"a": 0.1, "b": 0.2, "c": 0.3})
    found = track.race(10.0, (6, 6))
    assert "".join(track.order[:3]) == "abc" and "".join(track.order[-18:]) == "abccba" + "bcaacb" + "cabbac"
    assert {name: len(times) for name, times in found.times.items()} == {"a": 6, "b": 6, "c": 6}


def test_nothing_counts_before_a_clock_that_falls_is_steady():
    """A boost that lasts 3 s and fades over one more, as a GPU's does."""
    track = Track({"a": 0.01, "b": 0.02}, lambda now: 1.0 + 0.4 * min(1.0, max(0.0, now - 0.3)))
    found = track.race(4.0, (5, 1000))
    assert found.steady and min(found.times["a"]) == pytest.approx(0.014)
    assert sum(map(sum, found.times.values())) == pytest.approx(4.0, abs=0.1)


def test_a_clock_that_is_never_steady_is_said_and_waited_for_no_longer_than_so():
    track = Track({"a": 0.01}, lambda now: 1.0 + now)
    found = track.race(1.0)
    assert not found.steady and min(found.times["a"]) >= 0.01 * (1 + WARM_UP)
    assert min(found.times["a"]) < 0.011 * (1 + WARM_UP) + 0.001
    longer = Track({"a": 0.01}, lambda now: 1.0 + now).race(100.0, (5, 1000))
    assert min(longer.times["a"]) == pytest.approx(0.01 * (1 + LONGEST), rel=0.05)


def test_ratios_are_those_within_a_pair_of_laps():
    """The clock drifts from run to run, and changes for good between two pairs: medians of all runs would say something else."""
    track = Track({"a": 0.1, "b": 0.2}, lambda now: (1.0 + 0.01 * now) * (1.0 if now < 12 else 3.0))
    found = track.race(3.0, (20, 20))
    assert found.ratio("b", "a") == pytest.approx(2.0, rel=2e-3) and found.ratio("a", "b") == pytest.approx(
        0.5, rel=2e-3
    )
    assert paired_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 1.0]) == 2.0  # a last lap without one back
    assert paired_ratio([3.0], [1.0]) == 3.0 and paired_ratio([1.0, 1.0, 7.0, 7.0], [2.0, 2.0]) == 0.5


def test_a_clock_that_hardly_moves_is_no_error():
    assert paired_ratio([1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]) == 2.0  # of all laps: no pair's says anything
    assert paired_ratio([0.0, 0.0], [0.0, 0.0]) == 1.0 and paired_ratio([1.0, 1.0], [0.0, 0.0]) == float("inf")
    assert summarise([1.0, 1.0], 0.0, [0.0, 0.0]).seconds == 1.0 and summarise([0.0], 0.0, [0.0]).seconds == 0.0


def test_what_breaks_drops_out_or_ends_a_strict_race():
    track = Track({"a": 0.1})

    def broken(_: object) -> None:
        raise RuntimeError("gone")

    track.candidates["b"] = Candidate(lambda: None, broken)
    found = track.race(1.0)
    assert found.failed == {"b": "RuntimeError: gone"} and set(found.timings) == {"a"} and found.steady
    with pytest.raises(RuntimeError, match="gone"):
        track.race(1.0, strict=True)
    empty = race({}, HostStopwatch(track.clock), clock=track.clock)
    assert (empty.times, empty.failed, empty.timings) == ({}, {}, {})

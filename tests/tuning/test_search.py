"""The search, against fake measurers and models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import pytest

from attngen.errors import AttngenWarning, StoreError
from attngen.store import time_text
from attngen.tuning import fleet
from attngen.tuning.measure import Outcome
from attngen.tuning.progress import shown
from attngen.tuning.search import Progress, Search
from attngen.tuning.space import Space
from attngen.tuning.study import PRUNED, Tried
from attngen.tuning.trials import Trials

SPACE = Space({"m": (16, 32, 64, 128), "n": (16, 32, 64, 128), "w": (2, 4, 8)}, {"m": 64, "n": 64, "w": 4})


def seconds(point: dict) -> float:
    """Best at m=128, n=32, w=8."""
    return 1e-3 * (1 + abs(point["m"] - 128) / 64 + abs(point["n"] - 32) / 32 + (8 - point["w"]) / 8)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeMeasurer:
    """Times by `seconds`, on a machine whose speed drifts; each measurement takes a second of the fake clock."""

    clock: Clock
    bad: dict[int, str] = field(default_factory=dict)  # place in the order of measurements -> status
    interrupt: int = -1
    drift: float = 0.0
    kind: str = "measured"
    spreads: list = field(default_factory=list)  # of the races of more than two, one after the other; then 1%
    calls: list = field(default_factory=list)

    def measure(self, points, patience=1.0):
        number = len(self.calls)
        self.calls.append(list(points))
        self.clock.now += 1.0
        if number == self.interrupt:
            raise KeyboardInterrupt
        speed = 1.0 + self.drift * number
        spread = self.spreads.pop(0) if self.spreads and len(points) > 2 else 0.01
        outcomes = [Outcome("ok", seconds(point) * speed, spread, 0.5) for point in points]
        if number in self.bad:
            outcomes[0] = Outcome(self.bad[number], reason="it was bad")
        return outcomes

    def close(self) -> None:
        pass


def search(count=20, storage=None, **options) -> tuple[Search, FakeMeasurer]:
    clock = options.pop("clock", Clock())
    measurer = FakeMeasurer(
        clock, **{n: options.pop(n) for n in ("bad", "interrupt", "drift", "spreads") if n in options}
    )
    trials = Trials(storage, "study", seed=0)
    return Search(options.pop("space", SPACE), measurer, trials, count, clock=clock, **options), measurer


def test_search_finds_the_best_of_a_small_space():
    searching, _ = search(count=48)
    result = searching.run()
    assert result.best.point == {"m": 128, "n": 32, "w": 8}
    assert result.progress.done == 48 and result.ended == "trials"


def test_search_never_tries_a_point_twice_and_ends_when_none_is_left():
    searching, measurer = search(count=1000)
    result = searching.run()
    assert result.ended == "exhausted" and result.progress.done == SPACE.size
    firsts = [json.dumps(call[0], sort_keys=True) for call in measurer.calls[:-1]]  # the last is the final race
    assert len(set(firsts)) == len(firsts) == SPACE.size


def test_better_than_chance():
    """With 16 of 48 trials the sampler and the neighbours of the best reach the best three."""
    searching, _ = search(count=16)
    best = searching.run().best
    assert seconds(best.point) <= sorted(seconds(p) for p in SPACE.points())[2]


def test_illegal_points_are_not_measured():
    space = replace(SPACE, illegal=lambda p: "too big" if p["m"] * p["n"] > 4096 else None)
    searching, measurer = search(count=100, space=space)
    result = searching.run()
    assert result.ended == "exhausted" and result.progress.done == len(list(space.points()))
    assert all(space.illegal(point) is None for call in measurer.calls for point in call)


def test_incumbent_and_start_come_first():
    incumbent = {"m": 16, "n": 16, "w": 2}
    searching, measurer = search(count=5, first=[incumbent])
    searching.run()
    assert measurer.calls[0] == [incumbent]
    assert measurer.calls[1][0] == SPACE.start


def test_candidates_race_against_the_best_so_far_so_drift_does_not_matter():
    searching, measurer = search(count=48, drift=0.05)  # at the end everything takes three times as long
    result = searching.run()
    assert result.best.point == {"m": 128, "n": 32, "w": 8}
    assert all(len(call) == 2 for call in measurer.calls[1:-1])


def test_failures_are_recorded_and_do_not_win():
    bad = {1: "timeout", 2: "crashed", 3: "memory", 4: "wrong", 5: "failed"}
    searching, _ = search(count=20, bad=bad)
    result = searching.run()
    assert result.progress.failed == 5 and result.progress.done == 20
    assert sorted(t.outcome.status for t in result.failures) == sorted(bad.values())
    assert result.best.outcome.ok


def test_when_everything_fails_there_is_no_best():
    searching, _ = search(count=6, bad=dict.fromkeys(range(100), "crashed"))
    result = searching.run()
    assert result.best is None and result.progress.failed == 6 and result.final == ()


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    kept = []
    searching, _ = search(count=20, interrupt=7, storage=tmp_path / "a.journal", keep=kept.append)
    result = searching.run()
    assert result.ended == "interrupted" and result.progress.done == 7
    assert result.best.outcome.seconds == min(t.outcome.seconds for t in kept)
    again, _ = search(count=20, storage=tmp_path / "a.journal")
    result = again.run()
    assert result.progress.resumed == 7 and result.progress.done == 20 and result.ended == "trials"


def test_a_finished_study_is_not_searched_again(tmp_path):
    first = search(count=10, storage=tmp_path / "a.journal")[0].run()
    searching, measurer = search(count=10, storage=tmp_path / "a.journal")
    result = searching.run()
    assert result.progress.resumed == 10 and measurer.calls == []  # nor is its final race run again
    assert result.final == first.final and result.best == first.best


def test_deadline():
    searching, _ = search(count=40, deadline=8.5)
    result = searching.run()
    assert result.ended == "timeout" and result.progress.done == 9


def test_two_workers_share_a_study(tmp_path):
    """Like a fleet: each sees what the other did, and they stop at the common count."""
    one, _ = search(count=12, storage=tmp_path / "a.journal")
    two, _ = search(count=24, storage=tmp_path / "a.journal")
    one.run()
    result = two.run()
    assert result.progress.resumed == 12 and result.progress.done == 24


def test_a_storage_url(tmp_path):
    """As a fleet would use postgresql://; SQLite stands in for it here."""
    url = f"sqlite:///{tmp_path}/trials.db"
    search(count=4, storage=url)[0].run()
    assert search(count=6, storage=url)[0].run().progress.resumed == 4
    with pytest.raises(StoreError, match="nonsense"):
        Trials("nonsense://nowhere", "study")


def test_a_damaged_journal_is_kept_aside(tmp_path):
    path = tmp_path / "a.journal"
    search(count=5, storage=path)[0].run()
    path.write_bytes(b"\x00garbage\n" + path.read_bytes())
    with pytest.warns(AttngenWarning, match="cannot be read"):
        searching, _ = search(count=5, storage=path)
    assert searching.run().progress.resumed == 0
    assert len(list(tmp_path.glob("a.journal.damaged-*"))) == 1


def test_a_line_cut_short_by_a_kill_costs_one_trial(tmp_path, monkeypatch):
    path = tmp_path / "a.journal"
    search(count=5, storage=path)[0].run()
    lines = path.read_bytes().splitlines(keepends=True)
    told = [number for number, line in enumerate(lines) if b'"values":[' in line][4]  # the outcome of the fifth trial
    path.write_bytes(b"".join(lines[:told]) + lines[told][:-20])
    monkeypatch.setattr(fleet, "GONE", 0.0)
    searching, _ = search(count=8, storage=path)
    assert searching.run().progress.resumed == 4
    assert len(Trials(path, "study").history()) == 8


class FakeModel:
    def guess(self, point):
        return seconds(point)

    def bound(self, point):
        return 0.8 * seconds(point)

    def refuse(self, point):
        return "spills" if point["w"] == 2 else None


def finals(measurer: FakeMeasurer) -> int:
    return sum(len(points) > 2 for points in measurer.calls)


def test_a_noisy_final_race_is_run_again_and_the_quietest_counts():
    told: list[str] = []
    searching, measurer = search(count=6, spreads=[1.71, 0.2], watch=lambda progress: told.append(progress.now))
    result = searching.run()
    assert finals(measurer) == 2 and result.best.outcome.spread == 0.2 and not result.best.outcome.noisy
    assert "final race again: times 171% apart" in told
    searching, measurer = search(count=6, spreads=[0.9, 0.5, 0.8])
    result = searching.run()
    assert finals(measurer) == 3 and result.best.outcome.spread == 0.5 and result.best.outcome.noisy
    searching, measurer = search(count=6)
    assert not searching.run().best.outcome.noisy and finals(measurer) == 1
    searching, measurer = search(count=6, spreads=[0.9, 0.5], deadline=7.0)  # no time is left after the first
    assert searching.run().best.outcome.spread == 0.9 and finals(measurer) == 1


def test_the_bar_says_which_time_it_shows(capsys: pytest.CaptureFixture[str]):
    """So far by the races on the way; in the end what the record gets. What the model refused is told beside."""
    with shown(1, 12) as bars, bars.search("forward") as watch:
        searching, _ = search(count=12, drift=0.5, model=FakeModel(), watch=watch)
        result = searching.run()
    told = capsys.readouterr().err
    assert result.progress.kept == result.best and result.progress.pruned > 0
    assert f"kept {time_text(result.best.outcome.seconds)}" in told and f"pruned {result.progress.pruned}" in told
    assert "so far" not in told and "took" in told and "failed" not in told
    with shown(1, 4) as bars, bars.search("forward") as watch:
        watch(Progress(trials=4, done=2, failed=1, best=Tried({}, Outcome("ok", 0.193))))
    told = capsys.readouterr().err
    assert "2/4 so far 193 ms  failed 1 left" in told


def test_the_model_prunes_and_its_guesses_come_first():
    searching, measurer = search(count=40, model=FakeModel())
    result = searching.run()
    assert measurer.calls[1] == [{"m": 128, "n": 32, "w": 8}, SPACE.start]
    assert result.best.point == {"m": 128, "n": 32, "w": 8}
    assert result.ended == "exhausted" and result.progress.pruned > 20
    assert result.progress.done + result.progress.pruned == SPACE.size
    assert not any(point["w"] == 2 for call in measurer.calls for point in call)


def test_tightening_searches_near_the_best():
    narrow = SPACE.around([{"m": 128, "n": 32, "w": 8}, {"m": 128, "n": 16, "w": 8}])
    assert narrow.choices == {"m": (64, 128), "n": (16, 32, 64), "w": (4, 8)}
    assert narrow.holds(narrow.start)


def test_search_goes_on_after_tightening(tmp_path):
    searching, _ = search(count=46, storage=tmp_path / "a.journal")
    searching.trials.asking = 1e9  # as if the sampler had become slow
    result = searching.run()
    assert result.best.point == {"m": 128, "n": 32, "w": 8} and result.progress.done == 46
    assert len(Trials(tmp_path / "a.journal", "study").history()) == 46


def test_pruned_trials_are_kept_in_the_study():
    trials = Trials(None, "study")
    asked = trials.ask(SPACE)
    trials.tell(asked, Outcome(PRUNED, reason="spills"))
    trials.forget(trials.ask(SPACE))
    (tried,) = trials.history()
    assert tried.point == asked.point and tried.outcome.reason == "spills"

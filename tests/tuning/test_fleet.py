"""Several tuners at one study: who tries what, who is still there, and the one final race; and how the study reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch

import attngen as ag
from attngen.errors import StoreError
from attngen.store import Shape, Store, engine_url
from attngen.tuning import fleet
from attngen.tuning.attends import Part
from attngen.tuning.jobs import Job
from attngen.tuning.measure import Outcome
from attngen.tuning.study import Tried
from attngen.tuning.target_device import find_target_device
from attngen.tuning.trials import Trials
from tests.postgres import empty_database, running_server  # noqa: F401  (fixtures)
from tests.tuning.test_search import SPACE, FakeMeasurer, FakeModel, finals, search, seconds

RUNNING, COMPLETE, PRUNED, FAIL = (optuna.trial.TrialState[name] for name in ("RUNNING", "COMPLETE", "PRUNED", "FAIL"))


def study_at(path) -> optuna.Study:
    file = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(file))


def together(measurers: list[FakeMeasurer]) -> None:
    """Each begins its first measurement only when all have come to theirs."""
    all_here = threading.Barrier(len(measurers), timeout=60)

    def measure(measurer, points, patience=1.0):
        if not measurer.calls:
            all_here.wait()
        return FakeMeasurer.measure(measurer, points, patience)

    for measurer in measurers:
        measurer.measure = partial(measure, measurer)


def test_tuners_at_one_study_share_its_trials_and_one_final_race(tmp_path):
    first = sorted(SPACE.points(), key=seconds)[:3]  # the finalists, whoever tries what after them
    searches = [search(count=20, storage=tmp_path / "a.journal", seed=seed, first=first) for seed in range(3)]
    together([measurer for _, measurer in searches])
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda one: one[0].run(), searches))
    assert sum(finals(measurer) for _, measurer in searches) == 1
    assert len({json.dumps([result.best.point, result.best.outcome.seconds]) for result in results}) == 1
    assert all(result.final == results[0].final for result in results)
    assert all(
        20 <= result.progress.done <= 22 for result in results
    )  # all may begin the last trial at the same moment
    assert all(measurer.calls for _, measurer in searches)


def test_a_better_candidate_that_came_late_gets_a_race(tmp_path):
    first = search(count=6, storage=tmp_path / "a.journal")[0].run()
    late, measurer = search(count=40, storage=tmp_path / "a.journal")
    result = late.run()
    assert finals(measurer) == 1 and result.best.outcome.seconds < first.best.outcome.seconds
    again, measurer = search(count=40, storage=tmp_path / "a.journal")
    assert again.run().final == result.final and measurer.calls == []


def test_a_noisy_race_of_an_earlier_call_is_run_again(tmp_path):
    search(count=6, storage=tmp_path / "a.journal", spreads=[0.9] * 3)[0].run()
    searching, measurer = search(count=6, storage=tmp_path / "a.journal")
    assert not searching.run().best.outcome.noisy and finals(measurer) == 1


def test_a_tuner_that_was_killed_is_not_waited_for(tmp_path, monkeypatch):
    """It leaves a trial that runs, and the final race."""
    killed = Trials(tmp_path / "a.journal", "study")
    asked = killed.ask(SPACE, {"m": 128, "n": 32, "w": 8})
    killed._presence._say("alive")
    killed._claims.claim("study, final race 1")
    monkeypatch.setattr(fleet, "GONE", 0.2)
    searching, measurer = search(count=12, storage=tmp_path / "a.journal")
    result = searching.run()
    assert result.progress.done == 12 and finals(measurer) == 1
    (abandoned,) = (trial for trial in study_at(tmp_path / "a.journal").trials if trial.state == FAIL)
    assert abandoned.params == asked.point and abandoned.user_attrs["reason"] == "its tuner is gone"
    killed.tell(asked, Outcome("ok", 1e-9))  # it was only slow: too late
    assert Trials(tmp_path / "a.journal", "study").history() == searching.trials.history()


def test_a_tuner_that_is_alive_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "GONE", 1.0)
    monkeypatch.setattr(fleet, "BEAT", 0.1)
    with Trials(tmp_path / "a.journal", "study") as alive, ThreadPoolExecutor(1) as pool:
        asked = alive.ask(SPACE, {"m": 128, "n": 32, "w": 8})
        searching, measurer = search(count=4, storage=tmp_path / "a.journal")
        running = pool.submit(searching.run)
        time.sleep(2.0)
        assert not running.done() and len(measurer.calls) == 3
        alive.tell(asked, Outcome("ok", 1e-9))
        assert running.result().best.point == asked.point


def test_ctrl_c_in_the_final_race_leaves_it_to_others(tmp_path):
    assert search(count=5, interrupt=5, storage=tmp_path / "a.journal")[0].run().ended == "interrupted"
    searching, measurer = search(count=5, storage=tmp_path / "a.journal")
    assert searching.run().ended == "trials" and finals(measurer) == 1


def test_a_claim_goes_to_one(tmp_path):
    tuners = [Trials(tmp_path / "a.journal", "study") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        own = [own for _, own in pool.map(lambda one: one._claims.claim("study, final race 1"), tuners)]
    assert sorted(own) == [False] * 5 + [True]


def test_the_study_holds_only_what_was_tried(tmp_path):
    """Of 124 trials 60 were asked for and dropped once: illegal points, and those tried before."""
    space = replace(SPACE, illegal=lambda p: "too big" if p["m"] * p["n"] > 4096 else None)
    bad = {1: "wrong"}
    searching, _ = search(count=100, space=space, bad=bad, model=FakeModel(), storage=tmp_path / "a.journal")
    result = searching.run()
    trials = study_at(tmp_path / "a.journal").trials
    assert len(trials) == result.progress.done + result.progress.pruned == len(list(space.points()))
    assert [trial.user_attrs["status"] for trial in trials if trial.state == FAIL] == list(bad.values())
    assert {trial.user_attrs["reason"] for trial in trials if trial.state == PRUNED} >= {"spills"}
    best = min((trial for trial in trials if trial.state == COMPLETE), key=lambda trial: trial.value)
    assert best.user_attrs == {"status": "ok", "spread": 0.01, "error": 0.5, "tuner": searching.trials._presence.name}
    assert searching.trials.history()[best.number] == Tried(best.params, Outcome("ok", best.value, 0.01, 0.5))


def test_a_study_says_what_it_is_about():
    part = Part("", ag.Spec(mask=ag.causal(), name="mine"), Shape.of("B1 H2 N256 D32"), {})
    job = Job(part, "forward", torch.float32, find_target_device("H100", None), 0, 1.0)
    assert job.study.startswith("mask: i >= j, forward, B1 H2 N256 D32, float32, NVIDIA H100")
    about = Trials(None, job.study, about=job.about)._study.user_attrs
    assert about["spec"] == part.spec.text and about["time is"] == "modelled, in seconds"
    assert about["device"].startswith("NVIDIA H100") and about["untuned schedule"]["block_m"] >= 16


def test_a_storage_that_is_not_there_is_named_without_its_password():
    with pytest.raises(StoreError, match=r"storage postgresql://me:\*\*\*@127.0.0.1:1/d: .*refused") as caught:
        Trials("postgresql://me:secret@127.0.0.1:1/d", "study")
    assert "secret" not in str(caught.value)


# On a real server -----------------------------------------------------------------------------------------------------


def tuner(url: str, folder: Path) -> subprocess.Popen[str]:
    """The command that every machine of a fleet runs."""
    return subprocess.Popen(
        [sys.executable, "-m", "attngen", "tune", "i >= j", "--shape", "B1 H2 N512 D32", "--trials", "12", "--db", url],
        env=os.environ | {"ATTNGEN_CACHE_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def runs_a_trial(storage: optuna.storages.RDBStorage, tuner: subprocess.Popen[str]) -> bool:
    trials = [t for study in storage.get_all_studies() for t in storage.get_all_trials(study._study_id)]
    return any(t.state == RUNNING and f" {tuner.pid} " in t.user_attrs["tuner"] for t in trials)


@pytest.mark.slow
def test_three_tuners_at_a_server_one_killed(database, tmp_path):
    """The two that are left finish the search, with one final race and one record of each direction."""
    url = database.replace("postgres:@", "postgres:secret@")
    tuners = [tuner(url, tmp_path / str(number)) for number in range(3)]
    storage = optuna.storages.RDBStorage(engine_url(database).render_as_string(hide_password=False))
    deadline = time.monotonic() + 300
    while not runs_a_trial(storage, tuners[0]):
        assert time.monotonic() < deadline and tuners[0].poll() is None
        time.sleep(0.05)
    os.killpg(tuners[0].pid, signal.SIGKILL)
    output = [process.communicate(timeout=500)[0] for process in tuners]
    assert [process.returncode for process in tuners] == [-signal.SIGKILL, 0, 0], output
    assert not any("secret" in text for text in output) and all("postgres:***@" in text for text in output[1:])

    records = Store(database).records()
    assert sorted(record.key.piece for record in records) == ["backward", "forward"]
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    for record in records:
        of_piece = [study for study in studies if study.study_name.startswith(f"mask: i >= j, {record.key.piece}, ")]
        (main,) = (study for study in of_piece if "final race" not in study.study_name)
        (race,) = (study for study in of_piece if study.user_attrs.get("ended") == "run")
        assert race.trials[0].params == record.schedule and race.trials[0].value == pytest.approx(
            record.seconds, rel=1e-3
        )
        abandoned = [trial for trial in main.trials if trial.user_attrs["status"] == "abandoned"]
        assert all(f" {tuners[0].pid} " in trial.user_attrs["tuner"] for trial in abandoned)
        # The last trial may be begun by both at once.
        assert 12 <= len(main.trials) - len(abandoned) <= 13 and all(trial.state.is_finished() for trial in main.trials)
        for process in tuners[1:]:
            assert any(f" {process.pid} " in trial.user_attrs["tuner"] for trial in main.trials)

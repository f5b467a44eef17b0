"""`tune`, end to end on the CPU backend."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import attngen as ag
from attngen.cli.main import app
from attngen.errors import AttngenWarning, InputError
from attngen.store import Device, Key, Record, Shape, Store, Versions
from attngen.tuning.measure import WorkerMeasurer
from attngen.tuning.search import Progress, Result
from attngen.tuning.tuner import Tuned, TuneReport


@pytest.fixture
def cache(tmp_path, monkeypatch, request) -> Path:
    """A cache folder of its own; one thread, which a busy machine slows down less than several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTNGEN_DB", raising=False)
    return tmp_path


def test_tune_on_the_cpu(cache):
    import attngen as ag

    db = cache / "mine.db"
    spec = ag.Spec(mask=ag.causal() & ag.window(64))
    options = {"trials": 3, "db": db, "progress": False, "patience": 0.02}
    report = ag.tune(spec, shapes=["B1 H2 N256 D32"], **options)
    assert report.kind == "measured" and report.results
    records = {r.key.piece: r for r in Store(db).records()}
    assert set(records) == {tuned.piece for tuned in report.results}
    for one in records.values():
        assert one.kind == "measured" and one.seconds > 0 and one.error <= 1.0 and one.schedule
    last = str(report).splitlines()[-1]
    assert last.startswith("measured: forward ") and "; backward " in last and last.count("x the untuned speed") == 2
    again = ag.tune(spec, shapes=["B1 H2 N256 D32"], **options)
    assert all(tuned.result.progress.resumed == tuned.result.progress.done for tuned in again.results)
    assert "finished before, measured" in str(again) and again.records == report.records
    assert all(tuned.seconds == 0 for tuned in again.results)
    q, k, v = (torch.randn(1, 2, 256, 32) for _ in range(3))
    attention = ag.compile(spec, db=str(db))
    assert torch.allclose(attention(q, k, v).double(), ag.oracle(spec, q, k, v)[0], atol=1e-4)
    assert "measured record, exact" in attention.explain(q, k, v)


def test_the_last_line_says_what_was_won(cache, tmp_path):
    key = Key.of("spec", "forward", "float32", Shape.of("B1 H2 N256 D32"), Device("a GPU", 1), Versions("g"))
    record = Record(key, {}, 2e-3, 0.01, "measured", 0.1, "2026-11-30T00:00:00Z", "a test")

    def tuned(name: str, record: Record | None, start: float | None, seconds: float = 1.0) -> Tuned:
        return Tuned(
            name,
            "",
            "forward",
            Shape.of("B1 H2 N256 D32"),
            record,
            start,
            Result(None, (), Progress(), "trials"),
            seconds,
        )

    def last(*results: Tuned) -> str:
        return str(TuneReport(results, "a GPU", "measured", "some.db", False, ())).splitlines()[-1]

    assert last(tuned("", record, 3e-3)) == "measured: forward 2 ms, 1.50x the untuned speed"
    noisy, broken = tuned("a", replace(record, spread=2.0), None), tuned("b", None, None)
    assert last(noisy, broken) == "measured: a, forward 2 ms, too noisy; b, forward: no schedule worked"
    assert last(tuned("", record, None, 0.0)) == "measured: forward 2 ms" and last().endswith("nothing was tuned")
    many = [tuned(str(place), record, start) for place, start in enumerate((2e-3, 4e-3, 3e-3, None, None))]
    assert last(*many) == "measured: 3 raced: 1.00x to 2.00x the untuned speed, median 1.50x"
    assert last(*many[3:], *many[3:], many[3]) == "measured: none of 5 raced the untuned schedule"


def test_tune_for_a_gpu_that_is_not_here(cache):
    import attngen as ag

    spec = ag.Spec(mask=ag.causal())
    report = ag.tune(
        spec, shapes=["B1 Hq8 Hkv2 N2048 D64"], target="H200", trials=3, pieces=["forward"], progress=False
    )
    (record,) = report.records
    assert (
        record.kind == "modelled" and record.key.device == "NVIDIA H200" and "modelled for NVIDIA H200" in str(report)
    )
    assert Store(cache / "records.db").records() == [record]


def test_ctrl_c_in_a_real_tuning(cache):
    """The whole command: SIGINT in the middle; it reports, and the database has the best so far."""
    code = (
        "import attngen as ag\n"
        "report = ag.tune(ag.Spec(mask=ag.causal()), shapes=['B1 H2 N256 D32'], trials=10**6, progress=False,"
        " patience=0.02)\nprint(report)\nprint('interrupted', report.interrupted)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    store = Store(cache / "records.db")
    end = time.monotonic() + 60
    while not (store.path.exists() and store.records()) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "interrupted True" in out or "running out of schedules" in out
    assert store.records()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shapes": []}, "shapes"),
        ({"trials": 0}, "trials"),
        ({"pieces": ["sideways"]}, "pieces"),
        ({"target": "H9000"}, "target"),
        ({"device": "toaster"}, "device"),
        ({"captures": {"slope": 1}}, "slope"),
    ],
)
def test_bad_arguments(cache, options, named):
    from attngen.tuning import tune

    with pytest.raises(InputError, match=named):
        tune(ag.Spec(mask=ag.causal()), **({"shapes": ["H1 N16 D16"], "progress": False} | options))


def test_a_noisy_record_is_kept_with_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch):
    quiet = WorkerMeasurer.measure

    def measure(self, points, patience=1.0):
        return [replace(outcome, spread=1.71) for outcome in quiet(self, points, patience)]

    monkeypatch.setattr(WorkerMeasurer, "measure", measure)
    spec, options = ag.Spec(mask=ag.causal()), {"trials": 2, "pieces": ["forward"], "progress": False, "patience": 0.01}
    with pytest.warns(AttngenWarning, match="spread 171%, too noisy: the schedule may be no better than another"):
        report = ag.tune(spec, shapes=["B1 H2 N256 D32"], **options)
    (record,) = Store(cache / "records.db").records()
    assert record.noisy and record.spread == 1.71 and "spread 171%, too noisy" in str(report)
    q = torch.randn(1, 2, 256, 32)
    assert "measured record, exact, too noisy" in ag.compile(spec).explain(q, q, q)
    assert "spread 171%, too noisy" in CliRunner().invoke(app, ["db", "ls"]).output

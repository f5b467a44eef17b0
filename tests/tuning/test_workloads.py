"""Lists of calls: read from files, tuned one after another, and asked of the database."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import attngen as ag
from attngen.backends.worker import Worker
from attngen.errors import AttngenError, InputError, SpecError
from attngen.store import Key, Record, Shape, Store, Workload
from attngen.store.workload import is_list, read_list
from attngen.tuning.coverage import coverage, devices_of, known_workloads
from attngen.tuning.effort import EFFORTS, effort_named
from attngen.tuning.jobs import jobs_of
from attngen.tuning.target_device import find_target_device
from attngen.tuning.tuner import tune_all

LIST = """
dtype = "float32"
shapes = ["B1 H2 N64 D16", "B1 H2 Nq1 Nk64 D16"]

[[attention]]
name = "window"
mask = "i >= j and i - j < width"
params = {width = "int"}
values = {width = 32}
directions = ["forward"]

[[attention]]
spec = "specs.py:packed"
shapes = ["B1 H2 N32 D16"]
dtype = "float16"

[[attention]]
spec = "i >= j"
"""


def write(folder: Path, text: str) -> Path:
    (folder / "specs.py").write_text("import attngen as ag\npacked = ag.Spec(mask=ag.documents(), name='packed')\n")
    path = folder / "list.toml"
    path.write_text(text)
    return path


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_list_of_calls(tmp_path):
    path = write(tmp_path, LIST)
    assert is_list(path) and not is_list("i >= j")
    found = [(one.name, str(one.shape), one.dtype, dict(one.captures), one.directions) for one in read_list(path)]
    both = ("forward", "backward")
    assert found == [
        ("window", "B1 H2 N64 D16", "float32", {"width": 32}, ("forward",)),
        ("window", "B1 H2 Nq1 Nk64 D16", "float32", {"width": 32}, ("forward",)),
        ("packed", "B1 H2 N32 D16", "float16", {}, both),
        ("attention 3", "B1 H2 N64 D16", "float32", {}, both),
        ("attention 3", "B1 H2 Nq1 Nk64 D16", "float32", {}, both),
    ]
    assert read_list(path)[2].spec == ag.Spec(mask=ag.documents())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shapes = ['B1 H1 N8 D16']", "no attention is listed"),
        ("attention = ['i >= j']", "no attention is listed"),
        ("[[attention]]\nmask = 'i >= j'\nshapes = ['H1 N8 D16']\nvalues = 3", "attention 1: values: expected a table"),
        ("trials = 3\n[[attention]]\nmask = 'i >= j'", r"unknown keys \['trials'\].*dtype, shapes, directions"),
        ("[[attention]]\nmask = 'i >= j'", "attention 1: shapes: expected a list"),
        ("[[attention]]\nmask = 'i >= j'\nshapes = ['H1 Q9']", "cannot read 'Q9'"),
        ("[[attention]]\nmask = 'i >= j'\nshapes = ['H1 N8 D16']\ndtype = 'int8'", "attention 1: dtype"),
        ("[[attention]]\nmask = 'i >= j'\nshapes = ['H1 N8 D16']\ndirections = ['up']", "attention 1: directions"),
        ("[[attention]]\nmask = 'i >= j'\nshapes = ['H1 N8 D16']\nvalues = {width = 3}", "attention 1: values.*none"),
        ("[[attention]]\nmask = 'i >= j'\nmusk = 'i >= j'\nshapes = ['H1 N8 D16']", r"attention 1: unknown keys \['musk'\]"),
        ("[[attention]]\nspec = 'i >= j'\nmask = 'i < j'\nshapes = ['H1 N8 D16']", r"there are \['mask'\]"),
        ("[[attention]]\nspec = 'nowhere.py:x'\nshapes = ['H1 N8 D16']", "nowhere.py: no such file"),
    ],
)  # fmt: skip
def test_mistakes_in_a_list_are_named(tmp_path, text, says):
    with pytest.raises(AttngenError, match=f"(?s){says}"):
        read_list(write(tmp_path, text))


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"list\.toml: not a readable TOML file"):
        is_list(write(tmp_path, "["))


# -- effort -----------------------------------------------------------------------------------------------------------


def test_effort():
    assert EFFORTS["quick"].trials == 3
    assert effort_named("full", None, None) == EFFORTS["full"]
    assert effort_named("quick", 7, None).trials == 7, "trials that are given win"
    assert effort_named("quick", None, 9.0).patience == 9.0
    with pytest.raises(InputError, match="effort: expected one of quick, standard, full"):
        effort_named("heroic", None, None)
    with pytest.raises(InputError, match="trials"):
        effort_named("quick", 0, None)


# -- one worker for many searches -------------------------------------------------------------------------------------

ECHO = """
import json, os, sys
job = None
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "job":
        if request.get("name") == "bad" or (request.get("name") == "second" and job == "first"):
            os.abort()
        job = request["name"]
    print(json.dumps({"status": "ok", "job": job, "pid": os.getpid()}), flush=True)
"""


def test_a_process_takes_one_job_after_another():
    worker = Worker({"op": "job", "name": "first"}, command=[sys.executable, "-c", ECHO])
    first = worker.ask({"op": "x"})
    worker.begin({"op": "job", "name": "third"}, 60.0)
    third = worker.ask({"op": "x"})
    assert (first["job"], third["job"]) == ("first", "third") and first["pid"] == third["pid"]
    worker.close()


def test_a_job_that_an_old_process_cannot_take_gets_a_new_one():
    worker = Worker({"op": "job", "name": "first"}, command=[sys.executable, "-c", ECHO])
    first = worker.ask({"op": "x"})
    worker.begin({"op": "job", "name": "second"}, 60.0)
    second = worker.ask({"op": "x"})
    assert second["job"] == "second" and first["pid"] != second["pid"]
    worker.begin({"op": "job", "name": "bad"}, 60.0)
    with pytest.raises(AttngenError, match="cannot start"):
        worker.ask({"op": "x"})
    worker.close()


# -- tuning and coverage ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTNGEN_DB", raising=False)
    return tmp_path


def calls() -> list[Workload]:
    window, causal = ag.Spec(mask=ag.causal() & ag.window(32)), ag.Spec(mask=ag.causal())
    small, other = Shape.of("B1 H2 N64 D16"), Shape.of("B1 H2 N200 D16")
    forward = ("forward",)
    return [
        Workload("window", window, small, "float32", {}, forward),
        Workload("causal", causal, small, "float32", {}, forward),
        Workload("causal again", causal, small, "float32", {}, forward),
        Workload("causal", causal, other, "float32", {}, forward),
    ]


@pytest.mark.filterwarnings("ignore::attngen.errors.AttngenWarning")  # a busy machine measures unevenly
def test_calls_are_tuned_once_and_skipped_when_finished(cache, capsys):
    db, options = cache / "mine.db", {"trials": 1, "patience": 0.01}
    here = find_target_device(None, "cpu")
    before = coverage(calls(), [here], db=db)
    assert [one.status for one in before] == ["none"] * 3, "equal calls are one"
    first = tune_all(calls()[:2], db=db, device="cpu", **options)
    assert [tuned.name for tuned in first.results] == ["window", "causal"] and not any(t.skipped for t in first.results)
    assert "2/2 searches" in capsys.readouterr().err
    told = coverage(calls(), [here], db=db)
    assert [one.status for one in told] == ["exact", "exact", "nearest"]
    assert "nearest bucket" in told[2].words and "measured" in told[2].words
    report = tune_all(calls(), db=db, device="cpu", **options)
    assert [tuned.skipped for tuned in report.results] == [True, True, False]
    assert "window, forward B1 H2 N64 D16: finished before, measured" in str(report)
    assert "window forward B1 H2 N64 D16: finished before" in capsys.readouterr().err
    assert [one.status for one in coverage(calls(), [here], db=db)] == ["exact"] * 3
    assert json.loads(json.dumps(told[0].as_dict()))["direction"] == "forward"


def test_records_say_which_calls_and_devices_are_known(tmp_path):
    gpu, spec = find_target_device("H100", None), ag.Spec(mask=ag.causal())
    key = Key.of(spec.key, "forward", "bfloat16", Shape.of("B1 H4 N128 D64"), gpu.device, gpu.versions)
    made = Record(key, {"block_m": 64}, 1e-3, 0.0, "modelled", 0.0, "2026-01-01T00:00:00Z", "test", spec.text)
    db = tmp_path / "records.db"
    Store(db).put(made)
    (known,) = known_workloads([made])
    assert (known.spec, str(known.shape), known.dtype) == (spec, "B1 H4 N128 D64", "bfloat16")
    here, there = devices_of([made])
    assert here.torch_device is not None and there.device.name == "NVIDIA H100 80GB HBM3"
    found = {
        (one.job.key.device == there.device.name, one.job.piece): one.status
        for one in coverage([known], [here, there], db=db)
    }
    assert found == {
        (False, "forward"): "none",
        (False, "backward"): "none",
        (True, "forward"): "exact",
        (True, "backward"): "none",
    }


def test_a_key_sets_attentions_are_asked_for_by_what_calls_look_up():
    spec, device = ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()), find_target_device("H100", None)
    jobs = list(jobs_of([Workload("dropped", spec, Shape.of("B1 H2 N64 D16"), "float16", {}, ("forward",))], device))
    assert jobs and all(job.spec.key != spec.key and job.dtype == torch.float16 for job in jobs)


@pytest.mark.slow
def test_a_list_that_was_interrupted_goes_on(cache):
    """The whole command: SIGINT within a search; it reports, and the same command does the rest."""
    (cache / "list.toml").write_text(
        "dtype = 'float32'\ndirections = ['forward']\nshapes = ['B1 H2 N256 D32', 'B1 H2 N512 D32']\n"
        "[[attention]]\nname = 'causal'\nmask = 'i >= j'\n[[attention]]\nname = 'full'\nmask = 'j >= 0'\n"
    )
    db = cache / "records.db"
    command = [sys.executable, "-m", "attngen", "tune", str(cache / "list.toml"), "--trials", "30", "--db", str(db)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store, end = Store(db), time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        if db.exists() and len(store.records()) >= 2:  # the second search has a first result
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended by Ctrl-C" in told and "2 without a record" in told
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "causal forward B1 H2 N256 D32: finished before" in again.stderr
    assert "covered: 4 exact, 0 by the nearest record, 0 without a record" in again.stdout

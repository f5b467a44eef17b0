"""The process that runs candidates, and what comes of bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from attngen.backends.worker import Worker, WorkerDied
from attngen.errors import AttngenError
from attngen.tuning.measure import Outcome, WorkerMeasurer

FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    point = request.get("point") or {}
    what = point.get("do")
    if what == "hang":
        time.sleep(60)
    if what == "crash":
        print("boom: bad address", file=sys.stderr)
        os.abort()
    if what == "killed":
        os.kill(os.getpid(), 9)
    answer = {"status": "ok", "error": 0.25}
    if what in ("wrong", "memory", "failed"):
        answer = {"status": what, "reason": "said so", "error": 7.0}
    if request["op"] == "race":
        if any(p.get("do") == "late" for p in request["points"]):
            os.abort()
        answer = {"status": "ok", "times": [[p["t"]] * 5 for p in request["points"]]}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def measurer():
    worker = Worker({"op": "job"}, limit=1.0, command=[sys.executable, "-c", FAKE_WORKER])
    yield WorkerMeasurer(worker)
    worker.close()


GOOD = {"t": 1.0}


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("hang", "timeout"),
        ("crash", "crashed"),
        ("killed", "memory"),
        ("wrong", "wrong"),
        ("memory", "memory"),
        ("failed", "failed"),
        ("late", "crashed"),
    ],
)
def test_a_bad_candidate_costs_only_itself(measurer, what, status):
    assert measurer.measure([GOOD])[0].ok
    bad, good = measurer.measure([{"do": what, "t": 2.0}, GOOD], patience=0.2)
    assert bad.status == status and bad.reason and not bad.ok
    assert good == Outcome("ok", 1.0, 0.0, 0.25)
    assert measurer.measure([{"t": 3.0}, GOOD])[0].seconds == 3.0


def test_last_words_are_reported(measurer):
    (outcome,) = measurer.measure([{"do": "crash"}])
    assert "SIGABRT" in outcome.reason and "boom: bad address" in outcome.reason


def test_a_worker_that_cannot_start_ends_the_tuning():
    worker = Worker({}, command=[sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(AttngenError, match="no such thing"):
        worker.ask({"op": "prepare"})


def test_close_kills_a_hanging_worker():
    worker = Worker({"op": "job"}, limit=0.3, command=[sys.executable, "-c", FAKE_WORKER])
    worker.ask({"op": "x"})
    pid = worker._process.pid
    with pytest.raises(WorkerDied, match=r"0\.3 s"):
        worker.ask({"op": "prepare", "point": {"do": "hang"}})
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_real_worker_answers_errors_and_ends_with_its_tuner():
    process = subprocess.Popen(
        [sys.executable, "-m", "attngen.tuning.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    job = {"op": "job", "device": None}
    process.stdin.write(json.dumps(job) + "\n" + json.dumps({"op": "dance"}) + "\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"status": "ok"}
    answer = json.loads(process.stdout.readline())
    assert answer["status"] == "failed" and "dance" in answer["reason"]
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def test_tuning_is_imported_without_optuna():
    code = "import sys, attngen.tuning; print([m for m in ('optuna', 'sqlalchemy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

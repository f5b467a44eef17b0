"""Trying schedules: the protocols the search works against, and the worker process that runs candidates apart.

A candidate may hang, crash or run out of memory. It runs in a process of its own that is killed and started again when
that happens; the search sees an Outcome either way.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from attngen.errors import AttngenError
from attngen.store import NOISY
from attngen.tuning.space import Point

STATUSES = ("ok", "wrong", "failed", "timeout", "crashed", "memory")
START_LIMIT = 180.0  # seconds for the worker to import, make inputs and compute the reference


@dataclass(frozen=True)
class Outcome:
    """What came of trying a schedule. seconds: median; spread: (80th - 20th percentile) / median; error: the oracle
    check's error over what its rule allows; reason: why it is not ok."""

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


def summarise(times: Sequence[float], error: float) -> Outcome:
    """Median and spread of repeated times."""
    ordered = sorted(times)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return Outcome("ok", median, (high - low) / median if median else 0.0, error)


class WorkerDied(Exception):
    """The worker process ended or was killed in the middle of a request; `status` says how it counts."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Worker:
    """A process that answers JSON requests, one line each; started when first needed, and again after it died.

    A process of its own rather than multiprocessing: nothing is pickled, and a user's script needs no main guard.
    `job` is the first request of every process. `begin` gives another one to the process that is there, since starting one
    takes seconds.
    """

    def __init__(self, job: dict[str, Any], limit: float = 60.0, command: Sequence[str] | None = None):
        self.begin(job, limit)
        self.command = list(command or (sys.executable, "-m", "attngen.tuning.worker"))
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._log: Any = None
        self.starts = 0

    def ask(self, request: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """The answer. Raises WorkerDied after the time limit or when the process ended."""
        if self._process is None:
            self._start()
        if not self._begun:
            self._begin()
        return self._exchange(request, self.limit if limit is None else limit)

    def begin(self, job: dict[str, Any], limit: float) -> None:
        """Another job from the next request on."""
        self.job, self.limit = job, limit
        # Whether this process knows the job; whether one has, so that a death is a candidate's fault; whether it is the job's own.
        self._begun = self._works = self._fresh = False

    @property
    def alive(self) -> bool:
        return self._process is not None

    def close(self) -> None:
        """Kill the process and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _start(self) -> None:
        self.starts += 1
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tuner, which then ends the worker
        )
        self._answers = queue.Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        self._begun, self._fresh = False, True

    def _begin(self) -> None:
        try:
            answer = self._exchange(self.job, START_LIMIT)
        except WorkerDied as death:
            if self._works:
                raise
            if not self._fresh:  # an earlier job may have left the process in a bad state
                self._start()
                return self._begin()
            raise AttngenError(f"tuning cannot start: {death.reason}") from death
        if answer["status"] != "ok":
            self.close()
            raise AttngenError(f"tuning cannot start: {answer['reason']}")
        self._begun = self._works = True

    def _exchange(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it died: the queue says so
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise WorkerDied("timeout", f"no answer within {limit:g} s (candidate_timeout=)") from None
        except BaseException:
            self.close()  # an answer to this request must not be taken for the next one's
            raise
        if line is None:
            code = self._process.wait()
            self.close()
            raise WorkerDied("memory" if code == -signal.SIGKILL else "crashed", self._last_words(code))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self, code: int) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        name = signal.Signals(-code).name if code < 0 and -code in list(signal.Signals) else f"exit code {code}"
        return f"the worker ended with {name}" + (f": {lines[-1][:300]}" if lines else "")


def _forward(pipe: Any, answers: queue.Queue[str | None]) -> None:
    """Reading in a thread lets the tuner wait with a time limit on every platform."""
    with contextlib.suppress(OSError, ValueError):
        for line in pipe:
            answers.put(line)
    answers.put(None)


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
            answer = self.worker.ask(request, self.worker.limit + patience)
        except WorkerDied as death:
            answer = {"status": death.status, "reason": death.reason}
        if answer["status"] != "ok":
            # The newcomer stands first, and the others have run before: it takes the blame, they run again.
            newcomer, *rest = racing
            outcomes[newcomer] = Outcome(answer["status"], reason=answer["reason"])
            for place, outcome in zip(rest, self.measure([points[p] for p in rest], patience), strict=True):
                outcomes[place] = outcome
            return outcomes
        for place, times in zip(racing, answer["times"], strict=True):
            outcomes[place] = summarise(times, outcomes[place].error)
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

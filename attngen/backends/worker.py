"""A process that answers requests and may be killed: for whatever may hang, crash or run out of memory."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from attngen.errors import AttngenError

START_LIMIT = 180.0  # seconds for the worker to import, make inputs and compute the reference


class WorkerDied(Exception):
    """The worker process ended or was killed in the middle of a request; `status` says how it counts."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Worker:
    """A process that answers JSON requests, one line each; started when first needed, and again after it died.

    A process of its own rather than multiprocessing: nothing is pickled, and a user's script needs no main guard.
    `job` is the first request of every process. `begin` gives another one to the process that is there, since starting one
    takes seconds. limit: seconds for an answer, and `option` what sets them; starting: seconds for the first one; purpose: what
    can't start without it.
    """

    def __init__(
        self,
        job: dict[str, Any],
        limit: float = 60.0,
        command: Sequence[str] | None = None,
        option: str = "candidate_timeout=",
        starting: float = START_LIMIT,
        purpose: str = "tuning",
    ):
        self.option, self.starting, self.purpose = option, starting, purpose
        self._told = False
        self.begin(job, limit)
        self.command = list(command or (sys.executable, "-m", "attngen.tuning.worker"))
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._log: Any = None
        self.starts = 0

    def ask(self, request: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
        """The answer. Raises WorkerDied after the time limit or when the process ended."""
        self.ready()
        self._send(request)
        return self._receive(self.limit if limit is None else limit)

    def start(self) -> None:
        """Without waiting: it imports what it needs while its first request is made up."""
        if self._process is None:
            self._start()
        if not self._told:
            self._send(self.job)
            self._told = True

    def ready(self) -> None:
        """Wait until it can take a request. Raises as `ask`, and AttngenError if it can't start."""
        self.start()
        if not self._begun:
            self._begin()

    def begin(self, job: dict[str, Any], limit: float) -> None:
        """Another job from the next request on."""
        self.job, self.limit = job, limit
        # Whether this process was told the job, and has answered; whether one has, so that a death is a candidate's fault; whether it
        # is the job's own.
        self._told = self._begun = self._works = self._fresh = False

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
        self._told, self._begun, self._fresh = False, False, True

    def _begin(self) -> None:
        try:
            answer = self._receive(self.starting)
        except WorkerDied as death:
            if self._works:
                raise
            if not self._fresh:  # an earlier job may have left the process in a bad state
                self._start()
                return self.ready()
            raise AttngenError(f"{self.purpose} cannot start: {death.reason}") from death
        if answer["status"] != "ok":
            self.close()
            raise AttngenError(f"{self.purpose} cannot start: {answer['reason']}")
        self._begun = self._works = True

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died: the queue says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _receive(self, limit: float) -> dict[str, Any]:
        assert self._process is not None
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise WorkerDied("timeout", f"no answer within {limit:g} s ({self.option})") from None
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

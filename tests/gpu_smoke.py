"""A smoke test of every kernel family on a GPU, forward and backward, against the float64 oracle: what a lent machine shows first.

    python -m tests.gpu_smoke bfloat16 --out FILE.json                 on a GPU
    python -m tests.gpu_smoke float16 --out FILE.json --rehearse       without one: interpreted, at small sizes

What never ran on a GPU comes first (tests/gpu_smoke_cases.py). Cases run side by side in processes of their own, so that one that
hangs or crashes ends alone. FILE.json has each as it ends; the same command again runs what isn't ok there, or was with other kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

from attngen.backends.worker import Worker, WorkerDied
from attngen.schedule.choice import generator_hash
from attngen.tuning.worker import answering
from benchmarks.suite import write_json
from tests.backends.test_gpu import here
from tests.gpu_smoke_cases import CASES

LIMIT = 90.0  # seconds for one case; most is compiling
OK, SKIPPED, WRONG = "ok", "skipped", "wrong"


class Smoke:
    """Cases in one dtype and what came of them, on disk after each."""

    def __init__(self, path: Path, dtype: str, cases: Iterable[str], say: Callable[[str], None]):
        self.path, self.dtype, self.say, self.lock = path, dtype, say, Lock()
        self.kernels = generator_hash("triton" if torch.cuda.is_available() else "interpret")
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.found = {name: record for name, record in known.items() if record["kernels"] == self.kernels}
        self.cases = list(cases)
        self.left = [name for name in self.cases if not self.fine(name)]

    def run(self, until: float, processes: int) -> None:
        """What is left, side by side, as far as it starts before `until` on the monotonic clock."""
        with ThreadPoolExecutor(processes) as pool:
            for done in [pool.submit(self._work, until) for _ in range(min(processes, len(self.left)))]:
                done.result()

    def _work(self, until: float) -> None:
        command = (sys.executable, "-m", "tests.gpu_smoke", "--serve")
        process = Worker({}, LIMIT, command, "a case's limit", purpose="a smoke test")
        try:
            while time.monotonic() < until:
                with self.lock:
                    if not self.left:
                        return
                    name = self.left.pop(0)
                begun = time.monotonic()
                try:
                    got = process.ask({"case": name, "dtype": self.dtype})
                except WorkerDied as death:
                    got = {"status": death.status, "reason": death.reason}
                self._add(name, got | {"seconds": round(time.monotonic() - begun, 1)})
        finally:
            process.close()

    def _add(self, name: str, got: dict[str, Any]) -> None:
        figure = f"{got['error']:.2f} of the error allowed" if got["status"] == OK else got.get("reason", "")
        with self.lock:
            self.found[name] = got | {"kernels": self.kernels}
            write_json(self.path, self.found)
            self.say(f"{got['status']:<8} {name}: {figure} ({got['seconds']} s)")

    def fine(self, name: str) -> bool:
        """Whether it ran, and is as it should be."""
        return self.found.get(name, {}).get("status") in (OK, SKIPPED)

    def __str__(self) -> str:
        fine = [name for name in self.cases if self.fine(name)]
        bad = [name for name in self.cases if name in self.found and name not in fine]
        return f"{len(fine)} of {len(self.cases)} cases are fine" + (f", NOT: {'; '.join(bad)}" if bad else "")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Of a worker: {} asks whether it is ready, {"case", "dtype"} runs a case -> {"status", "error", "reason"}."""
    if not request:
        return {}
    try:
        with here() as place:
            return {"error": CASES[request["case"]](place, getattr(torch, request["dtype"]))}
    except AssertionError as problem:
        return {"status": WRONG, "reason": (str(problem) or "an assertion failed").splitlines()[0]}
    except pytest.skip.Exception as problem:
        return {"status": SKIPPED, "reason": str(problem)}


def main(arguments: list[str] | None = None) -> int:
    """0 when all is well, 1 when some are left, 2 without a GPU, 3 when a result is wrong, a kernel fails or a process ended."""
    parser = argparse.ArgumentParser(
        "python -m tests.gpu_smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dtype", nargs="?", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("smoke.json"), help="file of results (default smoke.json)")
    parser.add_argument("--seconds", type=float, default=600, help="after which no case starts (default 600)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose names have one of these words in them")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: interpreted, at small sizes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        answering(answer)
        return 0
    if not torch.cuda.is_available() and not given.rehearse:
        print("gpu_smoke: torch sees no GPU here; --rehearse runs the same cases in Triton's interpreter")
        return 2
    wanted = [name for name in CASES if given.only is None or any(word in name for word in given.only)]
    smoke = Smoke(given.out, given.dtype, wanted, say=lambda text: print(text, flush=True))
    smoke.run(time.monotonic() + given.seconds, processes=max(1, (os.cpu_count() or 2) // 2))
    print(smoke)
    return 1 if smoke.left else 0 if all(map(smoke.fine, wanted)) else 3


if __name__ == "__main__":
    sys.exit(main())

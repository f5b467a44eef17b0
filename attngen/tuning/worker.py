"""The process that runs candidates: `python -m attngen.tuning.worker`, JSON requests in, JSON answers out.

{"op": "job", ...}        the spec, shape, dtype, device: makes inputs and reference results
{"op": "prepare", point}  compile and check -> {"status", "error", "reason"}
{"op": "race", points}    time in turns -> {"status", "times"}
{"op": "resources", point} cross-compile for the job's target -> {"status", "kernels"}
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attngen.backends.triton.modelled import Resources
from attngen.inspect.cross import Compiled, cross_compile
from attngen.language.schedule import Schedule
from attngen.language.spec import Spec
from attngen.store import Shape
from attngen.tuning.bench import Bench
from attngen.tuning.captures import load_captures

Request = dict[str, Any]


def serve(handlers: Callable[[Request], dict[str, Any]], lines: Any, answer: Callable[[str], None]) -> None:
    """Answer each line; an exception becomes an answer too, with its kind."""
    for line in lines:
        try:
            result = {"status": "ok"} | handlers(json.loads(line))
        except MemoryError as problem:
            result = {"status": "memory", "reason": f"out of memory: {problem}"[:500]}
        except Exception as problem:  # a candidate may fail in any way it likes
            result = {"status": _status(problem), "reason": f"{type(problem).__name__}: {problem}"[:500]}
            error = getattr(problem, "error", 0.0)
            result["error"] = error if isinstance(error, float) and error < 1e300 else 1e300
            _recover(problem)
        answer(json.dumps(result))


def _status(problem: Exception) -> str:
    name = type(problem).__name__
    if name == "WrongResult":
        return "wrong"
    return "memory" if "OutOfMemory" in name or "out of memory" in str(problem).lower() else "failed"


def _recover(problem: Exception) -> None:
    """After a fault on the GPU the process's context is lost: end, so that a new worker starts clean."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:  # the fault itself, reported again
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        os._exit(1)


class Handlers:
    """The worker's state: one job."""

    def __init__(self) -> None:
        self.bench: Bench | None = None
        self.check = os.environ.get("ATTNGEN_CHECK", "")
        self.job: Request = {}

    def __call__(self, request: Request) -> dict[str, Any]:
        match request["op"]:
            case "job":
                return self.start(request)
            case "prepare":
                return {"error": self._bench().prepare(request["point"])}
            case "race":
                return {"times": self._bench().race(request["points"], request["patience"])}
            case "resources":
                return {"kernels": self.resources(request["point"])}
        raise ValueError(f"unknown request {request['op']!r}")

    def start(self, request: Request) -> dict[str, Any]:
        if request.get("threads"):
            torch.set_num_threads(request["threads"])
        self.job, self.bench = request, None
        os.environ["ATTNGEN_CHECK"] = (
            self.check if request.get("whole", True) else "0"
        )  # a part's indices are the key set's own
        if request["device"] is not None:
            self._bench()
        return {}

    def _bench(self) -> Bench:
        if self.bench is None:
            job, small = self.job, self.job.get("small")
            self.bench = Bench(
                Spec.from_text(job["spec"]),
                Shape.of(job["shape"]),
                getattr(torch, job["dtype"]),
                job["device"],
                job["piece"],
                base=Schedule(**job["base"]),
                captures=load_captures(Path(job["captures"])) if job.get("captures") else None,
                small=(Shape.of(small["shape"]), load_captures(Path(small["captures"]))) if small else None,
                whole=job.get("whole", True),
                seed=job.get("seed", 0),
            )
        return self.bench

    def resources(self, point: dict[str, Any]) -> list[dict[str, Any]]:
        job, shape = self.job, Shape.of(self.job["shape"])
        kernels = cross_compile(
            Spec.from_text(job["spec"]),
            target=job["target"],
            dtype=getattr(torch, job["dtype"]),
            head_dim=shape.head_dim,
            head_dim_v=shape.head_dim_v,
            passes=("forward",) if job["piece"] == "forward" else ("dq", "dkv"),
            schedule=Schedule(**point).over(Schedule(**job["base"])),
            wide=job.get("wide", ()),
        )
        return [{"name": kernel.name, "resources": _resources(kernel).to_json()} for kernel in kernels]


def _resources(kernel: Compiled) -> Resources:
    return Resources.of(kernel, kernel.source.num_warps, kernel.source.grid.parts)


def answering(handlers: Callable[[Request], dict[str, Any]]) -> None:
    """Read requests in a thread, so that the worker ends at once when the tuner is gone, even from within a hang."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for answers
    with contextlib.suppress(OSError):  # Linux: when memory runs out, the candidate goes, not the tuner
        Path("/proc/self/oom_score_adj").write_text("800")
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    serve(handlers, iter(lines.get, None), lambda text: print(text, file=out, flush=True))


if __name__ == "__main__":
    answering(Handlers())

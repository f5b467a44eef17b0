"""Everything that a GPU can show, in one command for machines that are lent for minutes:

    python -m benchmarks gpu_day --budget 540 --out DIR       again on the next machine, with DIR: it goes on there

Most valuable first: are the kernels right, the tables that decide, tuning of the headline cases, whether the model ranks tiles as
the clock does, the GPU tests in parts, then the other tables. Each is a process of its own, so that one that hangs or crashes
ends alone. What was found is on disk as it comes; after each stage DIR/day.tar.gz holds it all, and DIR/day.json says what is
done and what is left. Tuned records are in DIR/records.db: `attngen db export --db DIR/records.db FILE` makes them text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite import write_json

DONE, LEFT, FAILED = "done", "left", "failed"
TURNS = 2  # that a stage may fail, or end without having got further
GRACE = 5.0  # seconds that a stage has to end in, once it is asked to
TEST_PARTS = 8
HEADLINES = {  # what is tuned: a spec, its shape
    "causal": ("i >= j", "B1 Hq32 Hkv8 N8192 D128"),
    "window": ("i >= j and i - j < 1024", "B1 Hq32 Hkv8 N32768 D128"),
    "causal d64": ("i >= j", "B2 H16 N8192 D64"),
    "full": ("true", "B1 Hq32 Hkv8 N8192 D128"),
    "decode": ("true", "B8 Hq32 Hkv8 Nq1 Nk32768 D128"),
}

Run = Callable[
    [Sequence[str], float, Path], int | None
]  # a command's exit status within so many seconds, None past them


@dataclass(frozen=True)
class Stage:
    """One process of a day.

    command: behind `python -m`; {out} is the day's folder, {seconds} what it may take. least: seconds below which it is not worth
    starting; most: of one turn. resumes: whether it goes on where it ended, and exits with 1 where something is left.
    """

    name: str
    command: tuple[str, ...]
    least: float
    most: float
    resumes: bool = False


def stages(rehearsal: bool = False) -> list[Stage]:
    """A day's stages, most valuable first. rehearsal: the same on a CPU, kernels interpreted, at sizes to match."""
    where = ("cpu", "interpret") if rehearsal else ("cuda", "triton")
    tables = ("--device", "cpu", "--size", "small", "--seconds", "0.05") if rehearsal else ("--device", "cuda")
    tests = ("--rehearse-gpu",) if rehearsal else ()

    def table(suite: str) -> Stage:
        command = ("benchmarks", suite, "--resume", "--out", "{out}/tables", "--budget", "{seconds}", *tables)
        return Stage(f"table {suite}", command, 45, 110, resumes=True)

    def tuning(name: str) -> Stage:
        spec, shape = HEADLINES[name]
        shape = "B1 H2 N128 D32" if rehearsal else shape
        dtype = "float32" if rehearsal else "bfloat16"
        options = ("--shape", shape, "--dtype", dtype, "--trials", "2" if rehearsal else "40", "--timeout", "{seconds}")
        return Stage(f"tune {name}", ("attngen", "tune", spec, *options, "--db", "{out}/records.db"), 60, 120)

    found = [Stage(f"smoke {dtype}", ("tests.gpu_small_cases", *where, dtype), 20, 150) for dtype in _dtypes(rehearsal)]
    found += [table(suite) for suite in ("dense", "windows", "documents", "decode")]
    found += [tuning(name) for name in HEADLINES]

    ranks = ("benchmarks.ranks", "--out", "{out}/ranks.json", "--seconds", "{seconds}", *(("--rehearse",) * rehearsal))
    found.append(Stage("ranks", ranks, 45, 120))
    found += [
        Stage(f"tests {part}", ("pytest", "-q", "-m", "gpu", "--gpu-part", f"{part}/{TEST_PARTS}", *tests), 60, 180)
        for part in range(1, TEST_PARTS + 1)
    ]
    found += [table(suite) for suite in ("scores", "seeds", "planning", "first_call", "overhead")]
    return found


def _dtypes(rehearsal: bool) -> tuple[str, ...]:
    return ("float16",) if rehearsal else ("bfloat16", "float16")  # the interpreter rounds bfloat16 wrongly


class Day:
    """The stages' states, on disk after each change."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / "day.json"
        self.states: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.states = json.loads(self.path.read_text(encoding="utf-8"))

    def open(self, stage: Stage) -> bool:
        """Whether it has something left to do."""
        state = self.states.get(stage.name, {})
        return state.get("status") != DONE and state.get("failures", 0) < TURNS

    def add(self, stage: Stage, code: int | None, seconds: float) -> str:
        """Note a turn; the status it leaves the stage in."""
        state = self.states.setdefault(stage.name, {"seconds": 0.0, "turns": 0, "failures": 0})
        status = DONE if code == 0 else LEFT if stage.resumes and code in (None, 1) else FAILED
        state.update(status=status, code=code, seconds=round(state["seconds"] + seconds, 1), turns=state["turns"] + 1)
        state["failures"] += status == FAILED
        self.write()
        return status

    def write(self) -> None:
        """Atomically, and everything so far into one file that is easy to bring home."""
        write_json(self.path, self.states)
        packed = self.out / "day.tar.gz"
        with tarfile.open(packed.with_suffix(".tmp"), "w:gz") as archive:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and path.suffix not in (".gz", ".tmp"):
                    archive.add(path, path.relative_to(self.out))
        os.replace(packed.with_suffix(".tmp"), packed)


def live(
    wanted: Iterable[Stage],
    day: Day,
    budget: float,
    run: Run,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Stage]:
    """Run what is open while there is time, each stage a turn before any has a second; the stages that are left."""
    begun, wanted = clock(), list(wanted)
    while True:
        ran = False
        for stage in wanted:
            rest = budget - (clock() - begun)
            if not day.open(stage) or rest < stage.least + GRACE:
                continue
            ran, started, seconds = True, clock(), min(stage.most, rest - GRACE)
            say(f"[{started - begun:4.0f} s] {stage.name}: up to {seconds:.0f} s")
            words = {"out": str(day.out), "seconds": f"{max(1.0, seconds - GRACE):.0f}"}
            log = day.out / "logs" / f"{stage.name.replace(' ', '_')}.log"
            code = run([part.format(**words) for part in stage.command], seconds, log)
            status = day.add(stage, code, clock() - started)
            say(f"         {status} after {clock() - started:.0f} s{_ending(log)}")
        if not ran:
            return [stage for stage in wanted if day.states.get(stage.name, {}).get("status") != DONE]


def _ending(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:160]}" if last else ""


def spawned(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run `python -m command` in a process group of its own, its output at the end of `log`. Past the time it is asked to end, then
    made to.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *command], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for sent in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, sent)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE)
    return None


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing is left, 1 when something is, 2 when there is no GPU."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the day's folder; an earlier one is gone on with")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default 540)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="stages whose names begin with one of these")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes, kernels interpreted")
    given = parser.parse_args(arguments)
    if not given.rehearse and not _has_gpu():
        print("gpu_day: torch sees no GPU here; --rehearse goes through the same stages on a CPU")
        return 2
    wanted = [s for s in stages(given.rehearse) if given.only is None or s.name.startswith(tuple(given.only))]
    if not wanted:
        print(
            f"gpu_day: no stage begins with {' or '.join(given.only)}; there are {', '.join(s.name for s in stages())}"
        )
        return 2
    left = live(wanted, Day(given.out), given.budget, spawned, say=lambda text: print(text, flush=True))
    print(f"left: {', '.join(stage.name for stage in left) or 'nothing'}")
    return 1 if left else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

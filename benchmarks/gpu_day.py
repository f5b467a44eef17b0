"""Everything that a GPU can show, in one command for machines that are lent for minutes:

    python -m benchmarks gpu_day --budget 540 --out DIR       again on the next machine, with DIR: it goes on there

Most valuable first: are the kernels right, the tables that decide, tuning of the headline cases, whether the model ranks tiles as
the clock does, the GPU tests in parts, then the other tables. Each is a process of its own, so that one that hangs or crashes
ends alone. What was found is on disk as it comes; after each stage DIR/day.tar.gz holds it all, and DIR/day.json says what is
done and what is left. Tuned records are in DIR/records.db: `attngen db export --db DIR/records.db FILE` makes them text.

A stage that failed twice is left alone until --again names it, after a correction for instance. A GPU that is gone, Ctrl-C or
SIGTERM end the day at once and count as nobody's failure. benchmarks/results/README.md has the whole command for a bare machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.suite import write_json

DONE, LEFT, FAILED = "done", "left", "failed"
TURNS = 2  # that a stage may fail
AGAIN = """start these stages over, whatever became of them: what they go on from is deleted. After a correction name what has to
run again, done stages too; of those that go on, smoke, ranks and tests repeat by themselves what ran with other kernels. Tuned
records in records.db stay: tuning starts from them"""
GRACE = 5.0  # seconds that a stage has to end in, once it is asked to
TEST_FILES = (
    "tests/backends/test_gpu.py",
    "tests/backends/test_gpu_schedules.py",
)  # all others may need what isn't installed
TEST_PARTS = 8
HEADLINES = {  # what is tuned: a spec, its shape, and that of a rehearsal
    "causal": ("i >= j", "B1 Hq32 Hkv8 N8192 D128", "B1 Hq4 Hkv2 N128 D32"),
    "window": ("i >= j and i - j < 1024", "B1 Hq32 Hkv8 N32768 D128", "B1 Hq4 Hkv2 N256 D32"),
    "causal d64": ("i >= j", "B2 H16 N8192 D64", "B2 H2 N128 D16"),
    "full": ("true", "B1 Hq32 Hkv8 N8192 D128", "B1 Hq4 Hkv2 N128 D32"),
    "decode": ("true", "B8 Hq32 Hkv8 Nq1 Nk32768 D128", "B2 Hq4 Hkv2 Nq1 Nk256 D32"),
}

Run = Callable[
    [Sequence[str], float, Path], int | None
]  # a command's exit status within so many seconds, None past them


@dataclass(frozen=True)
class Stage:
    """One process of a day.

    command: behind `python -m`; {out} is the day's folder, {seconds} what it may take. least: seconds below which it is not worth
    starting; most: of one turn. resumes: the file in the day's folder from which it goes on where it ended, if it does; unfinished: how
    it ends where something is left, None for past its time. needs: a package that attngen alone does not.
    """

    name: str
    command: tuple[str, ...]
    least: float
    most: float
    resumes: str = ""
    unfinished: tuple[int | None, ...] = (None, 1)
    needs: str = ""


def stages(rehearsal: bool = False) -> list[Stage]:
    """A day's stages, most valuable first. rehearsal: the same on a CPU, kernels interpreted, at sizes to match."""
    tables = ("--device", "cpu", "--size", "small", "--seconds", "0.05") if rehearsal else ("--device", "cuda")

    def smoke(dtype: str) -> Stage:
        file, rehearsed = f"smoke_{dtype}.json", ("--rehearse",) * rehearsal
        command = ("tests.gpu_smoke", dtype, "--out", f"{{out}}/{file}", "--seconds", "{seconds}", *rehearsed)
        return Stage(f"smoke {dtype}", command, 30, 150, file)

    def table(suite: str) -> Stage:
        command = ("benchmarks", suite, "--resume", "--out", "{out}/tables", "--budget", "{seconds}", *tables)
        return Stage(f"table {suite}", command, 45, 110, f"tables/{suite}.json")

    def tuning(name: str) -> Stage:
        spec, *shapes = HEADLINES[name]
        shape, dtype, trials = (shapes[1], "float32", "2") if rehearsal else (shapes[0], "bfloat16", "40")
        file = f"trials_{name.replace(' ', '_')}.log"
        kept = ("--db", "{out}/records.db", "--storage", f"{{out}}/{file}")
        options = ("--shape", shape, "--dtype", dtype, "--trials", trials, "--timeout", "{seconds}", *kept)
        return Stage(f"tune {name}", ("attngen", "tune", spec, *options), 60, 120, file, unfinished=(), needs="optuna")

    def tests(part: int) -> Stage:
        own = ("--rehearse-gpu",) if rehearsal else _side_by_side()
        file, which = f"tests_{part}.txt", ("-m", "gpu", "--gpu-part", f"{part}/{TEST_PARTS}")
        command = ("pytest", "-vv", *which, "--gpu-passed", f"{{out}}/{file}", *own, *TEST_FILES)
        return Stage(f"tests {part}", command, 60, 180, file, unfinished=(None,), needs="pytest")

    ranks = ("benchmarks.ranks", "--out", "{out}/ranks.json", "--seconds", "{seconds}", *(("--rehearse",) * rehearsal))
    return [
        *(smoke(dtype) for dtype in _dtypes(rehearsal)),
        *(table(suite) for suite in ("dense", "windows", "documents", "decode")),
        *(tuning(name) for name in HEADLINES),
        Stage("ranks", ranks, 45, 120, "ranks.json"),
        *(tests(part) for part in range(1, TEST_PARTS + 1)),
        *(table(suite) for suite in ("scores", "seeds", "planning", "first_call", "overhead")),
    ]


def _dtypes(rehearsal: bool) -> tuple[str, ...]:
    return ("float16",) if rehearsal else ("bfloat16", "float16")  # the interpreter rounds bfloat16 wrongly


def _side_by_side() -> tuple[str, ...]:
    """Most of a test's time is compiling, which other cores can do meanwhile."""
    return ("-n", "4") if find_spec("xdist") else ()


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

    def add(self, stage: Stage, code: int | None, seconds: float, said: str = "", counts: bool = True) -> str:
        """Note a turn and its last line; the status it leaves the stage in. counts: whether a failure is the stage's own."""
        state = self.states.setdefault(stage.name, {"seconds": 0.0, "turns": 0, "failures": 0})
        status = DONE if code == 0 else LEFT if not counts or (stage.resumes and code in stage.unfinished) else FAILED
        state.update(status=status, code=code, said=said)
        state.update(seconds=round(state["seconds"] + seconds, 1), turns=state["turns"] + 1)
        state["failures"] += status == FAILED
        self.write()
        return status

    def forget(self, stage: Stage) -> None:
        """Start it over."""
        self.states.pop(stage.name, None)
        if stage.resumes:
            (self.out / stage.resumes).unlink(missing_ok=True)

    def write(self) -> None:
        """Atomically, and everything so far into one file that is easy to bring home."""
        write_json(self.path, self.states)
        packed = self.out / "day.tar.gz"
        with tarfile.open(packed.with_suffix(".tmp"), "w:gz") as archive:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and path.suffix not in (".gz", ".tmp"):
                    archive.add(path, path.relative_to(self.out))
        os.replace(packed.with_suffix(".tmp"), packed)


class GpuGone(Exception):
    """No further stage can run on this machine."""


def live(
    wanted: Iterable[Stage],
    day: Day,
    budget: float,
    run: Run,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
    gpu_answers: Callable[[], bool] = lambda: True,
) -> list[Stage]:
    """Run what is open while there is time, each stage a turn before any has a second; the stages that are left. Raises GpuGone
    where one fails because the GPU does not answer any more.
    """
    begun, wanted = clock(), list(wanted)
    try:
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
                answers = code == 0 or gpu_answers()
                status = day.add(stage, code, clock() - started, said := _last_line(log), counts=answers)
                say(f"         {status} after {clock() - started:.0f} s{': ' * bool(said)}{said}")
                if not answers:
                    raise GpuGone(f"the GPU does not answer since {stage.name}")
            if not ran:
                return left(wanted, day)
    finally:
        day.write()  # what a stage wrote that was interrupted


def left(wanted: Iterable[Stage], day: Day) -> list[Stage]:
    """The stages that are not done."""
    return [stage for stage in wanted if day.states.get(stage.name, {}).get("status") != DONE]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip(" =") for line in reversed(lines) if line.strip(" =")), "")[:200]


def spawned(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run `python -m command` in a process group of its own, its output at the end of `log` under a line that says what runs. Past
    the time, or when this process is asked to end, it is asked to end, then made to; when this process is killed, it is too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"== python -m {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
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


def _end_with_parent() -> None:
    """Linux: a day that was killed leaves no stage behind, which would write beside the one that goes on."""
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing is left, 1 when something is, 2 when it cannot start, 130 when it was interrupted."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the day's folder; an earlier one is gone on with")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default 540)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="stages whose names begin with one of these")
    parser.add_argument("--again", nargs="+", metavar="WORD", help=AGAIN)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes, kernels interpreted")
    given = parser.parse_args(arguments)
    if not given.rehearse and not _gpu_answers():
        print("gpu_day: torch sees no GPU here; --rehearse goes through the same stages on a CPU")
        return 2
    every = stages(given.rehearse)
    for word in (*(given.only or ()), *(given.again or ())):
        if not _beginning(every, [word]):
            print(f"gpu_day: no stage begins with {word}; there are {', '.join(stage.name for stage in every)}")
            return 2
    day = Day(given.out)
    for stage in _beginning(every, given.again or ()):
        day.forget(stage)
    chosen = every if given.only is None else _beginning(every, given.only)
    answers = (lambda: True) if given.rehearse else _gpu_answers
    code = 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the stage that runs is ended too
    try:
        live(_installed(chosen), day, given.budget, spawned, say=_say, gpu_answers=answers)
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except GpuGone as gone:
        _say(f"{gone}: nothing more can be measured here")
        code = 1
    finally:
        signal.signal(signal.SIGTERM, before)
    _say(summary(every, day))
    return code or int(bool(left(chosen, day)))


def _beginning(every: Iterable[Stage], words: Iterable[str]) -> list[Stage]:
    return [stage for stage in every if stage.name.startswith(tuple(words))]


def _installed(wanted: Sequence[Stage]) -> list[Stage]:
    """Those whose package is there; says what the others lack."""
    for package in sorted({stage.needs for stage in wanted if stage.needs and not find_spec(stage.needs)}):
        names = ", ".join(stage.name for stage in wanted if stage.needs == package)
        _say(f"{package} is not installed here, so these wait for another machine: {names}")
        wanted = [stage for stage in wanted if stage.needs != package]
    return list(wanted)


def _say(text: str) -> None:
    print(text, flush=True)


def summary(every: Sequence[Stage], day: Day) -> str:
    """A line for each stage, where everything is, and how to go on."""
    lines = []
    for stage in every:
        state = day.states.get(stage.name)
        status, seconds, said = ("-", "", "") if state is None else (state["status"], state["seconds"], state["said"])
        lines.append(f"{status:<6} {stage.name:<16} {seconds:>6} {said[:120]}".rstrip())
    open_stages = [stage for stage in every if day.open(stage)]
    failed = [stage.name for stage in left(every, day) if not day.open(stage)]
    lines.append(f"all of it is in {day.out / 'day.tar.gz'}")
    if failed:
        lines.append(f"failed {TURNS} times and left alone (--again tries them): {', '.join(failed)}")
    if open_stages:
        minutes = sum(stage.most for stage in open_stages) / 60
        lines.append(
            f"left: {len(open_stages)} stages, a turn of each {minutes:.0f} min at most: the same command goes on"
        )
    return "\n".join([*lines, *(["nothing is left"] if not failed and not open_stages else [])])


def _gpu_answers() -> bool:
    """Asked of a process of its own: this one holds no memory there, and survives a GPU that is lost."""
    asked = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').item()"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(asked, capture_output=True, timeout=120, check=False).returncode == 0
    return False

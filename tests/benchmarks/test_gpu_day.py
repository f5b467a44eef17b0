"""The day on a lent GPU, with pretended processes and a pretended clock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from attngen.language.schedule import Tile
from benchmarks import __main__ as command
from benchmarks import gpu_day, ranks
from benchmarks.gpu_day import DONE, FAILED, LEFT, Day, GpuGone, Stage, live, spawned, stages, summary
from benchmarks.ranks import spearman

ROOT = Path(__file__).parents[2]


class Machine:
    """Runs nothing: each command takes the seconds and ends with the status that `plan` has for its first word."""

    def __init__(self, plan: dict[str, list[tuple[float, int | None]]]):
        self.now, self.plan, self.ran = 0.0, plan, list[tuple[str, float]]()

    def clock(self) -> float:
        return self.now

    def run(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
        name = command[0]
        took, code = self.plan[name].pop(0) if self.plan.get(name) else (10.0, 0)
        self.ran.append((name, seconds))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"what {name} said\n")
        self.now += min(took, seconds)
        return None if took > seconds else code


def stage(name: str, least: float = 5, most: float = 50, resumes: bool = False) -> Stage:
    return Stage(name, (name,), least, most, f"{name}.json" if resumes else "")


def lived(machine: Machine, day: Day, budget: float, *wanted: Stage) -> tuple[list[str], list[str]]:
    """The names of what ran and of what is left."""
    before = len(machine.ran)
    left = live(wanted, day, budget, machine.run, machine.clock, say=lambda text: None)
    return [name for name, _ in machine.ran[before:]], [s.name for s in left]


def test_in_order_each_once(tmp_path: Path):
    machine = Machine({})
    assert lived(machine, Day(tmp_path), 500, stage("a"), stage("b"), stage("c")) == (["a", "b", "c"], [])


def test_a_stage_that_resumes_gets_its_second_turn_after_all_others_had_one(tmp_path: Path):
    machine = Machine({"tables": [(50, 1), (50, 1), (20, 0)]})
    ran, left = lived(machine, Day(tmp_path), 500, stage("tables", resumes=True), stage("b"))
    assert ran == ["tables", "b", "tables", "tables"] and not left


def test_nothing_starts_that_is_not_worth_it_and_nothing_outlasts_the_budget(tmp_path: Path):
    machine = Machine({"long": [(1e9, 0)] * 9})
    ran, left = lived(machine, Day(tmp_path), 100, stage("long", 15, 80, True), stage("big", least=60), stage("b"))
    assert ran == ["long", "b"] and left == ["long", "big"]
    assert machine.now <= 100 and machine.ran[-1][1] <= 100 - 80 - gpu_day.GRACE


def test_the_next_machine_goes_on(tmp_path: Path):
    first, second = Machine({"tables": [(30, 1)]}), Machine({})
    wanted = (stage("a"), stage("tables", resumes=True), stage("b"))
    assert lived(first, Day(tmp_path), 42, *wanted) == (["a", "tables"], ["tables", "b"])
    assert lived(second, Day(tmp_path), 500, *wanted) == (["tables", "b"], [])


def test_what_fails_twice_is_left_alone(tmp_path: Path):
    machine = Machine({"broken": [(1, 134)] * 9, "hangs": [(1e9, 0)] * 9})
    day = Day(tmp_path)
    ran, left = lived(machine, day, 1000, stage("broken"), stage("hangs"), stage("b"))
    assert ran == ["broken", "hangs", "b", "broken", "hangs"] and left == ["broken", "hangs"]
    assert day.states["broken"] == {
        "seconds": 2.0, "turns": 2, "failures": 2, "status": FAILED, "code": 134, "said": "what broken said"
    }  # fmt: skip
    assert day.states["hangs"]["code"] is None
    assert lived(Machine({}), Day(tmp_path), 1000, stage("broken")) == ([], ["broken"])


def test_what_is_left_alone_is_started_over_when_asked(tmp_path: Path):
    day, broken = Day(tmp_path), stage("broken", resumes=True)
    lived(Machine({"broken": [(1, 3)] * 2}), day, 1000, broken)
    (tmp_path / "broken.json").write_text("{}")
    day.forget(broken)
    assert not (tmp_path / "broken.json").exists()
    assert lived(Machine({}), day, 1000, broken) == (["broken"], [])


def test_failing_tests_are_no_unfinished_ones(tmp_path: Path):
    tests = Stage("tests", ("tests",), 5, 50, "tests.txt", unfinished=(None,))
    machine, day = Machine({"tests": [(1e9, 0), (10, 1), (10, 1)]}), Day(tmp_path)
    assert lived(machine, day, 1000, tests) == (["tests"] * 3, ["tests"])
    assert (day.states["tests"]["failures"], day.states["tests"]["status"]) == (2, FAILED)


def test_tests_go_on_behind_those_that_passed(tmp_path: Path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "conftest.py")
    noted = tmp_path / "passed.txt"
    (tmp_path / "test_it.py").write_text("""if True:
        import pathlib, pytest
        def test_passes(): pass
        def test_skips(): pytest.skip("so")
        def test_needs_a_file(): assert pathlib.Path(__file__).with_name("there").exists()
    """)

    def run(*options: str) -> tuple[int, str]:
        words = ["pytest", "-q", "-p", "no:cacheprovider", "--gpu-passed", "passed.txt", *options, "test_it.py"]
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]

    code, said = run()
    assert code == 4 and "is_available() is False" in said and not noted.exists()
    code, said = run("--rehearse-gpu")
    assert code == 1 and "1 failed, 1 passed, 1 skipped" in said
    (tmp_path / "there").touch()
    code, said = run("--rehearse-gpu")
    assert code == 0 and "1 passed, 2 deselected" in said
    code, said = run("--rehearse-gpu")
    assert code == 0 and "3 deselected" in said
    kernels, _, rest = noted.read_text().partition(" ")
    noted.write_text(f"{'0' * len(kernels)} {rest}")  # the first of them with other kernels
    code, said = run("--rehearse-gpu")
    assert code == 0 and "1 passed, 2 deselected" in said


@pytest.mark.slow
def test_a_worker_in_place_of_one_that_crashed_collects_what_the_others_did(tmp_path: Path):
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text("""if True:
        import os, pytest, time
        @pytest.mark.parametrize("number", range(12))
        def test_it(number):
            time.sleep(0.05)
            if number == 6:
                os._exit(3)
    """)
    words = [
        "pytest",
        "-n",
        "2",
        "-p",
        "no:cacheprovider",
        "--rehearse-gpu",
        "--gpu-passed",
        "passed.txt",
        "test_it.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and "1 failed, 11 passed" in done.stdout
    assert len((tmp_path / "passed.txt").read_text().splitlines()) == 11


def test_a_gpu_that_is_gone_is_no_stages_failure(tmp_path: Path):
    machine, day, alive = Machine({"b": [(1, 1)], "c": [(1, 1)]}), Day(tmp_path), iter([True, False])
    with pytest.raises(GpuGone, match="the GPU does not answer since c"):
        live(
            [stage(name) for name in "abcd"], day, 500, machine.run, machine.clock,
            say=lambda text: None, gpu_answers=lambda: next(alive),
        )  # fmt: skip
    assert [name for name, _ in machine.ran] == ["a", "b", "c"]
    states = Day(tmp_path).states
    assert (states["b"]["failures"], states["c"]["failures"], states["c"]["status"]) == (1, 0, LEFT)
    assert lived(Machine({}), Day(tmp_path), 500, *[stage(name) for name in "abcd"]) == (["b", "c", "d"], [])


def test_the_summary_says_what_is_done_and_how_to_go_on(tmp_path: Path):
    day, wanted = Day(tmp_path), (stage("a"), stage("b"), stage("c"))
    lived(Machine({"b": [(1, 1)] * 2}), day, 1000, *wanted[:2])
    done, failed, untouched, place, alone, left = summary(wanted, day).splitlines()
    assert done.split(maxsplit=3) == ["done", "a", "10.0", "what a said"]
    assert failed.startswith("failed b") and untouched.split() == ["-", "c"]
    assert "day.tar.gz" in place and alone.endswith(": b") and "--again" in alone
    assert left.startswith("left: 1 stages") and "goes on" in left
    day.forget(wanted[1])
    lived(Machine({}), day, 1000, *wanted)
    assert summary(wanted, day).splitlines()[-1] == "nothing is left"


def test_a_machine_that_is_taken_away_leaves_what_was_found(tmp_path: Path):
    def run(command: Sequence[str], seconds: float, log: Path) -> int:
        if command[0] == "b":
            (tmp_path / "tables").mkdir()
            (tmp_path / "tables" / "dense.json").write_text("{}")
            raise KeyboardInterrupt
        return 0

    day = Day(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        live([stage("a"), stage("b")], day, 500, run, Machine({}).clock, say=lambda text: None)
    assert json.loads((tmp_path / "day.json").read_text())["a"]["status"] == DONE
    with tarfile.open(tmp_path / "day.tar.gz") as archive:
        assert {"day.json", "tables/dense.json"} <= set(archive.getnames())
    assert Day(tmp_path).open(stage("b")) and not Day(tmp_path).open(stage("a"))


def test_the_whole_day_to_its_end(tmp_path: Path):
    """Ten machines lent for nine minutes each, every stage as long as it may be."""
    wanted, plan = stages(), dict[str, list[tuple[float, int | None]]]()

    class Slow(Machine):
        def run(self, command: Sequence[str], seconds: float, log: Path) -> int | None:
            assert not any("{" in word for word in command)
            return super().run(command, seconds, log)

    for number in range(10):
        plan["benchmarks"] = [(100.0, 1 if number < 3 else 0)] * 9
        machine = Slow(dict(plan, pytest=[(150.0, 0)] * 9, attngen=[(115.0, 0)] * 9))
        left = live(wanted, Day(tmp_path), 540, machine.run, machine.clock, say=lambda text: None)
        assert machine.now <= 540
        if number == 0:  # the first machine shows whether kernels are right, and the tables that decide
            assert list(Day(tmp_path).states)[:6] == [s.name for s in wanted[:6]]
        if not left:
            break
    assert not left and {state["status"] for state in Day(tmp_path).states.values()} == {DONE}


def test_a_process_past_its_time_is_ended_with_its_children(tmp_path: Path):
    log = tmp_path / "logs" / "x.log"
    begun = time.monotonic()
    assert spawned(["http.server", "0"], 1.0, log) is None
    assert time.monotonic() - begun < 1.0 + 2 * gpu_day.GRACE + 5
    assert spawned(["platform"], 60.0, log) == 0
    first, *_, headline, said = log.read_text().strip().splitlines()
    assert first == "== python -m http.server 0" and headline == "== python -m platform" and said


def test_a_stage_does_not_outlive_a_day_that_is_killed(tmp_path: Path):
    begin = """if True:
        import pathlib, sys
        from benchmarks.gpu_day import spawned
        spawned(["http.server", "0"], 60, pathlib.Path(sys.argv[1]))
    """
    day = subprocess.Popen([sys.executable, "-c", begin, str(tmp_path / "log")])
    deadline = time.monotonic() + 60
    while not (found := _children(day.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found
    day.kill()
    day.wait()
    while any(_runs(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in found)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_sigterm_ends_the_stage_and_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def run(command: Sequence[str], seconds: float, log: Path) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    monkeypatch.setattr(gpu_day, "spawned", run)
    assert command.main(["gpu_day", "--out", str(tmp_path), "--rehearse", "--only", "ranks"]) == 130
    said = capsys.readouterr().out
    assert "interrupted" in said and "the same command goes on" in said
    assert (tmp_path / "day.tar.gz").is_file() and Day(tmp_path).states == {}


def test_what_is_not_installed_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu_day, "find_spec", lambda name: None if name == "optuna" else name)
    monkeypatch.setattr(gpu_day, "spawned", lambda *_: 0)
    arguments = ["gpu_day", "--out", str(tmp_path), "--rehearse", "--only", "ranks", "tune"]
    assert command.main(arguments) == 1
    assert "optuna is not installed here" in capsys.readouterr().out
    assert list(Day(tmp_path).states) == ["ranks"]


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_day, "_gpu_answers", lambda: False)
    assert command.main(["gpu_day", "--out", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().out
    assert command.main(["gpu_day", "--out", str(tmp_path), "--rehearse", "--only", "nothing"]) == 2


def test_every_stage_is_a_command_that_exists():
    names = [s.name for s in stages()]
    assert len(set(names)) == len(names)
    for found in (*stages(), *stages(rehearsal=True)):
        assert found.least + gpu_day.GRACE < 540 and found.least <= found.most
        assert found.command[0] in ("tests.gpu_smoke", "benchmarks", "benchmarks.ranks", "attngen", "pytest")
        assert any(Path(found.resumes).stem in word for word in found.command)
    files = (ROOT / "tests/backends").glob("*.py")
    marked = [str(path.relative_to(ROOT)) for path in files if "\npytestmark = pytest.mark.gpu" in path.read_text()]
    assert sorted(marked) == sorted(gpu_day.TEST_FILES)


def test_ranks_go_on_behind_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[str] = []

    def tiles(name: str, *_: Any) -> dict[Tile, float]:
        measured.append(name)
        return {Tile(64, 64, 4, 2): 1.0, Tile(64, 32, 4, 2): 2.0}

    monkeypatch.setattr(ranks, "tiles", tiles)
    monkeypatch.setattr(ranks, "measured", lambda *_: [1.0, 2.0])
    arguments = ["--out", str(tmp_path / "ranks.json"), "--rehearse"]
    assert ranks.main([*arguments, "--seconds", "-1"]) == 1 and not measured
    assert ranks.main(arguments) == 0 == ranks.main(arguments)
    assert measured == ["causal"]
    monkeypatch.setattr(ranks, "generator_hash", lambda backend: "other kernels")
    assert ranks.main(arguments) == 0 and measured == ["causal"] * 2
    assert len(json.loads((tmp_path / "ranks.json").read_text())) == 2
    assert json.loads((tmp_path / "ranks.json").read_text())[0]["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        ([1, 1, 2], [5, 5, 9], 1),
    ],
)
def test_spearman(a: list[float], b: list[float], wanted: float):
    assert spearman(a, b) == pytest.approx(wanted)

"""The README as a newcomer takes it: every block is pasted and run, every name exists, every figure is one that was measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attngen as ag

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
INSTALL = [
    code for language, code in BLOCKS if language == "bash" and ".venv/" in code
]  # what .ci/run does in a fresh environment
LINES = [
    line
    for language, code in BLOCKS
    if language == "bash" and code not in INSTALL
    for line in code.strip().splitlines()
]


def blocks(language: str) -> list[str]:
    return [code for found, code in BLOCKS if found == language]


def in_a_new_process(command: list[str] | str, folder: Path) -> str:
    """What it prints. It has to end well and warn of nothing of ours."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"ATTNGEN_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT), "PATH": tools}
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(tmp_path: Path):
    script = tmp_path / "pasted.py"
    script.write_text("\n".join(blocks("python")))
    told = in_a_new_process([sys.executable, str(script)], tmp_path)
    for part in ("mask of batch 0", "@triton.jit", "registers", "records kept in"):
        assert part in told


@pytest.mark.slow
def test_the_shell_lines_run_one_after_the_other(tmp_path: Path):
    assert len(LINES) > 5
    told = [in_a_new_process(line, tmp_path) for line in LINES]
    assert "0 records" not in "".join(told) and (tmp_path / "window.png").exists()


def test_a_spec_may_live_in_a_file(tmp_path: Path):
    (text,) = blocks("toml")
    path = tmp_path / "spec.toml"
    path.write_text(text)
    spec = ag.Spec.from_toml(path)
    assert spec.schedule is not None and {*spec.tensors} == {"doc", "slope"}


def test_the_first_commands_are_those_that_ci_runs():
    ran = (ROOT / ".ci" / "run").read_text()
    assert len(INSTALL) == 2
    for part in re.findall(r"-m pytest -n 2|install -q .*\]\"|examples/\w+\.py", "".join(INSTALL)):
        assert part in ran


def test_every_name_exists():
    names = {*re.findall(r"\bag\.([A-Za-z_][\w.]*\w)", TEXT)}
    assert len(names) > 40
    for name in names:
        found = ag
        for part in name.split("."):
            found = getattr(found, part)


def test_every_figure_was_measured():
    section = TEXT.split("## Figures")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line][1:]
    results = ROOT / "benchmarks" / "results"
    measured = [line for path in (results / "cpu").glob("*.md") for line in path.read_text().splitlines()]
    assert len(rows) >= 8 and all(any(line.startswith(row) for line in measured) for row in rows)
    (modelled,) = (x for x in (results / "stream_k_modelled.md").read_text().splitlines() if "B8" in x and "H32/8" in x)
    said = re.findall(r"\d+ us", section)
    assert len(said) == 3 and all(time in modelled for time in said)

"""`attngen tune --model` on the examples: modelled for an H100, measured here; then calls of a new process find every record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attngen.cli.main import app

MODELS = sorted((Path(__file__).parents[2] / "examples" / "models").glob("*.json"))
CONTEXT = 64  # of the calls here; the heads and head dims are the models' own

FOUND = """
import json, sys, warnings
import torch
import attngen as ag
from attngen.analysis import facts
from attngen.integrations.config import read_config, workloads
from attngen.language.call import bind
from attngen.schedule import Schedule
from attngen.schedule.choice import choose_elsewhere
from attngen.tuning.attends import example

path, db, context = sys.argv[1], sys.argv[2], int(sys.argv[3])
for one in workloads(read_config(path), [1], [context]):
    (q, k, v), captures, _ = example(one.spec, one.shape, torch.float32, one.captures)
    told = ag.compile(one.spec, db=db).explain(q, k, v, **captures)
    offset = captures.pop("q_offset")
    call = bind(one.spec, *(x.bfloat16() for x in (q, k, v)), q_offset=offset, captures=captures)
    _, origin = choose_elsewhere(call, facts(one.spec), "H100", Schedule(), db)
    here = [line for line in told.splitlines() if "record" in line]
    print(json.dumps({"call": f"{one.name} {one.shape}", "here": here, "there": origin}))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::attngen.errors.AttngenWarning")  # a busy machine measures unevenly
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_calls_in_a_new_process_find_what_was_tuned_for_a_model(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("ATTNGEN_DB", raising=False)
    db = str(tmp_path / "records.db")

    def tune(*options: str) -> str:
        sizes = ["--batch", "1", "--context", str(CONTEXT), "--effort", "quick", "--db", db]
        result = CliRunner().invoke(app, ["tune", "--model", str(model), *sizes, *options])
        assert result.exit_code == 0, result.output
        return result.output

    modelled, measured = tune("--target", "H100"), tune("--dtype", "float32")
    calls = 2 if model.stem.startswith("llama") else 4  # a prefill and a decoding of each attention
    for told in (modelled, measured):
        assert f"covered: {calls} exact, 0 by the nearest record, 0 without a record" in told
    assert "modelled for NVIDIA H100" in modelled and "measured on" in measured
    command = [sys.executable, "-c", FOUND, str(model), db, str(CONTEXT)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == calls
    for one in found:
        assert any("measured record, exact" in line for line in one["here"]), one
        assert "forward: modelled record, exact" in one["there"], one
    assert tune("--target", "H100").count("finished before") == calls, "the same command again costs nothing"

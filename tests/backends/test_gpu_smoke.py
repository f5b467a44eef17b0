"""The smoke test for lent GPUs, without one: what its cases' names say, and what it does with processes that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.analysis import facts as analyse
from attngen.plan.launches import backward_launches
from attngen.schedule.choice import complete_for
from tests import gpu_smoke
from tests.backends.test_gpu import here
from tests.gpu_smoke import Smoke, WorkerDied, answer
from tests.gpu_smoke_cases import BATCH, CASES, HEADS, Case

NAMED = [name for name, case in CASES.items() if isinstance(case, Case) and (case.hopper or case.launch)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_what_a_name_says_is_so_on_sm_90(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    assert isinstance(case, Case)
    chosen = complete_for(case.spec, "sm_90", case.d, case.dv or case.d, dtype, case.schedule or ag.Schedule())
    assert {field: chosen.decided().get(field) for field in case.hopper} == case.hopper
    known = analyse(case.spec)
    launches = backward_launches(known, None, dtype, chosen, sorted(known.learned), BATCH, HEADS)
    assert not case.launch or case.launch in [str(launch) for launch in launches]


@pytest.mark.parametrize(
    "word",
    ["descriptors in dkv by default", "gradients stored by them", "separate_sums", "d192", "d256", "guarded second launch",
     "inside dq", "inside dkv", "persistent, longest first", "stream-K", "CUDA graph", "key set hash_sparse"],
)  # fmt: skip
def test_what_never_ran_on_a_gpu_is_there(word: str) -> None:
    assert [name for name in CASES if word in name]


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same case with a kernel whose result is a little off."""
    with here() as place:
        if place.real:
            pytest.skip("replaces the interpreter's kernels")
    name = "full d128"
    assert answer({"case": name, "dtype": "float16"})["error"] < 1
    monkeypatch.setattr(Case, "__call__", _off)
    got = answer({"case": name, "dtype": "float16"})
    assert got["status"] == "wrong" and got["reason"].startswith("out: ")


def _off(case: Case, place: Any, dtype: torch.dtype) -> float:
    from tests.check import check

    attn = ag.compile(case.spec, backend="cpu")

    def wrong(*tensors: torch.Tensor, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attn(*tensors, **named)
        return out * 1.02, lse

    q = torch.randn(1, 2, 9, 16).to(dtype)
    return check(case.spec, wrong, q, q, q, {})


class Stub:
    """A worker that dies of one case, and finds another wrong."""

    def __init__(self, *_: Any, **__: Any):
        self.closed = False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["case"] == "a":
            raise WorkerDied("crashed", "the worker ended with SIGSEGV")
        return {"status": "wrong", "reason": "out: 2 > 1"} if request["case"] == "b" else {"status": "ok", "error": 0.5}

    def close(self) -> None:
        self.closed = True


def test_what_dies_ends_alone_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "Worker", Stub)
    path, said = tmp_path / "smoke.json", list[str]()
    smoke = Smoke(path, "float16", "abcd", said.append)
    smoke.run(float("inf"), processes=2)
    assert not smoke.left and str(smoke) == "2 of 4 cases are fine, NOT: a; b"
    found = json.loads(path.read_text())
    assert [found[name]["status"] for name in "abcd"] == ["crashed", "wrong", "ok", "ok"]
    assert any("SIGSEGV" in line for line in said)
    assert Smoke(path, "float16", "abcd", said.append).left == ["a", "b"]
    monkeypatch.setattr(gpu_smoke, "generator_hash", lambda backend: "other kernels")
    assert Smoke(path, "float16", "abcd", said.append).left == ["a", "b", "c", "d"]


def test_what_has_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "Worker", Stub)
    smoke = Smoke(tmp_path / "smoke.json", "float16", "cd", lambda text: None)
    smoke.run(0.0, processes=1)
    assert smoke.left == ["c", "d"] and str(smoke) == "0 of 2 cases are fine"


def test_two_cases_in_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself, interpreted."""
    assert gpu_smoke.main(["float16", "--out", str(tmp_path / "s.json"), "--rehearse", "--only", "full d128"]) == 0
    assert "1 of 1 cases are fine" in capsys.readouterr().out

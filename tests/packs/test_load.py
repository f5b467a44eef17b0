"""Loaded packs: what they launch, without anything of a compiler, is what Triton launches for the same sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.packs import build
from tests.packs.stub import HERE, TREE, Stub, lines_of

slope, doc, width = ag.Tensor("slope", 1), ag.Tensor("doc", 2, dtype=torch.int32), ag.Param("width")
FIVE = {
    "causal": ag.Spec(mask=ag.causal()),
    "window": ag.Spec(mask=lambda b, h, i, j: (i >= j) & (i - j < width)),
    "documents": ag.Spec(mask=lambda b, h, i, j: (doc[b, i] == doc[b, j]) & (i >= j)),
    "cap and slopes": ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: 50 * ag.tanh(s / 50) + slope[h] * (j - i)),
    "block-sparse": ag.Spec(keys=ag.block_sparse((128, 128)), mask=ag.causal()),
}
SHAPE = "B2 Hq8 Hkv2 N512 D128"


@contextmanager
def jobs_of_builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """What Triton needs to compile the kernels of packs that are built within it, by their files there."""
    jobs: dict[str, dict[str, Any]] = {}
    record = build._Builder._record

    def recorded(builder: Any, attend: Any, source: Any) -> str:
        name = record(builder, attend, source)
        dtype = attend.call.q.dtype
        ones = [place for place, arg in enumerate(source.args) if arg.unit]
        jobs[builder.kernels[name].file] = {
            "file": str(source.write()),
            "symbol": source.name,
            "signature": {arg.name: build._kind(arg, dtype, attend.kinds) for arg in source.args},
            "ones": ones,
            "divisible": [place for place, arg in enumerate(source.args) if build._is_divisible(arg)],
            "options": {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True},
            "arch": 90,
        }
        return name

    with monkeypatch.context() as patch:
        patch.setattr(build._Builder, "_record", recorded)
        yield jobs


def launched(
    specs: dict[str, ag.Spec], stub: Stub, folder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> dict[str, list[str]]:
    """Build a pack, call what is in it in a process without a compiler, and let Triton launch the same: equal to the byte. Returns the
    names of the kernels by attention.
    """
    with jobs_of_builds(monkeypatch) as jobs:
        ag.save(specs, folder / "pack", targets=["sm_90"], shapes=[SHAPE], **more)
    ours, theirs = folder / "ours.log", folder / "theirs.log"
    printed = stub.run(HERE / "by_pack.py", folder / "pack", folder / "calls.json", environment=stub.environment(ours))
    by_triton = []
    for file, programs, stream, values in json.loads((folder / "calls.json").read_text()):
        job, given = jobs[file], iter(values)
        whole = [1 if place in job["ones"] else next(given) for place in range(len(job["signature"]))]
        assert next(given, None) is None
        by_triton.append({**job, "programs": programs, "stream": stream, "values": whole})
    (folder / "jobs.json").write_text(json.dumps(by_triton))
    environment = stub.environment(theirs) | {"TRITON_DISABLE_LINE_INFO": "1"}
    stub.run(HERE / "by_triton.py", folder / "jobs.json", environment=environment)
    assert len(lines_of(ours)) == len(by_triton) > 0
    assert lines_of(ours) == lines_of(theirs)
    return dict(map(json.loads, printed.splitlines()))


def test_a_forward_is_launched_as_triton_does(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = launched({"causal": FIVE["causal"]}, stub, tmp_path, monkeypatch, backward=False)
    assert found == {"causal": ["forward", "forward_guarded"]}


@pytest.mark.slow
def test_five_specs_are_launched_as_triton_does(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = launched(FIVE, stub, tmp_path, monkeypatch)
    assert found.keys() == FIVE.keys()
    for name, kernels in found.items():
        bare = {kernel.removesuffix(" + gradient") for kernel in kernels}
        assert {"forward", "delta", "delta_of_out", "dq", "dkv"} <= bare, name
    assert "dq + gradient" in found["cap and slopes"] and "tables" in found["documents"]


BUILDING = """
import sys
import torch
import attngen as ag

spec = ag.Spec(mask=ag.causal(), score=ag.soft_cap(20.0))
if "busy" in sys.argv[2]:  # a process that has called other things before
    q = torch.randn(1, 2, 40, 16)
    ag.compile(spec, backend="cpu")(q, q, q, k_offset=3)
specs = {"capped": spec, "sparse": ag.Spec(keys=ag.block_sparse(64), mask=ag.causal())}
ag.save(specs, sys.argv[1], targets=["sm_80"], shapes=["B1 Hq2 Hkv1 N128 D64"])
"""


@pytest.mark.slow
def test_two_builds_are_equal_to_the_byte_and_say_nothing_of_the_machine(tmp_path: Path):
    built = []
    for name in ("tidy", "busy"):
        place = tmp_path / name
        place.mkdir()
        caches = {"ATTNGEN_CACHE_DIR": str(place / "cache"), "TRITON_CACHE_DIR": str(place / "triton")}
        environment = os.environ | caches | {"PYTHONPATH": str(TREE), "PYTHONHASHSEED": str(len(built))}
        command = [sys.executable, "-c", BUILDING, str(place / "pack"), name]
        subprocess.run(command, cwd=place, env=environment, check=True)
        built.append({path.relative_to(place): path.read_bytes() for path in sorted((place / "pack").rglob("*.*"))})
    assert built[0] == built[1] and len(built[0]) > 10
    machine = {
        str(tmp_path),
        str(TREE),
        str(Path.home()),
        sys.prefix,
        str(Path(torch.__file__).parent),
        "tidy",
        "attngen/",
    }
    for path, content in built[0].items():
        assert not [name for name in machine if name.encode() in content], path


TIMED = """
import sys, time
import torch
import attngen as ag
from attngen.packs import driver

driver.launches_on, driver.index_of = (lambda device: True), (lambda device: 0)
driver.current_stream = lambda device: 0
attend = ag.load(sys.argv[1])
driver._library().cuCtxPushCurrent_v2(driver.primary_context(0))  # as torch does on a GPU
q, k, v = (torch.randn(2, heads, 512, 128, dtype=torch.bfloat16) for heads in (8, 2, 2))


def host_time(calls):
    start = time.process_time()
    for _ in range(calls):
        attend(q, k, v)
    return (time.process_time() - start) / calls


print(host_time(1), min(host_time(500) for _ in range(20)))
"""


@pytest.mark.slow
def test_host_time_of_a_call(stub: Stub, tmp_path: Path):
    """The launch itself takes no time here. Processor time, the least of many: other processes are no part of it."""
    ag.save(FIVE["causal"], tmp_path / "pack", targets=["sm_90"], shapes=[SHAPE], backward=False)
    first, then = map(float, stub.run("-c", TIMED, tmp_path / "pack", environment=stub.environment()).split())
    assert first < 20e-3 and then < 30e-6

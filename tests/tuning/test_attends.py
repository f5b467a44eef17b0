"""Tuning of whatever a call is made of: every key set, unions, documents, ragged lengths, pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.inspect.cross import cross_compile_call
from attngen.store import Shape
from attngen.tuning.attends import example, parts_of

CAUSAL = ag.causal()
NEAR = CAUSAL & ag.window(9)
LENGTHS = torch.tensor([130, 256])
ENDS = torch.tensor([0, 100, 256])
# What is tuned, and the captures that nobody makes up.
CASES: dict[str, tuple[ag.Spec, dict[str, Any]]] = {
    "documents": (ag.Spec(mask=ag.documents() & CAUSAL), {}),
    "k_len": (ag.Spec(mask=CAUSAL), dict(k_len=LENGTHS)),
    "packed": (ag.Spec(mask=CAUSAL), dict(cu_q=ENDS, cu_k=ENDS)),
    "paged": (ag.Spec(keys=ag.paged(16)), {}),
    "paged, k_len": (ag.Spec(keys=ag.paged(16), mask=CAUSAL), dict(k_len=LENGTHS)),
    "qk_sparse": (ag.Spec(keys=ag.qk_sparse(), mask=CAUSAL), {}),
    "hash_sparse": (ag.Spec(keys=ag.hash_sparse(), mask=CAUSAL), {}),
    "hyper": (ag.Spec(keys=ag.hyper(32, 32, 128), mask=CAUSAL), {}),
    "block_sparse": (ag.Spec(keys=ag.block_sparse((32, 32)), mask=CAUSAL), {}),
    "block_cluster": (ag.Spec(keys=ag.block_cluster(32), mask=CAUSAL), {}),
    "butterfly": (ag.Spec(keys=ag.butterfly()), {}),
    "big_bird": (ag.Spec(keys=ag.big_bird(), mask=CAUSAL), {}),
    "longformer": (ag.Spec(keys=ag.longformer(40, globals=3)), {}),
    "a_shape": (ag.Spec(keys=ag.a_shape(3, 40), mask=CAUSAL), {}),
    "vertical_slash": (ag.Spec(keys=ag.vertical_slash(), mask=CAUSAL), {}),
    "adaptive": (ag.Spec(keys=ag.adaptive(), mask=CAUSAL), {}),
    "pruned": (ag.Spec(keys=ag.pruned(0.5), mask=CAUSAL), {}),
    "gather": (ag.Spec(keys=ag.gather(), mask=CAUSAL), {}),
    "codebook": (ag.Spec(keys=ag.codebook()), {}),
    "graph": (ag.Spec(keys=ag.graph(), mask=CAUSAL), {}),
    "sparse_k": (ag.Spec(keys=ag.sparse_k(16), mask=CAUSAL), {}),
    "sparse_k, incremental": (ag.Spec(keys=ag.sparse_k(16, incremental=True), mask=CAUSAL), {}),
    "shared_prefix": (ag.Spec(keys=ag.shared_prefix(), mask=CAUSAL), {}),
    "union": (ag.union(ag.Spec(mask=NEAR), ag.Spec(keys=ag.qk_sparse(), mask=CAUSAL & ~NEAR), sink="0.5"), {}),
}


def shape_of(name: str) -> Shape:
    return Shape(1 if name == "packed" else 2, 4, 2, 1 if name.startswith("paged") else 256, 256, 64, 64)


# A process of its own: what it prints of `explain` is what a user sees who comes after the tuning.
EXPLAIN = """
import json, sys
sys.path.insert(0, sys.argv[3])
import attngen as ag
from tests.tuning.test_attends import CASES, shape_of
from attngen.tuning.attends import example
import torch
spec, captures = CASES[sys.argv[1]]
rows, named, _ = example(spec, shape_of(sys.argv[1]), torch.float32, captures)
attn = ag.compile(spec, db=sys.argv[2])
print(json.dumps([attn.explain(*rows, **named), [step.name for step, _ in attn.attends(*rows, **named)]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_measured_records_are_found_by_calls_in_another_process(name: str, tmp_path: Path):
    spec, captures = CASES[name]
    db, storage = tmp_path / "records.db", tmp_path / "trials.journal"
    report = ag.tune(
        spec, shape_of(name), trials=2, db=db, storage=storage, captures=captures, progress=False, patience=0.05
    )
    assert report.results and all(tuned.record is not None for tuned in report.results), report
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", EXPLAIN, name, str(db), str(root)], capture_output=True, text=True, check=True
    )
    told, steps = json.loads(run.stdout)
    plan = told[told.index("\nplan\n") :].split("\n  backward\n")[0]
    # Under each attention of the plan the record that it uses.
    found = [line.strip() for line in plan.splitlines() if line.strip().startswith("from ")]
    assert len(found) >= len(steps) and all("measured record" in line for line in found[: len(steps)]), told


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_modelled_records_are_used_by_a_cross_compiled_call(name: str, tmp_path: Path):
    spec, captures = CASES[name]
    db, storage = tmp_path / "records.db", tmp_path / "trials.journal"
    report = ag.tune(
        spec,
        shape_of(name),
        dtype=torch.float16,
        trials=2,
        db=db,
        storage=storage,
        captures=captures,
        progress=False,
        target="H100",
    )
    assert report.results and all(tuned.record is not None for tuned in report.results), report
    assert all(record.kind == "modelled" for record in report.records)
    rows, named, _ = example(spec, shape_of(name), torch.float16, captures)
    found = cross_compile_call(ag.compile(spec, db=str(db)), *rows, target="H100", passes=("forward",), **named)
    assert found and all("forward: modelled record" in one.origin and one.kernels for one in found)


def test_equal_attentions_are_searched_once():
    spec = ag.union(ag.Spec(mask=NEAR), ag.Spec(mask=NEAR), ag.Spec(mask=CAUSAL & ~NEAR))
    shape, where = (
        Shape(1, 2, 2, 64, 64, 16, 16),
        dict(device=torch.device("cpu"), patient=True, backward=False, seed=0),
    )
    parts, _ = parts_of(spec, shape, torch.float32, {}, **where)  # type: ignore[arg-type]
    assert [part.name for part in parts] == ["piece 0 attention", "piece 2 attention"]


def test_what_is_made_up_is_named_and_lengths_never_are():
    shape, where = (
        Shape(2, 4, 2, 64, 64, 16, 16),
        dict(device=torch.device("cpu"), patient=True, backward=False, seed=0),
    )
    keep = torch.ones(2, 4, 64, dtype=torch.bool)
    spec = ag.Spec(keys=ag.qk_sparse(), mask=CAUSAL, score=ag.alibi())
    parts, words = parts_of(spec, shape, torch.float32, dict(keep_q=keep), **where)  # type: ignore[arg-type]
    assert words == ["slope", "keep_k = a random half"] and parts[0].shape.n_q == 64
    (plain,), words = parts_of(ag.Spec(mask=CAUSAL), shape, torch.float32, {}, **where)  # type: ignore[arg-type]
    assert plain.whole and words == []


def test_a_part_that_fits_one_size_has_a_small_one_to_check():
    shape, where = (
        Shape(1, 2, 2, 3000, 3000, 16, 16),
        dict(device=torch.device("cpu"), patient=True, backward=True, seed=0),
    )
    (part,), _ = parts_of(ag.Spec(keys=ag.qk_sparse()), shape, torch.float32, {}, **where)  # type: ignore[arg-type]
    assert part.small is not None and part.small.spec.key == part.spec.key and part.small.shape.n_k < 1000


@pytest.mark.parametrize(
    ("captures", "message"),
    [
        (dict(keep_q=torch.ones(2, 4, 9, dtype=torch.bool)), "keep_q: expected bool"),
        (dict(nothing=1), "nothing: expected one of this spec's captures"),
        (dict(k_len=torch.tensor([1])), "k_len: expected one of"),
    ],
)
def test_captures_that_do_not_fit_are_refused_before_anything_is_compiled(captures: Any, message: str, tmp_path: Path):
    with pytest.raises(ag.InputError, match=message):
        ag.tune(
            ag.Spec(keys=ag.qk_sparse()), "B2 Hq4 Hkv4 N64 D16", captures=captures, db=tmp_path / "r.db", progress=False
        )
    with pytest.raises(ag.InputError, match="k_len: expected"):
        ag.tune(
            ag.Spec(), "B2 H4 N64 D16", captures=dict(k_len=torch.tensor([1])), db=tmp_path / "r.db", progress=False
        )

"""`attngen bench`: what stands beside attngen computes the same, or says why not; what is wrong is not timed."""

from __future__ import annotations

import json

import pytest
import torch

import attngen as ag
from attngen.language.programs import evaluate
from attngen.store import Shape
from attngen.tuning import peers, versus
from attngen.tuning.check import Reference, WrongResult
from attngen.tuning.race import race
from attngen.tuning.versus import chart, compare

SHAPE = Shape.of("B2 Hq4 Hkv2 N40 D16")
DOC, SLOPE, WIDTH = ag.Tensor("doc", 2, dtype=torch.int32), ag.Tensor("slope", 1), ag.Param("width")
SPECS = {
    "full": (ag.Spec(), "", ""),
    "causal": (ag.Spec(mask=ag.causal()), "is_causal", "block mask"),
    "window of a param": (ag.Spec(mask=lambda b, h, i, j: (i >= j) & (i - j < WIDTH)), "dense mask", "block mask"),
    "documents": (ag.Spec(mask=ag.causal() & ag.documents(DOC)), "dense mask", "block mask"),
    "heads differ": (ag.Spec(mask=lambda b, h, i, j: i - j < 9 + 4 * h), "dense mask", "block mask"),
    "alibi": (ag.Spec(mask=ag.causal(), score=ag.alibi(SLOPE)), "dense bias", "block mask"),
    "soft-cap": (ag.Spec(mask=ag.causal(), score=ag.soft_cap(20.0)), None, "block mask"),
    "scale": (ag.Spec(mask=ag.causal(), scale=0.3), "is_causal", "block mask"),
    "sinks": (ag.Spec(mask=ag.causal(), sink=ag.sink("sinks")), None, None),
}  # what SDPA and FlexAttention say of themselves; None where they can't


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """FlexAttention not compiled, which takes tens of seconds; what is compiled is tested once, below."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return compiled


def quick(spec, shape=SHAPE, **options):
    return compare(spec, shape, **{"dtype": torch.float32, "device": "cpu", "seconds": 0.0} | options)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", SPECS)
def test_peers_compute_the_same(name, monkeypatch):
    spec, *expected = SPECS[name]
    races = []
    monkeypatch.setattr(versus, "race", lambda *given, **more: races.append(race(*given, **more)) or races[-1])
    ours, *others = quick(spec).rows
    assert (ours.peer, ours.status) == ("attngen", "ok") and ours.error <= 1 and ours.ratio is None
    for row, note in zip(others, expected, strict=True):
        if note is None:
            assert row.status == "not available" and row.peer in row.note and row.timing is None
        else:
            assert (row.status, row.note) == ("ok", row.note) and note in row.note
            assert row.error <= 1 and row.ratio == races[0].ratio(row.peer, "attngen") > 0


@pytest.mark.parametrize("name", ["causal", "alibi", "heads differ", "sinks"])
def test_gradients(name):
    spec, sdpa, _ = SPECS[name]
    ours, dense, flex = quick(spec, direction="backward").rows
    assert ours.status == "ok" and ours.error <= 1
    assert dense.status == ("not available" if sdpa is None else "ok")
    assert flex.note == "FlexAttention has no backward on a CPU"


def test_half_types_and_decoding():
    found = quick(
        ag.Spec(mask=ag.causal()), Shape.of("B1 Hq4 Hkv2 Nq1 Nk70 D16"), dtype=torch.float16, peers=("attngen", "SDPA")
    )
    assert [row.status for row in found.rows] == ["ok", "ok"] and found.rows[1].note == "every pair attends: no mask"


def test_sinks_by_an_lse():
    spec = ag.Spec(mask=ag.causal(), sink=ag.sink("sinks"))
    q, k, v = (torch.randn(1, 4, 30, 16, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = ag.oracle(ag.Spec(mask=ag.causal()), q, k, v)
    value = evaluate(spec.sink, {"sinks": sinks, "h": torch.arange(4).view(1, -1, 1, 1)})
    torch.testing.assert_close(peers.with_sinks(out, lse, value), ag.oracle(spec, q, k, v, sinks=sinks)[0])


def test_what_is_wrong_or_breaks_is_not_timed(monkeypatch):
    right = peers.PEERS["SDPA"]

    def wrong(problem, db):
        return peers.Built(lambda: right(problem, db).run() + 1e-2)

    def broken(problem, db):
        raise RuntimeError("no such kernel in /home/somebody/lib/kernels.so")

    monkeypatch.setattr(versus, "PEERS", {**peers.PEERS, "SDPA": wrong, "FlexAttention": broken})
    ours, sdpa, flex = quick(ag.Spec(mask=ag.causal())).rows
    assert ours.status == "ok" and ours.timing is not None
    assert sdpa.status == "wrong" and sdpa.error > 1 and sdpa.timing is None and "times what is allowed" in sdpa.note
    assert flex.status == "failed" and flex.note == "RuntimeError: no such kernel in kernels.so"


def test_heads_that_are_numbered_are_checked_by_their_own_numbers():
    """The oracle of the last heads alone would count them from 0."""
    spec = SPECS["heads differ"][0]
    problem, _ = versus._problem(spec, SHAPE, torch.float32, torch.device("cpu"), None, False, 0)
    reference, out = Reference(problem), ag.compile(spec)(problem.q, problem.k, problem.v)
    assert reference.error(out, {}) <= 1
    with pytest.raises(WrongResult):
        reference.error(out + 0.01, {})


def test_json_and_chart(tmp_path):
    found = quick(ag.Spec(mask=ag.causal()), peers=("attngen", "SDPA"))
    read = json.loads(json.dumps(found.as_dict()))
    assert read["shape"] == str(SHAPE) and [row["peer"] for row in read["rows"]] == ["attngen", "SDPA"]
    assert read["rows"][1]["timing"]["runs"] >= 5 and read["made_up"] == []
    assert chart([found, found], tmp_path / "times.png") and (tmp_path / "times.png").stat().st_size > 1000
    nothing = quick(ag.Spec(mask=ag.causal()), peers=())
    assert not chart([nothing], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    assert quick(SPECS["window of a param"][0], peers=("attngen",)).made_up == ("width",)


@pytest.mark.parametrize(
    "spec",
    [ag.Spec(keys=ag.qk_sparse()), ag.Spec(keys=ag.paged(16)), ag.Spec(dropout=0.1)],
    ids=["keys", "paged", "dropout"],
)
def test_what_has_no_peer_is_refused(spec):
    with pytest.raises(
        ag.InputError, match="spec: expected a mask and a score, which SDPA or FlexAttention can compute"
    ):
        quick(spec)


def test_bad_arguments():
    with pytest.raises(ag.InputError, match="direction"):
        quick(ag.Spec(), direction="sideways")
    with pytest.raises(ag.InputError, match="width"):
        quick(ag.Spec(), captures={"width": 3})


@pytest.mark.slow
def test_compiled_flex_attention(monkeypatch, eager):
    monkeypatch.setattr(torch, "compile", eager)
    spec = ag.Spec(mask=ag.causal() & ag.documents(DOC), score=ag.soft_cap(20.0))
    row = quick(spec, peers=("attngen", "FlexAttention")).rows[1]
    assert row.status == "ok" and row.error <= 1 and row.ratio > 0

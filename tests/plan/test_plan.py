"""Plans: steps in an order that respects their buffers, each buffer kept as long as it is read."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import networkx
import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.language.schedule import Tile
from attngen.plan.backward import backward_plan, saved_by
from attngen.plan.forward import forward_plan
from attngen.plan.launches import backward_launches, every_backward_launch
from attngen.plan.plan import Plan, Sizes
from attngen.plan.steps import DELTA, DLSE, DO, LSE, OUT, Step
from tests.keys_work import CASES, case

SIZES = Sizes(1, 4, 2, 96, 96, 16, 16)
KINDS = {"Prepare", "Take", "Attend", "Merge", "Put", "CaptureGradient"}


def names(plan: Plan) -> list[str]:
    return [step.name for step in plan.steps]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_forward_and_backward_of_documents(backend: str):
    spec = ag.Spec(mask=ag.documents() & ag.causal(), score=ag.alibi())
    forward = forward_plan(spec, None, SIZES, backend)
    assert names(forward) == ["tables of attention (forward)", "attention"]
    backward = backward_plan(forward, frozenset({"q", "k", "v", "slope"}), backend)
    found = names(backward)
    assert found.index("delta") < found.index("attention, backward")
    assert [name for name in found if name.startswith("tables")] == [
        f"tables of attention ({kernel})" for kernel in (("dq",) if backend == "cpu" else ("dq", "dkv"))
    ]
    assert backward.results == ("d k", "d q", "d slope", "d v")
    assert DELTA in backward.released["attention, backward"]
    assert networkx.is_directed_acyclic_graph(backward.graph)
    assert backward.graph.get_edge_data("delta", "attention, backward")[0]["buffer"] == DELTA


LEARNED = ag.Spec(
    mask=ag.documents() & ag.causal(),
    score="s + slope[h] * (j - i) + pad[b, j] + table[h, min(i - j, 31)] + bias[h, i, j] + same[i, j]",
    tensors=[
        *(ag.Tensor(name, ndim) for name, ndim in (("slope", 1), ("pad", 2), ("table", 2), ("bias", 3), ("same", 2)))
    ],
)
DECIDED = ag.Schedule(**{p: Tile(64, 32, 4, 2) for p in ("forward", "dq", "dkv")})


def launched(wanted: Iterable[str], batch: int, heads: int, **decided: Any) -> list[str]:
    schedule = ag.Schedule(**decided).over(DECIDED)
    return list(map(str, backward_launches(facts(LEARNED), None, torch.bfloat16, schedule, wanted, batch, heads)))


def test_gradients_of_captured_tensors_are_added_up_where_their_pairs_are():
    assert launched((), 2, 4) == ["dq", "dkv"]
    assert launched(["slope"], 2, 4) == ["dq + slope", "dkv"]
    assert launched(["pad"], 2, 4) == ["dq", "dkv + pad"]
    # Two of five: another variant of dq for every such set would be many.
    assert launched(["table", "slope"], 2, 4) == ["dq + slope", "dkv", "gradient of table"]
    every = LEARNED.tensors.keys() - {"doc"}
    assert launched(every, 2, 4) == ["dq + bias, slope, table", "dkv + pad", "gradient of same"]
    assert launched(every, 1, 1) == ["dq + bias, same, slope, table", "dkv + pad"]
    assert launched(every, 2, 1, dq_persistent=1) == [
        "dq + slope, table", "dkv + pad", "gradient of bias", "gradient of same"
    ]  # fmt: skip


def test_a_backward_finds_what_a_large_lse_lacks_only_where_the_forward_did_not_leave_it():
    known = facts(LEARNED), None, torch.bfloat16, DECIDED
    assert [str(x) for x in backward_launches(*known)] == ["dq", "dkv"]
    assert [str(x) for x in backward_launches(*known, kept=False)] == ["excess", "dq", "dkv"]


def test_a_pack_has_every_kernel_that_some_call_launches():
    known, dtype = facts(LEARNED), torch.bfloat16
    every = {*every_backward_launch(known, None, dtype, DECIDED)}
    names = ("slope", "pad", "table", "bias", "same")
    for wanted in (chosen for count in range(6) for chosen in combinations(names, count)):
        for batch, heads, offsets in product((1, 5), (1, 3), (False, True)):
            assert {*backward_launches(known, None, dtype, DECIDED, wanted, batch, heads, offsets)} <= every


def test_closed_forms_need_no_tables():
    spec = ag.Spec(mask=ag.causal() & ag.window(ag.Param("w")))
    plan = forward_plan(spec, None, SIZES, "triton")
    assert names(plan) == ["attention"] and plan.preparation == () and plan.inputs == ("q", "k", "v")


def test_steps_are_sorted_and_results_are_kept():
    late = Step("late", ("x",), ("y",))
    early = Step("early", ("input",), ("x",))
    idle = Step("idle", ("input",), ("nobody reads it",))
    plan = Plan.ordered(ag.Spec(), None, [late, early, idle], ["y"])
    assert names(plan) == ["early", "late"]
    assert plan.released == {"early": (), "late": ("x",)}
    with pytest.raises(ValueError, match="two steps of one name"):
        Plan.ordered(ag.Spec(), None, [early, early, late], ["y"])


@pytest.mark.parametrize("name", CASES)
def test_every_key_set_is_a_plan_of_six_kinds_of_step(name: str):
    """Forward and backward: buffers are written before they are read, and released after; the text names every step."""
    size = (1, 2, 2, 96, 96, 0)
    keys, captures = case(name, size)
    q, k, v = (torch.randn(1, heads, 96, 16).requires_grad_() for heads in (4, 2, 2))
    attn = ag.compile(ag.Spec(keys=keys))
    call, given, executable = attn.checked(q, k, v, 0, captures)
    forward = executable.forward_plan
    backward = executable.backward_plan(frozenset({"q", "k", "v"}))
    saved = saved_by(forward, backward)
    there = {"q", "k", "v", *call.captures, *given}
    for plan, inputs in ((forward, there), (backward, {*there, *saved, *forward.prepared, OUT, LSE, DO, DLSE})):
        assert {step.kind for step in plan.steps} <= KINDS
        assert networkx.is_directed_acyclic_graph(plan.graph)
        alive: set[Any] = {*inputs}
        for step in plan.steps:
            assert {*step.reads} <= alive, step
            alive |= {*step.writes}
            alive -= {*plan.released[step.name]} - {*plan.results}
        assert {*plan.results} <= alive
        assert all(step.name in str(plan) for step in plan.steps)
    assert forward.attends and len(backward.attends) == len(forward.attends)

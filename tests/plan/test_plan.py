"""Plans: launches in an order that respects their buffers, each buffer kept as long as it is read."""

from __future__ import annotations

import networkx

import attngen as ag
from attngen.analysis import facts
from attngen.plan.plan import Plan, Step, backward_plan, forward_plan


def test_forward_and_backward_of_documents():
    spec = ag.Spec(mask=ag.documents() & ag.causal(), score=ag.alibi())
    known = facts(spec)
    assert [s.name for s in forward_plan(spec, known).steps] == ["tables of forward", "forward"]
    plan = backward_plan(spec, known, ["slope"])
    names = [s.name for s in plan.steps]
    assert names.index("delta") < names.index("dq") < names.index("gradient of slope")
    assert plan.results == ("dq", "dk", "dv", "d slope")
    assert plan.released[names[-1]] and "delta" in plan.released[names[-1]]
    assert networkx.is_directed_acyclic_graph(plan.graph)
    assert plan.graph.edges["delta", "dq"]["buffer"] == "delta"


def test_closed_forms_need_no_tables():
    spec = ag.Spec(mask=ag.causal() & ag.window(ag.Param("w")))
    assert [s.kind for s in forward_plan(spec, facts(spec)).steps] == ["kernel"]


def test_steps_are_sorted_and_results_are_kept():
    late = Step("late", "kernel", ("x",), ("y",))
    early = Step("early", "kernel", ("input",), ("x",))
    plan = Plan.ordered([late, early], ["y"])
    assert [s.name for s in plan.steps] == ["early", "late"]
    assert plan.released == {"early": (), "late": ("x",)}

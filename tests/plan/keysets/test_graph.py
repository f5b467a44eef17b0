"""Graphs and rows of indices: lists against their definitions, and the generated kernels on a few small ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attngen as ag
from attngen.language.call import bind
from attngen.language.listed_pairs import as_log_weight
from attngen.plan.forward import split
from attngen.plan.keysets.graph import list_edges
from attngen.reference.keysets import DEFINITIONS
from tests.keys_cases import MASKS, SIZES, compare, inputs

KINDS = {"shared": 0, "batch": 1, "kv": 2, "query": 3}


def lead_of(kind: str, size: tuple[int, ...]) -> tuple[int, ...]:
    batch, heads, group = size[:3]
    return [(), (batch,), (batch, heads), (batch, heads * group)][KINDS[kind]]


def csr(lead: tuple[int, ...], n_q: int, n_k: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of degree 0, 1, 5, and one that lists everything twice; col padded with nonsense."""
    generator = torch.Generator().manual_seed(seed)
    degree = torch.tensor([0, 1, 5])[torch.randint(0, 3, (*lead, n_q), generator=generator)]
    degree[..., n_q // 2] = 2 * n_k
    crow = torch.nn.functional.pad(degree.cumsum(-1), (1, 0))
    size = int(crow.max()) + 3
    col = torch.randint(0, n_k, (*lead, size), generator=generator)
    col = torch.where(torch.arange(size) < crow[..., -1:], col, 10**6)
    return dict(crow=crow.to(torch.int32), col=col)


def lists_agree(spec: ag.Spec, q: Any, k: Any, v: Any, captures: dict[str, Any], offset: int = 0) -> None:
    """The lists of both directions say what the definition says."""
    call, own = split(spec, q, k, v, offset, captures)
    plan = list_edges(spec, call, own)
    want = DEFINITIONS[spec.keys.name](spec.keys, call, own)[0].exp()
    names = ("query_edges", "query_runs", "key_edges", "key_runs")
    inner = ag.Spec(lists="rows()" if not plan.get("by_query_head") else "rows(by_query_head)")
    lists = {name: plan[name] for name in names}
    got = as_log_weight(bind(inner, q, k, v, captures=lists)).exp()
    torch.testing.assert_close(got.expand(*q.shape[:2], -1, -1), want.expand(*q.shape[:2], -1, -1))
    turned = {"query_edges": plan["key_edges"], "query_runs": plan["key_runs"]}
    turned |= {"key_edges": plan["query_edges"], "key_runs": plan["query_runs"]}
    back = as_log_weight(
        bind(inner, k.repeat_interleave(call.group, 1), q[:, :: call.group], q[:, :: call.group], captures=turned)
    )
    torch.testing.assert_close(back.exp().mT.expand(*q.shape[:2], -1, -1), want.expand(*q.shape[:2], -1, -1))
    rows = plan["query_edges"].expand(*plan["key_places"].shape[:2], -1).long().gather(-1, plan["key_places"].long())
    total = plan["key_runs"][..., 1].sum(-1)
    for at in torch.cartesian_prod(torch.arange(rows.shape[0]), torch.arange(rows.shape[1])).tolist():
        own = rows[at[0], at[1], : int(total[at[0], at[1]])]
        assert bool((own.diff() >= 0).all())  # the places of key_edges in query_edges are those of ascending keys


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_lists(size: tuple[int, ...], kind: str):
    lists_agree(ag.Spec(keys=ag.graph()), *inputs(size), csr(lead_of(kind, size), *size[3:5]), size[5])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["none", "window"])
def test_graph(mask: str, kind: str, size: tuple[int, ...]):
    spec = ag.Spec(keys=ag.graph(), mask=MASKS[mask])
    compare(spec, size, csr(lead_of(kind, size), *size[3:5]))


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize("kind", KINDS)
def test_edges_that_positions_rule_out(kind: str, backend: str):
    """Offsets of their own per batch: even lists that all share differ then. On a GPU the lists are as long as they were."""
    small = backend == "interpret"
    size = (2, 1, 2, 11, 13, torch.tensor([2, 7])) if small else (2, 1, 2, 45, 131, torch.tensor([86, 20]))
    mask: Any = lambda b, h, i, j: (i >= j) & (i - j < 40) & (j != 3) & (i % 5 != h)  # noqa: E731
    compare(ag.Spec(keys=ag.graph(), mask=mask), size, csr(lead_of(kind, size), *size[3:5]), backend=backend)
    if not small:
        compare(ag.Spec(keys=ag.gather(), mask=mask), size, by_row(size, 2, 7, True))


@pytest.mark.parametrize("size", [(1, 1, 1, 0, 9, 0), (1, 1, 1, 9, 0, 0), (2, 1, 1, 9, 9, 0), (0, 1, 1, 9, 9, 0)])
def test_no_edge_under_a_mask(size: tuple[int, ...]):
    crow, col = torch.zeros(size[3] + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    compare(ag.Spec(keys=ag.graph(), mask=ag.causal()), size, dict(crow=crow, col=col))
    if size[4]:
        index = torch.full((size[0], 1, size[3], 2), -1)
        compare(ag.Spec(keys=ag.gather(), mask=ag.causal()), size, dict(index=index))


def test_learned_scores_and_sinks():
    size = (2, 1, 2, 45, 51, 6)
    captures = csr((2, 1), 45, 51) | dict(bias=torch.randn(2, 45 + 6, 51), sink=torch.randn(2))
    score = [ag.soft_cap(5.0), ag.bias("hij")]
    compare(ag.Spec(keys=ag.graph(), mask=MASKS["causal"], score=score, sink=ag.sink()), size, captures)


@pytest.mark.parametrize("kind", ["shared", pytest.param("query", marks=pytest.mark.slow)])
def test_kernels(kind: str):
    size = (2, 1, 2, 19, 21, 2)
    spec = ag.Spec(keys=ag.graph(), mask=MASKS["causal"], score=ag.soft_cap(5.0))
    compare(spec, size, csr(lead_of(kind, size), 19, 21), backend="interpret")


def by_row(size: tuple[int, ...], heads: int, count: int, weighted: bool) -> dict[str, Any]:
    """An index with repetitions, missing ones, and a row without any."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-1, size[4], (size[0], heads, size[3], count), generator=generator)
    index[:, :, size[3] // 3] = -1
    return dict(index=index) | (dict(log_weight=torch.randn(index.shape, generator=generator)) if weighted else {})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal"])
def test_gather_by_row(mask: str, per_query_head: bool, weighted: bool, size: tuple[int, ...]):
    heads = size[1] * (size[2] if per_query_head else 1)
    spec = ag.Spec(keys=ag.gather(), mask=MASKS[mask])
    compare(spec, size, by_row(size, heads, 7, weighted))


@pytest.mark.parametrize("weighted, heads", [(True, 1), pytest.param(False, 2, marks=pytest.mark.slow)])
def test_gather_by_row_kernels(weighted: bool, heads: int):
    size = (2, 1, 2, 19, 21, 2)
    spec = ag.Spec(keys=ag.gather(), mask=MASKS["causal"])
    compare(spec, size, by_row(size, heads, 4, weighted), backend="interpret")


@given(st.data())
@settings(max_examples=25)
def test_random_graphs(data: st.DataObject):
    size = tuple(data.draw(st.integers(*ends)) for ends in ((1, 2), (1, 2), (1, 2), (1, 12), (1, 12), (0, 5)))
    lead = lead_of(data.draw(st.sampled_from(list(KINDS))), size)
    rows, most = math.prod(lead) * size[3], data.draw(st.sampled_from([0, 1, 3, 9]))
    degrees = data.draw(st.lists(st.integers(0, most), min_size=rows, max_size=rows))
    crow = torch.nn.functional.pad(torch.tensor(degrees).view(*lead, -1).cumsum(-1), (1, 0))
    length = int(crow.max()) + data.draw(st.integers(0, 2))
    keys = st.lists(st.integers(0, size[4] - 1), min_size=length, max_size=length)
    col = torch.tensor([data.draw(keys) for _ in range(math.prod(lead))], dtype=torch.int64).view(*lead, length)
    spec = ag.Spec(keys=ag.graph(), mask=MASKS[data.draw(st.sampled_from(["none", "causal", "strict"]))])
    compare(spec, size, dict(crow=crow, col=col))


# -- lists of the backward --------------------------------------------------------------------------------------------


def lists_given(attn: Any, q: Any, k: Any, v: Any, **captures: Any) -> dict[str, torch.Tensor]:
    """The captures that the call's only piece ran with."""
    ((_, call),) = attn.attends(q, k, v, **captures)
    return call.captures


@pytest.mark.parametrize("keys", ["graph", "gather", "block_sparse"])
def test_without_a_backward_nobody_lists_queries_by_key(keys: str):
    size = (1, 1, 2, 33, 33, 0)
    q, k, v = inputs(size)
    captures: dict[str, Any] = {
        "graph": csr((), 33, 33),
        "gather": by_row(size, 2, 4, True),
        "block_sparse": dict(layout=torch.ones(1, 1, 3, 3, dtype=torch.bool)),
    }[keys]
    attn = ag.compile(ag.Spec(keys=getattr(ag, keys)(*([(16, 16)] if keys == "block_sparse" else []))))
    names = ("key_tiles", "key_runs") if keys == "block_sparse" else ("key_edges", "key_runs")
    learned = [dict(q=q.clone().requires_grad_())]
    learned += [dict(log_weight=captures["log_weight"].clone().requires_grad_())] if keys == "gather" else []
    ran = lists_given(attn, q, k, v, **captures)
    assert all(ran[name].numel() == 0 for name in names)
    for change in learned:
        asked: dict[str, Any] = dict(q=q, k=k, v=v, **captures) | change
        ran = lists_given(attn, **asked)
        assert all(ran[name].numel() > 0 for name in names)
        with torch.no_grad():
            assert all(lists_given(attn, **asked)[name].numel() == 0 for name in names)
    with torch.no_grad():
        plan = attn.plan(q, k, v, **captures)  # is for every call
    assert all(plan.values[name].numel() > 0 for name in names)


# -- networkx and bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directed", [False, True])
def test_networkx(directed: bool):
    nx = pytest.importorskip("networkx")
    graph = (nx.DiGraph if directed else nx.Graph)([(0, 1), (1, 1), (4, 2)])
    q, k, v = inputs((1, 1, 1, 6, 6, 0))
    attn = ag.compile(ag.Spec(keys=ag.graph()))
    plan = attn.plan(q, k, v, graph=graph).values
    back = [] if directed else [(1, 0), (2, 4)]
    pairs = sorted([(0, 1), (1, 1), (4, 2), *back])
    assert plan["query_edges"].flatten().tolist() == [v for _, v in pairs]
    assert plan["query_runs"][0, 0, :, 1].tolist() == [sum(u == row for u, _ in pairs) for row in range(6)]
    with pytest.raises(ag.InputError, match="edge"):
        attn.plan(q[:, :, :4], k, v, graph=nx.Graph([(0, 5)]))
    numpy = pytest.importorskip("numpy")
    own = (nx.DiGraph if directed else nx.Graph)(
        [(numpy.int64(u), numpy.int32(v)) for u, v in [(0, 1), (1, 1), (4, 2)]]
    )
    same = attn.plan(q, k, v, graph=own).values
    assert torch.equal(same["query_edges"], plan["query_edges"]) and torch.equal(same["query_runs"], plan["query_runs"])
    for node in (True, numpy.bool_(True), 1.0, "1", -1, numpy.int64(6)):
        with pytest.raises(ag.InputError, match=r"graph: expected nodes that are ints in 0 \.\. 5, got"):
            attn.plan(q, k, v, graph=nx.Graph([(0, node)]))


BAD = [
    (dict(crow=[1, 1, 2, 3]), "crow"),
    (dict(crow=[0, 2, 1, 3]), "crow"),
    (dict(crow=[0, 1, 2, 4]), "crow"),
    (dict(crow=[0, 1, 3]), "crow"),
    (dict(col=[0, 5, 1]), "col"),
    (dict(col=[0, -1, 1]), "col"),
    (dict(crow=None), "crow"),
    (dict(graph=3), "graph"),
]


@pytest.mark.parametrize("change, name", BAD)
def test_bad_input(change: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch):
    q, k, v = inputs((1, 1, 1, 3, 5, 0))
    wrong: dict[str, Any] = dict(crow=[0, 1, 2, 3], col=[0, 4, 1]) | change
    captures = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in wrong.items()}
    attn = ag.compile(ag.Spec(keys=ag.graph()))
    with pytest.raises(ag.InputError) as error:
        attn.plan(q, k, v, **captures)
    assert error.value.args and name in str(error.value)
    if (name == "crow" and captures["crow"] is not None and len(captures["crow"]) == 4) or name == "col":
        monkeypatch.setenv("ATTNGEN_CHECK", "0")  # nothing is read outside all the same
        plan = attn.plan(q, k, v, **captures).values
        runs = plan["query_runs"]
        assert bool((plan["query_edges"] >= 0).all() and (plan["query_edges"] < 5).all())
        assert bool((runs >= 0).all() and (runs.sum(-1) <= 3).all())


def test_one_of_the_two_lists_alone():
    q, k, v = inputs((1, 1, 1, 3, 5, 0))
    attn, lists = ag.compile(ag.Spec(keys=ag.graph())), torch.tensor([0, 0, 0, 0])
    for captures, message in (
        (dict(crow=lists), r"col: expected crow= and col=, or graph=, got crow= alone; pass col="),
        (dict(col=lists), r"crow: expected crow= and col=, or graph=, got col= alone; pass crow="),
        ({}, r"crow: expected crow= and col=, or graph=, got nothing; pass crow="),
        (dict(crow=lists, col=lists, graph=3), "graph: expected either graph= or crow= and col=, got both"),
    ):
        with pytest.raises(ag.InputError, match=message):
            attn(q, k, v, **captures)


def test_too_many_edges_for_int32():
    q, k, v = inputs((1, 1, 1, 3, 5, 0))
    col = torch.zeros(1, dtype=torch.int32).expand(2**31)
    with pytest.raises(ag.InputError, match="int64"):
        ag.compile(ag.Spec(keys=ag.graph())).plan(q, k, v, crow=torch.zeros(4, dtype=torch.int32), col=col)


def test_a_graph_can_be_drawn() -> None:
    from typer.testing import CliRunner

    from attngen.cli.main import app

    shown = CliRunner().invoke(app, ["show", "mask: i >= j; keys: graph()", "-n", "64"])
    assert shown.exit_code == 0 and "6 edges a row" in shown.output

"""Graphs and rows of indices: lists against their definitions, and the generated kernels on a few small ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.inputs import bind
from attngen.keys.dense import DEFINITIONS
from attngen.lists import as_log_weight
from tests.check import check
from tests.keys_cases import MASKS, SIZES, inputs


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
    attn = ag.compile(spec)
    plan = attn.plan(q, k, v, q_offset=offset, **captures).values
    call, given = ag.keys.call.split(spec, q, k, v, offset, captures)
    want = DEFINITIONS[spec.keys.name](spec.keys, call, given)[0].exp()
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
@pytest.mark.parametrize("kind", ["shared", "batch", "kv", "query"])
def test_lists(size: tuple[int, ...], kind: str):
    batch, heads, group, n_q, n_k, offset = size
    lead = {"shared": (), "batch": (batch,), "kv": (batch, heads), "query": (batch, heads * group)}[kind]
    lists_agree(ag.Spec(keys=ag.graph()), *inputs(size), csr(lead, n_q, n_k), offset)


@pytest.mark.parametrize("kind", ["shared", "query"])
def test_kernels(kind: str):
    size = (2, 1, 2, 19, 21, 2)
    lead = {"shared": (), "query": (2, 2)}[kind]
    spec = ag.Spec(keys=ag.graph(), mask=MASKS["causal"], score=ag.soft_cap(5.0))
    check(spec, ag.compile(spec, backend="interpret"), *inputs(size), csr(lead, 19, 21), size[5])
    assert ag.Spec.from_text(str(spec)).key == spec.key


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_gather_by_row(weighted: bool, heads: int):
    index = torch.randint(-1, 21, (2, heads, 19, 4), generator=torch.Generator().manual_seed(1))
    index[:, :, 3] = -1
    captures: dict[str, Any] = dict(index=index)
    if weighted:
        captures["log_weight"] = torch.randn(index.shape)
    spec = ag.Spec(keys=ag.gather(), mask=MASKS["causal"])
    check(spec, ag.compile(spec, backend="interpret"), *inputs((2, 1, 2, 19, 21, 2)), captures, 2)


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
    given: dict[str, Any] = dict(crow=[0, 1, 2, 3], col=[0, 4, 1]) | change
    captures = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in given.items()}
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


def test_too_many_edges_for_int32():
    q, k, v = inputs((1, 1, 1, 3, 5, 0))
    col = torch.zeros(1, dtype=torch.int32).expand(2**31)
    with pytest.raises(ag.InputError, match="int64"):
        ag.compile(ag.Spec(keys=ag.graph())).plan(q, k, v, crow=torch.zeros(4, dtype=torch.int32), col=col)

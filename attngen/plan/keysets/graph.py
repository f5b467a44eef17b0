"""Attention along the edges of a graph (arXiv 2502.01659): each query row has a list of keys of its own, in CSR form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language import expression
from attngen.language.call import Call
from attngen.language.checks import check_dims, check_tensor, require
from attngen.language.keysets.listed import Graph
from attngen.language.lists import RowLists
from attngen.language.programs import evaluate, names_in, program_of
from attngen.plan.planner import FAMILIES, Family, Planner, inner_spec
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


LIMIT = 2**31


def plan_graph(keys: Graph, planner: Planner) -> Result:
    """The lists of rows in both directions, and one attention along them."""
    crow = dict(planner.sizes.given).get("crow", ())
    lists = RowLists(by_query_head=len(crow) == 3 and crow[1] not in (1, planner.sizes.heads_kv))
    make = partial(list_edges, planner.spec)
    found = planner.prepare("list edges", make, ("crow", "col"), lists.names)
    return attend_lists(planner, lists, found)


def list_edges(spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """query_edges, query_runs, and key_edges, key_runs, key_places, from checked crow and col; see `RowLists`."""
    n_k = call.k.shape[2]
    crow, col = read_csr(call, given)
    size = col.shape[-1]
    # Whatever came, no run reaches past the list and no edge past the keys: the checks may be turned off.
    crow = crow.long().clamp(0, size if n_k else 0).cummax(-1).values
    place = row = torch.arange(size, device=col.device).expand_as(col)
    edges, told = col.clamp(0, max(n_k - 1, 0)), by_position(spec)
    if call.wants_grad or told is not None:
        row = torch.searchsorted(crow[..., 1:].contiguous(), place.contiguous(), right=True)
    if told is not None:
        seen = evaluate(told, {"i": row + call.offset_column, "j": edges})
        crow, row, edges = _thinned(crow, row, edges, seen, call.waits)
        place = place[..., : edges.shape[-1]]
    runs = torch.stack([crow[..., :-1], crow.diff(dim=-1)], -1).to(word_for(size))
    lists = {"query_edges": edges.to(torch.int32), "query_runs": runs}
    return lists | transposed(torch.where(place < crow[..., -1:], edges, n_k), row, n_k, call.wants_grad)


def attend_lists(planner: Planner, lists: RowLists, captures: Mapping[str, str]) -> Result:
    """The whole call along its rows' lists, under the spec's own mask and score."""

    def build() -> dict[str, Any]:
        return {"mask": planner.mask, "score": planner.score, "lists": lists}

    return planner.attend("edges", lists, build, "q", "k", "v", captures, offset=True)


def by_position(spec: Spec) -> Any:
    """Those conditions of the mask that read nothing but the positions i and j, None if it has none: what they rule out need
    not be listed. The others hold when a list is walked, so that a plan is for any values that they read.
    """

    def build() -> dict[str, Any]:
        parts = spec.mask.args if type(spec.mask).__name__ == "And" else (spec.mask,)
        own = {expression.I, expression.J}
        told = expression.conjunction([part for part in parts if part.free_symbols <= own])
        return {"mask": expression.Expr(told), "scale": None}

    told = program_of(inner_spec(spec, "by position", build).mask)
    return told if names_in(told) else None


def _thinned(
    crow: torch.Tensor, row: torch.Tensor, edges: torch.Tensor, seen: torch.Tensor, waits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row offsets, rows and edges without those that are not `seen` [B', H', E], in the same order. Nobody waits to know how
    many are left: on a GPU the lists stay as long as they were.
    """
    size, shape = edges.shape[-1], seen.shape
    total = torch.nn.functional.pad(seen.cumsum(-1), (1, 0))
    crow = total.gather(-1, crow.expand(*shape[:2], -1))
    place = torch.where(seen, total[..., :-1], size)
    left = int(crow[..., -1].max()) if waits and crow.numel() else size

    def moved(x: torch.Tensor) -> torch.Tensor:
        longer = x.new_zeros((*shape[:2], size + 1))  # the last place takes what goes
        return longer.scatter_(-1, place, x.expand(shape))[..., :left]

    return crow, moved(row), moved(edges)


def transposed(key: torch.Tensor, row: torch.Tensor, n_k: int, wanted: bool = True) -> dict[str, torch.Tensor]:
    """key_edges, key_runs and key_places of listed pairs: `key` int [B', H', E], n_k for an element that counts for nothing,
    `row` the query row of each. One stable sort: the rows of a key ascend. Empty tensors where they are not `wanted`.
    """
    if not wanted:
        nothing = torch.zeros((1, 1, 0), dtype=torch.int32, device=key.device)
        return {"key_edges": nothing, "key_runs": nothing.new_zeros((1, 1, 0, 2)), "key_places": nothing}
    ordered, place = key.sort(dim=-1, stable=True)
    bounds = torch.arange(n_k + 1, dtype=key.dtype, device=key.device).expand(*key.shape[:2], -1)
    first = torch.searchsorted(ordered, bounds.contiguous())
    word = word_for(key.shape[-1])
    return {
        "key_edges": row.gather(-1, place).to(torch.int32),
        "key_runs": torch.stack([first[..., :-1], first.diff(dim=-1)], -1).to(word),
        "key_places": place.to(word),
    }


def word_for(size: int) -> torch.dtype:
    """The integer that counts up to `size`."""
    return torch.int32 if size < LIMIT else torch.int64


# -- what comes at the call -------------------------------------------------------------------------------------------


def read_csr(call: Call, given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """crow [B', H', Nq + 1] and col [B', H', E] of a call, checked. InputError."""
    crow, col = given.get("crow"), given.get("col")
    for name, own, other in (("crow", crow, col), ("col", col, crow)):
        if own is None:
            got = "nothing" if other is None else f"{'col' if name == 'crow' else 'crow'}= alone"
            raise InputError(name, "crow= and col=, or graph=", got, f"pass {name}=... at the call")
    crow = check_dims("crow", crow, (1, 2, 3), "int [Nq + 1], [B, Nq + 1] or [B, H, Nq + 1]")
    (batch, heads, n_q, _), device = call.q.shape, call.q.device
    kinds = (heads, call.k.shape[1], 1)
    own = crow.shape[1] if crow.dim() == 3 and crow.shape[1] in kinds else call.k.shape[1]
    lead = (batch, own)[: crow.dim() - 1]
    dims = ("", "B, ", "B, H, ")[crow.dim() - 1]
    crow = check_tensor("crow", crow, "int", (*lead, n_q + 1), f"[{dims}Nq + 1]", device)
    size = col.shape[-1] if isinstance(col, torch.Tensor) and col.dim() else 0
    col = check_tensor("col", col, "int", (*lead, size), f"[{dims}E]", device)
    if size >= LIMIT and crow.dtype == torch.int32:
        raise InputError("crow", f"int64, to count {size} edges", "int32")
    crow, col = (
        t.view((1, 1, -1) if t.dim() == 1 else (batch, 1, -1) if t.dim() == 2 else t.shape) for t in (crow, col)
    )
    require("crow", crow[..., :1] == 0, "0 at the start of each row offset list", crow[..., :1])
    require("crow", crow.diff(dim=-1) >= 0, "row offsets that do not fall", crow[..., 1:])
    require("crow", crow[..., -1:] <= size, f"at most col's length {size} as the last row offset", crow[..., -1:])
    listed = torch.arange(size, device=device) < crow[..., -1:]
    n_k = call.k.shape[2]
    require("col", ~listed | ((col >= 0) & (col < n_k)), f"rows of k in 0 .. {n_k - 1}", col)
    return crow, col


def read_graph(keys: Graph, given: Mapping[str, Any], q: Any, k: Any) -> dict[str, Any]:
    """crow= and col=, or those of graph=. InputError."""
    graph, found = given.get("graph"), {name: given[name] for name in ("crow", "col") if given.get(name) is not None}
    if graph is None:
        return found
    if found:
        raise InputError("graph", "either graph= or crow= and col=", "both")
    crow, col = from_networkx(graph, q.shape[2], k.shape[2], q.device)
    return {"crow": crow, "col": col}


def from_networkx(graph: Any, n_q: int, n_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """CSR of a networkx graph: edge u-v lets query u see key v, and where the graph is undirected also v see u. InputError."""
    if not (hasattr(graph, "edges") and hasattr(graph, "is_directed")):
        raise InputError("graph", "a networkx graph with nodes 0 .. N - 1", type(graph).__name__)
    for node in graph.nodes():  # numpy's integers are integers too
        if isinstance(node, bool) or not isinstance(node, Integral) or not 0 <= int(node) < max(n_q, n_k):
            raise InputError("graph", f"nodes that are ints in 0 .. {max(n_q, n_k) - 1}", repr(node)[:80])
    pairs = [(int(edge[0]), int(edge[1])) for edge in graph.edges()]
    if not graph.is_directed():
        pairs += [(v, u) for u, v in pairs if u != v]
    for u, v in pairs:
        if u >= n_q or v >= n_k:
            raise InputError("graph", f"edges from queries 0 .. {n_q - 1} to keys 0 .. {n_k - 1}", f"edge {(u, v)}")
    table = torch.tensor(sorted(pairs), dtype=torch.int64).view(-1, 2)
    crow = torch.zeros(n_q + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(table[:, 0], minlength=n_q).cumsum(0)
    return crow.to(device), table[:, 1].contiguous().to(device)


FAMILIES[Graph] = Family(plan_graph, read=read_graph)

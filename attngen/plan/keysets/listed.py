"""Keys given as a list per head: codebooks, and rows chosen by whoever calls."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attngen.errors import InputError
from attngen.language.call import Call
from attngen.language.checks import check_dims, check_range, check_tensor, require
from attngen.language.keysets.listed import Codebook, Gather
from attngen.language.lists import RowLists
from attngen.language.programs import evaluate
from attngen.plan.keysets.graph import attend_lists, by_position, transposed, word_for
from attngen.plan.keysets.permuted import to_query_heads
from attngen.plan.moves import Rows, shared_rows
from attngen.plan.planner import FAMILIES, Family, Planner
from attngen.plan.steps import Result

if TYPE_CHECKING:
    from attngen.language.spec import Spec


# -- codebooks --------------------------------------------------------------------------------------------------------


def plan_codebook(keys: Codebook, planner: Planner) -> Result:
    """One attention, whose logits gain the logarithm of each codeword's count."""
    log_count, counted = planner.derive("logarithms of counts", _log_counts, ("count",), ("log_count", "counted"))

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, h, j

        logs, there = planner.tensor("log_count", 3, None), planner.tensor("counted", 3, torch.bool)
        return {"mask": planner.mask & there[b, h, j], "score": planner.score + logs[b, h, j]}

    captures = {"log_count": log_count, "counted": counted}
    return planner.attend("codewords", "codewords", build, "q", "k", "v", captures, offset=True)


def _log_counts(call: Call, count: Any) -> tuple[torch.Tensor, ...]:
    kind = "float" if isinstance(count, torch.Tensor) and count.is_floating_point() else "int"
    count = check_tensor("count", count, kind, tuple(call.k.shape[:3]), "[B, Hkv, Nk]", call.q.device)
    require("count", (count >= 0) & (count < torch.inf), "finite numbers of at least 0", count.detach())
    counted = count > 0
    real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    logs = torch.log(torch.where(counted, count, 1).to(real))
    return to_query_heads(logs, call), to_query_heads(counted, call)


# -- rows given at the call -------------------------------------------------------------------------------------------


def plan_gather(keys: Gather, planner: Planner) -> Result:
    """One list for all rows of a head: its keys gathered. A list for each row: an attention along the lists."""
    sizes = planner.sizes
    given = dict(sizes.given)
    index, weighted = given.get("index", ()), "log_weight" in given
    if len(index) == 4:
        return _plan_by_row(planner, index[1] == sizes.heads_q != sizes.heads_kv, weighted)
    names = ("q_position", "k_position", "length")
    found = planner.prepare("sort the index", partial(_sorted, planner.spec), ("index",), (*names, "order", "rows"))
    captures = {name: found[name] for name in names}
    if weighted:
        (weight,) = planner.derive("sort weights", _sorted_weights, ("log_weight", found["order"]), ("log_weight",))
        captures["log_weight"] = weight

    def build() -> dict[str, Any]:
        from attngen.language.moved import b, h, i, j, moved

        q_position, k_position = planner.tensor("q_position", 2), planner.tensor("k_position", 3)
        places = {"i": q_position[b, i], "j": k_position[b, h, j]}
        length = planner.tensor("length", 1)
        score = moved(planner.score, **places)
        if weighted:
            score = score + planner.tensor("log_weight", 3, None)[b, h, j]
        return {"mask": moved(planner.mask, **places) & (k_position[b, h, j] < length[b]), "score": score}

    k = planner.take("listed keys", "k", Rows(unique=False), found["rows"])
    v = planner.take("listed values", "v", Rows(unique=False), found["rows"])
    return planner.attend("listed", ("listed", weighted), build, "q", k, v, captures)


def _sorted(spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The index in ascending order, the missing ones last: then the walks of causal masks and windows end early."""
    index = check_dims("index", given.get("index"), (3, 4), "int [B, H, K] or [B, H, Nq, K], H of k or q")
    (batch, heads_q, n_q, _), n_k, device = call.q.shape, call.k.shape[2], call.q.device
    heads = heads_q if index.shape[1] == heads_q else call.k.shape[1]
    index = check_tensor("index", index, "int", (batch, heads, index.shape[2]), "[B, Hkv or Hq, K]", device)
    check_range("index", index, -1, n_k, "rows of k, or -1 for none")
    if n_k == 0:
        raise InputError("k", "at least one row, to gather from", f"shape {list(call.k.shape)}")
    position, order = torch.where(index < 0, n_k, index).sort(dim=-1, stable=True)
    offset = call.q_offset.view(-1, 1) if isinstance(call.q_offset, torch.Tensor) else call.q_offset
    return {
        "order": order,
        "k_position": (position if heads == heads_q else to_query_heads(position, call)).to(torch.int32),
        "rows": shared_rows(position.clamp(max=n_k - 1).long(), call.k.shape[1], n_k),
        "q_position": (torch.arange(n_q, device=device) + offset).expand(batch, -1).to(torch.int32),
        "length": torch.full((batch,), n_k, dtype=torch.int32, device=device),
    }


def _sorted_weights(call: Call, log_weight: Any, order: torch.Tensor) -> tuple[torch.Tensor]:
    weight = _weights(log_weight, call, order).gather(-1, order)
    return (weight if weight.shape[1] == call.q.shape[1] else to_query_heads(weight, call),)


def _plan_by_row(planner: Planner, by_query_head: bool, weighted: bool) -> Result:
    lists = RowLists(weighted=weighted, by_query_head=by_query_head)
    names = tuple(name for name in lists.names if name != "edge_weight")
    found = planner.prepare("list rows", partial(_by_row, planner.spec), ("index",), (*names, "order"))
    captures = {name: found[name] for name in names}
    if weighted:
        (weight,) = planner.derive("sort weights", _edge_weights, ("log_weight", found["order"]), ("edge_weight",))
        captures["edge_weight"] = weight
    return attend_lists(planner, lists, captures)


def _edge_weights(call: Call, log_weight: Any, order: torch.Tensor) -> tuple[torch.Tensor]:
    return (_weights(log_weight, call, order).gather(-1, order).flatten(2),)


def _by_row(spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of an index [B, H, Nq, K]."""
    index = given["index"]
    (batch, heads, n_q, _), n_k, count = call.q.shape, call.k.shape[2], index.shape[3]
    own = heads if index.shape[1] == heads else call.k.shape[1]
    check_tensor("index", index, "int", (batch, own, n_q, count), "[B, Hkv or Hq, Nq, K]", call.q.device)
    check_range("index", index, -1, n_k, "rows of k, or -1 for none")
    # The missing ones last in each row, what the mask rules out, and with the checks turned off whatever is no row of k.
    missing, told = (index < 0) | (index >= n_k), by_position(spec)
    if told is not None:
        row = torch.arange(n_q, device=index.device) + call.offset_column
        missing = missing | ~evaluate(told, {"i": row.unsqueeze(-1), "j": index})
    position, order = torch.where(missing, n_k, index).sort(dim=-1, stable=True)
    size, flat = n_q * count, position.flatten(2)
    first = (torch.arange(n_q, device=index.device) * count).expand(position.shape[:3])
    runs = torch.stack([first, (position < n_k).sum(-1)], -1).to(word_for(size))
    row = (torch.arange(size, device=index.device) // max(count, 1)).expand_as(flat)
    edges = flat.clamp(max=max(n_k - 1, 0)).to(torch.int32)
    back = transposed(flat, row, n_k, call.wants_grad)
    return {"query_edges": edges, "query_runs": runs, "order": order, **back}


def _weights(log_weight: Any, call: Call, index: torch.Tensor) -> torch.Tensor:
    """log_weight, checked: one for each element of index, -inf for one that is not there."""
    shape, device = tuple(index.shape), call.q.device
    log_weight = check_tensor("log_weight", log_weight, "float", shape, "like index", device)
    require("log_weight", log_weight < torch.inf, "finite numbers, or -inf for none", log_weight.detach())
    return log_weight


FAMILIES[Codebook] = Family(plan_codebook)
FAMILIES[Gather] = Family(plan_gather)

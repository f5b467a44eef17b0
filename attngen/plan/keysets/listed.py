"""Keys given as a list per head: codebooks, and rows chosen by whoever calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attngen.backends.rows import take
from attngen.errors import InputError
from attngen.language.checks import check_dims, require
from attngen.language.expression import evaluate
from attngen.language.lists import RowLists
from attngen.plan.keysets.base import (
    KeySet,
    Pieces,
    Result,
    b,
    check_range,
    check_tensor,
    h,
    i,
    j,
    moved,
    offset_column,
    to_query_heads,
)
from attngen.plan.keysets.graph import attend_lists, by_position, check_list_names, transposed, word_for

if TYPE_CHECKING:
    from attngen.language.call import Call
    from attngen.language.spec import Spec


@dataclass(frozen=True)
class Codebook(KeySet):
    """Keys that stand for several tokens each. count [B, Hkv, Nk], int or float, at least 0."""

    name: ClassVar[str] = "codebook"
    used: ClassVar[tuple[str, ...]] = ("count",)

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        call, count = pieces.call, given.get("count")
        kind = "float" if isinstance(count, torch.Tensor) and count.is_floating_point() else "int"
        count = check_tensor("count", count, kind, tuple(call.k.shape[:3]), "[B, Hkv, Nk]", call.q.device)
        require("count", (count >= 0) & (count < torch.inf), "finite numbers of at least 0", count.detach())

        def build() -> dict[str, Any]:
            log_count, counted = pieces.tensor("log_count", 3, None), pieces.tensor("counted", 3, torch.bool)
            return {"mask": pieces.mask & counted[b, h, j], "score": pieces.score + log_count[b, h, j]}

        counted = count > 0
        log_count = torch.log(torch.where(counted, count, 1).to(_real(call)))
        extra = {"log_count": to_query_heads(log_count, call), "counted": to_query_heads(counted, call)}
        return pieces.attend("codewords", build, call.q, call.k, call.v, call.q_offset, **extra)


@dataclass(frozen=True)
class Gather(KeySet):
    """Keys by index, one list for all rows of a head, index int [B, H, K], or one for each row, [B, H, Nq, K], H being Hkv or
    Hq; -1 for none; optional log_weight float of that shape.
    """

    name: ClassVar[str] = "gather"
    prepared: ClassVar[tuple[str, ...]] = ("index",)
    used: ClassVar[tuple[str, ...]] = ("log_weight",)
    optional: ClassVar[tuple[str, ...]] = ("log_weight",)

    def check_spec(self, spec: Spec) -> None:
        check_list_names(self.name, spec, RowLists(weighted=True))
        super().check_spec(spec)

    def prepare(self, spec: Spec, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
        wanted = "int [B, H, K] or [B, H, Nq, K], H of k or q"
        index = check_dims("index", given.get("index"), (3, 4), wanted)
        if index.dim() == 4:
            return _by_row(spec, call, index)
        heads = call.q.shape[1] if index.shape[1] == call.q.shape[1] else call.k.shape[1]
        shape = (call.q.shape[0], heads, index.shape[2])
        index = check_tensor("index", index, "int", shape, "[B, Hkv or Hq, K]", call.q.device)
        n_k = call.k.shape[2]
        check_range("index", index, -1, n_k, "rows of k, or -1 for none")
        # Ascending, the missing ones last: then the walks of causal masks and windows end early.
        position, order = torch.where(index < 0, n_k, index).sort(dim=-1, stable=True)
        per_query_head = heads == call.q.shape[1]
        return {
            "order": order,
            "position": (position if per_query_head else to_query_heads(position, call)).to(torch.int32),
            "rows": position.clamp(max=max(n_k - 1, 0)).long(),
        }

    def run(self, pieces: Pieces, plan: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
        if "query_runs" in plan:
            return _attend_by_row(pieces, plan, given.get("log_weight"))
        call, rows, log_weight = pieces.call, plan["rows"], given.get("log_weight")
        n_k = call.k.shape[2]
        if log_weight is not None:
            log_weight = _weights(log_weight, call, rows).gather(-1, plan["order"])
            log_weight = log_weight if log_weight.shape[1] == call.q.shape[1] else to_query_heads(log_weight, call)
        weighted = log_weight is not None

        def build() -> dict[str, Any]:
            q_position, k_position = pieces.tensor("q_position", 2), pieces.tensor("k_position", 3)
            places = {"i": q_position[b, i], "j": k_position[b, h, j]}
            length = pieces.tensor("length", 1)
            score = moved(pieces.score, **places)
            if weighted:
                score = score + pieces.tensor("log_weight", 3, None)[b, h, j]
            return {"mask": moved(pieces.mask, **places) & (k_position[b, h, j] < length[b]), "score": score}

        if n_k == 0:
            raise InputError("k", "at least one row, to gather from", f"shape {list(call.k.shape)}")
        k, v = call.k, call.v
        if rows.shape[1] != k.shape[1]:
            k, v = to_query_heads(k, call), to_query_heads(v, call)
        k, v = take(k, rows, unique=False), take(v, rows, unique=False)
        device, batch = call.q.device, call.q.shape[0]
        q_position = torch.arange(call.q.shape[2], device=device) + _column(offset_column(call))
        extra = {
            "q_position": q_position.expand(batch, -1).to(torch.int32),
            "k_position": plan["position"],
            "length": torch.full((batch,), n_k, dtype=torch.int32, device=device),
        }
        extra |= {"log_weight": log_weight} if weighted else {}
        return pieces.attend(("listed", weighted), build, call.q, k, v, **extra)


def _by_row(spec: Spec, call: Call, index: torch.Tensor) -> dict[str, Any]:
    """The lists of an index [B, H, Nq, K]."""
    (batch, heads, n_q, _), n_k, count = call.q.shape, call.k.shape[2], index.shape[3]
    own = heads if index.shape[1] == heads else call.k.shape[1]
    check_tensor("index", index, "int", (batch, own, n_q, count), "[B, Hkv or Hq, Nq, K]", call.q.device)
    check_range("index", index, -1, n_k, "rows of k, or -1 for none")
    # The missing ones last in each row, what the mask rules out, and with the checks turned off whatever is no row of k.
    missing, told = (index < 0) | (index >= n_k), by_position(spec)
    if told is not None:
        row = torch.arange(n_q, device=index.device) + offset_column(call)
        missing = missing | ~evaluate(told, {"i": row.unsqueeze(-1), "j": index})
    position, order = torch.where(missing, n_k, index).sort(dim=-1, stable=True)
    size, flat = n_q * count, position.flatten(2)
    first = (torch.arange(n_q, device=index.device) * count).expand(position.shape[:3])
    runs = torch.stack([first, (position < n_k).sum(-1)], -1).to(word_for(size))
    row = (torch.arange(size, device=index.device) // max(count, 1)).expand_as(flat)
    edges = flat.clamp(max=max(n_k - 1, 0)).to(torch.int32)
    back = transposed(flat, row, n_k, call.wants_grad)
    return {"query_edges": edges, "query_runs": runs, "order": order, **back}


def _attend_by_row(pieces: Pieces, plan: Mapping[str, Any], log_weight: Any) -> Result:
    order, call = plan["order"], pieces.call
    lists = RowLists(weighted=log_weight is not None, by_query_head=order.shape[1] != call.k.shape[1])
    if log_weight is None:
        return attend_lists(pieces, plan, lists)
    weight = _weights(log_weight, call, order).gather(-1, order)
    return attend_lists(pieces, plan, lists, edge_weight=weight.flatten(2))


def _weights(log_weight: Any, call: Call, index: torch.Tensor) -> torch.Tensor:
    """log_weight, checked: one for each element of index, -inf for one that is not there."""
    shape, device = tuple(index.shape), call.q.device
    log_weight = check_tensor("log_weight", log_weight, "float", shape, "like index", device)
    require("log_weight", log_weight < torch.inf, "finite numbers, or -inf for none", log_weight.detach())
    return log_weight


def _column(offset: Any) -> Any:
    return offset.view(-1, 1) if isinstance(offset, torch.Tensor) else offset


def _real(call: Call) -> torch.dtype:
    return torch.float64 if call.q.dtype == torch.float64 else torch.float32


def codebook() -> Codebook:
    """Attention to codewords that stand for many tokens each (LongVQ, arXiv 2404.11163): `Spec(keys=ag.codebook())`, with
    the codewords as k [B, Hkv, S, D] and v, and count= [B, Hkv, S] tokens per codeword. A codeword's logit gains
    log(count), as if each of its tokens had that key and value; one with count 0 is not there. j is the codeword's number.
    A float count gets a gradient. InputError for a count that is negative, infinite or nan.
    """
    return Codebook()


def gather() -> Gather:
    """The keys whose rows are given: `Spec(keys=ag.gather(), mask=...)`, called with index= int [B, H, K], one list for all
    queries of a (kv or query) head, or int [B, H, Nq, K], one for each query; -1 for none; and
    optionally log_weight= float of the same shape, added to the logits
    and differentiable. A row listed twice counts twice. The mask reads the keys' original positions. InputError for rows out
    of range, and for weights that are nan or infinite (but for -inf, a row that is not there).
    """
    return Gather()

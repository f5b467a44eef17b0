"""What listed tiles, listed rows and pages mean, for the oracle: weights of all pairs, and keys copied out of their pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attngen.language.lists import RowLists, TileLists
from attngen.language.programs import broadcast

Call = Any  # `attngen.language.call.Call`, whose checks use this module


def as_log_weight(call: Call) -> torch.Tensor | None:
    """What the query's lists say as float64 [B', H', Nq, Nk] to add to logits: log(how often the key is listed, each time
    with its weight), -inf for a key that is not. None for a spec without lists.
    """
    lists, n_q, n_k = call.spec.lists, call.q.shape[2], call.n_k
    if lists is None:
        return None
    tiled = isinstance(lists, TileLists)
    entries = call.captures["query_tiles" if tiled else "query_edges"].long()
    runs = call.captures["query_runs"].long()
    lead = broadcast(entries.shape[:2], runs.shape[:2])
    entries, runs = entries.expand(*lead, -1), runs.expand(*lead, -1, -1)
    first, count = runs[..., 0], runs[..., 1:].sum(-1)
    place = torch.arange(entries.shape[-1], device=entries.device)
    columns = -(-n_k // lists.block_n) if isinstance(lists, TileLists) else n_k
    rows = []
    for row in range(runs.shape[2]):
        listed = (place >= first[..., row, None]) & (place < (first + count)[..., row, None])
        weight = listed.double()
        if isinstance(lists, RowLists) and lists.weighted:
            weight = torch.where(listed, torch.exp(call.captures["edge_weight"].double()), 0.0).expand(listed.shape)
        total = torch.zeros((*lead, columns), dtype=torch.float64, device=entries.device)
        rows.append(total.scatter_add(-1, torch.where(listed, entries, 0), weight))
    table = (
        torch.stack(rows, 2) if rows else torch.zeros((*lead, 0, columns), dtype=torch.float64, device=entries.device)
    )
    if isinstance(lists, TileLists):
        table = table.repeat_interleave(lists.block_m, 2)[:, :, :n_q]
        table = table.repeat_interleave(lists.block_n, 3)[..., :n_k]
    if table.shape[1] not in (1, call.q.shape[1]):  # one list for the heads that share keys
        table = table.repeat_interleave(call.group, 1)
    return torch.where(table > 0, torch.log(torch.where(table > 0, table, 1.0)), -torch.inf)


def without_pages(call: Call) -> Call:
    """The same call with k and v [B, Hkv, Nk, *] copied out of their pages."""
    if call.spec.page_size is None:
        return call

    def rows(pages: torch.Tensor) -> torch.Tensor:
        return pages[call.captures["page_table"].long()].transpose(1, 2).flatten(2, 3)

    return replace(call, k=rows(call.k), v=rows(call.v))

"""The definitions, dense, of graphs, paged caches and shared prefixes: edge by edge, and copies of what is not copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from attngen.language.call import Call
from attngen.plan.keysets.graph import read_csr


def _graph(keys: Any, call: Call, given: Mapping[str, Any]) -> tuple[torch.Tensor, None]:
    """A key weighs as often as the row lists it."""
    crow, col = read_csr(call, given)
    times = torch.zeros((*col.shape[:2], call.q.shape[2], call.k.shape[2]), dtype=torch.float64)
    for batch in range(col.shape[0]):
        for head in range(col.shape[1]):
            ends = crow[batch, head].tolist()
            for row, (start, stop) in enumerate(pairwise(ends)):
                for key in col[batch, head, start:stop].tolist():
                    times[batch, head, row, key] += 1
    if times.shape[1] not in (1, call.q.shape[1]):
        times = times.repeat_interleave(call.group, 1)
    return _log(times), None


def _paged(keys: Any, call: Call, given: Mapping[str, Any]) -> tuple[torch.Tensor, None]:
    """Keys below k_len."""
    return _below(given.get("k_len"), 0, call.k.shape[2], call), None


def _shared_prefix(keys: Any, call: Call, given: Mapping[str, Any]) -> tuple[torch.Tensor, None]:
    """All contexts, and of the suffix what is below k_len."""
    prefix = given["prefix_k"]
    parts = [prefix] if isinstance(prefix, torch.Tensor) else prefix
    return _below(given.get("k_len"), sum(part.shape[2] for part in parts), call.k.shape[2], call), None


def _below(k_len: Any, more: int, n_k: int, call: Call) -> torch.Tensor:
    place = torch.arange(n_k)
    if k_len is None:
        return torch.zeros((1, 1, 1, n_k), dtype=torch.float64)
    return torch.where(place < k_len.view(-1, 1, 1, 1) + more, 0.0, -torch.inf).double()


def _log(weights: torch.Tensor) -> torch.Tensor:
    return torch.where(weights > 0, torch.log(torch.where(weights > 0, weights, 1.0)), -torch.inf)


def _unpaged(keys: Any, call: Call, given: Mapping[str, Any]) -> Call:
    """k and v in logical order."""
    table = given["page_table"].long().clamp(0, max(call.k.shape[0] - 1, 0))
    k, v = (pages[table].transpose(1, 2).flatten(2, 3) for pages in (call.k, call.v))
    return replace(call, k=k, v=v)


def _with_prefix(keys: Any, call: Call, given: Mapping[str, Any]) -> Call:
    """Every sample with a copy of its contexts."""

    def whole(prefix: Any, suffix: torch.Tensor) -> torch.Tensor:
        parts = [prefix] if isinstance(prefix, torch.Tensor) else list(prefix)
        return torch.cat([*(p.repeat_interleave(len(suffix) // len(p), 0) for p in parts), suffix], 2)

    return replace(call, k=whole(given["prefix_k"], call.k), v=whole(given["prefix_v"], call.v))


Definition = Callable[[Any, Call, Mapping[str, Any]], tuple[torch.Tensor, None]]
DEFINITIONS: dict[str, Definition] = {"graph": _graph, "paged": _paged, "shared_prefix": _shared_prefix}
# Key sets whose k and v are not what the definition is about: the call with the k and v that are.
COPIED: dict[str, Callable[[Any, Call, Mapping[str, Any]], Call]] = {
    "paged": _unpaged,
    "shared_prefix": _with_prefix,
}

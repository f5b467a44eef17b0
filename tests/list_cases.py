"""Random lists of tiles and rows in both directions, made entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import torch

Full = Callable[[int, int], bool]


def tile_lists(layout: torch.Tensor, full_keys: Full, full_queries: Full) -> dict[str, torch.Tensor]:
    """The captures of `TileLists` for layout bool [B', H', Tq, Tk]; full_keys(r, c): whether tile (r, c) is full for a query
    tile that walks keys; full_queries(r, c): for a key tile that walks queries.
    """
    query_tiles, query_runs = _tiles(layout, full_keys)
    key_tiles, key_runs = _tiles(layout.transpose(2, 3), lambda c, r: full_queries(r, c))
    return {"query_tiles": query_tiles, "query_runs": query_runs, "key_tiles": key_tiles, "key_runs": key_runs}


def _tiles(layout: torch.Tensor, full: Full) -> tuple[torch.Tensor, torch.Tensor]:
    runs = torch.zeros(*layout.shape[:3], 3, dtype=torch.int32)
    lists: list[list[int]] = []
    for b in range(layout.shape[0]):
        for h in range(layout.shape[1]):
            found: list[int] = []
            for r in range(layout.shape[2]):
                live = layout[b, h, r].nonzero().flatten().tolist()
                whole = [c for c in live if full(r, c)]
                part = [c for c in live if not full(r, c)]
                runs[b, h, r] = torch.tensor([len(found), len(whole), len(part)])
                found += whole + part
            lists.append(found)
    return _padded(lists, layout.shape[:2]), runs


def row_lists(batch: int, heads: int, n_q: int, n_k: int, weighted: bool = False) -> dict[str, torch.Tensor]:
    """The captures of `RowLists`: rows of 0, 1, 3 or 40 keys, some of them listed twice."""
    edges, key_edges, places = [], [], []
    runs, key_runs = (torch.zeros(batch, heads, n, 2, dtype=torch.int64) for n in (n_q, n_k))
    for b in range(batch):
        for h in range(heads):
            own, rows = [], []
            for r in range(n_q):
                degree = (0, 1, 3, 40)[int(torch.randint(0, 4, ()))]
                runs[b, h, r] = torch.tensor([len(own), degree])
                own += torch.randint(0, n_k, (degree,)).tolist()
                rows += [r] * degree
            by_key, at = [], []
            for c in range(n_k):
                found = [place for place, key in enumerate(own) if key == c]
                key_runs[b, h, c] = torch.tensor([len(by_key), len(found)])
                by_key += [rows[place] for place in found]
                at += found
            edges.append(own)
            key_edges.append(by_key)
            places.append(at)
    shape = (batch, heads)
    lists = {"query_edges": _padded(edges, shape), "query_runs": runs}
    lists |= {"key_edges": _padded(key_edges, shape), "key_runs": key_runs}
    if weighted:
        lists["key_places"] = _padded(places, shape).long()
        lists["edge_weight"] = torch.randn(lists["query_edges"].shape)
    return lists


def _padded(lists: list[list[int]], shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    longest = max((len(own) for own in lists), default=0)
    rows = [own + [0] * (longest - len(own)) for own in lists]
    return torch.tensor(rows, dtype=torch.int32).view(*shape, longest)

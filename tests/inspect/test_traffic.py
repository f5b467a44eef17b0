"""Bytes counted from the plan against what the tiles of `ag.tile_map`, lists and page tables say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.inspect import traffic
from attngen.language.lists import RowLists, TileLists
from tests.list_cases import row_lists, tile_lists

D, DV = 16, 32
LENGTH = ag.Tensor("length", 1, dtype=torch.int32)
RAGGED = ag.Spec(mask=lambda b, h, i, j: j < LENGTH[b])
TILE = dict(block_m=16, block_n=32)


def inputs(batch: int, heads: int, kv_heads: int, n_q: int, n_k: int, dtype: Any = torch.float16) -> list[torch.Tensor]:
    kv = batch, kv_heads, n_k
    return [
        torch.empty(batch, heads, n_q, D, dtype=dtype),
        torch.empty(*kv, D, dtype=dtype),
        torch.empty(*kv, DV, dtype=dtype),
    ]


def count(
    spec: ag.Spec, qkv: list[torch.Tensor], given: dict[str, Any] | None = None, **schedule: Any
) -> traffic.Traffic:
    pins = ag.Schedule(**{**TILE, **schedule})
    return traffic.of(ag.compile(spec), *qkv, schedule=pins, **(given or {}))


def loaded(tiles: torch.Tensor, block_n: int, n_k: int) -> int:
    """Keys in the tiles of a map that are not empty."""
    widths = torch.tensor([min(block_n, n_k - start) for start in range(0, n_k, block_n)])
    return int(((tiles > 0) * widths).sum())


@pytest.mark.parametrize("heads", [8, 2])
def test_packed_heads_read_keys_and_values_once(heads: int) -> None:
    q, k, v = inputs(3, heads, 2, 1, 200)
    packed, apart = (count(ag.Spec(), [q, k, v], pack=pack) for pack in (True, False))
    once = 2 * (k.numel() + v.numel())
    assert packed.keys == once and apart.keys == once * heads // 2
    assert packed.queries == apart.queries == 2 * q.numel()
    assert packed.results == 3 * heads * (2 * DV + 4) and packed.states == 0
    assert packed.total == sum((packed.keys, packed.queries, packed.results))


@pytest.mark.parametrize("mask", [ag.causal(), ag.causal() & ag.window(40), ag.window(9), ag.dilated_window(6, 3)])
def test_the_walks_tiles_are_what_is_read(mask: Any) -> None:
    spec = ag.Spec(mask=mask)
    tiles = ag.tile_map(spec, 70, 203, 16, 32, q_offset=100)
    found = count(spec, inputs(2, 3, 3, 70, 203), {"q_offset": 100})
    assert found.keys == 2 * 3 * 2 * (D + DV) * loaded(tiles, 32, 203)


def test_tiles_that_depend_on_data() -> None:
    doc = ag.document_ids(torch.tensor([20, 90, 30]))[None].repeat(2, 1)
    spec = ag.Spec(mask=ag.documents() & ag.causal())
    tiles = ag.tile_map(spec, 140, 140, 16, 32, doc=doc)
    assert 0 < loaded(tiles, 32, 140) < 9 * 140
    assert count(spec, inputs(2, 3, 3, 140, 140), {"doc": doc}).keys == 2 * 3 * 2 * (D + DV) * loaded(tiles, 32, 140)


def test_ragged_lengths_read_to_the_end_of_a_tile() -> None:
    length = torch.tensor([0, 1, 64, 65, 200], dtype=torch.int32)
    for split in (1, 3, "stream"):
        found = count(RAGGED, inputs(5, 8, 2, 1, 200), {"length": length}, pack=True, split=split)
        assert found.keys == 2 * 2 * (D + DV) * (0 + 32 + 64 + 96 + 200)


def test_a_split_moves_states() -> None:
    """Each split writes a state of the tile's 16 rows and reads q; the merge reads the states."""
    given = inputs(2, 8, 2, 1, 200)
    whole, cut = count(ag.Spec(), given, pack=True), count(ag.Spec(), given, pack=True, split=5)
    assert (cut.keys, cut.results, cut.queries) == (whole.keys, whole.results, 5 * whole.queries)
    assert cut.states == 2 * (2 * 2 * 5) * 16 * (DV + 2) * 4


@pytest.mark.parametrize("programs", [1, 4, 9, 100])
def test_stream_k_moves_states_of_shared_outputs_only(programs: int) -> None:
    """4 outputs of 7 tiles: runs of ceil(28 / programs) or one less."""
    found = count(ag.Spec(), inputs(2, 8, 2, 1, 200), pack=True, split="stream", programs=programs)
    shared = {1: 0, 4: 0, 9: 11, 100: 28}[programs]  # 9: cuts at 4, 7, 10, 13, 16, 19, 22, 25: 2, 3, 3 and 3 programs
    assert found.states == 2 * shared * 16 * (DV + 2) * 4
    assert found.keys == 2 * 2 * 2 * 200 * (D + DV)


def test_a_window_over_a_paged_cache_reads_live_pages_only() -> None:
    """400 pages of 16 keys, of which a window of 100 keys before position 6000 touches 7, in tiles of 32 keys."""
    spec = ag.Spec(mask=ag.causal() & ag.window(100), page_size=16)
    k, v = torch.empty(800, 2, 16, D), torch.empty(800, 2, 16, DV)
    table = torch.full((2, 400), -1, dtype=torch.int32)
    q = torch.empty(2, 8, 1, D)
    for split in (1, 4, "stream"):
        found = count(spec, [q, k, v], {"page_table": table, "q_offset": 6000}, pack=True, split=split)
        first, last = (6000 - 99) // 32, 6000 // 32
        assert found.keys == 2 * 2 * (last - first + 1) * 32 * (D + DV) * 4
    assert found.keys < (k.numel() + v.numel()) * 4 / 30


def test_lists_of_tiles_read_their_tiles() -> None:
    torch.manual_seed(0)
    layout = torch.rand(2, 4, 3, 7) < 0.5
    lists = tile_lists(layout, lambda r, c: c < 6, lambda r, c: r < 2)
    found = count(ag.Spec(lists=TileLists(32, 32)), inputs(2, 4, 2, 90, 203), lists)
    rows = torch.tensor([2, 2, 2])  # kernel tiles of 16 rows in each listed one
    keys = (layout.long() * torch.tensor([32] * 6 + [11])).sum(-1)
    assert found.keys == 2 * (D + DV) * int((keys * rows).sum())


@pytest.mark.parametrize(("heads", "by_query_head"), [(1, False), (2, False), (8, True)])
def test_lists_of_rows_read_their_keys(heads: int, by_query_head: bool) -> None:
    """Once for the heads that share a list."""
    torch.manual_seed(0)
    lists = row_lists(1, heads, 9, 13)
    edges = int(lists["query_runs"][..., 1].sum()) * max(1, 2 // heads)
    found = count(ag.Spec(lists=RowLists(by_query_head=by_query_head)), inputs(1, 8, 2, 9, 13), lists)
    assert found.keys == edges * 2 * (D + DV)
    assert found.queries == 8 * 9 * D * 2


def test_key_sets_add_up_their_pieces() -> None:
    q, k, v = (torch.randn(t.shape) for t in inputs(1, 4, 4, 96, 96, torch.float32))
    layout = torch.rand(1, 4, 3, 3) < 0.5
    found = count(ag.Spec(keys=ag.block_sparse(32), mask=ag.causal()), [q, k, v], {"layout": layout})
    live = int((layout & torch.ones(3, 3, dtype=torch.bool).tril()).sum())
    assert found.keys == live * 2 * 32 * (D + DV) * 4


@pytest.mark.parametrize("heads", [8, 2])
def test_a_shared_prefix_is_read_once(heads: int) -> None:
    """M_c + B M_d keys, not B (M_c + M_d), and once for the heads of a group."""
    q, k, v = (torch.randn(t.shape) for t in inputs(6, heads, 2, 1, 64, torch.float32))
    prefix = {"prefix_k": torch.randn(1, 2, 320, D), "prefix_v": torch.randn(1, 2, 320, DV)}
    once = 2 * (D + DV) * 4
    spec = ag.Spec(keys=ag.shared_prefix())
    assert count(spec, [q, k, v], prefix, block_m=64, pack=True).keys == (320 + 6 * 64) * once
    k_len = torch.tensor([0, 1, 32, 33, 64, 5], dtype=torch.int32)
    found = count(spec, [q, k, v], {**prefix, "k_len": k_len}, block_m=64, pack=True)
    assert found.keys == (320 + 0 + 32 + 32 + 64 + 64 + 32) * once


def test_a_window_over_a_paged_key_set_reads_live_pages_only() -> None:
    """Two rows of a cache of 100 pages each; one ends at key 1500, the other at 40."""
    q, k, v = torch.randn(2, 8, 1, D), torch.randn(200, 16, 2, D), torch.randn(200, 16, 2, DV)
    table = torch.randperm(200).view(2, 100)
    k_len = torch.tensor([1500, 40], dtype=torch.int32)
    spec = ag.Spec(keys=ag.paged(16), mask=ag.causal() & ag.window(100))
    given = {"page_table": table, "k_len": k_len, "q_offset": k_len - 1}
    found = count(spec, [q, k, v], given, pack=True)
    tiles = (1499 // 32 - (1499 - 99) // 32 + 1) + 2
    assert found.keys == 2 * tiles * 32 * (D + DV) * 4


def test_ragged_lengths_of_a_call() -> None:
    q, k, v = (torch.randn(t.shape) for t in inputs(3, 4, 2, 1, 200, torch.float32))
    found = count(ag.Spec(), [q, k, v], {"k_len": torch.tensor([0, 33, 200])}, pack=True)
    assert found.keys == 2 * (0 + 64 + 200) * (D + DV) * 4


def test_bytes_fall_with_the_window_and_not_with_nothing() -> None:
    empty = count(ag.Spec(), inputs(2, 4, 2, 5, 0))
    assert empty.keys == 0 and empty.results == 2 * 4 * 5 * (2 * DV + 4)
    assert "keys and values 0" in str(empty)
    widths = [count(ag.Spec(mask=ag.window(w)), inputs(1, 1, 1, 300, 300)).keys for w in (1, 30, 100, 300)]
    assert widths == sorted(set(widths))


def test_the_models_choice_for_decoding_reads_keys_once() -> None:
    q, k, v = inputs(4, 32, 8, 1, 4096, torch.bfloat16)
    found = traffic.of(ag.compile(ag.Spec()), q, k, v)
    assert found.keys == 2 * (k.numel() + v.numel()) and 0 < found.states < found.keys / 10
    small = traffic.of(ag.compile(ag.Spec(), backend="interpret"), q[:1], k[:1], v[:1])
    assert small.keys == 4 * 2 * (k[:1].numel() + v[:1].numel())  # the interpreter packs nothing


def test_illegal_decisions_are_refused() -> None:
    with pytest.raises(ag.ScheduleError, match="depends on h"):
        count(ag.Spec(mask="j < i + h"), inputs(1, 4, 2, 3, 20), pack=True)
    with pytest.raises(ag.InputError, match="length"):
        count(RAGGED, inputs(1, 4, 2, 1, 20))

"""Split-K, stream-K, packed GQA rows and pages: generated kernels in the interpreter against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attngen as ag
from attngen.analysis import facts
from attngen.inspect.cross import cross_compile
from attngen.language.call import bind
from attngen.language.device import programs_at_once
from attngen.language.lists import TileLists
from attngen.plan.launches import forward_launches
from attngen.schedule.decode import decode_choice, decode_tile, even_splits
from attngen.schedule.legality import why_not_packed
from tests.list_cases import tile_lists

SINK = ag.Tensor("sink", 1)
LENGTH = ag.Tensor("length", 1, dtype=torch.int32)
RAGGED = ag.Spec(mask=lambda b, h, i, j: (j < LENGTH[b]) & (i >= j))
SPLITS = [
    *(ag.Schedule(split=n) for n in (1, 2, 3, 7, 16)),
    *(ag.Schedule(split="stream", programs=n) for n in (1, 5, 64, 200)),
]


def check(spec: ag.Spec, q: Any, k: Any, v: Any, schedule: ag.Schedule, **captures: Any) -> None:
    want, want_lse = ag.oracle(spec, q, k, v, **captures)
    none = want_lse.isneginf()
    for backend in ("interpret", "cpu"):
        small = schedule if backend == "interpret" or spec.lists else ag.Schedule(block_m=32, block_n=32).over(schedule)
        out, lse = ag.compile(spec, backend=backend, schedule=small)(q, k, v, return_lse=True, **captures)
        assert torch.equal(lse.isneginf(), none) and not out[none].any()
        assert (out - want).norm() <= 1e-5 * want.norm()
        assert (lse - want_lse).masked_fill(none, 0).abs().max() <= 1e-4


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("schedule", SPLITS, ids=str)
def test_any_split_gives_the_same(schedule: ag.Schedule, pack: bool) -> None:
    torch.manual_seed(0)
    spec = ag.Spec(mask=ag.causal(), sink=lambda b, h, i: SINK[h])
    q, k, v = torch.randn(2, 4, 21, 16), torch.randn(2, 2, 45, 16), torch.randn(2, 2, 45, 24)
    check(spec, q, k, v, ag.Schedule(pack=pack).over(schedule), sink=torch.randn(4), q_offset=24)


@pytest.mark.parametrize("schedule", SPLITS[2:7:2], ids=str)
@pytest.mark.parametrize("n_q", [1, 5, pytest.param(64, marks=pytest.mark.slow)])
def test_ragged_batches(schedule: ag.Schedule, n_q: int) -> None:
    """Lengths of 0, 1, the end inside a tile, on its edge, and all."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, n_q, 16), torch.randn(5, 2, 45, 16), torch.randn(5, 2, 45, 16)
    k[:, :, 44], v[:, :, 44] = torch.nan, torch.inf  # what no length reaches must not be seen
    length = torch.tensor([0, 1, 19, 32, 44], dtype=torch.int32)
    offset = (length - n_q).clamp(min=0)
    kk, vv = k.nan_to_num(0), v.nan_to_num(0, posinf=0)
    want, _ = ag.oracle(RAGGED, q, kk, vv, length=length, q_offset=offset)
    for backend in ("interpret", "cpu"):
        attn = ag.compile(RAGGED, backend=backend, schedule=ag.Schedule(pack=True).over(schedule))
        out = attn(q, k, v, length=length, q_offset=offset)
        assert (out - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize("schedule", SPLITS[0:7:2], ids=str)
def test_pages_in_any_order(schedule: ag.Schedule, page_size: int) -> None:
    torch.manual_seed(0)
    room = -(-45 // page_size)
    k, v = torch.randn(2 * room, 2, page_size, 16), torch.randn(2 * room, 2, page_size, 24)
    table = torch.randperm(2 * room)[: 2 * room].view(2, room).to(torch.int32)
    table[1, 0] = table[0, 0]  # shared
    table[:, : 20 // page_size] = -1  # outside of the window: never read
    spec = ag.Spec(mask=ag.causal() & ag.window(20), page_size=page_size)
    q = torch.randn(2, 4, 3, 16)
    want, _ = ag.oracle(spec, q, k, v, page_table=table.clamp(min=0), q_offset=41)
    for backend in ("interpret", "cpu"):
        attn = ag.compile(spec, backend=backend, schedule=ag.Schedule(pack=True).over(schedule))
        out = attn(q, k, v, page_table=table, q_offset=41)
        assert (out - want).norm() <= 1e-5 * want.norm()


def test_listed_tiles_split() -> None:
    torch.manual_seed(0)
    layout = torch.rand(2, 4, 2, 3) < 0.7
    lists = tile_lists(layout, lambda r, c: c < 2, lambda r, c: r < 1)
    q, k, v = torch.randn(2, 4, 21, 16), torch.randn(2, 2, 45, 16), torch.randn(2, 2, 45, 16)
    for schedule in (ag.Schedule(split=3), ag.Schedule(split="stream", programs=7)):
        check(ag.Spec(lists=TileLists(16, 16)), q, k, v, schedule, **lists)


def test_a_plan_says_what_is_launched() -> None:
    for split in ("stream", 4):
        assert forward_launches(ag.Schedule(split=split)) == ("forward", "merge")
    assert forward_launches(ag.Schedule()) == ("forward",)


def test_legality_says_why() -> None:
    by_head = ag.Spec(mask="j < i + h")
    assert "depends on h" in why_not_packed(by_head, facts(by_head))
    documents = ag.Spec(mask=ag.documents())
    assert "tables" in why_not_packed(documents, facts(documents))
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(ag.ScheduleError, match="depends on h"):
        ag.compile(by_head, backend="interpret", schedule=ag.Schedule(pack=True))(q, q[:, :2], q[:, :2])
    with pytest.raises(ag.ScheduleError, match="stream"):
        ag.compile(ag.Spec(), backend="interpret", schedule=ag.Schedule(programs=3))(q, q, q)
    for wrong in (0, 2000, "streams", 1.5, True):
        with pytest.raises(ag.ScheduleError, match="split"):
            ag.Schedule(split=wrong)


def test_the_models_choice_fills_the_processors() -> None:
    assert even_splits(outputs=200, tiles=64, processors=132) == 1
    assert even_splits(outputs=8, tiles=4, processors=132) == 1
    assert 14 <= even_splits(outputs=8, tiles=512, processors=132) <= 16
    assert even_splits(outputs=0, tiles=512, processors=132) == 1

    def choice(spec: ag.Spec, batch: int, n_q: int, n_k: int, **captures: Any) -> ag.Schedule:
        q, k = torch.empty(batch, 32, n_q, 128), torch.empty(batch, 8, n_k, 128)
        call = bind(spec, q, k, k, q_offset=0, captures=captures)
        return decode_choice(call, facts(spec), 132)

    one = choice(ag.Spec(), 1, 1, 65536)
    assert one.pack and one.forward.block_m == 16 and isinstance(one.split, int) and one.split > 8
    assert choice(RAGGED, 2, 1, 65536, length=torch.zeros(2, dtype=torch.int32)).split == "stream"
    # 256 outputs fill 132 processors: whole ones end at different times where lengths differ, unless they are short or many.
    for batch, n_k, split in ((32, 4096, "stream"), (32, 256, 1), (512, 4096, 1)):
        lengths = torch.zeros(batch, dtype=torch.int32)
        assert choice(RAGGED, batch, 1, n_k, length=lengths).split == split
        assert choice(ag.Spec(), batch, 1, n_k).split == 1
    assert choice(ag.Spec(mask="j < i + h"), 1, 1, 65536).pack is False
    assert choice(ag.Spec(), 1, 512, 512) == ag.Schedule()


def test_small_programs_share_a_multiprocessor() -> None:
    """Keys are split so far that each of its four schedulers has a warp."""
    assert [programs_at_once(132, warps) for warps in (8, 4, 2, 1)] == [132, 132, 264, 528]
    q, k = torch.empty(8, 32, 1, 64), torch.empty(8, 4, 16384, 64)  # 32 outputs
    chosen = decode_choice(bind(ag.Spec(), q, k, k, q_offset=0, captures={}), facts(ag.Spec()), 132)
    assert chosen.forward.num_warps == 2 and chosen.split == 8
    assert chosen.forward.tma is False  # whatever form the tile has that ships for many rows


@given(outputs=st.integers(1, 105), tiles=st.integers(5, 600))
def test_splits_are_the_fewest_that_fill_the_last_wave(outputs: int, tiles: int) -> None:
    def filled(splits: int) -> float:
        return outputs * splits / (132 * -(-outputs * splits // 132))

    chosen, most = even_splits(outputs, tiles, 132), range(1, min(tiles, 128) + 1)
    enough = [splits for splits in most if filled(splits) >= 0.85 * max(map(filled, most))]
    assert chosen == enough[0]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("split", [4, "stream"])
def test_decode_schedules_do_not_spill(target: str, head_dim: int, split: Any) -> None:
    for rows in (16, 64):
        for page_size in (None, 16):
            schedule = ag.Schedule(pack=True, split=split).with_tile("forward", decode_tile(rows, head_dim))
            spec = ag.Spec(mask=lambda b, h, i, j: (j < LENGTH[b]) & (i >= j), page_size=page_size)
            for kernel in cross_compile(spec, target, head_dim=head_dim, schedule=schedule, passes=("forward",)):
                assert kernel.spills == 0, str(kernel)


@pytest.mark.parametrize("mask", [ag.causal(), ag.window(20) | ag.global_tokens(3), None, "j < 0"])
def test_stored_weights_give_the_same_gradients(mask: Any) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 330, 16), torch.randn(2, 2, 330, 24)
    results = []
    for store in (False, True):
        attn = ag.compile(ag.Spec(mask=mask), schedule=ag.Schedule(store=store))
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = attn(*leaves, return_lse=True, q_offset=180)
        loss = out.square().sum() + lse.masked_fill(lse.isneginf(), 0).square().sum()
        results.append((out, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_weights_are_stored_where_that_makes_sense() -> None:
    q = torch.randn(1, 2, 5, 16, requires_grad=True)
    for spec, backend, says in (
        (ag.Spec(), "interpret", "on a GPU"),
        (ag.Spec(score=ag.soft_cap(3.0)), "cpu", "with a score"),
    ):
        with pytest.raises(ag.ScheduleError, match=says):
            ag.compile(spec, backend=backend, schedule=ag.Schedule(store=True))(q, q, q)
    long = torch.randn(1, 2, 2049, 16)
    with pytest.raises(ag.ScheduleError, match="2048"):
        ag.compile(ag.Spec(), schedule=ag.Schedule(store=True))(q, long, long)

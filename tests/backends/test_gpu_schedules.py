"""Schedules, lists, pages and key sets on a GPU; see test_gpu.py, whose `--gpu-part` and `--rehearse-gpu` hold here too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.language.lists import RowLists, TileLists
from tests.backends.test_gpu import HALF, SMALL, Place, place
from tests.check import check
from tests.gpu_small_cases import on
from tests.list_cases import row_lists, tile_lists

pytestmark = pytest.mark.gpu
__all__ = ["place"]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
LENGTH = ag.Tensor("length", 1, dtype=torch.int32)
RAGGED = ag.Spec(mask=lambda b, h, i, j: (j < LENGTH[b]) & (i >= j), sink=lambda b, h, i: ag.Tensor("sink", 1)[h])
SPLITS = [
    ag.Schedule(split=2),
    ag.Schedule(split=7),
    ag.Schedule(split="stream", programs=5),
    ag.Schedule(split="stream"),
]


def same(prefixes: tuple[str, ...], **form: Any) -> ag.Schedule:
    """One form for several kernels."""
    return ag.Schedule(**{prefix + name: value for prefix in prefixes for name, value in form.items()})


ALL = ("", "dq_", "dkv_")
FORMS = {
    "tma": same(ALL, tma=True),
    "persistent": same(ALL, persistent=1),
    "longest first": same(ALL, order="longest_first"),
    "separate sums": same(("dkv_",), separate_sums=True),
    "sparing registers": same(("dq_", "dkv_"), tma=True, disable_licm=True).over(same(("dkv_",), separate_sums=True)),
    "tma, persistent, longest first": same(ALL, tma=True, persistent=2, order="longest_first"),
}


def need_descriptors(place: Place, schedule: ag.Schedule) -> None:
    if (
        (schedule.forward.tma or schedule.dq.tma or schedule.dkv.tma)
        and place.real
        and torch.cuda.get_device_capability()[0] < 9
    ):
        pytest.skip("tensor descriptors need sm_90 or above")


@DTYPES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "mask", [None, ag.causal(), ag.window(30) | ag.global_tokens(5)], ids=["none", "causal", "two"]
)
def test_forms(place: Place, mask: Any, form: str, dtype: torch.dtype) -> None:
    need_descriptors(place, FORMS[form])
    spec = ag.Spec(mask=mask, score=ag.soft_cap(20.0))
    d = (64, 96) if place.real else (16, 24)
    check(spec, place.attention(spec, FORMS[form].over(SMALL)), *place.qkv(dtype, *d, 70, 85), {})


@HALF
@pytest.mark.parametrize("d", [64, 128])
def test_specialised_warps(place: Place, d: int, dtype: torch.dtype) -> None:
    schedule = ag.Schedule(tma=True, warp_specialize=True, num_warps=4)
    place.need_gpu()
    need_descriptors(place, schedule)
    spec = ag.Spec(score=ag.soft_cap(20.0))
    check(spec, place.attention(spec, schedule), *place.qkv(dtype, d, d, 517, 1037), {})


@DTYPES
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("schedule", SPLITS, ids=str)
@pytest.mark.parametrize("n_q", [1, 9])
def test_splits(place: Place, n_q: int, schedule: ag.Schedule, pack: bool, dtype: torch.dtype) -> None:
    q, k, v = place.qkv(dtype, n_q=n_q, n_k=90)
    captures = on(place.device, dict(length=torch.tensor([0, 77], dtype=torch.int32), sink=torch.randn(q.shape[1])))
    attn = place.attention(RAGGED, ag.Schedule(pack=pack).over(schedule))
    with torch.no_grad():
        check(RAGGED, attn, q, k, v, captures, q_offset=70, backward=False)


@DTYPES
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("schedule", [None, *SPLITS[1:3]], ids=str)
def test_pages(place: Place, schedule: ag.Schedule | None, page_size: int, dtype: torch.dtype) -> None:
    q = place.qkv(dtype, n_q=3, n_k=90)[0]
    room = -(-90 // page_size)
    k, v = (torch.randn(2 * room, 2, page_size, q.shape[3]).to(q.device, dtype) for _ in range(2))
    table = torch.randperm(2 * room).view(2, room).to(q.device, torch.int32)
    spec = ag.Spec(mask=ag.causal() & ag.window(40), page_size=page_size)
    with torch.no_grad():
        check(spec, place.attention(spec, schedule), q, k, v, dict(page_table=table), q_offset=80, backward=False)


@DTYPES
@pytest.mark.parametrize("tile", [(16, 32), (48, 16), (128, 128)])
def test_listed_tiles(place: Place, tile: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n_q, n_k = (300, 410) if place.real else (50, 70)
    layout = torch.rand(2, 4, -(-n_q // tile[0]), -(-n_k // tile[1])) < 0.6
    layout[0, 1] = False
    lists = tile_lists(layout, lambda r, c: (c + 1) * tile[1] <= n_k, lambda r, c: (r + 1) * tile[0] <= n_q)
    spec = ag.Spec(score=ag.alibi(), lists=TileLists(*tile))
    captures = on(place.device, {**lists, "slope": torch.randn(4)})
    check(spec, place.attention(spec), *place.qkv(dtype, n_q=n_q, n_k=n_k), captures)


@DTYPES
@pytest.mark.parametrize("heads", ["one", "kv", "query"])
@pytest.mark.parametrize("weighted", [False, True])
def test_listed_rows(place: Place, weighted: bool, heads: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n_q, n_k = (60, 80) if place.real else (7, 9)
    lists = row_lists(*{"one": (1, 1), "kv": (2, 2), "query": (2, 4)}[heads], n_q, n_k, weighted)
    spec = ag.Spec(mask=ag.causal(), lists=RowLists(weighted, heads == "query"))
    check(spec, place.attention(spec), *place.qkv(dtype, n_q=n_q, n_k=n_k), on(place.device, lists))


def key_set(name: str, n: int) -> tuple[ag.Spec, dict[str, Any]]:
    """A spec of each key set with its captures, for 2 batches, 4 query and 2 key heads, n queries and keys."""
    generator, tiles = torch.Generator().manual_seed(3), -(-n // 16)

    def some(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator)

    causal = ag.causal()
    return {
        "block_sparse": (
            ag.Spec(keys=ag.block_sparse((16, 16)), mask=causal),
            dict(layout=some(2, 4, tiles, tiles) < 0.5),
        ),
        "butterfly": (ag.Spec(keys=ag.butterfly(16)), {}),
        "vertical_slash": (
            ag.Spec(keys=ag.vertical_slash(), mask=causal),
            dict(vertical=(some(2, 4, 5) * n).long(), slash=(some(2, 4, 3) * n).long()),
        ),
        "pruned": (ag.Spec(keys=ag.pruned(keep=0.5, block=16), mask=causal), {}),
        "graph": (
            ag.Spec(keys=ag.graph()),
            dict(crow=torch.arange(0, 3 * n + 1, 3), col=(some(3 * n) * n).long()),
        ),
        "gather": (ag.Spec(keys=ag.gather()), dict(index=(some(2, 4, n, 5) * n).long(), log_weight=some(2, 4, n, 5))),
        "shared_prefix": (
            ag.Spec(keys=ag.shared_prefix()),
            dict(prefix_k=some(1, 2, 33, 16), prefix_v=some(1, 2, 33, 16)),
        ),
    }[name]


NAMES = ["block_sparse", "butterfly", "vertical_slash", "pruned", "graph", "gather", "shared_prefix"]


@pytest.mark.parametrize("name", NAMES)
def test_key_sets(place: Place, name: str) -> None:
    n = 130 if place.real else 20
    spec, captures = key_set(name, n)
    check(spec, place.attention(spec), *place.qkv(torch.float32, 16, 16, n, n), on(place.device, captures))


@DTYPES
def test_ragged_calls(place: Place, dtype: torch.dtype) -> None:
    """k_len, and packed sequences, against each sequence alone."""
    attn = place.attention(ag.Spec(mask=ag.causal()))
    q, k, v = place.qkv(dtype, n_q=40, n_k=40)
    length = torch.tensor([13, 40], dtype=torch.int32, device=q.device)
    starts = torch.tensor([0, 13, 40], dtype=torch.int32, device=q.device)
    padded = attn(q, k, v, k_len=length)
    packed = attn(q[1:], k[1:], v[1:], cu_q=starts, cu_k=starts)
    limit = dict(atol=2e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    for b, n in enumerate((13, 40)):
        alone = attn(q[b : b + 1, :, :n], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        torch.testing.assert_close(padded[b : b + 1, :, :n], alone, **limit)
    for first, last in ((0, 13), (13, 40)):
        part = slice(first, last)
        alone = attn(q[1:, :, part], k[1:, :, part], v[1:, :, part])
        torch.testing.assert_close(packed[:, :, part], alone, **limit)

"""What every key set costs: tiles visited, memory, and no waiting for the device. Lists of tiles: tests/plan/keysets/test_tiles.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.backends import work
from attngen.backends.meta import tables as tables_of
from attngen.language.call import bind
from attngen.lowering import render
from attngen.schedule import Target, complete, fit
from tests.keys_cases import inputs
from tests.keys_work import (
    CASES,
    OnDevice,
    Work,
    case,
    memory,
    of_piece,
    on_the_meta_device,
    pairs_of,
    to_meta,
    without_copies,
)
from tests.keys_work import work as works

MASKS = {"none": None, "causal": ag.causal(), "window": ag.causal() & ag.window(200)}


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_tiles_are_the_patterns(name: str, mask: str):
    """Forward and backward; every attended pair is in one piece, and no other."""
    n = 512 if "incremental" in name else 500  # that form fills its last 128 queries up
    size = (1, 2, 2, n, n, 0)
    keys, captures = case(name, size)
    if name == "union" and mask != "none":
        pytest.skip("its pieces have masks")
    spec = ag.Spec(keys=keys, mask=MASKS[mask])
    found = sum(works(spec, *inputs(size), block=32, **captures), Work())
    assert found.needed <= found.forward <= 1.1 * found.needed, found
    assert found.needed_back <= found.backward <= 1.1 * found.needed_back, found
    if name != "hyper":  # test_keys_hyper counts its samples
        assert found.pairs == pairs_of(spec, *inputs(size), captures)


@pytest.mark.parametrize("name", [name for name in CASES if "head" not in name])
def test_the_kernels_plan_has_as_many_tiles(name: str):
    """What the launch counts for each program, in tiles of its own."""
    size, block = (1, 2, 1, 300, 300, 0), 32
    keys, captures = case(name, size)
    pinned = ag.Schedule(block_m=block, block_n=block, pack=False, split=1)
    attn = ag.compile(ag.Spec(keys=keys, mask=MASKS["none" if name == "union" else "causal"]))
    for _, call in attn.attends(*inputs(size), **captures):
        known, (head_dim, head_dim_v), dtype = facts(call.spec), (call.q.shape[3], call.v.shape[3]), call.q.dtype
        schedule = complete(call.spec, Target.named("sm_90"), head_dim, head_dim_v, dtype, pinned)
        schedule = fit(schedule, call.spec.lists, pinned)
        source = render(
            call.spec, known, "forward", head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype, schedule=schedule
        )
        tables = work.walk_tables(call, known, schedule, "forward", tables_of)
        counts = work.tile_counts(call, known, source.grid, schedule, tables)
        assert int(counts.sum()) == of_piece(call, block).forward


def test_a_graph_is_walked_where_positions_let_it():
    """A fully connected graph under a causal window: the keys of a row are those of its window, and a plan serves any values
    of what else the mask reads.
    """
    n, doc = 64, ag.Tensor("doc", 1, torch.int32)
    crow, col = torch.arange(0, n * n + 1, n), torch.arange(n).repeat(n)
    q, k, v = inputs((1, 1, 1, n, n, 0))
    mask: Any = lambda b, h, i, j: (i >= j) & (i - j < 5) & (doc[i] == doc[j])  # noqa: E731
    attn = ag.compile(ag.Spec(keys=ag.graph(), mask=mask))
    plan = attn.plan(q, k, v, crow=crow, col=col)
    assert plan.values["query_runs"][0, 0, :, 1].tolist() == [min(row + 1, 5) for row in range(n)]
    assert plan.values["key_runs"][0, 0, :, 1].tolist() == [min(n - row, 5) for row in range(n)]
    for ids in (torch.zeros(n, dtype=torch.int32), (torch.arange(n) // 3).int()):
        expected, _ = ag.oracle(ag.Spec(mask=mask), q, k, v, doc=ids)
        assert torch.allclose(attn(q, k, v, plan=plan, doc=ids).double(), expected, atol=1e-5)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_preparation_memory_doubles_with_the_length(name: str, mask: str):
    """What is allocated meanwhile, and what a plan holds: that of a causal HyperAttention once per level of its recursion."""
    found, held = [], []
    for n in (4096, 8192):
        size = (1, 1, 2, n, n, 0)
        keys, captures = case(name, size)
        attn = ag.compile(ag.Spec(keys=keys, mask=None if name == "union" else MASKS[mask]))
        x = inputs(size)
        levels = (
            len([name for name in attn.plan(*x, **captures).values if name.startswith("q_rows.")])
            if name == "hyper"
            else 1
        )
        held.append(attn.plan(*x, **captures).nbytes / levels)
        found.append(memory(lambda: attn.plan(*x, **captures)))  # noqa: B023
    assert held[1] <= 2.1 * held[0]
    assert found[1].peak <= 2.1 * found[0].peak and found[1].largest < 8192**2


@pytest.mark.parametrize("name", CASES)
def test_a_call_allocates_nothing_for_every_pair(name: str):
    """Forward and backward, preparation included: not even a byte per pair of a head."""
    n = 8192
    size = (1, 1, 1, n, n, 0)
    keys, captures = case(name, size)
    captures = {name: x.requires_grad_() if _learned(x) else x for name, x in captures.items()}
    attn = ag.compile(ag.Spec(keys=keys, mask=None if name == "union" else ag.causal()))
    leaves = [*(x.requires_grad_() for x in inputs(size)), *(x for x in captures.values() if _learned(x))]
    found = memory(lambda: torch.autograd.grad(attn(*leaves[:3], **captures).sum(), leaves))
    assert 0 < found.largest < n * n


def _learned(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


# -- waiting for the device -------------------------------------------------------------------------------------------

SIZE = (2, 2, 2, 130, 130, 0)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


WAITS = pytest.mark.xfail(strict=True, reason="incremental=True without a capacity waits once, for the longest list")
WAITING = ("incremental", "incremental, window")


@pytest.mark.parametrize("offset", [0, "tensor"])
@pytest.mark.parametrize("mask", ["none", "causal", "documents"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=WAITS) if n in WAITING else n for n in CASES])
def test_a_call_does_not_wait_for_the_device(name: str, mask: str, offset: Any, monkeypatch: pytest.MonkeyPatch):
    """Preparation, forward and backward. On the meta device nothing has a value: reading one is an error."""
    if offset == "tensor" and (name.startswith("incremental") or (name == "hyper" and mask != "none")):
        pytest.skip("takes no offset")
    keys, captures = case(name, SIZE)
    on_the_meta_device(monkeypatch)
    without_copies(monkeypatch)
    leaves = rows(*SIZE[:5])
    own = {"doc": meta(2, 130 + 130, dtype=torch.int32)} if mask == "documents" and name != "union" else {}
    masks = {**MASKS, "documents": ag.causal() & ag.documents()}
    attn = ag.compile(ag.Spec(keys=keys, mask=None if name == "union" else masks[mask]))
    shift: Any = ints(2) if offset == "tensor" else 0
    own |= {name: x.requires_grad_() if _learned(x) else x for name, x in to_meta(captures).items()}
    with OnDevice():
        attn.plan(*leaves, q_offset=shift, **own)
        torch.autograd.grad(attn(*leaves, q_offset=shift, **own).sum(), leaves)


def rows(batch: int, heads: int, group: int, n_q: int, n_k: int) -> list[torch.Tensor]:
    """q, k and v."""
    sizes = (heads * group, n_q, 16), (heads, n_k, 16), (heads, n_k, 24)
    return [meta(batch, *size).requires_grad_() for size in sizes]


def _paged(mask: Any) -> None:
    pages = (meta(20, 16, 2, dim) for dim in (16, 24))
    attn = ag.compile(ag.Spec(keys=ag.paged(16), mask=mask))
    attn(meta(2, 4, 3, 16), *pages, page_table=ints(2, 8), k_len=ints(2), q_offset=ints(2))


def _shared_prefix(mask: Any) -> None:
    leaves, prefix = rows(4, 2, 2, 3, 9), rows(2, 2, 1, 3, 40)[1:]
    attn = ag.compile(ag.Spec(keys=ag.shared_prefix(), mask=mask))
    out = attn(*leaves, prefix_k=prefix[0], prefix_v=prefix[1], k_len=ints(4), q_offset=ints(4))
    torch.autograd.grad(out.sum(), [*leaves, *prefix])


def _padded(mask: Any) -> None:
    leaves = rows(*SIZE[:5])
    out = ag.compile(ag.Spec(mask=mask))(*leaves, k_len=ints(2), q_offset=ints(2))
    torch.autograd.grad(out.sum(), leaves)


def _packed(mask: Any) -> None:
    leaves = rows(1, *SIZE[1:5])
    out = ag.compile(ag.Spec(mask=mask, sink=ag.sink()))(
        *leaves, cu_q=ints(6), cu_k=ints(6), q_offset=ints(5), sink=meta(4)
    )
    torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("call", [_paged, _shared_prefix, _padded, _packed])
def test_ragged_calls_do_not_wait_for_the_device(
    call: Callable[[Any], None], mask: str, monkeypatch: pytest.MonkeyPatch
):
    on_the_meta_device(monkeypatch)
    if call is not _paged:  # below
        without_copies(monkeypatch)
    with OnDevice():
        call(MASKS[mask])


def _tiles(mask: Any) -> None:
    index = ints(1, 1, 9, 4)
    ag.compile(ag.Spec(keys=ag.block_cluster(16), mask=mask))(*rows(*SIZE[:5]), index=index)


def _sink(mask: Any) -> None:
    attn = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=mask, sink="0.5"))
    keep_q, keep_k = (meta(2, heads, 130, dtype=torch.bool) for heads in (4, 2))
    attn(*rows(*SIZE[:5]), keep_q=keep_q, keep_k=keep_k)


def _packed_sink(mask: Any) -> None:
    ag.compile(ag.Spec(mask=mask, sink="0.5"))(*rows(1, *SIZE[1:5]), cu_q=ints(6), cu_k=ints(6))


@pytest.mark.parametrize("call", [_paged, _tiles, _sink, _packed_sink])
def test_numbers_are_made_on_the_device(call: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch):
    on_the_meta_device(monkeypatch)
    without_copies(monkeypatch)
    call(MASKS["causal"])


def test_buckets_hash_without_waiting(monkeypatch: pytest.MonkeyPatch):
    on_the_meta_device(monkeypatch)
    with OnDevice():
        for buckets in ag.lsh_buckets(meta(1, 4, 50, 16), meta(1, 2, 50, 16), 8):
            assert buckets.device.type == "meta"


def test_what_waits_is_found(monkeypatch: pytest.MonkeyPatch):
    """The check itself: a value that is read, a count of what holds, numbers that are made on the CPU."""
    on_the_meta_device(monkeypatch)
    without_copies(monkeypatch)
    x = meta(4)
    for wait in (
        lambda: x.max().item(),
        lambda: x[x > 0],
        lambda: torch.tensor([1, 2], device="meta"),
        lambda: torch.tensor([1, 2]).to("meta"),
        lambda: x[torch.tensor([1, 2])],
        lambda: x.cpu(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), OnDevice():
            wait()


@pytest.mark.parametrize(
    ("batch", "heads", "kv", "together"), [(1, 6, 6, 3), (1, 7, 7, 4), (2, 6, 2, 12), (1, 1, 1, 1)]
)
def test_heads_that_take_turns_are_a_part_of_all(batch: int, heads: int, kv: int, together: int):
    """Keys and values of four heads fit half of the cache here: fewer, if all heads are a multiple of more than half of them."""
    q, k = torch.empty(batch, heads, 128, 64), torch.empty(batch, kv, 1024, 64)
    call = bind(ag.Spec(), q, k, k, captures={})
    assert work.heads_together(call, "q") == together
    assert work.heads_together(call, "kv") == together * kv // heads  # of a kernel whose programs walk a whole group

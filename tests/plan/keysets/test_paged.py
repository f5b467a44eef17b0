"""Paged caches: page tables in random order, shared pages, lengths that end anywhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attngen as ag
from attngen.backends.cpu.tiles import GRAIN
from attngen.backends.launcher import Launcher
from attngen.inspect import traffic
from attngen.language.call import bind
from attngen.language.moved import b as keys_b
from attngen.language.moved import j as keys_j
from attngen.language.programs import evaluate
from attngen.plan.keysets import paged
from attngen.reference.dense import dense_env
from tests.check import check

MASKS: dict[str, Any] = {
    "none": None,
    "causal": ag.causal(),
    "window": ag.causal() & ag.window(9),
    "sinks": ag.causal() & (ag.window(5) | ag.global_tokens(2)),
    "blocks": ag.block_causal(8),
    "prefix": ag.prefix_lm(5),
    "dilated": ag.causal() & ag.dilated_window(9, 2),
}


def cache(page_size: int, head_major: bool = False) -> tuple[torch.Tensor, ...]:
    """q [3, 4, 2, 16], k, v in pages, a table whose rows share pages, lengths of 1 to 2 3/8 tiles, and no other entries."""
    generator = torch.Generator().manual_seed(page_size)
    rows = -(-38 // page_size)
    pages, lengths = 2 * rows + 3, torch.tensor([2, 17, 38])
    table = torch.stack([torch.randperm(pages, generator=generator)[:rows] for _ in range(3)])
    table[1, : rows // 2] = table[2, : rows // 2]
    first = torch.arange(rows) * page_size
    table = torch.where(first < lengths[:, None], table, -1).to(torch.int32)
    shape = (pages, 2, page_size) if head_major else (pages, page_size, 2)
    k, v = (torch.randn((*shape, dim), generator=generator) for dim in (16, 16))
    return torch.randn((3, 4, 2, 16), generator=generator), k, v, table, lengths


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size, head_major", [(16, False), (16, True), (1, False), (5, False), (256, True)])
def test_paged(page_size: int, head_major: bool, mask: str):
    q, k, v, table, lengths = cache(page_size, head_major)
    spec = ag.Spec(keys=ag.paged(page_size, head_major), mask=MASKS[mask], sink="0.25")
    check(spec, ag.compile(spec), q, k, v, dict(page_table=table, k_len=lengths), lengths - 2, backward=False)
    assert ag.Spec.from_text(str(spec)).key == spec.key


def test_nothing_is_kept_for_a_backward_that_cannot_come(monkeypatch: pytest.MonkeyPatch):
    """What a large lse lacks is stored for the backward only, which pages do not have."""
    launched, launch = [], Launcher._launch
    monkeypatch.setattr(
        Launcher, "_launch", lambda self, name, *a: launched.append((name, {*a[4]})) or launch(self, name, *a)
    )
    q, k, v, table, lengths = cache(16)
    spec = ag.Spec(keys=ag.paged(16), score=ag.bias("j"))
    captures = dict(page_table=table, k_len=lengths, bias=torch.full((48,), 1e6))
    ag.compile(spec, backend="interpret")(q, k, v, q_offset=lengths - 2, **captures)
    assert "forward" in dict(launched) and not [name for name, made in launched if "excess" in made]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    q, k, v, table, lengths = cache(16)
    attn = ag.compile(ag.Spec(keys=ag.paged(16), mask=ag.causal()))
    given = dict(page_table=table, k_len=lengths, q_offset=lengths - 2)
    got, want = attn(q.to(dtype), k.to(dtype), v.to(dtype), **given), attn(q, k, v, **given)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, **(dict(rtol=0.02, atol=0.02) if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize(
    "page_size, mask",
    [(16, "window"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "none"), (5, "sinks")))],
)
def test_kernels(page_size: int, mask: str):
    q, k, v, table, lengths = cache(page_size)
    spec = ag.Spec(keys=ag.paged(page_size), mask=MASKS[mask], sink="0.25")
    captures = dict(page_table=table, k_len=lengths)
    check(spec, ag.compile(spec, backend="interpret"), q, k, v, captures, lengths - 2, backward=False)


@pytest.mark.parametrize("sink", [None, "0.5"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_caches_of_no_key_and_of_one(page_size: int, sink: str | None):
    q, k, v, table, _ = cache(page_size)
    lengths = torch.tensor([0, 1, 38])
    table[0] = -1
    spec = ag.Spec(keys=ag.paged(page_size), mask=ag.causal(), sink=sink)
    captures = dict(page_table=table, k_len=lengths)
    check(spec, ag.compile(spec), q, k, v, captures, (lengths - 2).clamp(min=0), backward=False)
    out, lse = ag.compile(spec)(q, k, v, return_lse=True, **captures)
    assert not out[0].any() and bool((lse[0] == (-torch.inf if sink is None else 0.5)).all())


# -- pages that nobody sees -------------------------------------------------------------------------------------------


def far_window(page_size: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], list[list[int]]]:
    """q [2, 2, 3, 16], a cache whose pages are nan but for those that a window of 40 at the end of each row sees, their
    entries -1, the call's captures, and the pages that are seen.
    """
    generator = torch.Generator().manual_seed(0)
    lengths, slots = torch.tensor([500, 229]), 512 // page_size
    pages = 2 * slots + 1
    table = torch.randperm(pages, generator=generator)[: 2 * slots].view(2, -1)
    first = torch.arange(slots) * page_size
    seen = (first < lengths[:, None]) & (first + page_size > lengths[:, None] - 3 - 39)
    table = torch.where(seen, table, -1)
    k, v = (torch.full((pages, page_size, 1, 16), torch.nan) for _ in range(2))
    for place in table[seen].tolist():
        k[place], v[place] = torch.randn((2, page_size, 1, 16), generator=generator)
    captures = dict(page_table=table, k_len=lengths, q_offset=lengths - 3)
    return (torch.randn((2, 2, 3, 16), generator=generator), k, v), captures, [row[row >= 0].tolist() for row in table]


@pytest.mark.parametrize("page_size", [1, 8, 32, 64])
def test_a_window_reads_live_pages_only(page_size: int, monkeypatch: pytest.MonkeyPatch):
    (q, k, v), captures, seen = far_window(page_size)
    spec = ag.Spec(keys=ag.paged(page_size), mask=ag.causal() & ag.window(40))
    read: list[int] = []
    select = torch.Tensor.index_select

    def counting(self: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        if self.shape[:2] == (k.shape[0], page_size):
            read.extend(index.tolist())
        return select(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counting)
    got = ag.compile(spec)(q, k, v, return_lse=True, **captures)
    monkeypatch.undo()
    # Chunks of keys begin and end at multiples of GRAIN: entries of smaller pages that nobody sees are read as page 0.
    rounding: set[int] = set() if page_size >= GRAIN else {0}
    live = {page for row in seen for page in row}
    assert live <= set(read) <= live | rounding
    for mine, want in zip(got, ag.oracle(spec, q, k, v, **captures), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-5)


def test_a_window_asks_memory_for_live_pages_only():
    (q, k, v), captures, seen = far_window(32)
    attn = ag.compile(ag.Spec(keys=ag.paged(32), mask=ag.causal() & ag.window(40)), backend="interpret")
    found = traffic.of(attn, q, k, v, schedule=ag.Schedule(block_n=32), **captures)
    assert found.keys == sum(len(row) for row in seen) * 32 * (16 + 16) * 4 * q.shape[1] // k.shape[2]


def dense_mask(mask: Any, q: torch.Tensor, n_k: int, **captures: Any) -> torch.Tensor:
    """bool [B, Hq, Nq, n_k]."""
    spec = ag.Spec(mask=mask & (keys_j < ag.Tensor("k_len", 1, torch.int32)[keys_b]))
    k = q.new_zeros((q.shape[0], 1, n_k, q.shape[3]))
    call = bind(spec, q, k, k, q_offset=captures.pop("q_offset"), captures=captures)
    return torch.as_tensor(evaluate(spec.mask, dense_env(call, torch.float64))).expand(*q.shape[:3], n_k)


@given(st.data())
@settings(max_examples=40)
def test_random_page_tables(data: st.DataObject):
    """Entries that no query reaches hold anything, and one that a query reaches has to be a page."""
    page_size, slots = data.draw(st.sampled_from([1, 2, 7, 16, 33])), data.draw(st.integers(1, 5))
    n_q, name = (
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from(["causal", "window", "sinks", "blocks", "prefix"])),
    )
    lengths = torch.tensor([data.draw(st.integers(0, slots * page_size)) for _ in range(2)])
    pages = data.draw(st.integers(1, 8))
    entries = st.lists(st.integers(0, pages - 1), min_size=2 * slots, max_size=2 * slots)
    table = torch.tensor(data.draw(entries)).view(2, slots)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = (torch.randn(n, generator=generator) for n in ((2, 2, n_q, 8), *[(pages, page_size, 1, 8)] * 2))
    captures = dict(k_len=lengths, q_offset=(lengths - n_q).clamp(min=0))
    reached = dense_mask(MASKS[name], q, slots * page_size, **captures).unflatten(-1, (slots, page_size))
    needed = reached.any(-1).any(2).any(1)
    table = torch.where(needed, table, data.draw(st.sampled_from([-1, -7, 10**6])))
    spec = ag.Spec(keys=ag.paged(page_size), mask=MASKS[name])
    check(spec, ag.compile(spec), q, k, v, dict(page_table=table, k_len=lengths), captures["q_offset"], backward=False)
    if needed.any():
        row, slot = data.draw(st.sampled_from(needed.nonzero().tolist()))
        table[row, slot] = data.draw(st.sampled_from([-1, pages]))
        where = re.escape(f"{int(table[row, slot])} at [batch row, page slot] [{row}, {slot}]")
        with pytest.raises(ag.InputError, match=where):
            ag.compile(spec)(q, k, v, page_table=table, **captures)


def test_a_plan_checks_a_table_once(monkeypatch: pytest.MonkeyPatch):
    q, k, v, table, lengths = cache(16)
    width = ag.Param("width")
    attn = ag.compile(ag.Spec(keys=ag.paged(16), mask=ag.causal() & ag.window(width)))
    given = dict(page_table=table, k_len=lengths, q_offset=lengths - 2)
    with pytest.raises(ag.InputError, match="width"):
        attn.plan(q, k, v, **given)
    plan, want = attn.plan(q, k, v, width=9, **given), attn(q, k, v, width=9, **given)
    monkeypatch.setattr(paged, "reached", None)
    assert torch.equal(attn(q, k, v, plan=plan, width=9, **given), want)


def test_a_plan_needs_no_capture_of_the_score():
    q, k, v, table, lengths = cache(16)
    attn = ag.compile(ag.Spec(keys=ag.paged(16), mask=ag.causal(), score=ag.alibi(), sink=ag.sink("sink")))
    given = dict(page_table=table, k_len=lengths, q_offset=lengths - 2)
    captures = dict(slope=torch.rand(q.shape[1]), sink=torch.rand(q.shape[1]))
    plan = attn.prepare(q, k, v, **given)
    assert torch.equal(attn(q, k, v, plan=plan, **given, **captures), attn(q, k, v, **given, **captures))


def test_unchecked_tables_read_nothing_outside(monkeypatch: pytest.MonkeyPatch):
    q, k, v, table, lengths = cache(16)
    table[2, 1], table[1, 0] = 10**6, -5
    attn = ag.compile(ag.Spec(keys=ag.paged(16)))
    with pytest.raises(ag.InputError, match=re.escape("-5 at [batch row, page slot] [1, 0]")):
        attn(q, k, v, page_table=table, k_len=lengths)
    monkeypatch.setenv("ATTNGEN_CHECK", "0")
    got = attn(q, k, v, page_table=table, k_len=lengths)
    torch.testing.assert_close(got, attn(q, k, v, page_table=table.clamp(0, len(k) - 1), k_len=lengths))


def test_definition_is_the_cache_put_together():
    q, k, v, table, lengths = cache(16)
    got = ag.oracle(
        ag.Spec(keys=ag.paged(16), mask=ag.causal()), q, k, v, page_table=table, k_len=lengths, q_offset=lengths - 2
    )
    for row, length in enumerate(lengths.tolist()):
        own = [pages[table[row].clamp(min=0).long()].flatten(0, 1)[:length].transpose(0, 1)[None] for pages in (k, v)]
        want = ag.oracle(ag.Spec(mask=ag.causal()), q[row : row + 1], *own, q_offset=length - 2)
        for mine, yours in zip(got, want, strict=True):
            torch.testing.assert_close(mine[row : row + 1], yours)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(page_table=None), "page_table"),
        (dict(page_table=torch.full((3, 3), 99)), "page_table"),
        (dict(page_table=torch.zeros(3, 2, dtype=torch.int32)), "k_len"),
        (dict(page_table=torch.zeros(2, 3, dtype=torch.int32)), "page_table"),
        (dict(k_len=torch.tensor([1, 2, 49])), "k_len"),
        (dict(k_len=torch.tensor([1, -2, 4])), "k_len"),
    ],
)
def test_bad_input(change: dict[str, Any], name: str):
    q, k, v, table, lengths = cache(16)
    attn = ag.compile(ag.Spec(keys=ag.paged(16)))
    with pytest.raises(ag.InputError, match=name):
        attn(q, k, v, **dict(page_table=table, k_len=lengths) | change)


def test_inference_only_and_shapes():
    q, k, v, table, lengths = cache(16)
    attn = ag.compile(ag.Spec(keys=ag.paged(16)))
    with pytest.raises(ag.InputError, match="inference"):
        attn(q.requires_grad_(), k, v, page_table=table, k_len=lengths)
    with pytest.raises(ag.InputError, match="page_size"):
        attn(q.detach(), k.transpose(1, 2), v.transpose(1, 2), page_table=table, k_len=lengths)

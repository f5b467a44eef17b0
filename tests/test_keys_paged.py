"""Paged caches: page tables in random order, shared pages, lengths that end anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
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


@pytest.mark.parametrize("page_size, head_major", [(16, False), (16, True), (1, False), (5, False)])
def test_kernels(page_size: int, head_major: bool):
    q, k, v, table, lengths = cache(page_size, head_major)
    spec = ag.Spec(keys=ag.paged(page_size, head_major), mask=MASKS["causal"], sink="0.25")
    captures = dict(page_table=table, k_len=lengths)
    check(spec, ag.compile(spec, backend="interpret"), q, k, v, captures, lengths - 2, backward=False)
    assert ag.Spec.from_text(str(spec)).key == spec.key


@pytest.mark.parametrize("mask", [pytest.param(m, marks=() if m == "window" else pytest.mark.slow) for m in MASKS])
def test_masks(mask: str):
    q, k, v, table, lengths = cache(16)
    spec = ag.Spec(keys=ag.paged(16), mask=MASKS[mask])
    captures = dict(page_table=table, k_len=lengths)
    check(spec, ag.compile(spec, backend="interpret"), q, k, v, captures, lengths - 2, backward=False)


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
    attn = ag.compile(ag.Spec(keys=ag.paged(16)), backend="interpret")
    with pytest.raises(ag.InputError, match=name):
        attn(q, k, v, **dict(page_table=table, k_len=lengths) | change)


def test_inference_only_and_shapes():
    q, k, v, table, lengths = cache(16)
    attn = ag.compile(ag.Spec(keys=ag.paged(16)), backend="interpret")
    with pytest.raises(ag.InputError, match="inference"):
        attn(q.requires_grad_(), k, v, page_table=table, k_len=lengths)
    with pytest.raises(ag.InputError, match="page_size"):
        attn(q.detach(), k.transpose(1, 2), v.transpose(1, 2), page_table=table, k_len=lengths)

"""Every mask and score of the library while decoding: few queries at the ends of caches of uneven lengths, in pages or padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.language.moved import b, j
from tests.check import relative

LENGTHS = torch.tensor([5, 17, 38])
ROOM, PAGE = 48, 16  # positions that the caches have room for
BATCH, HEADS = 3, 4

PREFIX, DOC = ag.Tensor("prefix", 1, torch.int32), ag.Tensor("doc", 1, torch.int32)
ANCESTORS = ag.Tensor("ancestors", 3, torch.bool)
PATTERNS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": dict(mask=ag.causal()),
    "window": dict(mask=ag.window(9)),
    "window, left": dict(mask=ag.window(left=6)),
    "window, right": dict(mask=ag.window(right=3)),
    "window, both": dict(mask=ag.window(left=7, right=2)),
    "window by a param": dict(mask=ag.causal() & ag.window(ag.Param("w"))),
    "prefix_lm": dict(mask=ag.prefix_lm(5)),
    "prefix_lm per batch": dict(mask=ag.prefix_lm(PREFIX)),
    "global_tokens": dict(mask=ag.global_tokens(3)),
    "global_tokens and window": dict(mask=ag.causal() & (ag.window(5) | ag.global_tokens(2))),
    "dilated_window": dict(mask=ag.dilated_window(4, 3)),
    "dilated_window, causal": dict(mask=ag.causal() & ag.dilated_window(9, 2)),
    "documents": dict(mask=ag.causal() & ag.documents()),
    "documents for all": dict(mask=ag.documents(DOC)),
    "block_causal": dict(mask=ag.block_causal(8)),
    "neighborhood_2d": dict(mask=ag.neighborhood_2d(7, 2)),
    "tree": dict(mask=ag.tree()),
    "tree per batch": dict(mask=ag.tree(ANCESTORS, 12)),
    "longformer": dict(mask=ag.longformer(8, globals=2).condition()),
    "longformer, dilated": dict(mask=ag.causal() & ag.longformer(6, dilation=3).condition()),
    "a_shape": dict(mask=ag.a_shape(3, 7).condition()),
    "not causal": dict(mask=~ag.causal()),
    "alibi": dict(mask=ag.causal(), score=ag.alibi()),
    "soft_cap": dict(mask=ag.causal(), score=ag.soft_cap(3.0)),
    "t5_bias": dict(score=ag.t5_bias()),
    "t5_bias, causal": dict(mask=ag.causal(), score=ag.t5_bias(bidirectional=False)),
    "bias": dict(mask=ag.causal(), score=ag.bias()),
    "bias of keys": dict(score=ag.bias("bj")),
    "several scores": dict(mask=ag.causal(), score=[ag.soft_cap(3.0), ag.alibi()]),
    "sink": dict(mask=ag.causal() & ag.window(9), sink=ag.sink()),
}


def data(q_len: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """q [3, 4, q_len, 16], k and v [3, 2, ROOM, 16]; captures for all the patterns."""
    generator = torch.Generator().manual_seed(q_len)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    captures: dict[str, Any] = dict(
        w=6,
        start=12,
        prefix=torch.tensor([2, 20, 7], dtype=torch.int32),
        doc=ag.document_ids(torch.tensor([4, 9, 20, 15])),
        ancestor=torch.rand((ROOM, ROOM), generator=generator) < 0.4,
        ancestors=torch.rand((BATCH, ROOM, ROOM), generator=generator) < 0.4,
        slope=ag.alibi_slopes(HEADS),
        rel_bias=normal(32, HEADS),
        bias=normal(BATCH, HEADS, ROOM, ROOM),
        sink=normal(HEADS),
    )
    return (normal(BATCH, HEADS, q_len, 16), normal(BATCH, 2, ROOM, 16), normal(BATCH, 2, ROOM, 16)), captures


def captures_of(spec: ag.Spec, known: dict[str, Any]) -> dict[str, Any]:
    found = {name: known[name] for name in (*spec.tensors, *spec.params)}
    for name in found.keys() & {"doc", "bias"}:  # one name, of several shapes
        wide = found[name] if name == "bias" else found[name].expand(BATCH, -1)
        found[name] = {1: found[name], 2: wide if name == "doc" else wide[:, 0, 0], 4: wide}[spec.tensors[name].ndim]
    return found


def in_pages(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows [B, Hkv, ROOM, D] as pages [pages, PAGE, Hkv, D] where the table says."""
    pages = torch.full((int(table.max()) + 2, PAGE, rows.shape[1], rows.shape[3]), torch.nan)
    pages[table.flatten()] = rows.transpose(1, 2).unflatten(1, (-1, PAGE)).flatten(0, 1)
    return pages


@pytest.mark.parametrize("cache", ["paged", "padded"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode(pattern: str, cache: str):
    for q_len in (1, 5):
        decode(PATTERNS[pattern], q_len, cache)


def decode(parts: dict[str, Any], q_len: int, cache: str) -> None:
    (q, k, v), known = data(q_len)
    below = j < ag.Tensor("length", 1, torch.int32)[b]
    definition = ag.Spec(**{**parts, "mask": parts.get("mask", True) & below})
    captures = captures_of(definition, {**known, "length": LENGTHS.int()})
    want = ag.oracle(definition, q, k, v, q_offset=LENGTHS - q_len, **captures)
    del captures["length"]
    more: dict[str, Any] = dict(k_len=LENGTHS, q_offset=LENGTHS - q_len, return_lse=True, **captures)
    if cache == "paged":
        table = torch.randperm(9, generator=torch.Generator().manual_seed(1)).view(BATCH, -1)
        k, v, more["page_table"] = in_pages(k, table), in_pages(v, table), table
        parts = {**parts, "keys": ag.paged(PAGE)}
    out, lse = ag.compile(ag.Spec(**parts))(q, k, v, **more)
    assert torch.equal(lse.isneginf(), want[1].isneginf())
    assert relative(out, want[0]) <= 1e-5
    lse, expected = (torch.where(want[1].isneginf(), 0.0, t.double()) for t in (lse, want[1]))
    assert relative(lse, expected) <= 1e-5

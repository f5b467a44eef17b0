"""What `explain` counts, against the pairs that the reference attends."""

from __future__ import annotations

import re

import pytest
import torch

import attngen as ag
from attngen.reference.keysets import attended
from tests.keys_cases import inputs

SIZE = (2, 2, 2, 160, 200, 16)  # batch, kv heads, group, queries, keys, head dim


def told_pairs(told: str) -> int:
    found = re.search(r"pairs of all attentions together\n  ([0-9,]+) visited", told)
    assert found is not None, told
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    "keys", [ag.big_bird((16, 16)), ag.butterfly((32, 32)), ag.block_sparse((16, 32)), ag.graph()], ids=lambda k: k.name
)
def test_lists_are_counted_as_they_are_walked(keys):
    """Whole tiles, or single keys: without a mask those are the attended pairs themselves, but for keys past the end."""
    generator = torch.Generator().manual_seed(0)
    size = (*SIZE[:3], 192, 192, SIZE[5])
    captures = {}
    if keys.name == "block_sparse":
        captures["layout"] = torch.rand((2, 4, 12, 6), generator=generator) < 0.4
    if keys.name == "graph":
        edges = torch.rand((192, 192), generator=generator) < 0.1
        crow = torch.nn.functional.pad(edges.sum(1).cumsum(0), (1, 0))
        captures |= dict(crow=crow.int(), col=edges.nonzero()[:, 1].int())
    spec = ag.Spec(keys=keys)
    q, k, v = inputs(size)
    told = ag.compile(spec).explain(q, k, v, **captures)
    expected = attended(spec, q, k, v, 0, captures).expand(2, 4, 192, 192).sum()
    assert 0 < told_pairs(told) == int(expected) < 2 * 4 * 192 * 192


def test_the_picture_of_listed_tiles_is_the_layout():
    layout = torch.rand((1, 1, 5, 7), generator=torch.Generator().manual_seed(1)) < 0.5
    q, k, v = inputs(SIZE)
    attn = ag.compile(ag.Spec(keys=ag.block_sparse((32, 32))))
    ((_, call),) = attn.attends(q, k, v, layout=layout)
    found = ag.tile_map(call.spec, 160, 200, 32, 32, **call.captures)
    assert torch.equal(found > 0, layout[0, 0])
    inside = layout[0, 0, :, :6]  # the last key tile is cut at 200 of 224
    assert torch.equal(found[:, :6] == 2, inside) and not (found[:, 6] == 2).any()
    coarse = ag.tile_map(call.spec, 160, 200, 64, 64, **call.captures)
    cells = torch.nn.functional.pad(found, (0, 1, 0, 1)).unflatten(1, (4, 2)).unflatten(0, (3, 2))
    assert torch.equal(coarse > 0, (cells > 0).any(3).any(1))
    with pytest.raises(ag.InputError, match="block_m: expected a multiple of the listed tiles' 32, got 48"):
        ag.tile_map(call.spec, 160, 200, 48, 32, **call.captures)
    with pytest.raises(ag.InputError, match="query_tiles: expected a tensor"):
        ag.tile_map(call.spec, 160, 200, 32, 32)


def test_pieces_are_counted_together():
    near = ag.causal() & ag.window(32)
    attn = ag.compile(ag.union(ag.Spec(mask=near), ag.Spec(keys=ag.block_sparse((32, 32)))))
    layout = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    layout[..., 0] = True
    q, k, v = inputs(SIZE)
    told = attn.explain(q, k, v, layout=layout)
    parts = [int(x.replace(",", "")) for x in re.findall(r"  ([0-9,]+) of [0-9,]+ pairs visited", told)]
    assert len(parts) == 2 and parts[1] == 2 * 4 * 160 * 32 and sum(parts) == told_pairs(told)


@pytest.mark.parametrize("pins", [None, ag.Schedule(block_m=16, block_n=512)], ids=["chosen", "pinned"])
def test_the_schedule_marked_is_the_one_that_runs(pins):
    q, k, v = (torch.randn(1, 2, 700, 16) for _ in range(3))
    attn = ag.compile(ag.Spec(mask=ag.causal()), schedule=pins)
    told = attn.explain(q, k, v)
    ((_, call),) = attn.attends(q, k, v)
    tile = attn.specialiser.of(call).schedule.forward
    marked = re.findall(r"(\d+) x (\d+) .*<- this schedule", told)
    assert marked == [(str(tile.block_m), str(tile.block_n))]


def test_the_kernels_and_the_gradients_that_they_add_up():
    spec = ag.Spec(
        score="s + bias[h, i, j] + slope[h] * (j - i)", tensors=[ag.Tensor("bias", 3), ag.Tensor("slope", 1)]
    )
    q, bias, slope = torch.randn(2, 2, 32, 16), torch.zeros(2, 32, 32, requires_grad=True), torch.zeros(2)
    told = ag.compile(spec, backend="interpret").explain(q, q, q, bias=bias, slope=slope)
    assert "  forward: forward\n  backward: delta, dq + bias, dkv\n" in told
    slope.requires_grad_()
    told = ag.compile(spec, backend="interpret").explain(q, q, q, bias=bias, slope=slope)
    assert "  backward: delta, dq + bias, slope, dkv\n" in told

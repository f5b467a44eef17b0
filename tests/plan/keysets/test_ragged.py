"""Padded caches and packed sequences against one dense call per sequence."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.backends.cpu.tiles import GRAIN, Keys
from attngen.language.call import bind
from attngen.language.moved import b as keys_b
from attngen.language.moved import j as keys_j
from attngen.language.programs import evaluate
from tests import keys_work
from tests.check import relative

MASKS: dict[str, Any] = {
    "none": None,
    "causal": ag.causal(),
    "window": ag.causal() & ag.window(9),
    "blocks": ag.block_causal(8),
    "global": ag.window(3) | ag.global_tokens(2),
    "prefix": ag.prefix_lm(5),
}


def per_sequence(spec: ag.Spec, parts: list[tuple[Any, ...]], offsets: list[int]) -> list[Any]:
    return [ag.oracle(spec, *part, q_offset=offset) for part, offset in zip(parts, offsets, strict=True)]


def agree(got: list[torch.Tensor], want: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Values, and gradients of a random sum."""
    torch.manual_seed(3)
    losses = [0.0, 0.0]
    for mine, yours in zip(got, want, strict=True):
        assert torch.equal(mine.isneginf(), yours.isneginf())
        seen, right = (torch.where(yours.isneginf(), 0.0, t.double()) for t in (mine, yours))
        assert relative(seen, right) <= 1e-5
        weight = torch.randn(seen.shape, dtype=torch.float64)
        losses = [losses[0] + (seen * weight).sum(), losses[1] + (right * weight).sum()]
    if not losses[1].requires_grad:
        return
    grads = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses]
    for mine, yours in zip(*grads, strict=True):
        assert relative(mine, torch.zeros_like(mine).double() if yours is None else yours.double()) <= 1e-4


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("interpret", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n_q", [1, 33])
def test_padded(mask: str, n_q: int, backend: str):
    torch.manual_seed(0)
    lengths = torch.tensor([0, 1, 17, 40])
    q, k, v = leaf(4, 4, n_q, 16), leaf(4, 2, 40, 16), leaf(4, 2, 40, 8)
    spec, offset = ag.Spec(mask=MASKS[mask]), (lengths - n_q).clamp(min=0)
    got = ag.compile(spec, backend=backend)(q, k, v, k_len=lengths, q_offset=offset, return_lse=True)
    parts = [(q[x : x + 1], k[x : x + 1, :, :n], v[x : x + 1, :, :n]) for x, n in enumerate(lengths.tolist())]
    found = per_sequence(spec, parts, offset.tolist())
    agree(list(got), [torch.cat(ts) for ts in zip(*found, strict=True)], [q, k, v])


def test_what_lies_behind_does_not_matter():
    q, k, v = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    lengths, attn = torch.tensor([3, 30]), ag.compile(ag.Spec())
    want = attn(q, k, v, k_len=lengths)
    for tensor in (k, v):
        for row, length in enumerate(lengths.tolist()):
            tensor[row, :, length:] = torch.nan
    torch.testing.assert_close(attn(q, k, v, k_len=lengths), want)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("offset", [0, "tensor"])
@pytest.mark.parametrize("mask", MASKS)
def test_packed(mask: str, offset: Any, sink: bool):
    torch.manual_seed(0)
    lengths_q, lengths_k = [3, 0, 1, 30, 4], [7, 5, 1, 33, 0]
    offsets = [4, 0, 0, 3, 2] if offset == "tensor" else [0] * 5
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k))
    q, k, v = leaf(1, 4, 41, 16), leaf(1, 2, 49, 16), leaf(1, 2, 49, 8)  # with three rows of no sequence
    spec = ag.Spec(
        mask=MASKS[mask],
        score=lambda s, b, h, i, j: s + (j - i) * 0.01,
        sink=(lambda b, h, i: 0.1 * h) if sink else None,
    )
    shift: Any = torch.tensor(offsets) if offset == "tensor" else 0
    got = ag.compile(spec)(q, k, v, cu_q=cu_q, cu_k=cu_k, q_offset=shift, return_lse=True)
    parts = [
        (q[:, :, cu_q[x] : cu_q[x + 1]], k[:, :, cu_k[x] : cu_k[x + 1]], v[:, :, cu_k[x] : cu_k[x + 1]])
        for x in range(5)
    ]
    found = per_sequence(spec, parts, offsets)
    rest = torch.zeros(1, 4, 3, 8), torch.full((1, 4, 3), -torch.inf)
    agree(list(got), [torch.cat(ts, 2) for ts in zip(*found, rest, strict=True)], [q, k, v])


def test_packed_captures_by_sequence():
    torch.manual_seed(0)
    slope = ag.Tensor("slope", 2)
    spec = ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: s + slope[b, h] * (j - i))
    q, k, v, slopes = leaf(1, 2, 12, 16), leaf(1, 2, 12, 16), leaf(1, 2, 12, 16), leaf(2, 2)
    cu = torch.tensor([0, 5, 12])
    got = ag.compile(spec)(q, k, v, cu_q=cu, cu_k=cu, slope=slopes, return_lse=True)
    cut = [slice(0, 5), slice(5, 12)]
    found = [ag.oracle(spec, q[:, :, c], k[:, :, c], v[:, :, c], slope=slopes[x : x + 1]) for x, c in enumerate(cut)]
    agree(list(got), [torch.cat(ts, 2) for ts in zip(*found, strict=True)], [q, k, v, slopes])


@pytest.mark.parametrize("place", ["mask", "score"])
@pytest.mark.parametrize("axis, offset", [("i", 0), ("i", 2), ("i", "tensor"), ("j", 0)])
def test_captures_shorter_than_a_sequence(axis: str, offset: Any, place: str, monkeypatch: pytest.MonkeyPatch):
    mark = ag.Tensor("mark", 1)
    reads: Any = {"i": lambda i, j: mark[i], "j": lambda i, j: mark[j]}[axis]
    spec = ag.Spec(**(
        dict(mask=lambda b, h, i, j: reads(i, j) > 0)
        if place == "mask"
        else dict(score=lambda s, b, h, i, j: s + reads(i, j))
    ))  # fmt: skip
    attn, cu = ag.compile(spec), torch.tensor([0, 3, 3, 12])
    q, k, v = torch.randn(1, 2, 14, 16), torch.randn(1, 2, 14, 16), torch.randn(1, 2, 14, 16)
    given: dict[str, Any] = dict(cu_q=cu, cu_k=cu)
    given |= dict(q_offset=torch.tensor([7, 99, 2]) if offset == "tensor" else offset)
    length = 9 + (2 if offset else 0)
    length = length if offset != "tensor" else 11
    values = torch.rand(length) + 0.1
    attn(q, k, v, mark=values, **given)
    with pytest.raises(ag.InputError, match=rf"mark: .* {length} in sequence \[2\]"):
        attn(q, k, v, mark=values[:-1], **given)
    monkeypatch.setenv("ATTNGEN_CHECK", "0")  # clamped
    want = attn(q, k, v, mark=torch.cat([values[:-1], values[-2:-1]]), **given)
    torch.testing.assert_close(attn(q, k, v, mark=values[:-1], **given), want)


def test_positions_before_a_capture():
    mark = ag.Tensor("mark", 1)
    attn = ag.compile(ag.Spec(score=lambda s, b, h, i, j: s + mark[i]))
    q, cu = torch.randn(1, 2, 12, 16), torch.tensor([0, 3, 3, 12])
    attn(q, q, q, cu_q=cu, cu_k=cu, mark=torch.randn(12), q_offset=torch.tensor([0, -4, 2]))
    with pytest.raises(ag.InputError, match=r"q_offset: .* -1 in sequence \[0\]"):
        attn(q, q, q, cu_q=cu, cu_k=cu, mark=torch.randn(12), q_offset=torch.tensor([-1, -4, 2]))


# -- tiles ------------------------------------------------------------------------------------------------------------


def tile_maps(attn: Any, q: Any, k: Any, v: Any, block: int, transposed: bool, **given: Any) -> torch.Tensor:
    """Tiles that the call's piece visits, bool [B, Hq, tiles_q, tiles_k]."""
    ((_, call),) = attn.attends(q, k, v, **given)
    return keys_work.tile_maps(call, block, transposed) > 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_is_visited_behind_k_len(mask: str, transposed: bool):
    lengths, block = torch.tensor([0, 1, 64, 65, 300]), 16
    q, k = torch.randn(5, 1, 33, 16), torch.randn(5, 1, 320, 16)
    offset = (lengths - 33).clamp(min=0)
    attn = ag.compile(ag.Spec(mask=MASKS[mask]))
    seen = tile_maps(attn, q, k, k, block, transposed, k_len=lengths, q_offset=offset)
    for row, length in enumerate(lengths.tolist()):
        assert not seen[row, ..., -(-length // block) :].any()
        assert bool(seen[row].any()) == (length > 0)
    call = bind(
        ag.Spec(mask=(keys_j < ag.Tensor("k_len", 1, torch.int32)[keys_b])), q, k, k, captures=dict(k_len=lengths)
    )
    keys = Keys(call, ag.facts(call.spec), 32, 64)  # of the CPU's loops
    for row, length in enumerate(lengths.tolist()):
        chunks = keys.chunks(row, 0, 0)
        assert max(chunks.stop, default=0) == min(320, -(-length // GRAIN) * GRAIN)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences_visit_their_own_tiles(mask: str, transposed: bool):
    """At most the pairs of each sequence rounded out to tiles, and no tile without an attended pair where a mask by distance
    leaves some out.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (12,), generator=generator)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total, block = int(cu[-1]), 16
    q = torch.randn(1, 1, total + 40, 16)  # with rows of no sequence
    seen = tile_maps(ag.compile(ag.Spec(mask=MASKS[mask])), q, q, q, block, transposed, cu_q=cu, cu_k=cu)[0, 0]
    pairs, needed = torch.zeros_like(seen), torch.zeros_like(seen)
    for start, stop in pairwise(cu.tolist()):
        own = slice(start // block, -(-stop // block))
        pairs[own, own] = True
        place = torch.arange(stop - start)
        env = dict(b=0, h=0, i=place.view(-1, 1), j=place)
        spec = ag.Spec(mask=MASKS[mask])
        pair = torch.as_tensor(evaluate(spec.mask, env)).expand(stop - start, stop - start).nonzero() + start
        needed[pair[:, 0] // block, pair[:, 1] // block] = True
    assert not (needed & ~seen).any()
    assert int(seen.sum()) <= int(pairs.sum()) and not (seen & ~pairs).any()
    if mask in ("none", "causal", "window"):
        assert torch.equal(seen, needed)


def test_other_lengths_compile_nothing():
    attn, q = ag.compile(ag.Spec(mask=ag.causal())), torch.randn(1, 1, 20, 16)
    for ends in ([0, 5, 20], [0, 0, 7]):
        cu = torch.tensor(ends)
        attn(q, q, q, cu_q=cu, cu_k=cu)
        attn(q, q, q, k_len=cu[1:2])
    assert len(attn.specialiser.known) == 2


@pytest.mark.parametrize(
    "lengths, name",
    [
        (dict(k_len=[-1, 2]), "k_len"),
        (dict(k_len=[1, 9]), "k_len"),
        (dict(k_len=[1]), "k_len"),
        (dict(cu_q=[0, 2]), "cu_q"),
        (dict(cu_q=[1, 2], cu_k=[0, 8]), "cu_q"),
        (dict(cu_q=[0, 2, 1], cu_k=[0, 8, 8]), "cu_q"),
        (dict(cu_q=[0, 2], cu_k=[0, 9]), "cu_k"),
        (dict(cu_q=[0, 2], cu_k=[0, 2, 8]), "cu_k"),
    ],
)
def test_bad_input(lengths: dict[str, list[int]], name: str):
    q = torch.randn(1 if "cu_q" in lengths else 2, 1, 8, 16)
    with pytest.raises(ag.InputError, match=name):
        ag.compile(ag.Spec())(q, q, q, **{n: torch.tensor(x) for n, x in lengths.items()})


def wrapped(name: str) -> tuple[Any, tuple[torch.Tensor, ...], dict[str, Any]]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 6, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    if name == "packed":
        cu = torch.tensor([0, 2, 6])
        return ag.compile(ag.Spec(mask=ag.causal())), (q[:1], k[:1], v[:1]), dict(cu_q=cu, cu_k=cu)
    if name == "padded":
        return ag.compile(ag.Spec()), (q, k, v), dict(k_len=torch.tensor([3, 8]))
    if name == "prefix":
        prefix = dict(prefix_k=torch.randn(1, 2, 9, 16), prefix_v=torch.randn(1, 2, 9, 16))
        return ag.compile(ag.Spec(keys=ag.shared_prefix())), (q, k, v), prefix
    if name == "graph":
        crow, col = torch.arange(7), torch.tensor([0, 3, 7, 1, 2, 5])
        return ag.compile(ag.Spec(keys=ag.graph()), backend="interpret"), (q, k, v), dict(crow=crow, col=col)
    pages = dict(page_table=torch.tensor([[1], [0]]))
    attn = ag.compile(ag.Spec(keys=ag.paged(8, head_major=True)), backend="interpret")
    return attn, (q, k, v), pages


@pytest.mark.parametrize("name", ["packed", "padded", "prefix", "graph", "paged"])
def test_torch_compile(name: str):
    attn, qkv, captures = wrapped(name)
    compiled = torch.compile(lambda *tensors: attn(*tensors, **captures), backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), attn(*qkv, **captures))


@pytest.mark.parametrize("name", ["packed", "padded", "prefix", "graph", "paged"])
def test_autocast(name: str):
    attn, qkv, captures = wrapped(name)
    with torch.autocast("cpu", torch.float16):
        out = attn(*qkv, **captures)
    torch.testing.assert_close(out.float(), attn(*qkv, **captures), rtol=0.05, atol=0.05)

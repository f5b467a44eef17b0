"""HyperAttention: the definition, its estimator, and the faults of the public implementation."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.language.call import bind
from attngen.plan.keysets.hyper import Draws, cut, gray_decode, layout_of
from tests.check import check
from tests.keys_cases import MASKS, SIZES, compare, inputs, visited
from tests.keys_work import memory

SMALL = (1, 1, 2, 70, 70, 0)


@pytest.mark.parametrize("size", [*SIZES, (1, 2, 1, 77, 160, 0)])
@pytest.mark.parametrize(
    ("block", "samples", "min_len"), [(8, 6, 10), (16, 0, 10), (7, 500, 5), (500, 9, 5), (8, 8, 1000)]
)
def test_without_causality(size: tuple[int, ...], block: int, samples: int, min_len: int):
    compare(ag.Spec(keys=ag.hyper(block, samples, min_len)), size, dict(seed=5))


@pytest.mark.parametrize("n", [1, 19, 20, 21, 64, 131])
@pytest.mark.parametrize("mask", ["causal", "strict", "window"])
@pytest.mark.parametrize(("block", "samples", "min_len"), [(8, 6, 10), (7, 0, 4), (5, 300, 9), (300, 5, 9)])
def test_the_causal_recursion_is_the_definition(n: int, mask: str, block: int, samples: int, min_len: int):
    """Also where n is not divisible by the parts or the blocks: no padded key gets in."""
    compare(ag.Spec(keys=ag.hyper(block, samples, min_len), mask=MASKS[mask]), (2, 1, 2, n, n, 0), dict(seed=2))


def test_scores_and_captures_stay_on_original_positions():
    slope, doc = ag.Tensor("slope", 1), ag.Tensor("doc", 2, dtype=torch.int32)
    spec = ag.Spec(
        keys=ag.hyper(8, 6, 10),
        mask=lambda b, h, i, j: (i >= j) & (doc[b, i] == doc[b, j]),
        score=lambda s, b, h, i, j: s + slope[h] * (j - i),
        sink=ag.sink(),
    )
    ids = torch.stack([torch.arange(100) // 40, torch.arange(100) // 7]).int()
    compare(spec, (2, 1, 2, 100, 100, 0), dict(seed=1, slope=torch.rand(2), doc=ids, sink=torch.randn(2)))


@pytest.mark.parametrize("mask", [None, ag.causal()])
def test_generated_kernels(mask: Any):
    compare(ag.Spec(keys=ag.hyper(16, 8, 16), mask=mask), (1, 1, 1, 40, 40, 0), dict(seed=1), backend="interpret")


@pytest.mark.parametrize("mask", [None, ag.causal()])
@pytest.mark.parametrize("cover", [dict(block=70), dict(samples=70), dict(min_len=71)])
def test_exact_where_block_or_samples_cover_everything(mask: Any, cover: dict[str, int]):
    spec = ag.Spec(keys=ag.hyper(**{"block": 8, "samples": 8, "min_len": 8, **cover}), mask=mask)
    q, k, v = inputs(SMALL)
    out = ag.compile(spec)(q, k, v, seed=3)
    expected, _ = ag.oracle(ag.Spec(mask=mask), q, k, v)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_no_samples_is_block_diagonal():
    """In the order of the buckets; keys of other blocks and padding have no weight."""
    q, k, v = inputs(SMALL)
    spec = ag.Spec(keys=ag.hyper(16, 0, 8))
    out = ag.compile(spec)(q, k, v, seed=3)
    draws = Draws(bind(ag.Spec(), q, k, v, captures={}), 3)
    place = [draws.ranks(x, 70).argsort(dim=-1, stable=True).argsort(-1) // 16 for x in (q, k)]
    same = place[0].unsqueeze(-1) == place[1].repeat_interleave(2, 1).unsqueeze(-2)
    logits = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~same, -math.inf)
    assert torch.allclose(out, logits.softmax(-1) @ v.repeat_interleave(2, 1), atol=1e-5)


def test_neighbouring_buckets_differ_in_one_bit():
    """Encoding where decoding is meant leaves 31 of the 127 neighbours further apart."""
    codes = torch.arange(128)
    place = gray_decode(codes)
    assert torch.equal(place.sort().values, codes)
    ordered = place.argsort()  # the code at each place
    flips = [bin(int(a) ^ int(b)).count("1") for a, b in pairwise(ordered)]
    assert flips == [1] * 127
    encoded = (codes ^ (codes >> 1)).argsort()
    assert sum(bin(int(a) ^ int(b)).count("1") > 1 for a, b in pairwise(encoded)) == 31


def sums(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax's denominator [B, H, N, 1] and its numerator [B, H, N, Dv]."""
    total = lse.double().exp().unsqueeze(-1)
    return total, out.double() * total


def deviations(values: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How many standard errors the mean over the first dimension is off; what no draw changes has to be exact."""
    error = values.std(0) / math.sqrt(len(values))
    drawn = error > 1e-6 * exact.abs()
    assert torch.allclose(values.mean(0)[~drawn], exact[~drawn], rtol=1e-4, atol=1e-5)
    return ((values.mean(0) - exact) / error)[drawn]


RUNS = 256


@pytest.mark.parametrize(
    ("mask", "size", "min_len"), [(None, (2, 4, 1, 24, 96, 0), 8), (ag.causal(), (2, 4, 1, 96, 96, 0), 48)]
)
def test_the_estimate_is_unbiased(mask: Any, size: tuple[int, ...], min_len: int):
    """Over 256 seeds the mean of the estimated numerator and denominator is within 3 standard errors of the exact ones.

    Of each head's sums over all queries, the numerator along one direction: that is 16 numbers. A single entry may be further
    off, one of 370 if they are normal; the queries of a head share their samples, so that how far the count of those strays
    is taken from how much it differs between heads. The own block counted twice is off by more than 20 of them.
    """
    q, k, v = inputs(size)
    attn = ag.compile(ag.Spec(keys=ag.hyper(16, 16, min_len), mask=mask))
    exact = sums(*ag.oracle(ag.Spec(mask=mask), q, k, v))
    runs = [sums(*attn(q, k, v, return_lse=True, seed=seed)) for seed in range(RUNS)]
    along = torch.randn(v.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, values, want in zip(("denominator", "numerator"), zip(*runs, strict=True), exact, strict=True):
        stack = torch.stack(values)
        way = along if name == "numerator" else along.new_ones(1)
        whole = deviations((stack @ way).sum(-1), (want @ way).sum(-1))
        assert whole.numel() == size[0] * size[1] and whole.abs().max() < 3, f"{name}: {whole}"
        heads = [deviations(stack[:, b, h], want[b, h]) for b in range(size[0]) for h in range(size[1])]
        far = torch.tensor([float((head.abs() > 3).sum()) for head in heads])
        expected = math.erfc(3 / math.sqrt(2)) * sum(head.numel() for head in heads)
        assert far.sum() <= expected + 3 * math.sqrt(len(far)) * max(far.std(), 1.0), f"{name}: {far}"
        assert torch.cat(heads).square().mean().sqrt() < 1.2, name


def test_the_error_falls_as_one_over_the_root_of_the_samples():
    q, k, v = inputs((1, 1, 1, 32, 1024, 0), seed=2)
    exact, _ = ag.oracle(ag.Spec(), q, k, v)
    errors = []
    for samples in (16, 64, 256):
        attn = ag.compile(ag.Spec(keys=ag.hyper(16, samples, 8)))
        runs = [(attn(q, k, v, seed=seed).double() - exact).square().mean() for seed in range(12)]
        errors.append(torch.stack(runs).mean().sqrt().item())
    for coarse, fine in pairwise(errors):
        assert 1.5 < coarse / fine < 2.6, errors


def test_lse_is_exact_in_float32_where_half_types_saturate():
    """Two pieces whose sums differ by e^20: merged by logaddexp in float32, also for half inputs."""
    q, k, v = (x.half() for x in inputs((1, 1, 1, 64, 64, 0)))
    spec = ag.Spec(keys=ag.hyper(8, 8, 8), scale=3.0)
    out, lse = ag.compile(spec)(q, k, v, return_lse=True, seed=0)
    expected, expected_lse = ag.oracle(spec, q, k, v, seed=0)
    assert lse.dtype == torch.float32 and (lse - expected_lse).abs().max() < 1e-4
    assert (out.double() - expected).abs().max() < 4e-3


def test_the_gradient_flows_through_the_merge_weights():
    """A detached lse would lose part of dq and dk: `check` compares with autograd through the dense weighted definition."""
    q, k, v = inputs(SMALL)
    spec = ag.Spec(keys=ag.hyper(8, 8, 8))
    check(spec, ag.compile(spec), q * 3, k, v, dict(seed=4))


def test_seeds():
    q, k, v = inputs(SMALL)
    attn = ag.compile(ag.Spec(keys=ag.hyper(8, 8, 8), mask=ag.causal()))
    assert torch.equal(attn(q, k, v, seed=1), attn(q, k, v, seed=1))
    assert not torch.equal(attn(q, k, v, seed=1), attn(q, k, v, seed=2))
    plan = attn.plan(q, k, v, seed=2)
    assert torch.equal(attn(q, k, v, plan=plan), attn(q, k, v, seed=2))
    with pytest.raises(ag.InputError, match="seed: expected an int"):
        attn(q, k, v)
    with pytest.raises(ag.InputError, match="as many queries as keys"):
        attn(q[:, :, :60], k, v, seed=1)


@pytest.mark.parametrize(("n", "levels", "block"), [(16384, 2, 256), (65536, 4, 256), (16383, 2, 256), (1000, 3, 8)])
def test_the_parts_cover_the_triangle_once(n: int, levels: int, block: int):
    layout = cut(n, levels, block)
    covered = layout.leaves * layout.leaf * (layout.leaf + 1) // 2
    for pairs in layout.pairs:
        assert pairs.k_first + (pairs.count - 1) * 2 * pairs.k_size + pairs.k_size <= n  # keys are never padding
        covered += (1 << levels) // (2 * pairs.q_size // layout.leaf) * pairs.q_size * pairs.k_size
    assert covered == layout.length * (layout.length + 1) // 2 and 0 <= layout.length - n < 1 << levels


def test_pairs_are_few():
    """3.2 times fewer than causal at 16384, 10.7 times at 65536, with block and samples 256 and min_len 4096."""
    for n, fewer in ((16384, 3.2), (65536, 10.7)):
        layout = layout_of(ag.hyper(), ag.Spec(keys=ag.hyper(), mask=ag.causal()), n, n)
        assert layout is not None
        pairs = layout.leaves * layout.leaf**2 / 2 + sum(p.count * p.q_size * 512 for p in layout.pairs)
        assert abs(n * n / 2 / pairs - fewer) < 0.1


@pytest.mark.parametrize("mask", [None, ag.causal()])
def test_work_is_the_patterns(mask: Any):
    size = (1, 1, 1, 1000, 1000, 0)
    seen, needed = visited(ag.Spec(keys=ag.hyper(64, 64, 128), mask=mask), *inputs(size), block=32, seed=1)
    assert needed <= seen <= 1.1 * needed


@pytest.mark.parametrize("mask", [None, ag.causal()])
def test_no_tensor_has_a_sample_per_query(mask: Any):
    """A bias of N x samples, or anything N x N, is never made, forward or backward."""
    n, samples = 2048, 512
    leaves = [x.requires_grad_() for x in inputs((1, 1, 1, n, n, 0))]
    attn = ag.compile(ag.Spec(keys=ag.hyper(64, samples, 256), mask=mask))
    found = memory(lambda: torch.autograd.grad(attn(*leaves, seed=1).sum(), leaves))
    assert 0 < found.largest <= 4 * n * 128 < 4 * n * samples


def test_preparation_is_linear():
    attn = ag.compile(ag.Spec(keys=ag.hyper(64, 64, 128)))
    sizes = [attn.plan(*inputs((1, 1, 1, n, n, 0)), seed=1).nbytes for n in (2048, 4096)]
    assert sizes[1] <= 2.1 * sizes[0]

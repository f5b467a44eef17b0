"""Numerics of the CPU backend far from ordinary: large logits, the least finite numbers, sinks, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attngen as ag
from attngen.language.spec import Spec

LEAST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


def inputs(n: int = 40, dtype: torch.dtype = torch.float32, heads: int = 4, kv: int = 2) -> list[torch.Tensor]:
    """q, k, v [2, heads, n, 16]."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, heads, n, 16), (2, kv, n, 16), (2, kv, n, 16)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(attn: Any, leaves: list[torch.Tensor], captures: dict[str, Any]) -> list[torch.Tensor]:
    """out, lse, and the gradients of q, k, v and all float captures of a fixed loss."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    floats = {n: t.detach().clone().requires_grad_() for n, t in captures.items() if t.is_floating_point()}
    out, lse = attn(*leaves, **{**captures, **floats})
    generator = torch.Generator().manual_seed(7)
    weight, bias = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    # torch's own gradient of logsumexp is exp(x - lse): near 1e38 the oracle's weights don't add up to 1.
    loss = (out * weight).sum() + (torch.where(lse.abs() < 1e30, lse, 0.0) * bias).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, [*leaves, *floats.values()], materialize_grads=True)]


def agree(spec: Spec, leaves: list[torch.Tensor], captures: dict[str, Any], limit: float, **how: Any) -> None:
    """Relative Frobenius error of out, lse and gradients against the oracle in float64."""
    got = gradients(lambda *x, **c: ag.compile(spec, backend="cpu", **how)(*x, return_lse=True, **c), leaves, captures)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in captures.items()}
    want = gradients(lambda *x, **c: ag.oracle(spec, *x, **c), [t.double() for t in leaves], wide)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isneginf(), b.isneginf())
        a, b = (x.double().nan_to_num(neginf=0.0) if x.isneginf().any() else x.double() for x in (a, b))
        assert a.isfinite().all()
        top = b.abs().max().clamp(min=1e-30)  # a norm of numbers near 1e38 would overflow
        error = ((a - b) / top).norm() / (b / top).norm().clamp(min=1e-2)
        assert error <= limit, f"relative error {error.item():.1e}"


LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-2}


# -- large logits -----------------------------------------------------------------------------------------------------

BLOCKS = {
    "default": ag.Schedule(),
    "several chunks": ag.Schedule(block_m=32, block_n=64, dq_block_m=32, dq_block_n=64),
    "other blocks backward": ag.Schedule(block_m=128, block_n=64, dq_block_m=32, dq_block_n=128),
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("scored", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("size", [1.0, 30.0, 128.0, 1e3, 1e4, 1e5, 1e6])
def test_gradients_at_large_logits_are_as_good_as_torchs(size: float, scored: bool, blocks: str):
    """Within 4 times SDPA's error, both against float64; at other lengths its own backward sees other logits than its forward."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, weight = (torch.randn(1, 2, 256, 64, generator=generator) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q * size / 4, k, v)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    spec = ag.Spec(
        mask=ag.causal(), score="where(i >= 0, s, 1.0)" if scored else "s"
    )  # the same, but not for the compiler
    attn = ag.compile(spec, backend="cpu", schedule=BLOCKS[blocks])

    def run(attend: Any, x: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((attend(*x) * weight).sum(), x)

    def torchs(*x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*x, is_causal=True)

    for ours, theirs, exact in zip(run(attn, leaves), run(torchs, leaves), run(torchs, wide), strict=True):
        errors = [(x.double() - exact).norm().item() for x in (ours, theirs)]
        assert errors[0] <= 4 * max(errors[1], 1e-7 * exact.norm().item()), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [-1e9, -1e5, 1e4, 3e38])
def test_a_constant_logit_changes_only_lse(shift: float, dtype: torch.dtype):
    """All keys count the same, however large it is."""
    bias, bias_of = torch.full((40, 40), shift / 2, dtype=dtype), ag.Tensor("bias", 2)
    spec = ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: 2 * bias_of[i, j])
    agree(spec, inputs(dtype=dtype), {"bias": bias}, LIMITS[dtype] * 10)


# -- the least finite numbers -----------------------------------------------------------------------------------------


def padding(dtype: torch.dtype, value: float, n: int = 40) -> torch.Tensor:
    """A left-padded batch's bias [2, n, n]: causal, batch 1 without its first 9 keys; rows 0 .. 8 there have no other key."""
    i, j = torch.arange(n).view(-1, 1), torch.arange(n)
    allowed = torch.stack([i >= j, (i >= j) & (j >= 9)])
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, value)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("part", [1.0, 0.75])
def test_rows_of_the_least_finite_bias_are_means(part: float, blocks: str, dtype: torch.dtype):
    spec = ag.Spec(score=ag.bias("bij"))
    captures = {"bias": padding(dtype, LEAST[dtype] * part)}
    agree(spec, inputs(dtype=dtype), captures, LIMITS[dtype], schedule=BLOCKS[blocks])
    if dtype != torch.float16:  # whose least number leaves something of the logits
        leaves = inputs(dtype=dtype)
        out = ag.compile(spec, backend="cpu")(*leaves, **captures)
        mean = leaves[2][1].mean(1, keepdim=True, dtype=torch.float64).repeat_interleave(2, 0)
        torch.testing.assert_close(out[1, :, :9].double(), mean.expand(-1, 9, -1), rtol=0, atol=LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_least_finite_bias_beside_a_mask_a_sink_and_a_larger_one(dtype: torch.dtype):
    """A pair that is masked out stays out of the mean; of two tiny biases the larger wins; a sink of a real size takes all."""
    leaves, bias = inputs(dtype=dtype), padding(dtype, LEAST[dtype])
    agree(ag.Spec(mask="j != 3", score=ag.bias("bij")), leaves, {"bias": bias}, LIMITS[dtype])
    two = bias.clone()
    two[1, :9, 20] = LEAST[dtype] * 0.875
    agree(ag.Spec(mask="j != 3", score=ag.bias("bij")), leaves, {"bias": two}, LIMITS[dtype])
    for sink in (torch.zeros(4), torch.full((4,), LEAST[torch.float32])):
        agree(ag.Spec(score=ag.bias("bij"), sink=ag.sink()), leaves, {"bias": bias, "sink": sink}, LIMITS[dtype])


def test_a_logit_that_only_base_2_would_lose():
    """q.k of -3e38, times log2(e) beyond float32: alone in its row it has the weight 1."""
    q, k, v = (torch.full((1, 1, 1, 16), x, dtype=torch.float32) for x in (-1.5e19, 0.5e19, 2.0))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = ag.compile(ag.Spec(scale=0.25), backend="cpu")(*leaves, return_lse=True)
    assert out.eq(2).all() and abs(lse.item() / -3e38 - 1) < 1e-5
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert dv.eq(1).all() and not dq.any() and not dk.any()


@pytest.mark.parametrize(
    "score", ["where(s > 0, s, s / 2)", "where(s == 0, 1, s)", "s + floor(s)", "s // 1 * slope[h]"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [3, 20])
def test_whole_numbers_meet_the_jump_of_a_score_exactly(score: str, dtype: torch.dtype, head_dim: int):
    """q.k of whole numbers is 0 for many pairs: a factor that was rounded into q would put some of them past the jump."""
    generator = torch.Generator().manual_seed(11)
    leaves = [torch.randint(-2, 3, (1, 2, 40, head_dim), generator=generator).to(dtype) for _ in range(3)]
    spec = ag.Spec(score=score, scale=0.75 if "==" in score else 0.25, tensors=[ag.Tensor("slope", 1)])
    slope = torch.tensor([0.5, -0.25])
    for n_q in (40, 4):
        leaves[0] = leaves[0][:, :, :n_q]
        agree(spec, leaves, {"slope": slope} if "slope" in spec.tensors else {}, LIMITS[dtype])


# -- sinks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("sink", [-12.0, 0.0, 9.0, -torch.inf], ids=str)
@pytest.mark.parametrize("mask", ["true", "i >= j", "i > j and i - j < 12"])
@pytest.mark.parametrize("store", [True, False], ids=["store", "recompute"])
def test_learned_sinks(store: bool, mask: str, sink: float, dtype: torch.dtype):
    """Rows that see no key included, and weights kept for the backward."""
    captures = {"sink": torch.linspace(-1, 1, 4, dtype=dtype) + sink}
    spec = ag.Spec(mask=mask, sink=ag.sink())
    schedule = ag.Schedule(store=store, block_m=16, block_n=32, dq_block_m=16, dq_block_n=32)
    agree(spec, inputs(dtype=dtype), captures, LIMITS[dtype], schedule=schedule)


def test_a_sink_of_minus_infinity_in_a_row_without_a_key_has_gradient_0():
    for spec in (ag.Spec(mask="i > j", sink=ag.sink()), ag.Spec(mask="i > j", score=ag.soft_cap(5.0), sink=ag.sink())):
        leaves = [t.requires_grad_() for t in inputs()]
        sink = torch.full((4,), -torch.inf, requires_grad=True)
        out, lse = ag.compile(spec, backend="cpu")(*leaves, sink=sink, return_lse=True)
        assert lse[:, :, 0].isneginf().all() and not out[:, :, 0].any()
        grads = torch.autograd.grad(out.sum() + lse[:, :, 1:].sum(), [*leaves, sink])
        assert all(g.isfinite().all() for g in grads) and not grads[3].any() and not grads[0][:, :, 0].any()


# -- keys listed by row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_edges_at_large_logits(size: float):
    """The same graph as a mask, through the other loops."""
    n = 30
    q, k, v = inputs(n)
    leaves = [q * size / 4, k, v]
    i, j = torch.arange(n).view(-1, 1), torch.arange(n)
    edges = (i * 7 + j * 3) % 5 < 2
    graph = dict(crow=torch.cat([torch.zeros(1, dtype=torch.int64), edges.sum(1).cumsum(0)]), col=edges.nonzero()[:, 1])
    listed = gradients(lambda *x, **c: ag.compile(ag.Spec(keys=ag.graph()))(*x, return_lse=True, **c), leaves, graph)
    masked = gradients(
        lambda *x, **c: ag.compile(ag.Spec(mask="(i * 7 + j * 3) % 5 < 2"), backend="cpu")(*x, return_lse=True, **c),
        leaves,
        {},
    )
    for index in (0, 4):  # out and dv; dq and dk are differences of numbers that are all but equal
        torch.testing.assert_close(listed[index], masked[index], rtol=1e-4, atol=1e-4)

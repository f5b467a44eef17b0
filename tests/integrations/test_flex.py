"""`attngen.flex` in the place of torch's FlexAttention: the same functions, the same results and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import flex_attention as torchs

from attngen import flex
from tests.integrations.flex_cases import CASES, B, D, H, N, randn


@pytest.fixture(autouse=True)
def without_dynamo(monkeypatch):
    """torch's eager FlexAttention is compiled with a backend that does nothing: each mod would be traced by Dynamo for that."""
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture(autouse=True)
def in_float64():
    """To torch `0.1 * (q_idx - kv_idx)` is of the default dtype: what is compared with has none of its rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inputs(dtype=torch.float64, heads=H, kv_heads=H, n_q=N, n_k=N, batch=B):
    shapes = ((batch, heads, n_q, D), (batch, kv_heads, n_k, D), (batch, kv_heads, n_k, D))
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes]


def torch_mask(mask_mod, n_q=N, n_k=N, batch=B, heads=H, block=128):
    return None if mask_mod is None else torchs.create_block_mask(mask_mod, batch, heads, n_q, n_k, "cpu", block)


def own_mask(mask_mod, n_q=N, n_k=N, batch=B, heads=H):
    return None if mask_mod is None else flex.create_block_mask(mask_mod, batch, heads, n_q, n_k, "cpu")


def torch_result(q, k, v, score_mod=None, block_mask=None, **options):
    """out and lse of torch's FlexAttention, which has no gradients on a CPU."""
    with torch.no_grad():
        q, k, v = (x.detach() for x in (q, k, v))
        out, aux = torchs.flex_attention(
            q, k, v, score_mod, block_mask, return_aux=torchs.AuxRequest(lse=True), **options
        )
    return out, aux.lse


def dense(q, k, v, mask_mod, score_mod):
    """out from the weights of all pairs: the mods run on indices that broadcast."""
    b, h = torch.arange(q.shape[0]).view(-1, 1, 1, 1), torch.arange(q.shape[1]).view(1, -1, 1, 1)
    i, j = torch.arange(q.shape[2]).view(1, 1, -1, 1), torch.arange(k.shape[2]).view(1, 1, 1, -1)
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])
    score = score if score_mod is None else score_mod(score, b, h, i, j)
    if mask_mod is not None:
        score = torch.where(mask_mod(b, h, i, j), score, -torch.inf)
    empty = score.isneginf().all(-1, keepdim=True)
    return torch.where(empty, 0.0, torch.where(empty, 0.0, score).softmax(-1)) @ v


def close(got, want, limit=1e-11):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.equal(got.isneginf(), want.isneginf())
    difference = (got - want).masked_fill(want.isneginf(), 0).norm()
    assert difference <= limit * max(1.0, want.masked_fill(want.isneginf(), 0).norm())


@pytest.mark.parametrize("name", CASES)
def test_same_as_torch(name):
    mask_mod, score_mod, learned = CASES[name]()
    q, k, v = inputs()
    want, want_lse = torch_result(q, k, v, score_mod, torch_mask(mask_mod))
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(learned.values())
    out, lse = flex.flex_attention(q, k, v, score_mod, own_mask(mask_mod), return_lse=True)
    close(out, want)
    close(lse, want_lse)
    weight = randn(*out.shape)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((dense(q, k, v, mask_mod, score_mod) * weight).sum(), leaves)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, 1e-10)


@pytest.mark.parametrize(
    "name", ["sliding_window", "documents", "alibi", "bias_by_distance", "causal_as_score", "soft_cap"]
)
def test_generated_kernels(name):
    mask_mod, score_mod, learned = CASES[name]()
    q, k, v = inputs(torch.float32)
    want, want_lse = torch_result(*inputs(), score_mod, torch_mask(mask_mod))
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(learned.values())
    options = {
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 32,
        "bwd_BLOCK_M2": 32,
        "bwd_BLOCK_N2": 32,
    }
    out, lse = flex.flex_attention(
        q, k, v, score_mod, own_mask(mask_mod), return_lse=True, kernel_options=options, backend="interpret"
    )
    close(out.double(), want, 1e-5)
    close(lse.double(), want_lse, 1e-5)
    got = torch.autograd.grad(out.sum(), leaves)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(dense(*wide, mask_mod, score_mod).sum(), [*wide, *learned.values()])
    for mine, theirs in zip(got, expected, strict=True):
        close(mine.double(), theirs, 1e-4)

"""QK-sparse and hash-sparse attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from tests.keys_cases import MASKS, SIZES, compare, inputs, visited

KEEPS = {
    "half": lambda shape, g: torch.rand(shape, generator=g) < 0.5,
    "few": lambda shape, g: torch.rand(shape, generator=g) < 0.03,
    "none": lambda shape, g: torch.zeros(shape, dtype=torch.bool),
    "all": lambda shape, g: torch.ones(shape, dtype=torch.bool),
    "one head empty": lambda shape, g: (
        (torch.rand(shape, generator=g) < 0.5) & (torch.arange(shape[1]).view(1, -1, 1) > 0)
    ),
}
BUCKETS = {
    "random": lambda shape, g: torch.randint(0, 5, shape, generator=g),
    "mostly empty": lambda shape, g: torch.randint(0, 3, shape, generator=g) * 1000,
    "one giant": lambda shape, g: (torch.rand(shape, generator=g) < 0.05).long(),
    "rising": lambda shape, g: (torch.arange(shape[2]) // 13).expand(shape),
    "falling": lambda shape, g: (40 - torch.arange(shape[2]) // 13).expand(shape),
    "alternating": lambda shape, g: (torch.arange(shape[2]) % 2).expand(shape),
}


def keeps(size: tuple[int, ...], kind_q: str, kind_k: str, seed: int = 0) -> dict[str, Any]:
    batch, heads, group, n_q, n_k, _ = size
    g = torch.Generator().manual_seed(seed)
    return dict(keep_q=KEEPS[kind_q]((batch, heads * group, n_q), g), keep_k=KEEPS[kind_k]((batch, heads, n_k), g))


def buckets(size: tuple[int, ...], kind: str, seed: int = 0) -> dict[str, Any]:
    batch, heads, group, n_q, n_k, _ = size
    g = torch.Generator().manual_seed(seed)
    return dict(q_bucket=BUCKETS[kind]((batch, heads * group, n_q), g), k_bucket=BUCKETS[kind]((batch, heads, n_k), g))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_qk_sparse_equals_the_oracle(size: tuple[int, ...], mask: str):
    compare(ag.Spec(keys=ag.qk_sparse(), mask=MASKS[mask]), size, keeps(size, "half", "half"))


@pytest.mark.parametrize("kind_q", KEEPS)
@pytest.mark.parametrize("kind_k", KEEPS)
def test_qk_sparse_with_odd_keeps(kind_q: str, kind_k: str):
    compare(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()), SIZES[3], keeps(SIZES[3], kind_q, kind_k))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", MASKS)
def test_hash_sparse_equals_the_oracle(size: tuple[int, ...], mask: str):
    compare(ag.Spec(keys=ag.hash_sparse(), mask=MASKS[mask]), size, buckets(size, "random"))


@pytest.mark.parametrize("kind", BUCKETS)
@pytest.mark.parametrize("size", [SIZES[3], SIZES[4]])
def test_hash_sparse_with_odd_buckets(size: tuple[int, ...], kind: str):
    compare(ag.Spec(keys=ag.hash_sparse(), mask=ag.causal()), size, buckets(size, kind))


def test_scores_sinks_and_captures_stay_on_original_positions():
    size = SIZES[3]
    slope, doc = ag.Tensor("slope", 1), ag.Tensor("q_position", 2, dtype=torch.int32)  # a name that the pieces use too
    spec = ag.Spec(
        keys=ag.hash_sparse(),
        mask=lambda b, h, i, j: (i >= j) & (doc[b, i] == doc[b, j]),
        score=lambda s, b, h, i, j: s + slope[h] * (j - i),
        sink=ag.sink(),
    )
    more = dict(slope=torch.rand(4), sink=torch.randn(4), q_position=(torch.arange(130) // 50).int()[None])
    compare(spec, size, buckets(size, "random") | more)


@pytest.mark.parametrize("offset", [500, -20])
@pytest.mark.parametrize("mask", ["causal", "none", "window"])
def test_far_offsets_stay_in_the_bucket(offset: int, mask: str):
    size = (1, 1, 2, 60, 50, offset)
    compare(ag.Spec(keys=ag.hash_sparse(), mask=MASKS[mask]), size, buckets(size, "random"))


@pytest.mark.parametrize("keys", [ag.qk_sparse(), ag.hash_sparse()])
def test_offsets_per_batch(keys: Any):
    size = (2, 1, 2, 30, 80, torch.tensor([50, 3]))
    captures = keeps(size, "half", "half") if keys.name == "qk_sparse" else buckets(size, "random")
    compare(ag.Spec(keys=keys, mask=ag.causal()), size, captures)


@pytest.mark.parametrize("keys", [ag.qk_sparse(), ag.hash_sparse()])
def test_generated_kernels(keys: Any):
    size = (1, 1, 2, 40, 40, 0)
    captures = keeps(size, "half", "half") if keys.name == "qk_sparse" else buckets(size, "random")
    compare(ag.Spec(keys=keys, mask=ag.causal()), size, captures, backend="interpret")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype):
    size = SIZES[3]
    q, k, v = (x.to(dtype) for x in inputs(size))
    spec, captures = ag.Spec(keys=ag.hash_sparse(), mask=ag.causal()), buckets(size, "random")
    out, lse = ag.compile(spec)(q, k, v, return_lse=True, **captures)
    expected, _ = ag.oracle(spec, q, k, v, **captures)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.double() - expected).abs().max() <= 3 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_query_sees_itself():
    """`>` where `>=` is meant would leave the first query of each bucket without a key."""
    size = SIZES[1]
    spec = ag.Spec(keys=ag.hash_sparse(), mask=ag.causal())
    same = buckets(size, "random")
    same["k_bucket"] = same["q_bucket"]
    _, lse = ag.compile(spec)(*inputs(size), return_lse=True, **same)
    assert lse.isfinite().all()


@pytest.mark.parametrize("kind", ["rising", "falling", "random"])
def test_the_walk_loses_no_pair_where_hashes_follow_positions(kind: str):
    """Uniform logits and one-hot values: every pair shows up in the backward too (a walk that stops too early lost some)."""
    size = (1, 1, 1, 200, 200, 0)
    captures = buckets(size, kind)
    q, k = torch.zeros(1, 1, 200, 16), torch.zeros(1, 1, 200, 16)
    v = torch.eye(200)[None, None].requires_grad_()
    out = ag.compile(ag.Spec(keys=ag.hash_sparse(), mask=ag.causal()))(q, k, v, **captures)
    same = captures["q_bucket"].unsqueeze(-1) == captures["k_bucket"].unsqueeze(-2)
    pairs = same & torch.ones(200, 200, dtype=torch.bool).tril()
    assert torch.equal(out.detach() > 0, pairs)
    (grad,) = torch.autograd.grad(out.diagonal(dim1=-2, dim2=-1).sum(), v)
    expected = torch.where(pairs.any(-1), 1 / pairs.sum(-1).clamp(min=1), 0.0).diag_embed()
    expected = torch.where(torch.eye(200) > 0, expected * pairs, 0.0)
    assert torch.allclose(grad.diagonal(dim1=-2, dim2=-1), expected.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("keys", ["qk_sparse", "hash_sparse"])
@pytest.mark.parametrize("mask", ["causal", "window", "none"])
def test_work_is_the_patterns(keys: str, mask: str):
    size = (1, 1, 2, 1000, 1000, 0)
    captures = keeps(size, "half", "half") if keys == "qk_sparse" else buckets(size, "random")
    spec = ag.Spec(keys=getattr(ag, keys)(), mask=MASKS[mask] if mask != "window" else ag.causal() & ag.window(200))
    seen, needed = visited(spec, *inputs(size), block=32, **captures)
    assert needed <= seen <= 1.1 * needed


@pytest.mark.parametrize("keys", ["qk_sparse", "hash_sparse"])
def test_preparation_is_linear(keys: str):
    def nbytes(n: int) -> int:
        size = (1, 1, 2, n, n, 0)
        captures = keeps(size, "half", "half") if keys == "qk_sparse" else buckets(size, "random")
        return ag.compile(ag.Spec(keys=getattr(ag, keys)(), mask=ag.causal())).plan(*inputs(size), **captures).nbytes

    assert nbytes(2048) <= 2.1 * nbytes(1024) and nbytes(1024) < 1024 * 400


def test_a_plan_serves_other_calls():
    size = SIZES[3]
    spec, captures = ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()), keeps(size, "half", "half")
    attn = ag.compile(spec)
    plan = attn.plan(*inputs(size), **captures)
    other = inputs(size, seed=9)
    assert torch.equal(attn(*other, plan=plan), attn(*other, **captures))
    with pytest.raises(ag.InputError, match="a plan for"):
        attn(*inputs(SIZES[2]), plan=plan)
    with pytest.raises(ag.InputError, match="a plan for hash_sparse"):
        ag.compile(ag.Spec(keys=ag.hash_sparse()))(*other, plan=plan)
    with pytest.raises(ag.InputError, match="without"):
        ag.compile(ag.Spec())(*other, plan=plan)
    told = attn.explain(*other, **captures)
    assert all(step.name in told for step, _ in attn.attends(*other, **captures))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_q": None}, "keep_q: expected bool"),
        ({"keep_q": torch.ones(1, 4, 130)}, "keep_q: expected bool"),
        ({"keep_k": torch.ones(1, 4, 130, dtype=torch.bool)}, r"keep_k: expected bool \[B, Hkv, Nk\] = \[1, 2, 130\]"),
        ({"keep": 1}, "keep: expected one of"),
    ],
)
def test_bad_keeps(change: dict[str, Any], message: str):
    captures = {**keeps(SIZES[3], "half", "half"), **change}
    with pytest.raises(ag.InputError, match=message):
        ag.compile(ag.Spec(keys=ag.qk_sparse()))(*inputs(SIZES[3]), **captures)


def test_bad_buckets():
    good = buckets(SIZES[3], "random")
    attn = ag.compile(ag.Spec(keys=ag.hash_sparse(5)))
    attn(*inputs(SIZES[3]), **good)
    for wrong in (good["k_bucket"] - 1, good["k_bucket"] + 1):
        with pytest.raises(ag.InputError, match=r"k_bucket: expected bucket numbers in 0 \.\. 4"):
            attn(*inputs(SIZES[3]), **{**good, "k_bucket": wrong})
    with pytest.raises(ag.InputError, match="q_bucket: expected int"):
        attn(*inputs(SIZES[3]), **{**good, "q_bucket": good["q_bucket"].float()})


@pytest.mark.parametrize("size", [(0, 1, 1, 9, 9, 0), (1, 1, 1, 0, 9, 0), (1, 1, 1, 9, 0, 0), (1, 1, 1, 0, 0, 0)])
@pytest.mark.parametrize("mask", [None, ag.causal()])
def test_nothing_at_all(size: tuple[int, ...], mask: Any):
    batch, heads, _, _, n_k, _ = size
    compare(ag.Spec(keys=ag.qk_sparse(), mask=mask), size, keeps(size, "half", "half"))
    compare(ag.Spec(keys=ag.hash_sparse(), mask=mask), size, buckets(size, "random"))
    compare(ag.Spec(keys=ag.hyper(4, 3, 5), mask=mask), size, dict(seed=0))
    compare(ag.Spec(keys=ag.codebook(), mask=mask), size, dict(count=torch.ones(batch, heads, n_k)))
    out = ag.compile(ag.Spec(keys=ag.sparse_k(3), mask=mask))(*inputs(size), u=torch.ones(batch, heads, n_k))
    assert out.shape == (batch, 1, size[3], 24) and not (out.any() and n_k == 0)


def test_bad_specs():
    with pytest.raises(ag.SpecError, match="a capture of"):
        ag.Spec(keys=ag.qk_sparse(), mask=lambda b, h, i, j: ag.Tensor("keep_q", 1)[i] > 0)
    with pytest.raises(ag.SpecError, match="dropout"):
        ag.Spec(keys=ag.qk_sparse(), dropout=0.1)
    for text in (
        "nothing()",
        "hash_sparse(buckets=__import__)",
        "hash_sparse(n=3)",
        "hash_sparse(buckets=3",
        "hyper(block=0)",
    ):
        with pytest.raises(ag.SpecError):
            ag.Spec.from_text(f"keys: {text}")
    with pytest.raises(ag.SpecError, match="expected a key set"):
        ag.Spec(keys=3)


def test_lsh_buckets_are_the_nearest_directions():
    q, k, _ = inputs((1, 2, 2, 500, 300, 0))
    q_bucket, k_bucket = ag.lsh_buckets(q, k, 8, seed=3)
    directions = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(q_bucket, torch.cat([q @ directions, -(q @ directions)], -1).argmax(-1).int())
    assert k_bucket.shape == (1, 2, 300) and set(k_bucket.unique().tolist()) == set(range(8))
    with pytest.raises(ag.InputError):
        ag.lsh_buckets(q, k, 7)


def test_a_plan_is_for_one_mask_one_offset_and_instead_of_its_captures() -> None:
    q, k, v = (torch.randn(2, 2, 40, 16) for _ in range(3))
    keep = torch.rand(2, 2, 40) < 0.6
    causal = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()))
    plan = causal.plan(q, k, v, keep_q=keep, keep_k=keep, q_offset=torch.tensor([0, 3]))
    causal(q, k, v, plan=plan, q_offset=torch.tensor([0, 3]))
    with pytest.raises(ag.InputError, match="plan: expected the q_offset that the plan was made for"):
        causal(q, k, v, plan=plan, q_offset=torch.tensor([0, 4]))
    with pytest.raises(ag.InputError, match="a plan for the mask true"):
        ag.compile(ag.Spec(keys=ag.qk_sparse()))(q, k, v, plan=plan, q_offset=torch.tensor([0, 3]))
    with pytest.raises(ag.InputError, match="keep_q: expected nothing next to a plan"):
        causal(q, k, v, plan=plan, q_offset=torch.tensor([0, 3]), keep_q=~keep)

"""Codebooks, rows by index, SPARSEK, unions, and the public merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.inspect import traffic
from attngen.plan.keysets import sparse_k as module
from attngen.plan.keysets.sparse_k import survivors, threshold, weights
from tests.keys_cases import MASKS, SIZES, compare, inputs

# -- codebooks and lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_codebook(size: tuple[int, ...], kind: torch.dtype):
    count = torch.randint(0, 4, (size[0], size[1], size[4])).to(kind)
    compare(
        ag.Spec(keys=ag.codebook()), size, dict(count=count + 0.5 * (count > 0) if kind.is_floating_point else count)
    )


def test_a_codeword_counts_as_its_tokens():
    q, k, v = inputs((1, 1, 1, 9, 4, 0))
    count = torch.tensor([[[3, 0, 1, 2]]])
    rows = torch.tensor([0, 0, 0, 2, 3, 3])
    expected, _ = ag.oracle(ag.Spec(), q, k[:, :, rows], v[:, :, rows])
    assert torch.allclose(ag.compile(ag.Spec(keys=ag.codebook()))(q, k, v, count=count).double(), expected, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
@pytest.mark.parametrize("per_query_head", [False, True])
def test_gather(size: tuple[int, ...], mask: str, per_query_head: bool):
    generator = torch.Generator().manual_seed(0)
    heads = size[1] * (size[2] if per_query_head else 1)
    index = torch.randint(-1, size[4], (size[0], heads, 20), generator=generator)
    log_weight = torch.randn(index.shape, generator=generator)
    spec = ag.Spec(keys=ag.gather(), mask=MASKS[mask])
    compare(spec, size, dict(index=index))
    compare(spec, size, dict(index=index.int(), log_weight=log_weight))


def test_bad_lists():
    size = SIZES[3]
    q, k, v = inputs(size)
    attn = ag.compile(ag.Spec(keys=ag.gather()))
    for index, message in (
        (torch.full((1, 2, 5), 130), "rows of k"),
        (torch.full((1, 2, 5), -2), "rows of k"),
        (torch.zeros(1, 3, 5, dtype=torch.long), "index: expected int"),
        (torch.zeros(1, 2, 5), "index: expected int"),
        (None, "index: expected int"),
    ):
        with pytest.raises(ag.InputError, match=message):
            attn(q, k, v, index=index)
    for index in (torch.zeros(1, 2, 5, dtype=torch.long), torch.zeros(1, 4, 130, 5, dtype=torch.long)):
        for wrong in (torch.nan, torch.inf):
            log_weight = torch.zeros(index.shape)
            log_weight[0, 1, 3] = wrong
            with pytest.raises(
                ag.InputError, match=rf"log_weight: expected finite numbers, .* got {wrong} at \[0, 1, 3"
            ):
                attn(q, k, v, index=index, log_weight=log_weight)
    attn, count = ag.compile(ag.Spec(keys=ag.codebook())), torch.ones(1, 2, 130)
    with pytest.raises(ag.InputError, match="count: expected float"):
        attn(q, k, v, count=torch.zeros(1, 2, 7))
    for wrong in (-1.0, torch.nan, torch.inf, -torch.inf):
        count[0, 1, 7] = wrong
        with pytest.raises(ag.InputError, match=rf"count: expected finite numbers .* got {wrong} at \[0, 1, 7\]"):
            attn(q, k, v, count=count)
    with pytest.raises(ag.InputError, match=r"count: .* got -2 at \[0, 0, 0\]"):
        attn(q, k, v, count=torch.full((1, 2, 130), -2))


# -- SPARSEK ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10, 49, 50, 60])
def test_the_threshold_is_exact_and_differentiable(k: int):
    u = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    p = weights(u, k)
    assert torch.allclose(p.sum(-1), torch.full((3,), float(min(k, 50)), dtype=torch.float64))
    if k < 50:
        assert torch.autograd.gradcheck(lambda x: weights(x, k), u)


def test_the_threshold_with_ties_and_missing_entries():
    inf = float("inf")
    u = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, -inf], [5.0, 3.0, -inf, -inf], [4.0, 3.0, 1.0, 0.0]])
    p = torch.where(u.isfinite(), (u - threshold(u, 2).unsqueeze(-1)).clamp(0, 1), 0.0)
    expected = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert torch.allclose(p, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("k", [5, 40])
def test_sparse_k(size: tuple[int, ...], window: int | None, k: int):
    u = torch.randn(size[0], size[1], size[4], generator=torch.Generator().manual_seed(1))
    compare(ag.Spec(keys=ag.sparse_k(k, window), mask=ag.causal()), size, dict(u=u))
    compare(ag.Spec(keys=ag.sparse_k(k, window)), size, dict(u=u))


@pytest.mark.parametrize("n", [1, 15, 33, 130])
@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("score", [None, ag.soft_cap(5.0)])
def test_incremental_sparse_k(n: int, window: int | None, score: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    u = torch.randn(2, 2, n, generator=torch.Generator().manual_seed(n))
    spec = ag.Spec(keys=ag.sparse_k(6, window, incremental=True), mask=ag.causal(), score=score)
    compare(spec, (2, 2, 2, n, n, 0), dict(u=u))


def test_survivors_are_few():
    u = torch.randn(1, 2, 4096, generator=torch.Generator().manual_seed(1))
    past = survivors(u, 32, 128)
    assert past.shape[:3] == (1, 2, 32) and 32 <= past.shape[3] <= 4 * 32


def test_sparse_k_by_generated_kernels():
    u = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(1))
    compare(ag.Spec(keys=ag.sparse_k(6, 4), mask=ag.causal()), (1, 1, 1, 40, 40, 0), dict(u=u), backend="interpret")


def interpreted(name: str, size: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """A key set and captures for a few rows."""
    generator = torch.Generator().manual_seed(2)
    batch, heads, group, _, n_k, _ = size
    if name == "codebook":
        return ag.codebook(), dict(count=torch.randint(0, 4, (batch, heads, n_k), generator=generator) * 0.5)
    if name.startswith("gather"):
        lead = (batch, heads * (group if name == "gather by query head" else 1))
        index = torch.randint(-1, n_k, (*lead, 18), generator=generator)
        return ag.gather(), dict(index=index, log_weight=torch.randn(index.shape, generator=generator))
    u = torch.randn((batch, heads, n_k), generator=generator)
    if name == "union":
        far = ag.Spec(keys=ag.sparse_k(6), mask=ag.causal() & ~ag.window(9), score=ag.soft_cap(5.0))
        return ag.union(ag.Spec(mask=ag.causal() & ag.window(9)), far).keys, dict(u=u)
    return ag.sparse_k(6, 5 if name.endswith("window") else None, incremental=True), dict(u=u)


@pytest.mark.parametrize(
    "name", ["codebook", "gather by head", "gather by query head", "incremental", "incremental, window", "union"]
)
def test_generated_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    offset = 0 if name.startswith("incremental") else 3
    size = (1, 1, 2, 35, 35 + offset, offset)
    keys, captures = interpreted(name, size)
    mask = None if name == "union" else ag.causal()
    compare(ag.Spec(keys=keys, mask=mask), size, captures, backend="interpret")


# -- unions and merge -------------------------------------------------------------------------------------------------


def local_and_sparse() -> ag.Spec:
    local = ag.causal() & ag.window(9)
    return ag.union(
        ag.Spec(mask=local, score=ag.alibi()),
        ag.Spec(keys=ag.qk_sparse(), mask=ag.causal() & ~ag.window(9), score=ag.alibi()),
        sink=ag.sink(),
    )


def test_union():
    size = SIZES[3]
    generator = torch.Generator().manual_seed(0)
    captures = dict(
        keep_q=torch.rand((1, 4, 130), generator=generator) < 0.5,
        keep_k=torch.rand((1, 2, 130), generator=generator) < 0.5,
        slope=ag.alibi_slopes(4),
        sink=torch.randn(4, generator=generator),
    )
    compare(local_and_sparse(), size, captures)
    attn = ag.compile(local_and_sparse())
    plan = attn.plan(*inputs(size), **captures)
    rest = {name: captures[name] for name in ("slope", "sink")}
    assert torch.equal(attn(*inputs(size), **captures), attn(*inputs(size), plan=plan, **rest)) and plan.nbytes > 0


def test_every_piece_of_a_union_is_explained_and_counted():
    q, k, v = inputs(SIZES[1])
    near = ag.causal() & ag.window(9)
    keep = dict(keep_q=torch.ones(1, 1, 67, dtype=torch.bool), keep_k=torch.ones(1, 1, 67, dtype=torch.bool))
    attn = ag.compile(ag.union(ag.Spec(mask=near), ag.Spec(keys=ag.qk_sparse(), mask=ag.causal() & ~near)))
    told = attn.explain(q, k, v, **keep)
    assert "piece 0 attention: schedule" in told and "piece 1 kept: schedule" in told
    alone = ag.compile(ag.Spec(mask=near))
    apart = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal() & ~near))
    assert traffic.of(attn, q, k, v, **keep) == traffic.of(alone, q, k, v) + traffic.of(apart, q, k, v, **keep)


def test_overlaps_count_twice_and_the_debug_mode_finds_them(monkeypatch: pytest.MonkeyPatch):
    q, k, v = inputs(SIZES[1])
    attn = ag.compile(ag.union(ag.Spec(mask=ag.causal()), ag.Spec(mask=lambda b, h, i, j: i == j)))
    _, lse = attn(q, k, v, return_lse=True)
    twice = ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: s + ag.where(i == j, math.log(2), 0.0))
    assert torch.allclose(lse.double(), ag.oracle(twice, q, k, v)[1], atol=1e-5)
    monkeypatch.setenv("ATTNGEN_DEBUG", "1")
    with pytest.raises(ag.InputError, match="pieces 0 and 1 both attend"):
        attn(q, k, v)


def test_bad_unions():
    with pytest.raises(ag.SpecError, match="not a Spec"):
        ag.union(ag.causal())
    for pair, name in (((ag.qk_sparse(), ag.qk_sparse()), "keep_q"), ((ag.gather(), ag.block_cluster()), "index")):
        with pytest.raises(ag.SpecError, match=rf"two pieces read the capture '{name}'\ncaptures go .* ag.merge"):
            ag.union(*(ag.Spec(keys=keys) for keys in pair))
    ag.union(ag.Spec(keys=ag.hyper()), ag.Spec(keys=ag.hyper(), mask=ag.causal()))  # one seed for both
    with pytest.raises(ag.SpecError, match="belong to the pieces"):
        ag.Spec(keys=ag.union(ag.Spec()).keys, mask=ag.causal())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_merge_is_the_softmax_of_all_keys(count: int):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * 9 for _ in range(count)]
    values = [torch.randn(2, 7, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    logits[0][0, 0] = logits[-1][0, 0] = -torch.inf  # a row that no piece, or only the middle one, has keys for
    leaves = [x.requires_grad_() for x in (*logits, *values)]

    def state(s: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        empty = s.isneginf().all(-1, keepdim=True)
        p = torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, s), -1))
        return p @ v, torch.where(empty.squeeze(-1), -torch.inf, torch.logsumexp(torch.where(empty, 0.0, s), -1))

    got = ag.merge(*[state(s, v) for s, v in zip(logits, values, strict=True)])
    want = state(torch.cat(logits, -1), torch.cat(values, -2))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in want]

    def grads(result: Any) -> Any:
        out, lse = result
        loss = (out * weights[0]).sum() + (torch.where(lse.isfinite(), lse, 0.0) * weights[1]).sum()
        return torch.autograd.grad(loss, leaves)

    for a, b in zip(grads(got), grads(want), strict=True):
        assert a.isfinite().all() and torch.allclose(a, b)


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for wrong in ((), (out,), ((out, lse), (out[:, :1], lse)), ((out, lse[..., :2]),)):
        with pytest.raises(ag.InputError, match="merge"):
            ag.merge(*wrong)


@pytest.mark.parametrize("worst", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("incremental", [False, True])
def test_sparse_k_of_keys_that_are_as_good_as_absent(worst: float, incremental: bool) -> None:
    """Such scores mark padding: they must not cancel the others in a sum."""
    torch.manual_seed(0)
    u = torch.randn(1, 2, 60)
    u[:, :, 7], u[:, 1, 40:] = worst, worst
    if worst > -torch.inf:
        assert torch.allclose(weights(u, 5).sum(-1), torch.tensor(5.0))
    q, k, v = (torch.randn(1, 2, 60, 16) for _ in range(3))
    spec = ag.Spec(keys=ag.sparse_k(5, window=4, incremental=incremental), mask=ag.causal())
    out, (want, _) = ag.compile(spec)(q, k, v, u=u), ag.oracle(spec, q, k, v, u=u)
    assert (out - want).norm() <= 1e-5 * want.norm()


def test_sparse_k_refuses_scores_that_say_nothing() -> None:
    q = torch.randn(1, 2, 20, 16)
    for wrong in (torch.nan, torch.inf):
        u = torch.randn(1, 2, 20)
        u[0, 1, 3] = wrong
        with pytest.raises(ag.InputError, match="u: expected scores that are finite"):
            ag.compile(ag.Spec(keys=ag.sparse_k(4)))(q, q, q, u=u)
    with pytest.raises(ag.SpecError, match="incremental"):
        ag.sparse_k(4, incremental="x")

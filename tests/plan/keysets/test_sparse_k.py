"""The incremental form of SPARSEK: lists of the keys that may still be chosen, and a threshold for every query."""

from __future__ import annotations

import pytest
import torch

import attngen as ag
from attngen.plan.keysets import sparse_k as module
from attngen.plan.keysets.sparse_k import survivors, threshold
from tests.keys_cases import compare

N, K = 700, 20
SPREADS = [3.0, 0.05]  # at the second all scores differ by less than 1: hundreds of keys are chosen in part


def scores(spread: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return spread * torch.randn(2, 3, N, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("step", [1, 3, 8])
def test_lists_hold_what_may_still_be_chosen(spread: float, step: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STEP", step)
    u = scores(spread)
    lists = survivors(u, K, 64)
    longest = 0
    for chunk in range(lists.shape[2]):
        known = u[..., : 64 * chunk]
        alive = known > threshold(known, K).unsqueeze(-1) if chunk else known.bool()
        for b, h in ((0, 0), (1, 2)):
            wanted = alive[b, h].nonzero().flatten()
            found = lists[b, h, chunk]
            assert torch.equal(found[found >= 0], wanted)
            longest = max(longest, len(wanted))
    assert lists.shape[2] == -(-N // 64) and longest <= lists.shape[3] < N
    assert (longest > 2 * K + 64) == (spread < 1)  # the lists had to grow


@pytest.mark.parametrize("spread", SPREADS)
def test_a_capacity_changes_nothing_but_the_length(spread: float):
    u = scores(spread)
    free = survivors(u, K, 64)
    given = survivors(u, K, 64, free.shape[-1] + 30)
    assert torch.equal(given[..., : free.shape[-1]], free) and bool((given[..., free.shape[-1] :] == -1).all())
    with pytest.raises(ag.InputError, match=rf"u: expected scores that leave at most capacity={free.shape[-1] - 1} "):
        survivors(u, K, 64, free.shape[-1] - 1)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("largest", [1, 2**22])
def test_thresholds_of_every_query(spread: float, largest: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LARGEST", largest)
    u = scores(spread, torch.float64).requires_grad_()
    own = torch.arange(N).view(10, 70)
    position = torch.arange(N).expand(2, 3, 10, N)
    tau = module._Thresholds.apply(u.unsqueeze(2).expand(-1, -1, 10, -1), position, own, K)
    seen = torch.arange(N) <= torch.arange(N).unsqueeze(-1)
    wanted = threshold(torch.where(seen, u.unsqueeze(-2), -torch.inf), K)
    assert torch.allclose(tau.flatten(2), wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got, want = (torch.autograd.grad((x.reshape(2, 3, N) * weight).sum(), u)[0] for x in (tau, wanted))
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spread", SPREADS)
def test_with_a_capacity(spread: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 32)
    u = scores(spread)[:, :2, :150]
    spec = ag.Spec(keys=ag.sparse_k(6, 10, incremental=True, capacity=150), mask=ag.causal())
    compare(spec, (2, 2, 2, 150, 150, 0), dict(u=u))
    small = ag.Spec(keys=ag.sparse_k(6, 10, incremental=True, capacity=4), mask=ag.causal())
    with pytest.raises(ag.InputError, match="u: expected scores that leave at most capacity=4"):
        compare(small, (2, 2, 2, 150, 150, 0), dict(u=u))


def test_bad_capacities():
    with pytest.raises(ag.SpecError, match="capacity is for incremental=True"):
        ag.sparse_k(4, capacity=9)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ag.SpecError, match="capacity"):
            ag.sparse_k(4, incremental=True, capacity=wrong)
    spec = ag.Spec(keys=ag.sparse_k(4, incremental=True, capacity=9))
    assert ag.Spec.from_text(str(spec)).keys == spec.keys


@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1e-2), (torch.float16, 4e-3), (torch.float32, 3e-3)])
def test_an_offset_of_the_scores_changes_nothing(offset: float, dtype: torch.dtype, allowed: float):
    """The threshold moves with them. What is left is how finely float32 tells scores apart that far from 0."""
    spec = ag.Spec(keys=ag.sparse_k(20, 16, incremental=True), mask=ag.causal())
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 300, 32, generator=generator).to(dtype).requires_grad_() for heads in (2, 1, 1))
    u = (0.3 * torch.randn(1, 1, 300, generator=generator) + offset).requires_grad_()
    out = ag.compile(spec)(q, k, v, u=u)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, u)]
    want = ag.oracle(spec, *exact[:3], u=exact[3])[0]
    got = torch.autograd.grad(out.double().sum(), (q, k, v, u))
    wanted = torch.autograd.grad(want.sum(), exact)
    for a, b in ((out, want), *zip(got, wanted, strict=True)):
        assert (a.double() - b).norm() <= allowed * b.norm()


@pytest.mark.parametrize("absent", [-torch.inf, -1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_absent_keys_have_a_gradient_of_nothing(absent: float, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(1, 2, 300, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    u = torch.randn(1, 2, 300, generator=generator)
    u[..., 250:] = absent
    u.requires_grad_()
    out = ag.compile(ag.Spec(keys=ag.sparse_k(20, incremental=True), mask=ag.causal()))(*leaves, u=u)
    dq, dk, dv, du = torch.autograd.grad(out.float().sum(), (*leaves, u))
    assert all(bool(x.isfinite().all()) for x in (out, dq, dk, dv, du))
    assert not any(bool(x[:, :, 250:].any()) for x in (dk, dv, du))


@pytest.mark.parametrize("incremental", [False, True])
def test_a_plan_is_for_its_scores(incremental: bool):
    attn = ag.compile(ag.Spec(keys=ag.sparse_k(20, incremental=incremental), mask=ag.causal()))
    q = k = v = torch.randn(2, 3, N, 16)
    u = scores(1.0)
    plan = attn.plan(q, k, v, u=u)
    assert torch.equal(attn(q, k, v, u=u.clone(), plan=plan), attn(q, k, v, u=u))
    with pytest.raises(ag.InputError, match="u: expected what the plan was made from"):
        attn(q, k, v, u=u + 0.1, plan=plan)

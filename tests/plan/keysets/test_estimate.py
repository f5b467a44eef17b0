"""Estimates of each head's pattern, and heads of different kinds in one call."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import attngen as ag
from attngen.plan.keysets import estimate as module
from attngen.reference.keysets import attended
from tests.check import check
from tests.keys_cases import MASKS, SIZES, compare, inputs


def heads_of_each_kind(n: int = 400, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Head 0 looks at the first keys and its neighbours, head 1 at scattered columns, head 2 at tiles that are like its own."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.zeros(1, 3, n, dim), torch.zeros(1, 3, n, dim)
    place = torch.arange(n)
    angle = place.view(-1, 1) * torch.linspace(0.0, 0.06, dim // 2 - 1)
    q[0, 0, :, 2:] = k[0, 0, :, 2:] = 2 * torch.cat([angle.cos(), angle.sin()], -1)
    q[0, 0, :, 0] = k[0, 0, :4, 0] = 11.0
    q[0, 1, :, 0] = 8.0
    k[0, 1, torch.randperm(n, generator=generator)[:24], 0] = 8.0
    cluster = torch.randint(0, 6, (-(-n // 16),), generator=generator)
    names = 5 * torch.nn.functional.normalize(torch.randn(6, dim, generator=generator), dim=-1)
    q[0, 2] = k[0, 2] = 2 * names[cluster].repeat_interleave(16, 0)[:n]
    return q, k, torch.randn(1, 3, n, dim, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_adaptive(size: tuple[int, ...], mask: str):
    q, k, _ = inputs(size)
    for last in (1, 20):
        found = ag.estimate(q, k, block=16, budget=64, sink=4, last=last, q_offset=size[5])
        compare(ag.Spec(keys=ag.adaptive(16), mask=MASKS[mask]), size, dict(estimate=found))


def test_heads_of_every_kind_in_one_call():
    q, k, v = heads_of_each_kind()
    found = ag.estimate(q, k, block=16, budget=64, sink=4, last=32)
    assert found.kind.tolist() == [[0, 1, 2]], found.mass
    spec = ag.Spec(keys=ag.adaptive(16), mask=ag.causal())
    check(spec, ag.compile(spec), q, k, v, dict(estimate=found))


@pytest.mark.parametrize("kind", range(3))
def test_masses_are_what_the_patterns_cover(kind: int):
    """The mass of each pattern, against dense attention of the last queries inside what the pattern attends."""
    q, k, v = heads_of_each_kind()
    found = ag.estimate(q, k, block=16, budget=64, sink=4, last=30)
    forced = dataclasses.replace(found, kind=torch.full_like(found.kind, kind))
    pairs = attended(ag.Spec(keys=ag.adaptive(16), mask=ag.causal()), q, k, v, 0, dict(estimate=forced))
    causal = torch.arange(400).view(-1, 1) >= torch.arange(400)
    weights = torch.softmax(torch.where(causal, q.double() @ k.double().mT / 64**0.5, -torch.inf), -1)
    want = torch.where(pairs, weights, 0.0)[:, :, -30:].sum((2, 3)) / 30
    assert torch.allclose(found.mass[..., kind].double(), want, atol=1e-5)


@pytest.mark.parametrize("size", SIZES[:5])
def test_marginals(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """How much attention each key and each distance gets from the last queries, against the dense table."""
    monkeypatch.setattr(module, "SCORES", 64 * size[0] * size[1] * size[2] * 16)
    (q, k, _), offset = inputs(size), size[5]
    rows = min(16, size[3])
    column, distance = module._Sample(q, k, rows, 0.25, offset).marginals(16)
    i, j = torch.arange(size[3])[-rows:].view(-1, 1) + offset, torch.arange(size[4])
    logits = 0.25 * q[:, :, -rows:].double() @ k.double().repeat_interleave(size[2], 1).mT
    weights = torch.softmax(torch.where(i >= j, logits, -torch.inf), -1)
    assert torch.allclose(column.double(), weights.sum(2), atol=1e-5)
    for far in range(distance.shape[2]):
        at = torch.where(i - j == far, weights, 0.0).sum((2, 3))
        assert torch.allclose(distance[..., far].double(), at, atol=1e-5), far


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    q, k, _ = heads_of_each_kind()
    whole = ag.estimate(q, k, block=16, budget=64, last=30)
    monkeypatch.setattr(module, "SCORES", 1000)
    parts = ag.estimate(q, k, block=16, budget=64, last=30)
    assert torch.equal(whole.index, parts.index) and torch.allclose(whole.mass, parts.mass, atol=1e-6)
    assert torch.equal(whole.band.sort(-1).values, parts.band.sort(-1).values)


def test_plan_is_reused():
    q, k, v = heads_of_each_kind()
    found = ag.estimate(q, k, block=16, budget=64)
    attn = ag.compile(ag.Spec(keys=ag.adaptive(16), mask=ag.causal()))
    plan = attn.plan(q, k, v, estimate=found)
    assert torch.equal(attn(q, k, v, plan=plan), attn(q, k, v, estimate=found))


def test_bad_estimates():
    q, k, v = heads_of_each_kind()
    attn = ag.compile(ag.Spec(keys=ag.adaptive(16), mask=ag.causal()))
    found = ag.estimate(q, k, block=16, budget=64)
    with pytest.raises(ag.InputError, match="estimate: expected what"):
        attn(q, k, v)
    with pytest.raises(ag.InputError, match="estimate: expected one for"):
        attn(q[:, :, :100], k, v, estimate=found)
    with pytest.raises(ag.InputError, match="estimate: expected one for"):
        ag.compile(ag.Spec(keys=ag.adaptive(32), mask=ag.causal()))(q, k, v, estimate=found)
    for wrong, message in (
        (dict(budget=32), "budget"),
        (dict(last=0), "last"),
        (dict(sink=64), "sink"),
        (dict(q_offset=torch.zeros(1)), "q_offset"),
    ):
        with pytest.raises(ag.InputError, match=message):
            ag.estimate(q, k, **{"block": 16, "budget": 64, **wrong})
    with pytest.raises(ag.InputError, match="k: expected batch"):
        ag.estimate(q, k[..., :8], block=16, budget=64)

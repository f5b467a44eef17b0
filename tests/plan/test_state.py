"""Partial softmax states: the laws of merge, and that any split of the keys gives the softmax."""

from __future__ import annotations

import pytest
import torch

import attngen as ag
from attngen.plan.softmax import State, empty, finish, merge

ROWS, KEYS, DV = 5, 24, 3


def state_of(logits: torch.Tensor, values: torch.Tensor) -> State:
    m = logits.amax(-1, keepdim=True)
    p = torch.exp(logits - m)
    return State(m, p.sum(-1, keepdim=True), p @ values)


def pieces(seed: int, *sizes: int) -> tuple[torch.Tensor, torch.Tensor, list[State]]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, sum(sizes), generator=generator, dtype=torch.float64) * 20
    values = torch.randn(sum(sizes), DV, generator=generator, dtype=torch.float64)
    parts = zip(logits.split(sizes, -1), values.split(sizes), strict=True)
    return logits, values, [state_of(s, v) for s, v in parts]


@pytest.mark.parametrize("seed", range(3))
def test_merged_pieces_are_the_softmax(seed: int):
    logits, values, states = pieces(seed, 1, 7, 16)
    merged = states[0]
    for piece in states[1:]:
        merged = merge(merged, piece)
    out, lse = finish(merged)
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ values)
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1))


def test_merge_is_associative_and_commutative():
    _, _, (a, b, c) = pieces(0, 3, 4, 5)
    for left, right in ((merge(merge(a, b), c), merge(a, merge(b, c))), (merge(a, b), merge(b, a))):
        for x, y in zip(left, right, strict=True):
            torch.testing.assert_close(x, y)


def test_the_empty_set_is_the_identity():
    _, _, (a,) = pieces(0, 6)
    nothing = empty((ROWS,), DV, torch.float64)
    for merged in (merge(a, nothing), merge(nothing, a)):
        assert all(torch.equal(x, y) for x, y in zip(merged, a, strict=True))
    out, lse = finish(merge(nothing, nothing))
    assert not out.any() and lse.isneginf().all()


def test_base_two():
    logits, values, _ = pieces(1, KEYS)
    base_2 = logits / torch.log(torch.tensor(2.0, dtype=torch.float64))
    m = base_2.amax(-1, keepdim=True)
    p = torch.exp2(base_2 - m)
    states = [
        State(m, p[:, part].sum(-1, keepdim=True), p[:, part] @ values[part]) for part in (slice(0, 9), slice(9, None))
    ]
    out, _ = finish(merge(*states, base_2=True), base_2=True)
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ values)


def merging(parts: int = 3) -> tuple[torch.Tensor, ...]:
    """outs and lses of some parts, float64."""
    generator = torch.Generator().manual_seed(3)
    outs = [torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(parts)]
    lses = [torch.randn(2, 5, generator=generator, dtype=torch.float64) for _ in range(parts)]
    return (*outs, *lses)


def merged(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = len(tensors) // 2
    return ag.merge(*zip(tensors[:half], tensors[half:], strict=True))


def test_merge_has_every_derivative():
    tensors = [x.requires_grad_() for x in merging()]
    assert torch.autograd.gradcheck(merged, tensors, check_forward_ad=True, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(merged, tensors)


def test_merge_under_functional_transforms():
    tensors = merging(2)

    def loss(*given: torch.Tensor) -> torch.Tensor:
        out, lse = merged(*given)
        return out.square().sum() + lse.sin().sum()

    found = torch.func.grad(loss, argnums=tuple(range(4)))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)
    along = tuple(torch.ones_like(x) for x in tensors)
    _, tangent = torch.func.jvp(loss, tensors, along)
    torch.testing.assert_close(tangent, sum((a * t).sum() for a, t in zip(found, along, strict=True)))

"""Shared contexts against the same keys and values copied for every sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from tests.check import check
from tests.keys_cases import inputs

MASKS: dict[str, Any] = {
    "none": None,
    "causal": ag.causal(),
    "window": ag.causal() & ag.window(24),
    "global": ag.causal() & (ag.window(5) | ag.global_tokens(3)),
}


def contexts(groups: tuple[int, ...], lengths: tuple[int, ...], heads: int) -> dict[str, Any]:
    return {
        "prefix_k": tuple(torch.randn(g, heads, n, 16) for g, n in zip(groups, lengths, strict=True)),
        "prefix_v": tuple(torch.randn(g, heads, n, 24) for g, n in zip(groups, lengths, strict=True)),
    }


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups, n_q, n_k", [(1, 1, 5), (1, 9, 9), (2, 3, 7), (4, 2, 2), (1, 2, 0)])
def test_one_level(mask: str, groups: int, n_q: int, n_k: int):
    torch.manual_seed(0)
    q, k, v = inputs((4, 2, 2, n_q, n_k, 0))
    captures = {name: parts[0] for name, parts in contexts((groups,), (37,), 2).items()}
    spec = ag.Spec(keys=ag.shared_prefix(), mask=MASKS[mask], score=ag.soft_cap(4.0))
    check(spec, ag.compile(spec), q, k, v, captures, 37 + n_k - n_q)
    assert ag.Spec.from_text(str(spec)).key == spec.key


def test_lengths_offsets_and_captures_in_logical_positions():
    torch.manual_seed(0)
    q, k, v = inputs((4, 1, 2, 3, 6, 0))
    bias, lengths = ag.Tensor("bias", 2), torch.tensor([0, 1, 4, 6])
    captures = {name: parts[0] for name, parts in contexts((2,), (20,), 1).items()}
    captures |= dict(k_len=lengths, bias=torch.randn(4, 26))
    spec = ag.Spec(keys=ag.shared_prefix(), mask=ag.causal(), score=lambda s, b, h, i, j: s + bias[b, j], sink="0.5")
    check(spec, ag.compile(spec), q, k, v, captures, 17 + lengths)
    with pytest.raises(ag.InputError, match="bias"):
        ag.compile(spec)(q, k, v, **captures | dict(bias=torch.randn(4, 25)))


@pytest.mark.parametrize("with_lengths", [False, True])
def test_tree(with_lengths: bool):
    torch.manual_seed(0)
    q, k, v = inputs((4, 2, 1, 2, 5, 0))
    named = contexts((1, 2), (19, 8), 2)
    names = [(name, level) for name in named for level in range(2)]
    leaves = [q, k, v, *(named[name][level] for name, level in names)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    captures: dict[str, Any] = {"prefix_k": tuple(leaves[3:5]), "prefix_v": tuple(leaves[5:7])}
    captures |= {"k_len": torch.tensor([0, 1, 3, 5])} if with_lengths else {}
    spec = ag.Spec(keys=ag.shared_prefix(levels=2), mask=ag.causal())
    found = []
    for run in (ag.compile(spec), None):
        more: dict[str, Any] = dict(q_offset=30, **captures)
        out, lse = ag.oracle(spec, *leaves[:3], **more) if run is None else run(*leaves[:3], return_lse=True, **more)
        found.append([out, lse, *torch.autograd.grad(out.double().square().sum() + lse.double().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


def test_contexts_are_read_once():
    q, k, v = inputs((16, 2, 4, 1, 8, 0))
    captures = {name: parts[0] for name, parts in contexts((1,), (64,), 2).items()}
    attn = ag.compile(ag.Spec(keys=ag.shared_prefix()))
    rows = sum(call.k.shape[0] * call.k.shape[2] for _, call in attn.attends(q, k, v, q_offset=72, **captures))
    assert rows == 64 + 16 * 8


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(prefix_k=None), "prefix_k"),
        (dict(prefix_v=torch.randn(1, 2, 6, 24)), "prefix_v"),
        (dict(prefix_k=torch.randn(3, 2, 5, 16), prefix_v=torch.randn(3, 2, 5, 24)), "prefix_k"),
        (dict(prefix_k=torch.randn(1, 1, 5, 16)), "prefix_k"),
        (dict(prefix_k=torch.randn(1, 2, 5, 16).half()), "prefix_k"),
        (dict(k_len=torch.tensor([0, 1, 2, 9])), "k_len"),
    ],
)
def test_bad_input(change: dict[str, Any], name: str):
    q, k, v = inputs((4, 2, 1, 2, 8, 0))
    captures = {name: parts[0] for name, parts in contexts((1,), (5,), 2).items()} | change
    with pytest.raises(ag.InputError, match=name):
        ag.compile(ag.Spec(keys=ag.shared_prefix()))(q, k, v, **captures)

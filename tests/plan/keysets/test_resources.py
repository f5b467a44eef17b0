"""Registers and shared memory of the kernels that key sets are made of, cross-compiled with the default schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from attngen.inspect.cross import cross_compile
from attngen.schedule import Target
from tests.keys_work import CASES
from tests.keys_work import case as case_of

N = 260
SIZE = (1, 2, 2, N, N, 0)
CAUSAL, ALL = ag.causal(), None
Pieces = dict[str, tuple[ag.Spec, frozenset[str]]]


def given(name: str, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """A key set with its default blocks, and its captures."""
    if name in CASES:
        return case_of(name, SIZE)
    if name == "hash_sparse, buckets":
        return ag.hash_sparse(5), case_of("hash_sparse", SIZE)[1]
    if name == "gather, log_weight":
        keys, captures = case_of("gather by row", SIZE)
        return keys, captures | dict(log_weight=torch.zeros(captures["index"].shape))
    if name == "adaptive":
        return ag.adaptive(), dict(estimate=ag.estimate(q.detach(), k.detach(), budget=512, sink=4))
    if name == "vertical_slash":
        line = torch.arange(3).expand(1, 4, 3)
        return ag.vertical_slash(), dict(vertical=line * 40, slash=line * 20)
    if name == "block_sparse":
        return ag.block_sparse(), dict(layout=torch.ones(1, 4, 3, 3, dtype=torch.bool))
    if name == "block_cluster":
        return ag.block_cluster(), dict(index=torch.arange(3).expand(1, 4, 5, 3))
    if name == "shared_prefix":
        return ag.shared_prefix(), dict(prefix_k=torch.randn(1, 2, 37, 16), prefix_v=torch.randn(1, 2, 37, 16))
    if name == "k_len":
        return None, dict(k_len=torch.tensor([90]))
    if name == "packed":
        return None, dict(cu_q=torch.tensor([0, 40, N]), cu_k=torch.tensor([0, 50, N]))
    return CLOSED[name], {}


CLOSED = {
    "butterfly": ag.butterfly(),
    "big_bird": ag.big_bird(),
    "longformer": ag.longformer(40, globals=3),
    "longformer, dilated": ag.longformer(40, globals=3, dilation=3),
    "a_shape": ag.a_shape(3, 40),
    "pruned": ag.pruned(0.5),
    "pruned, heads": ag.pruned(0.5, heads=0.5),
}
WITHOUT_CAUSALITY = ("hyper", "codebook", "gather", "gather by row", "graph", "butterfly", "longformer")
NAMES = [
    *(name for name in CASES if name != "incremental, capacity"), *CLOSED, "hash_sparse, buckets", "gather, log_weight",
    "adaptive", "vertical_slash", "block_sparse", "block_cluster", "shared_prefix", "k_len", "packed",
]  # fmt: skip


def pieces(name: str) -> Pieces:
    """The specs that a pattern's calls run, by key, and which of their captured tensors have 64-bit integers."""
    found = {}
    for mask in (CAUSAL, ALL) if name in WITHOUT_CAUSALITY else (CAUSAL,):
        for offset in (0, torch.tensor([3])):  # which may widen what positions are told by
            if not (isinstance(offset, int) or name.startswith("hash_sparse")):
                continue
            q, k, v = (torch.randn(1, heads, N, 16).requires_grad_() for heads in (4, 2, 2))
            keys, captures = given(name, q, k)
            attn = ag.compile(ag.Spec(keys=keys, mask=None if name == "union" else mask))
            for step, call in attn.attends(q, k, v, q_offset=offset, **captures):
                wide = frozenset(name for name, x in call.captures.items() if x.dtype == torch.int64)
                found[step.spec.key + ",".join(sorted(wide))] = step.spec, wide
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", NAMES)
def test_default_schedules_fit_and_do_not_spill(name: str, target: str) -> None:
    found = pieces(name)
    assert found
    for spec, wide in found.values():
        for head_dim in (64, 128):
            for kernel in cross_compile(
                spec, target, head_dim=head_dim, passes=("forward", "dq", "dkv"), wide=wide & set(spec.tensors)
            ):
                assert kernel.shared <= Target.named(target).shared_limit
                assert kernel.spills == 0, f"{kernel}, head dim {head_dim}:\n{spec}"

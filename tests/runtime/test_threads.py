"""Threads that call, differentiate and explain different specs at once: nothing that one does shows in another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

import attngen as ag
from tests.keys_work import case

THREADS, CALLS = 8, 1000
N = 64
KEYS = ["qk_sparse", "hash_sparse", "gather", "graph", "sparse_k", "hyper"]
MASKS: list[Any] = [ag.causal(), ag.causal() & ag.window(7), None, ag.causal() & ag.documents()]


def jobs() -> list[Callable[[], list[torch.Tensor]]]:
    """Calls with gradients, in inference and explained: each of a spec of its own, and what one attention has several of."""
    torch.manual_seed(0)
    found: list[Callable[[], list[torch.Tensor]]] = []
    shared = ag.compile(ag.Spec(mask=ag.causal(), score=ag.alibi()))
    for number, mask in enumerate(MASKS):
        captures = dict(doc=(torch.arange(N) // 10).int()[None]) if number == 3 else {}
        found.append(_call(ag.compile(ag.Spec(mask=mask, score=lambda s, *_, n=number: s * (n + 1))), captures, number))
    for number, name in enumerate(KEYS):
        keys, captures = case(name, (1, 2, 2, N, N, 0))
        found.append(_call(ag.compile(ag.Spec(keys=keys, mask=ag.causal())), captures, 10 + number))
    found += [_call(shared, dict(slope=torch.rand(4) + seed), 20 + seed) for seed in range(3)]
    found.append(_call(ag.compile(ag.Spec(mask=ag.causal())), dict(k_len=torch.tensor([40])), 30))
    return found


def _call(attn: Any, captures: dict[str, Any], seed: int) -> Callable[[], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(1, heads, N, 16, generator=generator) for heads in (4, 2, 2)]
    turns = [0]

    def run() -> list[torch.Tensor]:
        turns[0] += 1
        if turns[0] % 25 == 0:
            told: str = attn.explain(*rows, **captures)
            assert attn.spec.key[:16] in told
        if turns[0] % 3 == 0:
            return [attn(*rows, **captures).clone()]
        own = [x.clone().requires_grad_() for x in rows]
        out = attn(*own, **captures)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), own)]

    return run


def test_eight_threads_a_thousand_calls():
    work = jobs()
    want = [run() for run in work]  # each job's first turn has gradients
    again = jobs()  # new attentions: their caches are filled by whoever comes first
    wrong: list[str] = []
    start = threading.Barrier(THREADS)

    def thread(which: int) -> None:
        start.wait()
        for turn in range(CALLS // THREADS):
            number = (which * 5 + turn * 7) % len(again)
            try:
                got = again[number]()
            except Exception as error:
                wrong.append(f"job {number}: {type(error).__name__}: {error}")
                continue
            for a, b in zip(got, want[number], strict=False):
                if not torch.allclose(a, b, atol=1e-5):
                    wrong.append(f"job {number}: other values")

    threads = [threading.Thread(target=thread, args=(which,)) for which in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong, wrong[:5]

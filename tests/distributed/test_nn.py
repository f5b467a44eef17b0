"""The blockwise transformer block and checkpoints that keep attention: equal results, one attention forward, small peaks."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attngen as ag
from attngen.distributed import nn
from attngen.runtime.executor import Executor

CAUSAL = ag.Spec(mask=ag.causal() & ag.window(200), score=ag.alibi())


def block(chunk: int | None, ff_width: int = 96, **options: Any) -> nn.Block:
    torch.manual_seed(0)
    return nn.Block(32, 4, options.pop("spec", CAUSAL), heads_kv=2, ff_width=ff_width, chunk=chunk, **options)


def gradients(module: nn.Block, x: torch.Tensor, **captures: Any) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    learned = [t for t in captures.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    out = module(x, **captures)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters(), *learned])]


@pytest.mark.parametrize("chunk", [1, 7, 32, 40, 1000])
def test_chunks_change_nothing(chunk: int) -> None:
    x, slope = torch.randn(2, 40 if chunk > 1 else 5, 32), torch.rand(4).requires_grad_()
    plain = gradients(block(None), x, slope=slope)
    for got, want in zip(gradients(block(chunk), x, slope=slope), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(block(chunk)(x, slope=slope), plain[0])


def test_gated_activation_and_norm() -> None:
    options = dict(activation=torch.nn.SiLU(), norm=torch.nn.RMSNorm, bias=False, spec=ag.Spec())
    x = torch.randn(1, 50, 32)
    for got, want in zip(gradients(block(16, **options), x), gradients(block(None, **options), x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_no_rows() -> None:
    assert block(8, spec=ag.Spec())(torch.zeros(2, 0, 32)).shape == (2, 0, 32)


class Live(TorchDispatchMode):
    """Bytes of the storages that operators made and somebody still holds, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@lru_cache
def peak(chunk: int | None, ff_width: int, length: int) -> int:
    module, x = block(chunk, ff_width, spec=ag.Spec(mask=ag.causal() & ag.window(64))), torch.randn(1, length, 32)
    with Live() as live:
        gradients(module, x)
    return live.peak


def test_peak_memory_does_not_grow_with_the_feed_forward() -> None:
    length, chunk, width = 512, 32, 256
    more = {c: peak(c, 2 * width, length) - peak(c, width, length) for c in (chunk, None)}
    one = 4 * width  # bytes by which a row of the feed-forward grows
    weights = 3 * 2 * 32 * one  # gradients of the two maps: a sum, a share and its transposed
    assert more[None] >= 2 * length * one  # what the measurement sees in the plain block
    assert more[chunk] <= 5 * chunk * one + weights, more
    assert peak(chunk, 2 * width, length) < 0.5 * peak(None, 2 * width, length)


def test_a_checkpoint_does_not_run_attention_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = Executor.run

    def counted(self: Any, plan: Any, *args: Any, **more: Any) -> None:
        runs.extend(1 for step in plan.attends if step.direction == "forward")
        run(self, plan, *args, **more)

    monkeypatch.setattr(Executor, "run", counted)
    plain, x = block(None, spec=ag.Spec(mask=ag.causal())), torch.randn(2, 40, 32)
    want = gradients(plain, x)
    assert len(runs) == 1
    x = x.requires_grad_()
    out = nn.checkpoint(plain, x)
    got = [out, *torch.autograd.grad(out.square().sum(), [x, *plain.parameters()])]
    assert len(runs) == 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    gradients(block(16, spec=ag.Spec(mask=ag.causal())), x.detach())
    assert len(runs) == 2 + 3  # each chunk once


def test_a_checkpoint_keeps_little() -> None:
    module, x = block(None, 1024, spec=ag.Spec(mask=ag.causal())), torch.randn(1, 512, 32, requires_grad=True)
    kept = {}
    for name, run in (("plain", module), ("checkpoint", lambda x: nn.checkpoint(module, x))):
        with Live() as live:
            out = run(x)
            kept[name] = live.now
        del out
    assert kept["checkpoint"] < 0.1 * kept["plain"], kept


def test_bad_input() -> None:
    with pytest.raises(ag.InputError, match="heads: expected a divisor of dim = 32"):
        nn.Block(32, 5, CAUSAL)
    with pytest.raises(ag.InputError, match="chunk: expected an int of at least 1"):
        nn.Block(32, 4, CAUSAL, chunk=0)
    with pytest.raises(ag.SpecError, match="a spec with keys="):
        nn.Block(32, 4, ag.Spec(keys=ag.qk_sparse()))
    with pytest.raises(ag.InputError, match=r"x: expected \[B, N, 32\]"):
        block(8)(torch.zeros(2, 3, 16))

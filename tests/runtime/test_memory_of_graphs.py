"""What autograd keeps of a call, and what it notices."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attngen as ag
from tests.keys_work import case

SIZE = (1, 2, 2, 40, 40, 0)


def rows(grads: bool = True) -> list[torch.Tensor]:
    return [torch.randn(1, heads, 40, 16, requires_grad=grads) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", ["qk_sparse", "sparse_k", "hyper", None])
def test_a_checkpoint_keeps_nothing(name: str | None):
    keys, captures = case(name, SIZE) if name else (None, {})
    attn, x = ag.compile(ag.Spec(keys=keys, mask=ag.causal())), rows()
    seen: list[Any] = []

    def layer(*leaves: torch.Tensor) -> Any:
        own = [x * 2 for x in leaves]
        seen.extend(map(weakref.ref, own))
        return attn(*own, **captures)

    want = torch.autograd.grad(layer(*x).square().sum(), x)
    seen.clear()
    out = checkpoint(layer, *x, use_reentrant=False)
    gc.collect()
    assert not any(ref() is not None for ref in seen)
    for a, b in zip(torch.autograd.grad(out.square().sum(), x), want, strict=True):
        assert torch.equal(a, b)


def test_tensors_are_gone_after_the_backward():
    attn, (q, k, v) = ag.compile(ag.Spec(mask=ag.causal())), rows()
    own = q * 2
    ref, out = weakref.ref(own), attn(own, k, v)
    out.sum().backward()
    del own
    assert ref() is None


@pytest.mark.parametrize("what", ["doc", "q_offset", "slope", "q"])
def test_changes_in_place_are_noticed(what: str):
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.documents(), score=ag.alibi()))
    x = rows()
    named = dict(q=x[0] * 1, doc=(torch.arange(90) // 9).int()[None], q_offset=torch.tensor([3]), slope=torch.rand(4))
    more = {name: value for name, value in named.items() if name != "q"}
    out = attn(named["q"], *x[1:], **more)
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    with torch.no_grad():
        named[what] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("alone", ["k", "v", "q", "u"])
def test_one_input_alone_wants_a_gradient(alone: str):
    spec = ag.Spec(keys=ag.sparse_k(8), mask=ag.causal())
    named = dict(zip("qkv", rows(False), strict=True)) | dict(u=torch.randn(1, 2, 40))
    named[alone].requires_grad_()
    results = []
    for run in (ag.compile(spec), lambda *a, **c: ag.oracle(spec, *a, **c)[0]):
        out = run(*(named[x] for x in "qkv"), u=named["u"])
        results.append(torch.autograd.grad(out.square().sum(), named[alone])[0])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", ["out", "lse", "do", "dlse", "delta", "dq", "excess", "states", "grad"])
def test_captures_may_have_any_name(name: str, lengths: bool, backend: str):
    """Also those of what kernels and plans make."""
    t = ag.Tensor(name, 3)
    spec, plain = (ag.Spec(score=lambda s, b, h, i, j, t=t: s * t[b, h, i]) for t in (t, ag.Tensor("w", 3)))
    x, w = rows(), torch.rand(1, 4, 40)
    more = dict(k_len=torch.tensor([40])) if lengths else {}
    found = []
    for own, capture in ((spec, name), (plain, "w")):
        out = ag.compile(own, backend=backend)(*x, **{capture: w}, **more)
        found.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_attentions_do_not_outlive_their_users():
    attn = ag.compile(ag.Spec(mask="i >= j + 71"))
    attn(*rows(False))
    ref = weakref.ref(attn)
    del attn
    gc.collect()
    assert ref() is None


def test_pins_of_one_spec_are_not_anothers():
    x, k_len = rows(False), torch.tensor([30])
    pinned = ag.Spec(mask=ag.window(77), schedule=ag.Schedule(deterministic=False))
    for spec in (pinned, ag.Spec(mask=ag.window(77))):
        ((step, call),) = ag.compile(spec).attends(*x, k_len=k_len)
        assert step.spec.schedule is None
        schedule = ag.compile(spec).specialiser.of(call).schedule
        assert schedule.deterministic is (False if spec is pinned else None) or spec is not pinned


def test_inference_tensors_are_compared():
    attn, x = ag.compile(ag.Spec(mask=ag.documents())), rows(False)
    with torch.inference_mode():
        doc = (torch.arange(40) // 9).int()[None]
        plan = attn.prepare(*x, doc=doc)
        attn(*x, doc=doc, plan=plan)
        doc += (torch.arange(40) % 2).int()
        with pytest.raises(ag.InputError, match="doc: expected what the plan was made from"):
            attn(*x, doc=doc, plan=plan)


def test_offsets_of_numpy():
    np = pytest.importorskip("numpy")
    attn = ag.compile(ag.Spec(mask=ag.causal() & ag.window(9)))
    q, k, v = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 240, 16), torch.randn(1, 2, 240, 16)
    want = attn(q, k, v, q_offset=100)
    for _ in range(3):
        assert torch.equal(attn(q, k, v, q_offset=np.int8(100)), want)

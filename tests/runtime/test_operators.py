"""attngen under torch's own machinery: opcheck, torch.compile, autocast, no_grad, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.backends.cpu import passes
from attngen.backends.launcher import Launcher
from attngen.runtime import operators

SPEC = ag.Spec(mask=ag.causal() & ag.window(ag.Param("width")), score=ag.alibi(), sink=ag.sink())


def inputs(grad: bool = False, n: int = 40):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, n, 16), torch.randn(2, 2, n, 16), torch.randn(2, 2, n, 16)
    captures = {"slope": torch.randn(4) * 0.1, "sink": torch.randn(4)}
    for t in (q, k, v, *captures.values()):
        t.requires_grad_(grad)
    return (q, k, v), {**captures, "width": 9}


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
def test_opcheck(backend: str):
    attn = ag.compile(SPEC, backend=backend)
    (q, k, v), captures = inputs(grad=True, n=17)
    torch.library.opcheck(torch.ops.attngen.forward, operators.arguments(attn, q, k, v, 0, None, captures))


def test_no_graph_break_and_equal_results():
    attn = ag.compile(SPEC)
    (q, k, v), captures = inputs(grad=True)
    compiled = torch.compile(lambda *a, **c: attn(*a, **c) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, **captures)
    expected = attn(q, k, v, **captures) * 2
    torch.testing.assert_close(out, expected)
    leaves = [q, k, v, captures["slope"], captures["sink"]]
    grads = torch.autograd.grad(out.square().sum(), leaves)
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("traced", [False, True])
def test_what_a_large_lse_lacks_comes_from_the_forward(traced: bool, dtype: torch.dtype, monkeypatch: Any):
    """The logits of q and k are not found a second time for it."""
    launched, launch = [], Launcher._launch
    monkeypatch.setattr(Launcher, "_launch", lambda self, name, *a: launched.append(name) or launch(self, name, *a))
    spec = ag.Spec(mask=ag.causal(), score=[ag.alibi(), ag.bias("j")])
    attn = ag.compile(spec, backend="interpret")
    (q, k, v), captures = inputs(n=24)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    captures = {"slope": captures["slope"], "bias": torch.full((24,), 3e5)}
    call = torch.compile(attn, fullgraph=True, backend="aot_eager") if traced else attn
    grads = torch.autograd.grad(call(*leaves, **captures).square().sum(), leaves)
    assert launched == ["forward", "delta" if traced else "delta_of_out", "dq", "dkv"]
    right = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = ag.oracle(spec, *right, **{name: x.double() for name, x in captures.items()})
    # Logits are rounded to 2^-5 beside the bias, in each pair alike; the weights of a row still sum to 1.
    for got, want in zip(grads, torch.autograd.grad(out.square().sum(), right), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.1, atol=0.1)
    dv = torch.autograd.grad(call(*leaves, **captures).sum(), leaves[2])[0]
    torch.testing.assert_close(dv.float().sum((2,)), torch.full((2, 2, 16), 48.0), rtol=1e-3, atol=1e-3)


def test_a_traced_forward_keeps_nothing_that_its_backward_does_not_get(monkeypatch: Any):
    """The weights of a schedule that stores them, on a CPU: they are no result of the operator."""
    attn = ag.compile(ag.Spec(mask=ag.causal()), schedule=ag.Schedule(store=True), backend="cpu")
    leaves, _ = inputs(grad=True)
    want = torch.autograd.grad(attn(*leaves).square().sum(), leaves)
    monkeypatch.setattr(passes, "forward_keeping", lambda *a: pytest.fail("kept for nobody"))
    out = torch.compile(attn, fullgraph=True, backend="aot_eager")(*leaves)
    for got, right in zip(torch.autograd.grad(out.square().sum(), leaves), want, strict=True):
        torch.testing.assert_close(got, right)


def test_a_changed_param_is_no_new_graph():
    attn = ag.compile(SPEC)
    (q, k, v), captures = inputs()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda width: attn(q, k, v, **{**captures, "width": width}), fullgraph=True, backend=count, dynamic=True
    )
    for width in (3, 5, 9, 11):
        torch.testing.assert_close(compiled(width), attn(q, k, v, **{**captures, "width": width}))
    assert len(graphs) <= 2


class Watched(torch.Tensor):
    """A subclass, whose calls go through the operators."""


def test_a_backward_after_the_attention_is_forgotten():
    (q, k, v), captures = inputs(grad=True)
    spec = ag.Spec(mask=ag.causal() & ag.window(ag.Param("width")) & ag.prefix_lm(39), score=ag.alibi(), sink=ag.sink())
    leaves = [t.detach().as_subclass(Watched).requires_grad_() for t in (q, k, v)]
    out = ag.compile(spec)(*leaves, **captures)
    gc.collect()
    grads = torch.autograd.grad(out.sum(), leaves)
    for got, want in zip(
        grads, torch.autograd.grad(ag.compile(spec)(q, k, v, **captures).sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


def test_gradcheck():
    attn = ag.compile(SPEC)
    (q, k, v), captures = inputs()
    q, k, v = (t[:, :, :6, :3].double().requires_grad_() for t in (q, k, v))
    slope, sink = (captures[n].double().requires_grad_() for n in ("slope", "sink"))

    def both(q, k, v, slope, sink):
        return attn(q, k, v, slope=slope, sink=sink, width=4, return_lse=True)

    assert torch.autograd.gradcheck(both, (q, k, v, slope, sink))


def test_autocast_and_no_grad():
    attn = ag.compile(SPEC)
    (q, k, v), captures = inputs(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(q, k, v, **captures)
    assert out.dtype == torch.bfloat16 and out.requires_grad
    out.float().sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32
    with torch.no_grad():
        assert not attn(q, k, v, **captures).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(attn(q, k, v, **captures), attn(q, k, v, **captures))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = ag.compile(SPEC)
        self.slope = torch.nn.Parameter(torch.randn(4))
        self.sink = torch.nn.Parameter(torch.randn(4))

    def forward(self, q, k, v):
        return self.attn(q, k, v, slope=self.slope, sink=self.sink, width=9)


def test_modules_copy_pickle_and_save():
    layer = Layer()
    (q, k, v), _ = inputs()
    expected = layer(q, k, v)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(q, k, v), expected)


def test_second_derivatives_are_refused():
    attn = ag.compile(SPEC)
    (q, k, v), captures = inputs(grad=True)
    (dq,) = torch.autograd.grad(attn(q, k, v, **captures).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        dq.sum().backward()


def test_lse_takes_a_gradient_and_out_may_be_unused():
    attn = ag.compile(SPEC)
    (q, k, v), captures = inputs(grad=True)
    _, lse = attn(q, k, v, **captures, return_lse=True)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    _, expected = ag.oracle(SPEC, q, k, v, **captures)
    (want,) = torch.autograd.grad(expected.sum(), q)
    torch.testing.assert_close(dq, want.float(), rtol=1e-4, atol=1e-5)

"""CPU calls of few query rows, and walks on plain integers: against the oracle, and against the same program on tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import attngen as ag
from attngen.analysis import facts
from attngen.backends.cpu import backward as cpu_backward
from attngen.backends.cpu import few, passes
from attngen.backends.cpu import forward as cpu_forward
from attngen.backends.cpu import tiles as cpu_tiles
from attngen.language.call import bind
from attngen.schedule.defaults import default_on_cpu
from tests.strategies import Case, cases

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(n_q: int, n_k: int, dtype: torch.dtype = torch.float32, kv: int = 2) -> list[torch.Tensor]:
    """q [2, 4, n_q, 16], k and v [2, kv, n_k, 16]."""
    generator = torch.Generator().manual_seed(n_q)
    shapes = [(2, 4, n_q, 16), (2, kv, n_k, 16), (2, kv, n_k, 16)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def agree(spec: ag.Spec, leaves: list[torch.Tensor], captures: dict[str, Any], q_offset: Any) -> None:
    """out, lse and the gradients of q, k, v against the oracle."""
    limit, results = LIMITS[leaves[0].dtype], []
    wide = [t.detach().double().requires_grad_() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]
    attn = ag.compile(spec, backend="cpu")
    for out, lse, x in (
        (*attn(*leaves, return_lse=True, q_offset=q_offset, **captures), leaves),
        (*ag.oracle(spec, *wide, q_offset=q_offset, **captures), wide),
    ):
        assert out.is_contiguous() and lse.is_contiguous()
        generator = torch.Generator().manual_seed(7)
        weight, bias = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (out, lse))
        loss = (out * weight).sum() + (torch.where(lse.isfinite(), lse, 0.0) * bias).sum()
        results.append([out, lse.nan_to_num(neginf=-1e3), *torch.autograd.grad(loss, x)])
    for got, want in zip(*results, strict=True):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-2)
        assert got.isfinite().all() and error <= 3 * limit, f"relative error {error.item():.1e}"


SPECS: dict[str, tuple[ag.Spec, dict[str, Any]]] = {
    "all": (ag.Spec(), {}),
    "causal": (ag.Spec(mask=ag.causal()), {}),
    "window": (ag.Spec(mask=ag.causal() & ag.window(ag.Param("width"))), {"width": 11}),
    "two runs": (ag.Spec(mask="i >= j and (i - j < 9 or j < 5)"), {}),
    "holes": (ag.Spec(mask="i >= j and (i + j) % 3 != 1"), {}),
    "by batch": (ag.Spec(mask="j < 20 + 9 * b and i >= j"), {}),
    "lengths": (ag.Spec(mask=lambda b, h, i, j: j < ag.Tensor("n", 1, torch.int32)[b]), {"n": torch.tensor([45, 13])}),
    "documents": (
        ag.Spec(mask=ag.documents(ag.Tensor("doc", 2, torch.int32))),
        {"doc": torch.arange(50).div(17, rounding_mode="floor").expand(2, -1)},
    ),
    "alibi": (ag.Spec(mask=ag.causal(), score=ag.alibi()), {"slope": torch.rand(4)}),
    "mask by head": (ag.Spec(mask="(i + j) % (h + 2) != 1"), {}),
    "bias": (ag.Spec(mask="j % 5 != 2", score=ag.bias("hj")), {"bias": torch.randn(4, 50)}),
    "undefined on masked pairs": (
        ag.Spec(mask=ag.causal(), score=lambda s, b, h, i, j: s - ag.log(i - j + 1)),
        {},
    ),
    "sink": (ag.Spec(mask=ag.causal(), sink=ag.sink()), {"sink": torch.randn(4)}),
}  # fmt: skip
OTHERS: dict[str, tuple[ag.Spec, dict[str, Any]]] = {
    "keys by head": (ag.Spec(mask="i - j >= 5 * h"), {}),
    "rows without a key": (ag.Spec(mask="i > j + 45"), {}),
    "soft cap": (ag.Spec(mask=ag.causal(), score=ag.soft_cap(5.0)), {}),
    "dropout": (ag.Spec(dropout=0.2), {"seed": 3}),
}


@pytest.mark.parametrize("offset", [42, torch.tensor([42, 30])], ids=["int", "tensor"])
@pytest.mark.parametrize("n_q", [1, 3, 8])
@pytest.mark.parametrize("name", SPECS)
def test_few_rows(name: str, n_q: int, offset: Any, monkeypatch: pytest.MonkeyPatch):
    """Forward and backward come from `few` alone."""
    for module, function in ((cpu_forward, "attend"), (cpu_backward, "differentiate")):
        monkeypatch.setattr(module, function, lambda *_: pytest.fail("not from few"))
    spec, captures = SPECS[name]
    agree(spec, inputs(n_q, 50), captures, offset)


@pytest.mark.parametrize("n_q", [1, 8])
@pytest.mark.parametrize("name", OTHERS)
def test_few_rows_of_others(name: str, n_q: int):
    """What `few` declines."""
    spec, captures = OTHERS[name]
    agree(spec, inputs(n_q, 50), captures, 42)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_few_rows_of_any_type_and_group(kv: int, dtype: torch.dtype):
    agree(SPECS["window"][0], inputs(5, 50, dtype, kv), {"width": 20}, 45)


def test_few_rows_of_any_strides():
    """A cache [B, N, H, D], and one whose head dim is not contiguous."""
    q, k, v = inputs(2, 50)
    cache = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    agree(SPECS["window"][0], [q, *cache], {"width": 20}, 48)
    agree(SPECS["causal"][0], [q, *(t.mT.contiguous().mT for t in (k, v))], {}, 48)


def test_few_rows_are_float32s_rounded_once():
    leaves = inputs(1, 50, torch.bfloat16)
    attn = ag.compile(ag.Spec(), backend="cpu")
    assert torch.equal(attn(*leaves), attn(*(t.float() for t in leaves)).to(torch.bfloat16))


def test_autocast_and_grad_mode_do_not_reach_inside():
    """The backend called as an executor calls it, with both switched on around it."""
    spec, leaves = ag.Spec(mask=ag.causal()), [t.requires_grad_() for t in inputs(3, 50)]
    call, known = bind(spec, *leaves, q_offset=47, captures={}), facts(spec)
    schedule, results = default_on_cpu(call, known), []
    for inside in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
        with inside():
            out, lse = passes.forward(call, known, schedule)
            do = torch.ones_like(out)
            delta = passes.delta(out, do, lse * 0)
            dq, dk, dv, _ = passes.backward(call, known, schedule, lse, delta, do, [])
        results.append([out, lse, dq, dk, dv])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("poisoned", [1, 2], ids=["k", "v"])
def test_few_rows_keep_poison_out(poisoned: int, poison: float):
    """In a key that the walk leaves out, and in a hole of the mask."""
    for spec, at in ((ag.Spec(mask=ag.causal() & ag.window(10)), 20), (ag.Spec(mask="i >= j and j % 4 != 1"), 45)):
        leaves = inputs(3, 50)
        leaves[poisoned][:, :, at] = poison
        leaves = [t.requires_grad_() for t in leaves]
        out, lse = ag.compile(spec, backend="cpu")(*leaves, q_offset=47, return_lse=True)
        want, want_lse = ag.oracle(spec, *(t.detach() for t in leaves), q_offset=47)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        assert all(g.isfinite().all() and not g[:, :, at].any() for g in grads[1:]) and grads[0].isfinite().all()


def test_keys_of_minus_infinity_are_no_keys():
    """Attended, but with logits of -inf: lse is -inf, where the fused operator says 0."""
    q, k, v = (t.abs() for t in inputs(1, 50))
    out, lse = ag.compile(ag.Spec(), backend="cpu")(q, torch.full_like(k, -torch.inf), v, return_lse=True)
    assert not out.any() and lse.isneginf().all()


def test_loads_out_of_range_are_found_in_few_rows_too():
    table = ag.Tensor("table", 1)
    spec = ag.Spec(mask=ag.causal() & ag.window(8), score=lambda s, b, h, i, j: s + table[i - j])
    attn = ag.compile(spec, backend="cpu")
    assert attn(*inputs(1, 50), table=torch.randn(8), q_offset=49).isfinite().all()
    with pytest.raises(ag.InputError, match=r"table: .*`i - j`.* 6"):
        attn(*inputs(1, 50), table=torch.randn(7), q_offset=49)


def runs_of(case: Case, block: int) -> tuple[bool, list[Any]]:
    """(whether on integers, the runs of all tiles)."""
    spec = case.spec()
    call = bind(spec, *case.inputs(), q_offset=case.q_offset, captures=case.captures(spec))
    keys = cpu_tiles.Keys(call, facts(spec), block, 256)
    batch, heads, n_q = call.q.shape[:3]
    places = [(b, h, tile) for b in range(batch) for h in range(heads) for tile in range(-(-n_q // block))]
    return keys.scalar is not None, [keys.visited, *(sorted(keys.runs(*place)) for place in places)]


@settings(max_examples=80)
@given(cases())
def test_integers_walk_as_tensors_do(case: Case):
    few_tiles = cpu_tiles.FEW_TILES
    try:
        cpu_tiles.FEW_TILES = 10**9
        _, integers = runs_of(case, 16)
        cpu_tiles.FEW_TILES = -1
        on_integers, tensors = runs_of(case, 16)
    finally:
        cpu_tiles.FEW_TILES = few_tiles
    assert not on_integers and integers[1:] == tensors[1:]


def test_a_walk_on_integers_is_taken_where_it_is_one():
    def scalar(spec: ag.Spec, **captures: Any) -> bool:
        call = bind(spec, *inputs(1, 50), captures=captures, q_offset=49)
        return cpu_tiles.Keys(call, facts(spec), 1, 256).scalar is not None

    assert scalar(SPECS["window"][0], width=3) and scalar(SPECS["lengths"][0], **SPECS["lengths"][1])
    assert not scalar(SPECS["documents"][0], **SPECS["documents"][1])  # needs a table


def test_the_fused_operator_is_used_here():
    assert few._has_fused()

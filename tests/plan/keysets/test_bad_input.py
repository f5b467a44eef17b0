"""Captures and plans that do not fit, for every key set: an InputError that names which, and nothing read out of bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attngen as ag
from tests.keys_cases import inputs
from tests.keys_work import CASES, case
from tests.plan.keysets import test_tiles as tiles

SIZE = (2, 2, 2, 130, 130, 0)
NAMES = [*(name for name in CASES if name not in ("hyper", "incremental, window", "union")), *tiles.GIVEN]


def made(name: str) -> tuple[Any, dict[str, Any]]:
    keys, captures = tiles.case(name, SIZE) if name in tiles.GIVEN else case(name, SIZE)
    if name == "gather":
        captures["log_weight"] = torch.zeros(captures["index"].shape)
    return ag.compile(ag.Spec(keys=keys, mask=ag.causal())), captures


def unfit(x: torch.Tensor) -> dict[str, Any]:
    """What is not such a tensor: another number of dimensions, another batch, head count, dtype or device."""
    found = {"none": None, "a list": x.tolist(), "one more": x.expand(1, *x.shape), "one less": x.flatten()}
    found |= {"heads": x[:, :1].expand(-1, 3, *x.shape[2:])} if x.dim() > 1 else {"one less": x[0]}
    found |= {"batch": x[:1].expand(3, *x.shape[1:])} if x.dim() > 1 else {}
    found |= {"kind": x.long() if x.is_floating_point() else x.double(), "device": x.to("meta")}
    found |= {"bool": x > 0} if x.dtype != torch.bool else {"int8": x.to(torch.int8)}
    return found | ({} if x.is_floating_point() or x.dtype == torch.bool else {"int16": x.to(torch.int16)})


@pytest.mark.parametrize("name", NAMES)
def test_captures_of_a_wrong_shape_dtype_or_device(name: str):
    attn, captures = made(name)
    q, k, v = inputs(SIZE)
    attn(q, k, v, **captures)
    for own, value in captures.items():
        for what, wrong in unfit(value).items():
            if what == "none" and own in ("log_weight", "layout"):
                continue  # may be left out; a layout's absence has a message of its own
            if what == "kind" and own == "count":
                continue  # may be a float
            with pytest.raises(ag.InputError) as error:
                attn(q, k, v, **{**captures, own: wrong})
            # Of two lists that have to fit each other the first that does not is named, or the pair.
            pair = {"crow": ("crow", "col"), "col": ("crow", "col"), "counts": ("counts", "indices")}
            pair |= {"indices": ("counts", "indices"), "index": ("index", "log_weight")}
            assert error.value.name in pair.get(own, (own,)), (own, what, str(error.value))


@pytest.mark.parametrize("name", NAMES)
def test_values_out_of_range(name: str, monkeypatch: pytest.MonkeyPatch):
    """Named with their place; with the checks turned off, no pass reads behind a tensor's end or makes numbers of nothing."""
    attn, captures = made(name)
    q, k, v = inputs(SIZE)
    q = q.requires_grad_()
    if name == "counts":
        captures["counts"][0, 0, 0] = 1  # what stands behind a row's count may be anything
    for own, value in captures.items():
        if value.dtype != torch.int64 or (own == "count" and name == "codebook"):
            continue
        for far in (-(2**40), -2, 2**20, 2**31 + 5, 2**40):
            wrong = value.clone()
            wrong[(0,) * wrong.dim()] = far
            monkeypatch.setenv("ATTNGEN_CHECK", "1")
            if far != 2**20 or own not in ("q_bucket", "k_bucket", "slash"):  # numbers of buckets, and distances
                with pytest.raises(ag.InputError, match=rf"{own}: expected .*got {far} at \[0"):
                    attn(q, k, v, **{**captures, own: wrong})
            monkeypatch.setenv("ATTNGEN_CHECK", "0")
            out = attn(q, k, v, **{**captures, own: wrong})
            (grad,) = torch.autograd.grad(out.sum(), q)
            assert out.isfinite().all() and grad.isfinite().all(), (own, far)


@pytest.mark.parametrize("name", [name for name in [*CASES, *tiles.GIVEN] if name != "codebook"])
def test_a_plan_made_for_other_sizes(name: str):
    keys, captures = tiles.case(name, SIZE) if name in tiles.GIVEN else case(name, SIZE)
    attn = ag.compile(ag.Spec(keys=keys, mask=None if name == "union" else ag.causal()))
    q, k, v = inputs(SIZE)
    plan = attn.plan(q, k, v, **captures)
    used = {own: value for own, value in captures.items() if own in keys.used}
    assert torch.equal(attn(q, k, v, plan=plan, **used), attn(q, k, v, **captures))
    for other in (
        (q[:, :, 1:], k, v),
        (q, k[:, :, 1:], v[:, :, 1:]),
        (q[:1], k[:1], v[:1]),
        (q[:, :2], k, v),
        (q, k[:, :1], v[:, :1]),
    ):
        with pytest.raises(ag.InputError, match=r"plan: expected a plan for \(B, Hq, Nq, Hkv, Nk"):
            attn(*other, plan=plan, **used)
    for other in (3, plan.values):
        with pytest.raises(ag.InputError, match=r"plan: expected what attn\.plan"):
            attn(q, k, v, plan=other, **used)


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize(
    ("score", "declared", "bad", "good", "says"),
    [
        ("s + slope[h] * (j - i)", ag.Tensor("slope", 1), (8,), (4,), "4 .or 1. along dimension 0, indexed by h"),
        ("s + row[j]", ag.Tensor("row", 1), (15,), (32,), "at least 32 .or 1. along dimension 0, indexed by j"),
        ("s + bit[b, i]", ag.Tensor("bit", 2), (3, 32), (2, 32), "2 .or 1. along dimension 0, indexed by b"),
        ("s + bit[b, i]", ag.Tensor("bit", 2), (2, 31), (1, 32), "at least 32"),
    ],
)
def test_captures_of_a_union_fit_the_call(
    backend: str, score: str, declared: Any, bad: tuple[int, ...], good: tuple[int, ...], says: str
):
    """And those of size 1 serve all batches and heads."""
    spec = ag.union(*(ag.Spec(mask=mask, score=score, tensors=[declared]) for mask in ("j < 10", "j >= 10")))
    attn = ag.compile(spec, backend=backend)
    q, k, v = torch.randn(2, 4, 32, 16), torch.randn(2, 2, 32, 16), torch.randn(2, 2, 32, 16)
    with pytest.raises(ag.InputError, match=says):
        attn(q, k, v, **{declared.name: torch.zeros(bad)})
    for size in (good, (1,) * len(good)):
        value = torch.randn(size, requires_grad=True)
        out, want = attn(q, k, v, **{declared.name: value}), ag.oracle(spec, q, k, v, **{declared.name: value})[0]
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
        got, right = (torch.autograd.grad(x.double().square().sum(), value)[0] for x in (out, want))
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


LINE = torch.arange(3).expand(1, 4, 3)
KEY_SETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qk_sparse": (
        ag.qk_sparse(),
        dict(keep_q=torch.ones(1, 4, 32, dtype=torch.bool), keep_k=torch.ones(1, 2, 32, dtype=torch.bool)),
    ),
    "hyper": (ag.hyper(8, 8, 16), dict(seed=3)),
    "gather": (ag.gather(), dict(index=torch.arange(32).expand(1, 4, 32))),
    "block_sparse": (ag.block_sparse((16, 16)), dict(layout=torch.ones(1, 1, 2, 2, dtype=torch.bool))),
    "vertical_slash": (ag.vertical_slash(), dict(vertical=LINE, slash=LINE)),
    "longformer": (ag.longformer(8, globals=2), {}),
}


@pytest.mark.parametrize("backend", ["cpu", "interpret"])
@pytest.mark.parametrize("name", KEY_SETS)
def test_indices_out_of_range_whatever_rows_a_key_set_moves(name: str, backend: str):
    keys, captures = KEY_SETS[name]
    spec = ag.Spec(keys=keys, score=lambda s, b, h, i, j: s + ag.Tensor("row", 1)[j + 5])
    attn = ag.compile(spec, backend=backend)
    q, k, v = (torch.randn(1, heads, 32, 16) for heads in (4, 2, 2))
    with pytest.raises(ag.InputError, match=r"row: expected .* its index 0, in 0 \.\. 35"):
        attn(q, k, v, row=torch.randn(36), **captures)
    assert attn(q, k, v, row=torch.randn(37), **captures).isfinite().all()

"""The design's error rules, for every backend test."""

from __future__ import annotations

from typing import Any

import torch

import attngen as ag
from attngen.reference.dense import plain

LIMITS = {"out": 1e-5, "lse": 1e-5, "gradient": 1e-4}


def check(
    spec: ag.Spec,
    attn: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: dict[str, Any],
    q_offset: Any = 0,
    backward: bool = True,
) -> float:
    """out, lse and every gradient against the oracle; the largest error over what is allowed.

    float32: relative Frobenius error of out and lse at most 1e-5, of gradients 1e-4. Half types: largest error at most twice
    (gradients three times) that of plain PyTorch in the same dtype on the same inputs, plus one rounding of the result.
    """
    leaves = {"q": q, "k": k, "v": v, **{n: t for n, t in captures.items() if _learned(t)}}
    # detach keeps the strides, which are part of what is tested
    leaves = {name: tensor.detach().requires_grad_(backward) for name, tensor in leaves.items()}
    others = {name: value for name, value in captures.items() if name not in leaves}
    generator = torch.Generator().manual_seed(5)
    runs: dict[str, list[torch.Tensor]] = {}
    half = q.dtype in (torch.float16, torch.bfloat16)
    functions = {"got": attn, "want": lambda *a, **c: ag.oracle(spec, *a, **_no_lse(c))}
    if half:
        functions["plain"] = lambda *a, **c: plain(spec, *a, **_no_lse(c))
    weights: list[torch.Tensor] = []
    for name, function in functions.items():
        given = {n: t for n, t in leaves.items() if n not in ("q", "k", "v")}
        out, lse = function(
            leaves["q"], leaves["k"], leaves["v"], return_lse=True, q_offset=q_offset, **given, **others
        )
        if not weights:
            assert out.dtype == q.dtype and lse.dtype in (torch.float32, torch.float64)
            weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in (out, lse)]
        runs[name] = [out, lse]
        if backward:
            seen = torch.where(lse.isfinite(), lse, 0.0)  # the gradient of an empty row's -inf is 0
            loss = (out.double() * weights[0].double()).sum() + (seen.double() * weights[1].double()).sum()
            if loss.requires_grad:  # the oracle of nothing at all is a constant
                runs[name] += torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            else:
                runs[name] += [None] * len(leaves)
    worst = 0.0
    for place, name in enumerate(["out", "lse", *(f"gradient of {n}" for n in leaves)][: len(runs["got"])]):
        got, want = runs["got"][place], runs["want"][place]
        if want is None:
            assert got is None or not got.any(), name
            continue
        if name == "lse":
            assert torch.equal(got.isneginf(), want.isneginf()), "rows without a key differ"
            got, want = (torch.where(want.isneginf(), 0.0, t.double()) for t in (got, want))
        if half and name != "lse":
            # One rounding of the exact result on top: on a handful of numbers plain PyTorch may be exact by chance.
            rounding = torch.finfo(got.dtype).eps / 2 * want.abs().max().item() if want.numel() else 0.0
            allowed = (2.0 if name == "out" else 3.0) * _largest(runs["plain"][place], want) + rounding
            error = _largest(got, want)
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
            worst = max(worst, error / allowed if allowed else 0.0)
            continue
        limit = LIMITS["gradient" if name.startswith("gradient") else name] * (1e3 if half else 1)
        error = relative(got, want)
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}\n{spec}"
        worst = max(worst, error / limit)
    return worst


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error; absolute where the expected value is (numerically) zero."""
    assert got.shape == want.shape
    difference, norm = (got.double() - want).norm().item(), want.norm().item()
    if got.numel() and not got.isfinite().all():
        return float("inf")
    return difference / norm if norm > 1e-6 else difference * 1e-2


def _largest(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - want).abs().max().item()
    return difference if difference == difference else float("inf")


def _learned(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _no_lse(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "return_lse"}

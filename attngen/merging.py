"""Merge finished attention results of disjoint key sets, differentiably: the one operation behind unions of pieces.

A result (out, lse) is a softmax state with o / l and m + log l written out (`attngen.state`). For disjoint sets

    lse = log sum_p exp(lse_p)        out = sum_p exp(lse_p - lse) * out_p

and lse is never detached: each piece's weights then are its share of the global softmax, in the backward too.
"""

from __future__ import annotations

from typing import Any

import torch

from attngen.errors import InputError

Result = tuple[torch.Tensor, torch.Tensor]


def merge(*results: Result) -> Result:
    """The attention over the union of disjoint key sets, from the (out, lse) of each.

    out [..., N, Dv] of one dtype, lse [..., N] in natural log, -inf for a row without a key (whose out is 0). Any number of
    results, in any order. Sums in lse's dtype (float32, or float64 for float64 inputs). Differentiable in every out and
    lse; a key that is in two sets counts twice. Raises InputError for shapes that do not fit together.
    """
    if not results:
        raise InputError("merge", "at least one (out, lse)", "none")
    for place, result in enumerate(results):
        if not (
            isinstance(result, (tuple, list)) and len(result) == 2 and all(isinstance(t, torch.Tensor) for t in result)
        ):
            raise InputError(f"merge: argument {place}", "a pair of tensors (out, lse)", type(result).__name__)
        out, lse = result
        if out.shape != results[0][0].shape or out.shape[:-1] != lse.shape:
            wanted = f"out {list(results[0][0].shape)} like the first, and lse without the last dimension"
            raise InputError(f"merge: argument {place}", wanted, f"out {list(out.shape)}, lse {list(lse.shape)}")
    if len(results) == 1:
        return results[0]
    return _Merge.apply(len(results), *(out for out, _ in results), *(lse for _, lse in results))


class _Merge(torch.autograd.Function):
    """d out_p = w_p * d_out and d lse_p = w_p * (d_lse + d_out . (out_p - out)), with w_p = exp(lse_p - lse)."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> Result:
        outs, lses = tensors[:count], tensors[count:]
        top = lses[0]
        for lse in lses[1:]:
            top = torch.maximum(top, lse)
        top = top.clamp(min=torch.finfo(top.dtype).min)  # all empty: -inf - -inf would be nan
        total = torch.zeros_like(top)
        for lse in lses:
            total += torch.exp(lse - top)
        merged = top + torch.log(total)
        base = _finite(merged)
        out = outs[0].to(top.dtype) * torch.exp(lses[0] - base).unsqueeze(-1)
        for piece, lse in zip(outs[1:], lses[1:], strict=True):
            out = out.addcmul_(piece.to(top.dtype), torch.exp(lse - base).unsqueeze(-1))
        ctx.count = count
        ctx.save_for_backward(*tensors, out, merged)
        return out.to(outs[0].dtype), merged

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_out, grad_lse = grads
        *tensors, out, merged = ctx.saved_tensors
        outs, lses = tensors[: ctx.count], tensors[ctx.count :]
        grad_out, base = grad_out.to(merged.dtype), _finite(merged)
        shared = grad_lse - (grad_out * out).sum(-1)
        for_outs, for_lses = [], []
        for piece, lse in zip(outs, lses, strict=True):
            weight = torch.exp(lse - base)
            for_outs.append((grad_out * weight.unsqueeze(-1)).to(piece.dtype))
            for_lses.append(weight * (shared + (grad_out * piece).sum(-1)))
        return None, *for_outs, *for_lses


def _finite(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse.isneginf(), 0.0)

"""Merge finished attention results of disjoint key sets: the one operation behind unions of pieces.

A result (out, lse) is a softmax state with o / l and m + log l written out (`attngen.plan.softmax`). For disjoint sets

    lse = log sum_p exp(lse_p)        out = sum_p w_p out_p,  w_p = exp(lse_p - m) / sum exp(lse_p - m),  m = max lse_p

so that weights sum to 1 wherever lse lies: exp(lse_p - lse) would not where lse is large and its last digit coarse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attngen.errors import InputError

Result = tuple[torch.Tensor, torch.Tensor]
RowPart = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # out, lse, and which rows it has (None: all)

CHUNK = 4096  # rows: on a CPU the pages of a large temporary cost more than the sums made in it


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
    outs, lses = zip(*results, strict=True)
    return _Merge.apply(len(outs), *outs, *lses)


def merge_parts(shape: Sequence[int], parts: Sequence[RowPart], sink: torch.Tensor | None = None) -> Result:
    """The same where a part may have some of the rows: their numbers among the B * H * N rows of `shape` = (B, H, N), int64
    without repeats, as many as the part has. sink: logits [B, H, N] of one more key of value 0. Not differentiable.
    """
    rows = shape[0] * shape[1] * shape[2]
    flat = [(out.reshape(rows if at is None else -1, out.shape[-1]), at) for out, _, at in parts]
    found = weigh([(lse.reshape(-1), at) for _, lse, at in parts], rows, sink)
    width, dtype = flat[0][0].shape[1], parts[0][0].dtype
    merged = torch.zeros((rows, width), dtype=found.lse.dtype, device=found.lse.device)
    for (out, at), weight in zip(flat, found.parts, strict=True):
        for part in _chunks(weight):
            own = out[part] * weight[part].unsqueeze(-1)
            if at is None:
                merged[part] += own
            else:
                merged.index_add_(0, at.reshape(-1)[part], own)
    return merged.to(dtype).view(*shape, width), found.lse.view(*shape)


class Weighed(NamedTuple):
    """The weights w_p of the parts, [rows of each]; the sink's [rows]; and lse of the whole [rows]."""

    parts: list[torch.Tensor]
    sink: torch.Tensor | None
    lse: torch.Tensor


def weigh(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]], rows: int, sink: torch.Tensor | None = None
) -> Weighed:
    """What a merge weighs its parts with: of each its lse [rows] and which rows these are, as in `merge_parts`."""
    first = parts[0][0]
    flat = [(lse, None if at is None else at.reshape(-1)) for lse, at in parts]
    own = None if sink is None else sink.reshape(-1).to(first.dtype)
    top = torch.full((rows,), -torch.inf, dtype=first.dtype, device=first.device)
    if own is not None:
        top = torch.maximum(top, own)
    for lse, at in flat:
        if at is None:
            torch.maximum(top, lse, out=top)
        else:
            top.index_copy_(0, at, torch.maximum(top.index_select(0, at), lse))
    base = torch.where(top == -torch.inf, 0.0, top)  # a row without a key: exp(-inf - 0) is 0
    sunk = None if own is None else torch.exp(own - base)
    total = torch.zeros_like(base) if sunk is None else sunk.clone()
    weights = []
    for lse, at in flat:
        weight = torch.exp(lse - (base if at is None else base.index_select(0, at)))
        weights.append(weight)
        total = total + weight if at is None else total.index_add(0, at, weight)
    norm = torch.where(total == 0, 1.0, total)
    shares = [
        weight / (norm if at is None else norm.index_select(0, at))
        for weight, (_, at) in zip(weights, flat, strict=True)
    ]
    lse = torch.where(total == 0, -torch.inf, base + torch.log(norm))
    return Weighed(shares, None if sunk is None else sunk / norm, lse)


class _Merge(torch.autograd.Function):
    """out = sum of w_p * out_p and lse = logsumexp of lse_p, with w = softmax of lse_p: d out_p = w_p * d_out and
    d lse_p = w_p * (d_lse + d_out . (out_p - out)); for tangents t, t_out = sum of w_p * (t_out_p + t_lse_p * (out_p - out)).
    """

    @staticmethod
    def forward(count: int, *tensors: torch.Tensor) -> Result:
        outs, lses = tensors[:count], tensors[count:]
        shape = (1, 1, lses[0].numel())
        out, lse = merge_parts(shape, [(o, l, None) for o, l in zip(outs, lses, strict=True)])
        out, lse = out.view(outs[0].shape), lse.view(lses[0].shape)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors, output[0])
        ctx.save_for_forward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        outs, lses, out = _saved(ctx)
        grad_out, grad_lse = grads
        real, weights = lses[0].dtype, _weights(lses)
        shared = grad_lse - (grad_out * out).sum(-1, dtype=real)
        for_outs = [(grad_out * w.unsqueeze(-1)).to(out.dtype) for w in weights]
        for_lses = [w * (shared + (grad_out * o).sum(-1, dtype=real)) for w, o in zip(weights, outs, strict=True)]
        return None, *for_outs, *for_lses

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor) -> Result:
        outs, lses, out = _saved(ctx)
        t_out, t_lse = torch.zeros_like(out, dtype=lses[0].dtype), torch.zeros_like(lses[0])
        parts = zip(_weights(lses), outs, tangents[: ctx.count], tangents[ctx.count :], strict=True)
        for weight, own, of_out, of_lse in parts:
            t_lse = t_lse + weight * of_lse
            t_out = t_out + weight.unsqueeze(-1) * (of_out + of_lse.unsqueeze(-1) * (own - out))
        return t_out.to(out.dtype), t_lse


def _saved(ctx: Any) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], torch.Tensor]:
    """The outs, the lses, and the merged out."""
    *tensors, out = ctx.saved_tensors
    return tensors[: ctx.count], tensors[ctx.count :], out


def _weights(lses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each set, its share of every row; 0 where none has a key."""
    weights = torch.softmax(torch.stack(list(lses)), 0)
    return torch.where(weights.isnan(), 0.0, weights)


def _chunks(rows: torch.Tensor) -> list[slice]:
    if rows.device.type != "cpu":
        return [slice(None)]
    return [slice(at, at + CHUNK) for at in range(0, rows.shape[0], CHUNK)]

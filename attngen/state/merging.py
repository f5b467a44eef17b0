"""Merge finished attention results of disjoint key sets, differentiably: the one operation behind unions of pieces.

A result (out, lse) is a softmax state with o / l and m + log l written out (`attngen.state.softmax`). For disjoint sets

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
    return merge_rows(results[0], *[(result, None) for result in results[1:]])


def merge_rows(base: Result, *pieces: tuple[Result, torch.Tensor | None]) -> Result:
    """`merge`, where a piece may have a part of the rows: those of `base` [..., N, Dv] whose numbers in all of its rows are
    in an int64 tensor without repeats, as many as the piece has; None for all.
    """
    outs, lses = zip(base, *(piece for piece, _ in pieces), strict=True)
    return _Merge.apply(len(outs), *outs, *lses, None, *(rows for _, rows in pieces))


class _Merge(torch.autograd.Function):
    """d out_p = w_p * d_out and d lse_p = w_p * (d_lse + d_out . (out_p - out)), with w_p = exp(lse_p - lse).

    On the CPU it goes by chunks of rows: the pages of a large temporary cost more than the sums made in it.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Result:
        outs, lses, rows = _flat(tensors[:count], tensors[count : 2 * count], tensors[2 * count :])
        merged = lses[0].clone()
        for lse, places in zip(lses[1:], rows[1:], strict=True):
            if places is None:
                merged = torch.logaddexp(merged, lse)
            else:
                merged[places] = torch.logaddexp(merged[places], lse)
        base = _finite(merged)
        out = torch.empty(
            outs[0].shape, dtype=merged.dtype, device=merged.device
        )  # half types are rounded once, at the end
        for part in _parts(merged):
            out[part] = outs[0][part] * torch.exp(lses[0][part] - base[part]).unsqueeze(-1)
        for piece, lse, places in zip(outs[1:], lses[1:], rows[1:], strict=True):
            for part in _parts(lse):
                at = part if places is None else places[part]
                out[at] += piece[part] * torch.exp(lse[part] - base[at]).unsqueeze(-1)
        out, merged = out.to(outs[0].dtype).view(tensors[0].shape), merged.view(tensors[count].shape)
        ctx.count = count
        ctx.save_for_backward(*tensors, out, merged)
        return out, merged

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        *tensors, out, merged = ctx.saved_tensors
        outs, lses, rows = _flat(tensors[: ctx.count], tensors[ctx.count : 2 * ctx.count], tensors[2 * ctx.count :])
        out, merged, grad_out, grad_lse = (
            out.view(outs[0].shape),
            merged.view(-1),
            grads[0].reshape(outs[0].shape),
            grads[1].reshape(-1),
        )
        base, shared = _finite(merged), torch.empty_like(merged)
        for part in _parts(merged):
            shared[part] = grad_lse[part] - (grad_out[part] * out[part]).sum(-1, dtype=merged.dtype)
        for_outs, for_lses = [torch.empty_like(x) for x in outs], [torch.empty_like(x) for x in lses]
        for number, (piece, lse, places) in enumerate(zip(outs, lses, rows, strict=True)):
            for part in _parts(lse):
                at = part if places is None else places[part]
                grad, weight = grad_out[at], torch.exp(lse[part] - base[at])
                for_outs[number][part] = grad * weight.unsqueeze(-1)
                for_lses[number][part] = weight * (shared[at] + (grad * piece[part]).sum(-1, dtype=merged.dtype))
        shaped = [grad.view(x.shape) for grad, x in zip((*for_outs, *for_lses), tensors, strict=False)]
        return None, *shaped, *(None for _ in rows)


CHUNK = 4096  # rows


def _flat(outs: Any, lses: Any, rows: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Any]]:
    return (
        [x.reshape(-1, x.shape[-1]) for x in outs],
        [x.reshape(-1) for x in lses],
        [r if r is None else r.reshape(-1) for r in rows],
    )


def _parts(lse: torch.Tensor) -> list[slice]:
    size = CHUNK if lse.device.type == "cpu" else max(1, len(lse))
    return [slice(start, start + size) for start in range(0, len(lse), size)]


def _finite(lse: torch.Tensor) -> torch.Tensor:
    return lse.masked_fill(lse.isneginf(), 0.0)

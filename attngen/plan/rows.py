"""Moving rows: gather by index, scatter back, both with a backward that is the other one."""

from __future__ import annotations

from typing import Any

import torch

from attngen.plan.memory import full


def take(x: torch.Tensor, index: torch.Tensor, unique: bool = True) -> torch.Tensor:
    """x [B, H, N, D], index int64 [B, H, n] in 0 .. N - 1 -> [B, H, n, D]. `unique`: no (b, h) takes a row twice."""
    flat = _flat(index, x.shape[2])
    rows = _Take.apply(x.reshape(-1, x.shape[3]), flat.reshape(-1), unique)
    return rows.view(*index.shape, x.shape[3])


def take_flat(x: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [B, H, N, D], each flat int64 [B', H', n] row numbers in all of x's B * H * N -> for each [B', H', n, D]. Rows may be
    taken several times.
    """
    taken = _TakeAll.apply(x.reshape(-1, x.shape[3]), *(index.reshape(-1) for index in flat))
    return tuple(rows.view(*index.shape, x.shape[3]) for rows, index in zip(taken, flat, strict=True))


def put(out: torch.Tensor, lse: torch.Tensor, index: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows back to their places: out [B, H, n, Dv], lse [B, H, n], index [B, H, n] without repeats -> out [B, H, length, Dv]
    and lse [B, H, length]; rows that nobody fills have out 0 and lse -inf.
    """
    shape, places = (*index.shape[:2], length), _flat(index, length).reshape(-1)
    total = shape[0] * shape[1] * length
    out = _Put.apply(out.reshape(-1, out.shape[-1]), places, total, 0.0).view(*shape, out.shape[-1])
    lse = _Put.apply(lse.reshape(-1, 1), places, total, -torch.inf).view(shape)
    return out, lse


def flat_rows(index: torch.Tensor, length: int) -> torch.Tensor:
    """Row numbers in all of [B, H, length, *] for index [B, H, ...] within each (b, h)."""
    return _flat(index, length)


def _flat(index: torch.Tensor, length: int) -> torch.Tensor:
    batch, heads = index.shape[:2]
    base = torch.arange(batch * heads, device=index.device) * length
    return index + base.view(batch, heads, *(1 for _ in index.shape[2:]))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flat: torch.Tensor, unique: bool) -> torch.Tensor:
        ctx.save_for_backward(flat)
        ctx.rows, ctx.unique = x.shape[0], unique
        return x.index_select(0, flat)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,), (flat,) = grads, ctx.saved_tensors
        shape = (ctx.rows, grad.shape[1])
        if ctx.unique:
            every = len(flat) == ctx.rows  # a permutation: nothing is left to zero
            total = full(grad, shape, None if every else 0.0)
            return total.index_copy_(0, flat, grad), None, None
        total = full(grad, shape, 0.0)
        _add_rows(total, flat, grad)
        return total, None, None


class _TakeAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*flat)
        ctx.shape = x.shape
        return tuple(x.index_select(0, index) for index in flat)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        total = full(grads[0], ctx.shape, 0.0)
        for index, grad in zip(ctx.saved_tensors, grads, strict=True):
            _add_rows(total, index, grad)
        return total, *(None for _ in grads)


def _add_rows(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """total[index] += rows, the same sum every time."""
    if total.is_cuda:  # sorts instead of atomics
        total.index_put_((index,), rows, accumulate=True)
    else:  # a third of the time of index_add_
        total.scatter_add_(0, index.unsqueeze(-1).expand_as(rows), rows)


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flat: torch.Tensor, rows: int, fill: float) -> torch.Tensor:
        ctx.save_for_backward(flat)
        shape = (rows, x.shape[1])
        result = full(x, shape, None if len(flat) == rows else fill)
        return result.index_copy_(0, flat, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None, None

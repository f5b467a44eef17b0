"""Moving rows: gather by index, scatter back, both with a backward that is the other one."""

from __future__ import annotations

from typing import Any

import torch


def take(x: torch.Tensor, index: torch.Tensor, unique: bool = True) -> torch.Tensor:
    """x [B, H, N, D], index int64 [B, H, n] in 0 .. N - 1 -> [B, H, n, D]. `unique`: no (b, h) takes a row twice."""
    flat = _flat(index, x.shape[2])
    rows = _Take.apply(x.reshape(-1, x.shape[3]), flat.reshape(-1), unique)
    return rows.view(*index.shape, x.shape[3])


def take_flat(x: torch.Tensor, flat: torch.Tensor, unique: bool = True) -> torch.Tensor:
    """x [B, H, N, D], flat int64 [B', H', n] row numbers in all of x's B * H * N -> [B', H', n, D]."""
    return _Take.apply(x.reshape(-1, x.shape[3]), flat.reshape(-1), unique).view(*flat.shape, x.shape[3])


def put(out: torch.Tensor, lse: torch.Tensor, index: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows back to their places: out [B, H, n, Dv], lse [B, H, n], index [B, H, n] without repeats -> out [B, H, length, Dv]
    and lse [B, H, length]; rows that nobody fills have out 0 and lse -inf.
    """
    shape = (*index.shape[:2], length)
    return put_flat(out, lse, _flat(index, length), shape)


def put_flat(
    out: torch.Tensor, lse: torch.Tensor, flat: torch.Tensor, shape: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with row numbers in all of B * H * length, `shape` being (B, H, length)."""
    total, places = shape[0] * shape[1] * shape[2], flat.reshape(-1)
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
        total = grad.new_zeros((ctx.rows, grad.shape[1]))
        if ctx.unique:
            return total.index_copy_(0, flat, grad), None, None
        if grad.is_cuda:  # sorts instead of atomics: the same sum every time
            return total.index_put_((flat,), grad, accumulate=True), None, None
        return total.index_add_(0, flat, grad), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flat: torch.Tensor, rows: int, fill: float) -> torch.Tensor:
        ctx.save_for_backward(flat)
        return x.new_full((rows, x.shape[1]), fill).index_copy_(0, flat, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None, None

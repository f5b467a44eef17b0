"""SPARSEK (arXiv 2406.16747): each query attends (softly) k keys that learned scores choose, and a window. Causal, forward and
backward, against dense attention on this machine as the length doubles. The scores come from a linear layer, which learns:
out and the gradient of its weight are compared with the definition in float64.

    python examples/sparse_k.py [--n 1024 2048 4096 8192]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from verdict import GRADIENT, here, verdict

import attngen as ag

Tensors = list[torch.Tensor]


def timed(run: Callable[[], torch.Tensor], leaves: Tensors, d_out: torch.Tensor) -> tuple[torch.Tensor, Tensors, float]:
    """out, the gradients, and seconds of forward and backward, the better of two."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        out = run()
        grads = torch.autograd.grad(out, leaves, d_out)
        if out.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return out.detach(), list(grads), min(times)


def defined(qkv: Tensors, u: torch.Tensor, i: torch.Tensor, chosen: int, near: int, every: bool) -> torch.Tensor:
    """Rows i of q, from the definition: p = clip(u - tau, 0, 1) with sum p = chosen over all keys, or for every query over those
    up to it; keys nearer than `near` as they are.
    """
    q, k, v = qkv
    far = i[:, None] - torch.arange(k.shape[2], device=i.device)
    u = torch.where((far >= 0) | (not every), u.unsqueeze(2), -torch.inf)
    low, high = torch.full_like(u[..., :1], -1e3), torch.full_like(u[..., :1], 1e3)
    for _ in range(60):  # tau by bisection; its gradient is from the keys that are chosen in part
        tau = (low + high).detach() / 2
        more = (u.detach() - tau).clamp(0, 1).sum(-1, keepdim=True) >= chosen
        low, high = torch.where(more, tau, low), torch.where(more, high, tau)
    part = (u > tau) & (u < tau + 1)
    mean = torch.where(part, u, 0.0).sum(-1, keepdim=True) / part.sum(-1, keepdim=True).clamp(min=1)
    p = torch.where(far < near, 1.0, (u - (tau + mean - mean.detach())).clamp(0, 1))
    logits = torch.where((far >= 0) & (p > 0), p * (q[:, :, i] @ k.mT) / q.shape[3] ** 0.5, -torch.inf)
    return (torch.softmax(logits, -1) * p) @ v


def main(lengths: list[int], k: int, window: int, capacity: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = ag.compile(ag.Spec(keys=ag.sparse_k(k, window, incremental=True, capacity=capacity), mask=ag.causal()))
    once = ag.compile(ag.Spec(keys=ag.sparse_k(k, window), mask=ag.causal()))
    print(f"k {k}, window {window}, B1 H4 D64 float32 on {device}, forward + backward")
    found: list[float] = []
    slower = {}
    for n in lengths:
        torch.manual_seed(0)
        q, key, v = leaves = [torch.randn(1, 4, n, 64, device=device, requires_grad=True) for _ in range(3)]
        x, weight = torch.randn(n, 64, device=device), (torch.randn(4, 64, device=device) / 2).requires_grad_()
        rows = torch.linspace(0, n - 1, 32, device=device).long().unique()  # those that the definition is for
        d_out = torch.zeros_like(q)
        d_out[:, :, rows] = torch.randn(1, 4, len(rows), 64, device=device)
        _, _, dense = timed(lambda: F.scaled_dot_product_attention(q, key, v, is_causal=True), leaves, d_out)  # noqa: B023
        print(f"  N {n:6}: dense causal {dense * 1e3:8.1f} ms")
        for name, attn in (("chosen once", once), ("chosen for every query", every)):
            u = (weight @ x.mT)[None].detach().double().requires_grad_()
            want = defined([t.detach().double() for t in leaves], u, rows, k, window, attn is every)
            (d_u,) = torch.autograd.grad(want, u, d_out[:, :, rows].double())
            out, grads, taken = timed(lambda: attn(q, key, v, u=(weight @ x.mT)[None]), [*leaves, weight], d_out)  # noqa: B023
            errors = [(a - b).norm() / b.norm() for a, b in ((out[:, :, rows], want), (grads[-1], d_u[0] @ x.double()))]
            found += [error.item() for error in errors]
            slower[name] = taken / dense
            print(f"    {name:22} {taken * 1e3:8.1f} ms, {dense / taken:5.2f}x", end="")
            print(f"; errors: out {errors[0]:.1e}, gradient of the layer's weight {errors[1]:.1e}")
    verdict(
        "matches SPARSEK's definition, the gradient of the learned scores included",
        max(found),
        GRADIENT,
        f"about {n / (2 * (k + window)):.1f}x fewer pairs at N {n}",
        *(f"{name}: {times:.2f}x SDPA's time on {here()}" for name, times in slower.items()),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="lengths")
    for option, value in (("k", 128), ("window", 128), ("capacity", 256)):
        parser.add_argument(f"--{option}", type=int, default=value)
    args = parser.parse_args()
    main(args.n, args.k, args.window, args.capacity)

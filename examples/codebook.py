"""LongVQ (arXiv 2404.11163): keys quantised to S codewords, each with the mean of its tokens' values and their count, against
dense attention on this machine, forward and backward (to q, k and v, through the means). Attention over the codewords is
exact attention over the quantised keys: the error against that, and against the keys themselves, which falls with S.

    python examples/codebook.py [--n 8192]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from verdict import GRADIENT, here, verdict

import attngen as ag


def timed(run: Any, leaves: list[torch.Tensor], rounds: int = 2) -> tuple[list[torch.Tensor], float]:
    """out and the gradients of its squares' sum; seconds, the best of `rounds`."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = run(*leaves)
        results = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
        if out.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return results, min(times)


def quantise(k: torch.Tensor, size: int, rounds: int = 5) -> torch.Tensor:
    """The codeword [B, H, N] of each key, by k-means."""
    code = k[:, :, torch.linspace(0, k.shape[2] - 1, size).long()]
    for _ in range(rounds):
        label = torch.cdist(k, code).argmin(-1)
        code, _ = means(k, label, size)
    return label


def means(x: torch.Tensor, label: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean row of each codeword [B, H, S, D], and how many rows it has [B, H, S]."""
    count = torch.zeros(*label.shape[:2], size, device=x.device, dtype=torch.int64)
    count = count.scatter_add(-1, label, torch.ones_like(label))
    total = x.new_zeros(*count.shape, x.shape[3]).scatter_add(2, label.unsqueeze(-1).expand_as(x), x)
    return total / count.clamp(min=1).unsqueeze(-1), count


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest, relative to the norm, of out and gradients."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True))


def main(n: int, sizes: list[int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attn = ag.compile(ag.Spec(keys=ag.codebook()))
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, n, 64, device=device)
    centers = 2 * torch.randn(1, 4, 64, 64, device=device)
    k = k / 8 + centers[:, :, torch.randint(0, 64, (n,), device=device)]  # tokens of 64 sorts
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want, dense = timed(F.scaled_dot_product_attention, leaves)
    print(f"dense, N {n}, B1 H4 D64 float32, {device}, forward + backward: {dense * 1e3:.1f} ms")
    errors = []
    for size in sizes:
        start = time.perf_counter()
        label = quantise(k.detach(), size)
        quantised = time.perf_counter() - start

        def coded(q: Any, k: Any, v: Any) -> torch.Tensor:
            (key, count), (value, _) = (means(x, label, size) for x in (k, v))  # noqa: B023
            return attn(q, key, value, count=count)

        def exact(q: Any, k: Any, v: Any) -> torch.Tensor:
            rows = label.unsqueeze(-1).expand_as(k)  # noqa: B023
            return F.scaled_dot_product_attention(q, means(k, label, size)[0].gather(2, rows), v)  # noqa: B023

        got, taken = timed(coded, leaves)
        over, _ = timed(exact, [x.detach().double().requires_grad_() for x in leaves], 1)
        print(
            f"  S {size:5}: {taken * 1e3:7.1f} ms, {dense / taken:5.1f}x, and {quantised * 1e3:7.1f} ms to quantise; ",
            end="",
        )
        errors.append(error(got, over))
        print(f"error to the quantised keys {errors[-1]:.1e}, to the keys {error(got[:1], want[:1]):.1e}")
    verdict(
        "matches dense attention to the quantised keys, gradients included",
        max(errors),
        GRADIENT,
        f"{n / sizes[-1]:.1f}x fewer pairs with {sizes[-1]} codewords",
        f"{taken / dense:.2f}x SDPA's time on {here()}, and {quantised / dense:.2f}x to quantise",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="length")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64, 256, 1024], help="codewords")
    args = parser.parse_args()
    main(args.n, args.sizes)

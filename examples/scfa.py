"""Sparse causal flash attention (arXiv 2306.01160): dropping queries and keys, and attention inside hash buckets, against
dense causal attention on this machine. Forward and backward, with sorting, gathering and scattering.

    python examples/scfa.py [--n 8192]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from verdict import FLOAT32, here, relative, timed, verdict

import attngen as ag


def training(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> float:
    """Seconds of forward and backward, the better of two."""
    return timed(lambda: torch.autograd.grad(run().sum(), leaves), 2)[1]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Dense causal attention in float64 to the pairs that are seen; 0 where there are none."""
    seen = seen & torch.ones_like(seen).tril()
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)
    return torch.where(seen.any(-1, keepdim=True), out, 0.0)


def main(n: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = leaves = [torch.randn(1, 8, n, 64, device=device, requires_grad=True) for _ in range(3)]
    dense = training(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves)
    print(f"dense causal, N {n}, B1 H8 D64, {device}: {dense:.3f} s")

    dropping = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()))
    for dropped in (0.3, 0.5, 0.7, 0.8):
        keep_q, keep_k = (torch.rand(1, 8, n, device=device) >= dropped for _ in range(2))
        taken = training(lambda q_=keep_q, k_=keep_k: dropping(q, k, v, keep_q=q_, keep_k=k_), leaves)
        print(f"  {dropped:.0%} of queries and keys dropped: {taken:.3f} s, {dense / taken:.1f}x")

    hashing = ag.compile(ag.Spec(keys=ag.hash_sparse(), mask=ag.causal()))
    for buckets in (4, 8, 16, 32):

        def run(buckets: int = buckets) -> torch.Tensor:
            q_bucket, k_bucket = ag.lsh_buckets(q, k, buckets)
            return hashing(q, k, v, q_bucket=q_bucket, k_bucket=k_bucket)

        taken = training(run, leaves)
        print(f"  {buckets} hash buckets: {taken:.3f} s, {dense / taken:.1f}x")

    # From the definition, over the first rows.
    few = [x.detach()[:, :, :512] for x in leaves]
    keep_q, keep_k = (keep[:, :, :512] for keep in (keep_q, keep_k))
    q_bucket, k_bucket = ag.lsh_buckets(*few[:2], buckets)
    kept = keep_q.unsqueeze(3) & keep_k.unsqueeze(2)
    alike = q_bucket.unsqueeze(3) == k_bucket.unsqueeze(2)
    errors = [
        relative(dropping(*few, keep_q=keep_q, keep_k=keep_k), exact(*few, kept)),
        relative(hashing(*few, q_bucket=q_bucket, k_bucket=k_bucket), exact(*few, alike)),
    ]
    verdict(
        "matches dense attention to the pairs that are kept, or in one bucket",
        max(errors),
        FLOAT32,
        f"{1 / kept.double().mean().item():.1f}x fewer pairs with {dropped:.0%} dropped",
        f"{taken / dense:.2f}x SDPA's time with {buckets} buckets on {here()}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=8192, help="length")
    main(parser.parse_args().n)

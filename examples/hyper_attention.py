"""HyperAttention (arXiv 2310.05869) against exact causal attention on this machine: time of forward and backward, and the
error, on random inputs (which have nothing for the hash to find) and on clustered ones (which do).

    python examples/hyper_attention.py [--n 16384]
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from verdict import FLOAT32, relative, verdict

import attngen as ag


def timed(run: object, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The result, and seconds of forward and backward."""
    start = time.perf_counter()
    out = run()  # type: ignore[operator]
    torch.autograd.grad(out.sum(), leaves)
    if out.is_cuda:
        torch.cuda.synchronize()
    return out.detach(), time.perf_counter() - start


def main(n: int, block: int, samples: int, min_len: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    attn = ag.compile(ag.Spec(keys=ag.hyper(block, samples, min_len), mask=ag.causal()))
    print(attn.spec)
    figures = []
    for name in ("random", "clustered"):
        q, k, v = (torch.randn(1, 8, n, 64, device=device) for _ in range(3))
        if name == "clustered":
            centers = 4 * F.normalize(torch.randn(64, 64, device=device), dim=-1)
            label = torch.randint(0, 64, (1, 8, n), device=device)
            q, k, v = 2 * centers[label] + 0.3 * q, centers[label] + 0.3 * k, centers[label] + v
        leaves = [x.requires_grad_() for x in (q, k, v)]
        exact, dense = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves)  # noqa: B023
        attn(q, k, v, seed=0)  # the first call analyses and compiles
        out, taken = timed(lambda: attn(q, k, v, seed=1), leaves)  # noqa: B023
        error = (out - exact).norm() / exact.norm()
        print(
            f"{name} inputs, N {n}, B1 H8 D64, {device}: exact {dense:.3f} s, HyperAttention {taken:.3f} s: {dense / taken:.1f}x"
        )
        print(f"  relative error {error:.3f}")
        figures.append(f"{error:.3f} off exact attention on {name} inputs, in {taken / dense:.2f}x SDPA's time")
    # The estimate is one; its definition, with the same buckets and samples, is met. Few rows, so that it is quick.
    small = ag.compile(ag.Spec(keys=ag.hyper(32, 32, 64), mask=ag.causal()))
    few = [x.detach()[:, :, :512] for x in (q, k, v)]
    want, _ = ag.oracle(small.spec, *few, seed=1)
    verdict("matches HyperAttention's definition", relative(small(*few, seed=1), want), FLOAT32, *figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("n", 16384), ("block", 256), ("samples", 256), ("min_len", 4096)):
        parser.add_argument(f"--{option}", type=int, default=value)
    main(**vars(parser.parse_args()))

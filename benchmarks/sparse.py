"""Sparse key sets on the CPU against dense causal SDPA: forward and backward, preparation included.

    python -m benchmarks.sparse                          all figures at N 16384, B1 H8 D64 float32
    python -m benchmarks.sparse --only hyper --n 65536   one, at another length
    python -m benchmarks.sparse --shares                 time against the live share of QK-sparse

The candidates run in turn, in one process. Targets are those for N 16384 (HyperAttention also has one for 65536).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import Line, save
from benchmarks.timing import interleaved, ratio

HEADS, HEAD_DIM, BUCKETS = 8, 64, 16
TARGETS = {"qk 50%": 2.5, "qk 30%": 6.0, "hash": 5.0, "hyper": 2.0}


def candidates(n: int, leaves: list[torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    """Forward calls by name; what a call needs besides q, k, v is part of it, except for the masks of what to keep."""
    import attngen as ag

    kept = ag.compile(ag.Spec(keys=ag.qk_sparse(), mask=ag.causal()))
    hashed = ag.compile(ag.Spec(keys=ag.hash_sparse(BUCKETS), mask=ag.causal()))
    hyper = ag.compile(ag.Spec(keys=ag.hyper(256, 256, 4096), mask=ag.causal()))
    q, k, v = leaves

    def qk(share: float) -> Callable[[], torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        keep_q, keep_k = (torch.rand(1, HEADS, n, generator=generator) < share for _ in range(2))
        return lambda: kept(q, k, v, keep_q=keep_q, keep_k=keep_k)

    def by_hash() -> torch.Tensor:
        q_bucket, k_bucket = ag.lsh_buckets(q, k, BUCKETS)
        return hashed(q, k, v, q_bucket=q_bucket, k_bucket=k_bucket)

    return {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "qk 50%": qk(0.5),
        "qk 30%": qk(0.3),
        "hash": by_hash,
        "hyper": lambda: hyper(q, k, v, seed=0),
        "qk 10%": qk(0.1),
        "qk 5%": qk(0.05),
    }


def measure(n: int, names: list[str], rounds: int) -> dict[str, Any]:
    """Timings of forward and backward, interleaved."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, HEADS, n, HEAD_DIM, generator=generator).requires_grad_() for _ in range(3)]
    seed = torch.randn(1, HEADS, n, HEAD_DIM, generator=generator)
    found = candidates(n, leaves)

    def both(run: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), leaves, seed)

    return interleaved({name: both(found[name]) for name in names}, rounds, warmup=1)


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; 1 if one misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="FIGURE", help=f"some of: {', '.join(TARGETS)}")
    parser.add_argument("--n", type=int, default=16384, help="length (default 16384)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each candidate (default 3)")
    parser.add_argument("--shares", action="store_true", help="QK-sparse at 50%% to 5%%, time per live pair")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--markdown", help="write a table to this file")
    given = parser.parse_args(arguments)
    lines: list[Line] = []
    if given.shares:
        shares = {"qk 50%": 0.5, "qk 30%": 0.3, "qk 10%": 0.1, "qk 5%": 0.05}
        timings = measure(given.n, list(shares), given.rounds)
        base = timings["qk 50%"].median / shares["qk 50%"] ** 2
        for name, share in shares.items():
            figure = timings[name].median / share**2 / base
            measured = {name: asdict(timings[name])}
            lines.append(
                Line(f"{name}: time per live pair over that at 50%, N {given.n}", figure, "x", 1.25, False, measured)
            )
    else:
        names = given.only or list(TARGETS)
        timings = measure(given.n, ["dense", *names], given.rounds)
        for name in names:
            target = 6.0 if name == "hyper" and given.n >= 65536 else TARGETS[name]
            measured = {x: asdict(timings[x]) for x in ("dense", name)}
            what = f"{name}, forward + backward, N {given.n}: against dense causal SDPA"
            lines.append(Line(what, ratio(timings, name, "dense"), "x", target, True, measured))
    for line in lines:
        print(line)
        for what, value in line.measured.items():
            print(f"    {what}: {value['median']:.2f} s ({value['best']:.2f} at best)")
    save(lines, given.json, given.markdown)
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
